// The C++ API: what it computes, against dense attention in ATen; that generators govern dropout; that results repeat.
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/linear.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "api_cases.h"

namespace {

using namespace testing_wmha;

/// (output, logsumexp) by dense attention: the definition in the header, word by word.
std::tuple<Tensor, Tensor> dense(
    const Tensor& query,
    const Tensor& key,
    const Tensor& value,
    const AttentionOptions& o) {
  const int64_t heads = query.size(1), queries = query.size(2), keys = key.size(2);
  const int64_t group = heads / key.size(1);
  const Tensor k = key.repeat_interleave(group, 1), v = value.repeat_interleave(group, 1);
  Tensor scores = query.matmul(k.transpose(-2, -1)) * o.scale_.value_or(1 / std::sqrt(double(query.size(3))));
  if (o.softcap_ > 0) scores = o.softcap_ * (scores / o.softcap_).tanh();
  scores = o.temperature_tensor_ ? scores / o.temperature_tensor_->view({1, -1, 1, 1}) : scores / o.temperature_;

  const auto offset = o.query_offset_.value_or(keys - queries).expect_int();
  const auto left = o.window_left_.expect_int(), right = o.window_right_.expect_int();
  const Tensor distance = at::arange(keys) - (at::arange(queries) + offset).unsqueeze(1); // j - p(i)
  Tensor hidden = distance != distance;                                                   // nothing
  if (left >= 0) hidden = hidden.logical_or(distance < -left);
  if (right >= 0) hidden = hidden.logical_or(distance > right);
  scores = scores.masked_fill(hidden, -std::numeric_limits<double>::infinity());
  const Tensor blind = hidden.all(-1, /*keepdim=*/true);
  return {scores.softmax(-1).masked_fill(blind, 0).matmul(v), scores.logsumexp(-1)};
}

// ---- What it computes ----

TEST(Api, AgreesWithDenseAttention) {
  const Inputs in;
  for (const auto& [name, options] : all_options()) {
    SCOPED_TRACE(name);
    const auto [expected, expected_lse] = dense(in.query, in.key, in.value, options);
    const auto [output, lse] = wmha::attention_with_lse(in.query, in.key, in.value, options);
    EXPECT_LT(difference(output, expected), 1e-13);
    EXPECT_LT(difference(lse, expected_lse), 1e-13);
    EXPECT_TRUE(wmha::attention(in.query, in.key, in.value, options).equal(output));
    const Tensor weights = wmha::attention_weights(in.query, in.key, options);
    EXPECT_LT(difference(weights.matmul(in.value.repeat_interleave(2, 1)), expected), 1e-13);
  }
}

TEST(Api, LaysItsOutputOutAsTheQueryIs) {
  const Tensor query = random({2, 9, 4, 5}).transpose(1, 2); // (B, N, H, D) in memory
  const Inputs in;
  const Tensor output = wmha::attention(query, in.key, in.value);
  EXPECT_TRUE(output.transpose(1, 2).is_contiguous());
  EXPECT_TRUE(output.equal(wmha::attention(query.contiguous(), in.key, in.value)));
  EXPECT_TRUE(wmha::attention(in.query, in.key, in.value).is_contiguous());
}

TEST(Api, TakesAnyStrides) {
  const Tensor packed = random({2, 9, 3, 4, 5}); // one projection: (B, N, qkv, H, D)
  const auto part = [&](int64_t i) { return packed.select(2, i).transpose(1, 2); };
  const Tensor expected = wmha::attention(part(0).contiguous(), part(1).contiguous(), part(2).contiguous());
  EXPECT_EQ(difference(wmha::attention(part(0), part(1), part(2)), expected), 0);
  const auto features_apart = [&](int64_t i) { return part(i).transpose(2, 3).contiguous().transpose(2, 3); };
  EXPECT_EQ(difference(wmha::attention(features_apart(0), features_apart(1), features_apart(2)), expected), 0);
  const Tensor one = random({1, 1, 9, 5}).expand({2, 4, 9, 5});
  EXPECT_EQ(
      difference(wmha::attention(one, one, one), wmha::attention(one.contiguous(), one.contiguous(), one.contiguous())),
      0);
}

TEST(Api, GivesLogsumexpInTheTypeOfTheArithmetic) {
  const Inputs in;
  for (const auto& [dtype, acc] :
       {std::pair{at::kDouble, at::kDouble},
        {at::kFloat, at::kFloat},
        {at::kBFloat16, at::kFloat},
        {at::kHalf, at::kFloat}}) {
    const auto [output, lse] = wmha::attention_with_lse(in.query.to(dtype), in.key.to(dtype), in.value.to(dtype));
    EXPECT_EQ(output.scalar_type(), dtype);
    EXPECT_EQ(lse.scalar_type(), acc);
    EXPECT_LT(difference(output.to(at::kDouble), std::get<0>(dense(in.query, in.key, in.value, {}))), 0.05);
  }
}

TEST(Api, MultiHeadAttentionIsProjectionsAroundAttention) {
  Projections p;
  const auto options = AttentionOptions().window(4, 1).temperature(random({4}, 16).abs() + 0.5);
  for (const bool biases : {true, false}) {
    if (!biases) p.weights = {p.weights.q_weight, p.weights.k_weight, p.weights.v_weight, p.weights.out_weight};
    const auto project = [](const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t heads) {
      return at::linear(x, weight, bias).unflatten(-1, {heads, -1}).transpose(1, 2);
    };
    const auto& w = p.weights;
    const Tensor heads = std::get<0>(dense(
        project(p.query, w.q_weight, w.q_bias, 4), project(p.key, w.k_weight, w.k_bias, 2),
        project(p.value, w.v_weight, w.v_bias, 2), options));
    const Tensor expected = at::linear(heads.transpose(1, 2).flatten(2), w.out_weight, w.out_bias);
    const Tensor output = wmha::multi_head_attention(p.query, p.key, p.value, w, 4, 2, options);
    EXPECT_LT(difference(output, expected), 1e-13);
  }
}

// ---- Dropout and repeatability ----

TEST(Dropout, IsGovernedByTheGenerator) {
  const Inputs in;
  const auto drop = [&](double p, std::optional<at::Generator> generator = std::nullopt) {
    AttentionOptions options = AttentionOptions().dropout(p);
    if (generator) options.generator(*generator);
    return wmha::attention(in.query, in.key, in.value, options);
  };
  at::manual_seed(5);
  const Tensor first = drop(0.5), second = drop(0.5);
  EXPECT_FALSE(first.equal(second)) << "each call draws a new seed";
  at::manual_seed(5);
  EXPECT_TRUE(drop(0.5).equal(first));
  EXPECT_TRUE(drop(0.5).equal(second));

  at::manual_seed(5);
  at::Generator own = at::detail::createCPUGenerator(5);
  EXPECT_TRUE(drop(0.5, own).equal(first)) << "the same draw from a generator of one's own";
  EXPECT_TRUE(drop(0.5).equal(first)) << "which leaves the default generator alone";
  EXPECT_TRUE(drop(0).equal(wmha::attention(in.query, in.key, in.value)));
  EXPECT_TRUE(drop(1).eq(0).all().item<bool>());
}

TEST(Dropout, IsTheSameForwardAndBackward) {
  Inputs in;
  in.value = random({2, 2, 11, 11}); // the output as a linear map of the value shows the mask; so does its gradient
  in.value.requires_grad_();
  at::manual_seed(5);
  const Tensor output = wmha::attention(in.query, in.key, in.value, AttentionOptions().dropout(0.5));
  const Tensor weights = random(output.sizes());
  const Tensor gradient = torch::autograd::grad({output}, {in.value}, {weights})[0];
  // The output is linear in the value, hence <output, weights> = <value, gradient>.
  EXPECT_NEAR((output * weights).sum().item<double>(), (in.value * gradient).sum().item<double>(), 1e-10);
}

TEST(Repeatability, GivesTheSameBitsForAnyNumberOfThreads) {
  const int before = at::get_num_threads();
  Tensors first;
  for (const int threads : {1, 2, 3}) {
    at::set_num_threads(threads);
    Tensors inputs = {
        random({1, 4, 700, 16}).to(at::kFloat), random({1, 2, 700, 16}).to(at::kFloat),
        random({1, 2, 700, 16}).to(at::kFloat), random({4}).to(at::kFloat).abs() + 0.5};
    for (Tensor& input : inputs) input.requires_grad_();
    const auto options = AttentionOptions().window(50, 3).dropout(0.1).temperature(inputs[3]).generator(
        at::detail::createCPUGenerator(1));
    const Tensor output = wmha::attention(inputs[0], inputs[1], inputs[2], options);
    Tensors results = torch::autograd::grad({output.square().sum()}, inputs);
    results.push_back(output);
    if (first.empty()) first = results;
    for (size_t i = 0; i < results.size(); ++i) EXPECT_TRUE(results[i].equal(first[i])) << threads << " threads, " << i;
  }
  at::set_num_threads(before);
}

TEST(Repeatability, TheOutputIsTheSameWithAndWithoutGradients) {
  Inputs in;
  const Tensor without = wmha::attention(in.query, in.key, in.value, AttentionOptions().window(3, 0));
  in.query.requires_grad_();
  EXPECT_TRUE(wmha::attention(in.query, in.key, in.value, AttentionOptions().window(3, 0)).equal(without));
}

} // namespace

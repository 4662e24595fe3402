// The C++ API: what it computes, against dense attention in ATen; its gradients of first and second order, against
// central differences in fp64.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <wmha/wmha.h>

#include <functional>
#include <vector>

namespace {

using at::Tensor;
using wmha::AttentionOptions;
using Tensors = std::vector<Tensor>;

constexpr int64_t largest = std::numeric_limits<int64_t>::max();

Tensor random(at::IntArrayRef shape, uint64_t seed = 0) {
  return at::randn(shape, at::detail::createCPUGenerator(seed + shape.size()), at::kDouble);
}

struct Inputs {
  Tensor query = random({2, 4, 9, 5}, 1);
  Tensor key = random({2, 2, 11, 5}, 2);
  Tensor value = random({2, 2, 11, 3}, 3);
};

/// (output, logsumexp) by dense attention: the definition in the header, word by word.
std::tuple<Tensor, Tensor> dense(const Tensor& query, const Tensor& key, const Tensor& value, const AttentionOptions& o) {
  const int64_t heads = query.size(1), queries = query.size(2), keys = key.size(2);
  const int64_t group = heads / key.size(1);
  const Tensor k = key.repeat_interleave(group, 1), v = value.repeat_interleave(group, 1);
  Tensor scores = query.matmul(k.transpose(-2, -1)) * o.scale_.value_or(1 / std::sqrt(double(query.size(3))));
  if (o.softcap_ > 0) scores = o.softcap_ * (scores / o.softcap_).tanh();
  scores = o.temperature_tensor_ ? scores / o.temperature_tensor_->view({1, -1, 1, 1}) : scores / o.temperature_;

  const auto offset = o.query_offset_.value_or(keys - queries).expect_int();
  const auto left = o.window_left_.expect_int(), right = o.window_right_.expect_int();
  const Tensor distance = at::arange(keys) - (at::arange(queries) + offset).unsqueeze(1); // j - p(i)
  Tensor hidden = distance != distance; // nothing
  if (left >= 0) hidden = hidden.logical_or(distance < -left);
  if (right >= 0) hidden = hidden.logical_or(distance > right);
  scores = scores.masked_fill(hidden, -std::numeric_limits<double>::infinity());
  const Tensor blind = hidden.all(-1, /*keepdim=*/true);
  return {scores.softmax(-1).masked_fill(blind, 0).matmul(v), scores.logsumexp(-1)};
}

double difference(const Tensor& a, const Tensor& b) {
  if (!a.sizes().equals(b.sizes())) return std::numeric_limits<double>::infinity();
  const Tensor same = a == b; // infinities among them
  return (a - b).abs().masked_fill(same, 0).max().item<double>();
}

// ---- What it computes ----

struct NamedOptions {
  const char* name;
  AttentionOptions options;
};

std::vector<NamedOptions> all_options() {
  using O = AttentionOptions;
  return {
      {"defaults", O()},
      {"causal", O().causal()},
      {"window", O().window(3, 2)},
      {"left bound alone", O().window(3, -1)},
      {"right bound alone", O().window(-1, 2)},
      {"the widest window", O().window(largest, largest)},
      {"scale", O().scale(0.3)},
      {"scale 0", O().scale(0)},
      {"negative scale", O().scale(-0.3).window(3, 0)},
      {"temperature", O().temperature(0.7)},
      {"temperature of rank 0", O().window(4, 0).temperature(random({}, 4).abs() + 0.5)},
      {"temperature of shape (1,)", O().window(4, 0).temperature(random({1}, 4).abs() + 0.5)},
      {"temperature of each head", O().window(4, 0).temperature(random({4}, 4).abs() + 0.5)},
      {"softcap", O().softcap(0.8)},
      {"offset", O().window(3, 0).query_offset(0)},
      {"queries before all keys", O().window(3, 0).query_offset(-4)},
      {"queries after all keys", O().window(3, 0).query_offset(7)},
      {"all of them", O().window(5, 1).scale(0.5).temperature(random({4}, 4).abs() + 0.5).softcap(1.5).query_offset(1)},
  };
}

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
  EXPECT_EQ(difference(wmha::attention(one, one, one), wmha::attention(one.contiguous(), one.contiguous(), one.contiguous())), 0);
}

TEST(Api, GivesLogsumexpInTheTypeOfTheArithmetic) {
  const Inputs in;
  for (const auto& [dtype, acc] : {std::pair{at::kDouble, at::kDouble}, {at::kFloat, at::kFloat},
                                   {at::kBFloat16, at::kFloat}, {at::kHalf, at::kFloat}}) {
    const auto [output, lse] = wmha::attention_with_lse(in.query.to(dtype), in.key.to(dtype), in.value.to(dtype));
    EXPECT_EQ(output.scalar_type(), dtype);
    EXPECT_EQ(lse.scalar_type(), acc);
    EXPECT_LT(difference(output.to(at::kDouble), std::get<0>(dense(in.query, in.key, in.value, {}))), 0.05);
  }
}

struct Projections {
  Tensor query = random({2, 9, 10}, 5), key = random({2, 11, 6}, 6), value = random({2, 11, 7}, 7);
  wmha::ProjectionWeights weights{
      .q_weight = random({4 * 5, 10}, 8) / 3,
      .k_weight = random({2 * 5, 6}, 9) / 3,
      .v_weight = random({2 * 3, 7}, 10) / 3,
      .out_weight = random({8, 4 * 3}, 11) / 3,
      .q_bias = random({4 * 5}, 12),
      .k_bias = random({2 * 5}, 13),
      .v_bias = random({2 * 3}, 14),
      .out_bias = random({8}, 15)};
};

TEST(Api, MultiHeadAttentionIsProjectionsAroundAttention) {
  Projections p;
  const auto options = AttentionOptions().window(4, 1).temperature(random({4}, 16).abs() + 0.5);
  for (const bool biases : {true, false}) {
    if (!biases) p.weights.q_bias = p.weights.k_bias = p.weights.v_bias = p.weights.out_bias = std::nullopt;
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

// ---- Gradients ----

/// The gradients of sum over all outputs of (fixed random numbers * output).
Tensors gradients(const Tensors& outputs, const Tensors& inputs, bool create_graph = false) {
  Tensors weights;
  for (size_t i = 0; i < outputs.size(); ++i) weights.push_back(random(outputs[i].sizes(), 100 + i));
  return torch::autograd::grad(outputs, inputs, weights, /*retain_graph=*/std::nullopt, create_graph);
}

double weighted_sum(const Tensors& outputs) {
  double sum = 0;
  for (size_t i = 0; i < outputs.size(); ++i) sum += (outputs[i] * random(outputs[i].sizes(), 100 + i)).sum().item<double>();
  return sum;
}

using Function = std::function<Tensors(const Tensors&)>;

/// Compares the gradient of every element of every input with the difference quotient.
void expect_gradients(const Function& function, Tensors inputs) {
  constexpr double step = 1e-5;
  for (Tensor& input : inputs) input = input.detach().clone().requires_grad_();
  const Tensors actual = gradients(function(inputs), inputs);
  for (size_t n = 0; n < inputs.size(); ++n) {
    const Tensor elements = inputs[n].data().view({-1}); // shares the memory
    for (int64_t e = 0; e < elements.numel(); ++e) {
      const double x = elements[e].item<double>();
      elements[e].fill_(x + step);
      const double above = weighted_sum(function(inputs));
      elements[e].fill_(x - step);
      const double below = weighted_sum(function(inputs));
      elements[e].fill_(x);
      const double expected = (above - below) / (2 * step);
      ASSERT_NEAR(actual[n].reshape({-1})[e].item<double>(), expected, 1e-7 * (1 + std::abs(expected)))
          << "input " << n << ", element " << e;
    }
  }
}

/// attention_with_lse as a function of query, key, value and, if the options have one, temperature. Queries without keys
/// keep a finite logsumexp for the sake of the difference quotient.
Function attention_of(const AttentionOptions& options) {
  return [options](const Tensors& inputs) -> Tensors {
    AttentionOptions o = options;
    if (inputs.size() > 3) o.temperature(inputs[3]);
    if (o.dropout_p_ > 0) o.generator(at::detail::createCPUGenerator(99)); // each call the same mask
    const auto [output, lse] = wmha::attention_with_lse(inputs[0], inputs[1], inputs[2], o);
    return {output, lse.masked_fill(lse.isinf(), 0)};
  };
}

Tensors small_inputs(const AttentionOptions& options) {
  Tensors inputs = {random({1, 4, 5, 3}, 20), random({1, 2, 6, 3}, 21), random({1, 2, 6, 2}, 22)};
  if (options.temperature_tensor_) inputs.push_back(*options.temperature_tensor_);
  return inputs;
}

std::vector<NamedOptions> all_options_and_dropout() {
  std::vector<NamedOptions> all = all_options();
  all.push_back({"dropout", AttentionOptions().window(3, 1).dropout(0.4)});
  all.push_back(
      {"dropout and all others",
       AttentionOptions().window(3, 1).dropout(0.4).softcap(1.2).temperature(random({4}, 4).abs() + 0.5)});
  return all;
}

TEST(Gradients, AgreeWithCentralDifferences) {
  for (const auto& [name, options] : all_options_and_dropout()) {
    SCOPED_TRACE(name);
    expect_gradients(attention_of(options), small_inputs(options));
  }
}

TEST(Gradients, OfSecondOrderAgreeWithCentralDifferences) {
  for (const auto& [name, options] : all_options_and_dropout()) {
    SCOPED_TRACE(name);
    const Function attention = attention_of(options);
    expect_gradients(
        [&](const Tensors& inputs) { return gradients(attention(inputs), inputs, /*create_graph=*/true); },
        small_inputs(options));
  }
}

TEST(Gradients, AreTheSameByTheFusedKernelsAndByTheComposedForm) {
  for (const auto& [name, options] : all_options_and_dropout()) {
    SCOPED_TRACE(name);
    Tensors inputs = small_inputs(options);
    for (Tensor& input : inputs) input.requires_grad_();
    const Function attention = attention_of(options);
    const Tensors fused = gradients(attention(inputs), inputs);
    const Tensors composed = gradients(attention(inputs), inputs, /*create_graph=*/true);
    for (size_t i = 0; i < inputs.size(); ++i) EXPECT_LT(difference(fused[i], composed[i]), 1e-12) << "input " << i;
  }
}

TEST(Gradients, OfOneOutputAlone) {
  const auto options = AttentionOptions().window(3, 1).temperature(random({4}, 4).abs() + 0.5);
  for (const size_t which : {0, 1}) {
    const Function both = attention_of(options);
    const Function one = [&](const Tensors& inputs) -> Tensors { return {both(inputs)[which]}; };
    if (which == 0) {
      expect_gradients(one, small_inputs(options));
    } else { // logsumexp does not depend on value
      const Tensors all = small_inputs(options);
      expect_gradients(
          [&](const Tensors& inputs) { return one({inputs[0], inputs[1], all[2], inputs[2]}); },
          {all[0], all[1], all[3]});
    }
  }
}

TEST(Gradients, OfAttentionWeightsAgreeWithCentralDifferences) {
  const auto options = AttentionOptions().window(3, 1).softcap(1.2).temperature(random({4}, 4).abs() + 0.5);
  const Tensors all = small_inputs(options);
  expect_gradients(
      [&](const Tensors& inputs) -> Tensors {
        AttentionOptions o = options;
        return {wmha::attention_weights(inputs[0], inputs[1], o.temperature(inputs[2]))};
      },
      {all[0], all[1], all[3]});
}

TEST(Gradients, OfMultiHeadAttentionAgreeWithCentralDifferences) {
  const Projections p;
  const auto& w = p.weights;
  expect_gradients(
      [](const Tensors& in) -> Tensors {
        const auto options =
            AttentionOptions().window(4, 1).dropout(0.2).temperature(in[11]).generator(at::detail::createCPUGenerator(3));
        return {wmha::multi_head_attention(
            in[0], in[1], in[2], {in[3], in[4], in[5], in[6], in[7], in[8], in[9], in[10]}, 4, 2, options)};
      },
      {p.query, p.key, p.value, w.q_weight, w.k_weight, w.v_weight, w.out_weight, *w.q_bias, *w.k_bias, *w.v_bias,
       *w.out_bias, random({4}, 16).abs() + 0.5});
}

TEST(Gradients, OfATemperatureHaveItsDtypeAndShape) {
  const Inputs in;
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    for (const std::vector<int64_t>& shape : {std::vector<int64_t>{}, {1}, {4}}) {
      const Tensor temperature = (random(shape).abs() + 0.5).to(dtype).requires_grad_();
      wmha::attention(in.query, in.key, in.value, AttentionOptions().temperature(temperature)).square().sum().backward();
      EXPECT_EQ(temperature.grad().scalar_type(), dtype);
      EXPECT_EQ(temperature.grad().sizes(), temperature.sizes());
      EXPECT_GT(temperature.grad().abs().max().item<double>(), 0);
    }
  }
}

TEST(Gradients, AreExactlyZeroOutsideOfEveryWindow) {
  Inputs in;
  for (Tensor* tensor : {&in.query, &in.key, &in.value}) tensor->requires_grad_();
  // Queries 0 to 8 at positions -2 to 6: the first two see nothing, and nobody sees keys 7 to 10.
  const auto options = AttentionOptions().window(3, 0).query_offset(-2);
  wmha::attention(in.query, in.key, in.value, options).square().sum().backward();
  EXPECT_TRUE(in.query.grad().slice(2, 0, 2).eq(0).all().item<bool>());
  EXPECT_TRUE(in.key.grad().slice(2, 7).eq(0).all().item<bool>());
  EXPECT_TRUE(in.value.grad().slice(2, 7).eq(0).all().item<bool>());
  EXPECT_TRUE(in.value.grad().slice(2, 0, 7).ne(0).all().item<bool>());
}

TEST(Gradients, FlowThroughASumWhoseGradientHasStrideZero) {
  Inputs in;
  in.value.requires_grad_();
  const Tensor output = wmha::attention(in.query, in.key, in.value);
  const Tensor expected = torch::autograd::grad({output}, {in.value}, {output.new_ones(output.sizes())}, true)[0];
  EXPECT_TRUE(torch::autograd::grad({output.sum()}, {in.value})[0].equal(expected));
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

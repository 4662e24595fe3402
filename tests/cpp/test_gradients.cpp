// Gradients of first and second order through the C++ API, against central differences in fp64.
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>

#include "api_cases.h"

namespace {

using namespace testing_wmha;

/// On one thread: they call tiny problems a hundred thousand times.
class Gradients : public testing::Test {
  void SetUp() override { at::set_num_threads(1); }
  void TearDown() override { at::set_num_threads(threads_); }

  const int threads_ = at::get_num_threads();
};

/// The gradients of sum over all outputs of (fixed random numbers * output).
Tensors gradients(const Tensors& outputs, const Tensors& inputs, bool create_graph = false) {
  Tensors weights;
  for (size_t i = 0; i < outputs.size(); ++i) weights.push_back(random(outputs[i].sizes(), 100 + i));
  return torch::autograd::grad(outputs, inputs, weights, /*retain_graph=*/std::nullopt, create_graph);
}

double weighted_sum(const Tensors& outputs) {
  double sum = 0;
  for (size_t i = 0; i < outputs.size(); ++i)
    sum += (outputs[i] * random(outputs[i].sizes(), 100 + i)).sum().item<double>();
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

/// attention_with_lse as a function of query, key, value and, if the options have one, temperature. Queries without
/// keys keep a finite logsumexp for the sake of the difference quotient.
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

TEST_F(Gradients, AgreeWithCentralDifferences) {
  for (const auto& [name, options] : all_options_and_dropout()) {
    SCOPED_TRACE(name);
    expect_gradients(attention_of(options), small_inputs(options));
  }
}

TEST_F(Gradients, OfSecondOrderAgreeWithCentralDifferences) {
  for (const auto& [name, options] : all_options_and_dropout()) {
    SCOPED_TRACE(name);
    const Function attention = attention_of(options);
    expect_gradients(
        [&](const Tensors& inputs) { return gradients(attention(inputs), inputs, /*create_graph=*/true); },
        small_inputs(options));
  }
}

TEST_F(Gradients, AreTheSameByTheFusedKernelsAndByTheComposedForm) {
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

TEST_F(Gradients, AreTheSameByBothWhereTheComposedFormTakesSeveralChunks) {
  const auto options = AttentionOptions().window(40, 3).dropout(0.2).temperature(random({2}, 4).abs() + 0.5);
  Tensors inputs = {
      random({1, 2, 700, 3}, 30), random({1, 1, 600, 3}, 31), random({1, 1, 600, 2}, 32), *options.temperature_tensor_};
  for (Tensor& input : inputs) input.requires_grad_();
  const Function attention = attention_of(options);
  const Tensors fused = gradients(attention(inputs), inputs);
  const Tensors composed = gradients(attention(inputs), inputs, /*create_graph=*/true);
  for (size_t i = 0; i < inputs.size(); ++i) EXPECT_LT(difference(fused[i], composed[i]), 1e-11) << "input " << i;
}

TEST_F(Gradients, OfEmptyTensorsAreEmptyOrZero) {
  struct Sizes {
    int64_t batch, heads, kv_heads, queries, keys;
  };
  for (const Sizes& n : {Sizes{0, 4, 2, 5, 6}, {2, 0, 0, 5, 6}, {2, 4, 2, 0, 6}, {2, 4, 2, 5, 0}}) {
    for (const bool create_graph : {false, true}) {
      SCOPED_TRACE(testing::Message() << n.batch << n.heads << n.kv_heads << n.queries << n.keys << create_graph);
      Tensors inputs = {
          random({n.batch, n.heads, n.queries, 3}), random({n.batch, n.kv_heads, n.keys, 3}),
          random({n.batch, n.kv_heads, n.keys, 2}), random({1}).abs() + 0.5};
      for (Tensor& input : inputs) input.requires_grad_();
      const auto options = AttentionOptions().window(3, 0).dropout(0.2).temperature(inputs[3]);
      const Tensors results = gradients(attention_of(options)(inputs), inputs, create_graph);
      for (size_t i = 0; i < inputs.size(); ++i) {
        EXPECT_EQ(results[i].sizes(), inputs[i].sizes());
        EXPECT_TRUE(results[i].eq(0).all().item<bool>()) << "input " << i;
      }
      EXPECT_EQ(
          wmha::attention_weights(inputs[0], inputs[1], AttentionOptions().temperature(inputs[3])).sizes(),
          (at::IntArrayRef{n.batch, n.heads, n.queries, n.keys}));
    }
  }
}

TEST_F(Gradients, OfOneOutputAlone) {
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

TEST_F(Gradients, OfAttentionWeightsAgreeWithCentralDifferences) {
  const auto options = AttentionOptions().window(3, 1).softcap(1.2).temperature(random({4}, 4).abs() + 0.5);
  const Tensors all = small_inputs(options);
  expect_gradients(
      [&](const Tensors& inputs) -> Tensors {
        AttentionOptions o = options;
        return {wmha::attention_weights(inputs[0], inputs[1], o.temperature(inputs[2]))};
      },
      {all[0], all[1], all[3]});
}

TEST_F(Gradients, OfMultiHeadAttentionAgreeWithCentralDifferences) {
  const Projections p;
  const auto& w = p.weights;
  expect_gradients(
      [](const Tensors& in) -> Tensors {
        const auto options = AttentionOptions().window(4, 1).dropout(0.2).temperature(in[11]).generator(
            at::detail::createCPUGenerator(3));
        return {wmha::multi_head_attention(
            in[0], in[1], in[2], {in[3], in[4], in[5], in[6], in[7], in[8], in[9], in[10]}, 4, 2, options)};
      },
      {p.query, p.key, p.value, w.q_weight, w.k_weight, w.v_weight, w.out_weight, *w.q_bias, *w.k_bias, *w.v_bias,
       *w.out_bias, random({4}, 16).abs() + 0.5});
}

TEST_F(Gradients, OfATemperatureHaveItsDtypeAndShape) {
  const Inputs in;
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    for (const std::vector<int64_t>& shape : {std::vector<int64_t>{}, {1}, {4}}) {
      const Tensor temperature = (random(shape).abs() + 0.5).to(dtype).requires_grad_();
      wmha::attention(in.query, in.key, in.value, AttentionOptions().temperature(temperature))
          .square()
          .sum()
          .backward();
      EXPECT_EQ(temperature.grad().scalar_type(), dtype);
      EXPECT_EQ(temperature.grad().sizes(), temperature.sizes());
      EXPECT_GT(temperature.grad().abs().max().item<double>(), 0);
    }
  }
}

TEST_F(Gradients, AreExactlyZeroOutsideOfEveryWindow) {
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

TEST_F(Gradients, FlowThroughASumWhoseGradientHasStrideZero) {
  Inputs in;
  in.value.requires_grad_();
  const Tensor output = wmha::attention(in.query, in.key, in.value);
  const Tensor expected = torch::autograd::grad({output}, {in.value}, {output.new_ones(output.sizes())}, true)[0];
  EXPECT_TRUE(torch::autograd::grad({output.sum()}, {in.value})[0].equal(expected));
}

} // namespace

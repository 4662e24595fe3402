// The modules: what they compute, against the operators and LibTorch's own modules; saving, cloning, decoding, errors.
#include <ATen/ops/cat.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/silu.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/optim/adam.h>
#include <torch/serialize.h>
#include <wmha/nn.h>

#include <sstream>

#include "api_cases.h"

namespace {

using namespace testing_wmha;
using wmha::nn::MultiheadAttention;
using wmha::nn::MultiheadAttentionOptions;
using wmha::nn::TransformerLayer;
using wmha::nn::TransformerLayerOptions;
using wmha::nn::TransformerStack;
using wmha::nn::TransformerStackOptions;
using wmha::nn::Window;

constexpr int64_t embed_dim = 24, heads = 4;

MultiheadAttentionOptions attention() { return {embed_dim, heads}; }

MultiheadAttentionOptions rich_attention() {
  return attention().num_kv_heads(2).value_dim(5).window({4, 0}).softcap(20).learned_temperature("per_head");
}

TransformerStackOptions rich_stack() {
  const auto layer =
      TransformerLayerOptions(rich_attention().window({-1, -1})).dim_feedforward(40).activation("swiglu");
  return TransformerStackOptions(2, layer).windows(std::vector<Window>{{3, 0}, {-1, 0}}).final_norm(true);
}

/// In fp64, with all parameters away from their first values.
template <typename Module>
Module prepared(Module module) {
  torch::NoGradGuard no_grad;
  module->to(at::kDouble);
  uint64_t seed = 1;
  for (auto& parameter : module->parameters()) parameter.add_(0.1 * random(parameter.sizes(), ++seed));
  return module;
}

template <typename Module, typename Other>
void expect_same_parameters(const Module& module, const Other& other) {
  const auto ours = module->named_parameters(), others = other->named_parameters();
  ASSERT_EQ(ours.keys(), others.keys());
  for (const auto& parameter : ours) EXPECT_TRUE(parameter.value().equal(others[parameter.key()])) << parameter.key();
}

template <typename Function>
std::string error_of(Function&& function) {
  try {
    function();
  } catch (const c10::Error& error) {
    const std::string text = error.what_without_backtrace();
    return text.substr(0, text.find('\n'));
  }
  return "no error";
}

// ---- Attention ----

TEST(MultiheadAttention, IsTheOperator) {
  const auto options = rich_attention().kdim(6).vdim(7).scale(0.3);
  const auto module = prepared(MultiheadAttention(options));
  const Tensor query = random({2, 9, embed_dim}), key = random({2, 11, 6}), value = random({2, 11, 7});
  const wmha::ProjectionWeights weights{module->q_proj->weight,   module->k_proj->weight, module->v_proj->weight,
                                        module->out_proj->weight, module->q_proj->bias,   module->k_proj->bias,
                                        module->v_proj->bias,     module->out_proj->bias};
  const auto call = AttentionOptions().window(4, 0).softcap(20).scale(0.3).temperature(module->log_temperature.exp());
  const Tensor expected = wmha::multi_head_attention(query, key, value, weights, heads, 2, call);
  auto holder = module;
  EXPECT_TRUE(holder(query, key, value).equal(expected));
}

TEST(MultiheadAttention, AttendsToItself) {
  auto module = prepared(MultiheadAttention(attention().bias(false)));
  const Tensor x = random({2, 9, embed_dim}), y = random({2, 5, embed_dim}, 3);
  EXPECT_TRUE(module(x).equal(module(x, x, x)));
  EXPECT_TRUE(module(x, y).equal(module(x, y, y)));
  EXPECT_EQ(error_of([&] { module->forward(x, {}, y); }), "wmha: value must come with key, got value alone");
}

TEST(MultiheadAttention, IsCausalByItsWindow) {
  torch::manual_seed(1);
  MultiheadAttention causal(attention().causal(true).window({3, -1}));
  torch::manual_seed(1);
  MultiheadAttention window(attention().window({3, 0}));
  const Tensor x = random({2, 9, embed_dim}).to(at::kFloat);
  EXPECT_EQ(causal->options.window(), Window(3, 0));
  EXPECT_TRUE(causal(x).equal(window(x)));
}

TEST(MultiheadAttention, StartsWithTheSameNumbersForTheSameSeed) {
  torch::manual_seed(3);
  const MultiheadAttention first(rich_attention().temperature(0.5));
  torch::manual_seed(3);
  const MultiheadAttention second(rich_attention().temperature(0.5));
  expect_same_parameters(first, second);
  const double bound = std::sqrt(6.0 / (embed_dim + 12));
  EXPECT_LE(first->k_proj->weight.abs().max().item<double>(), bound);
  EXPECT_GT(first->k_proj->weight.abs().max().item<double>(), 0.95 * bound);
  EXPECT_TRUE(first->q_proj->bias.eq(0).all().item<bool>());
  EXPECT_TRUE(first->out_proj->bias.eq(0).all().item<bool>());
  EXPECT_LT(difference(first->log_temperature.exp(), at::full({heads}, 0.5)), 1e-6);
}

TEST(MultiheadAttention, LearnsATemperatureThatStaysPositive) {
  for (const char* learned : {"shared", "per_head"}) {
    MultiheadAttention module(attention().window({4, 0}).learned_temperature(learned));
    torch::optim::Adam optimizer({module->log_temperature}, torch::optim::AdamOptions(3.0));
    const Tensor x = random({2, 9, embed_dim}).to(at::kFloat);
    for (int step = 0; step < 3; ++step) {
      optimizer.zero_grad();
      module(x).square().sum().backward();
      EXPECT_TRUE(module->log_temperature.grad().ne(0).all().item<bool>());
      optimizer.step();
      EXPECT_TRUE(module->log_temperature.exp().gt(0).all().item<bool>());
      EXPECT_TRUE(module(x).isfinite().all().item<bool>());
    }
  }
}

TEST(MultiheadAttention, DropsOnlyWhileTraining) {
  auto module = prepared(MultiheadAttention(attention().dropout(0.5)));
  const Tensor x = random({2, 9, embed_dim});
  torch::manual_seed(1);
  const Tensor first = module(x), second = module(x);
  EXPECT_FALSE(first.equal(second));
  torch::manual_seed(1);
  EXPECT_TRUE(module(x).equal(first));
  module->eval();
  EXPECT_TRUE(module(x).equal(module(x)));
}

TEST(MultiheadAttention, DecodesPartsOfASequence) {
  for (const int64_t left : {0, 4, 100, -1}) {
    auto module = prepared(MultiheadAttention(rich_attention().window({left, 0})));
    const Tensor x = random({2, 17, embed_dim});
    const Tensor whole = module(x);
    for (const std::vector<int64_t>& chunks : {std::vector<int64_t>(17, 1), {3, 3, 3, 3, 3, 2}, {10, 1, 1, 5}, {17}}) {
      std::optional<wmha::nn::KeyValueCache> cache;
      Tensors outputs;
      int64_t seen = 0;
      for (const Tensor& chunk : x.split_with_sizes(chunks, 1)) {
        auto [output, next] = module->decode(chunk, cache);
        outputs.push_back(output);
        cache = next;
        seen += chunk.size(1);
        const int64_t held = left < 0 ? seen : std::min(seen, left);
        EXPECT_EQ(cache->key.sizes(), at::IntArrayRef({2, 2, held, 6}));
        EXPECT_EQ(cache->value.sizes(), at::IntArrayRef({2, 2, held, 5}));
        EXPECT_EQ(cache->length.item<int64_t>(), seen);
      }
      EXPECT_LT(difference(at::cat(outputs, 1), whole), 1e-13);
    }
  }
  MultiheadAttention both_ways(attention().window({4, 1}));
  EXPECT_EQ(
      error_of([&] { both_ways->decode(random({1, 3, embed_dim}).to(at::kFloat)); }),
      "wmha: window_right must be 0 (causal) for decode, got 1");
}

// ---- Layer and stack ----

TEST(TransformerLayer, AddsSublayersAndNorms) {
  const Tensor x = random({2, 9, embed_dim});
  for (const char* activation : {"relu", "gelu", "silu", "geglu", "swiglu"}) {
    SCOPED_TRACE(activation);
    const auto feed_forward = [&](TransformerLayer& layer, const Tensor& y) {
      const Tensor hidden = layer->linear1(y), gate = hidden.narrow(-1, 0, 40);
      const std::string name = activation;
      const Tensor active = name == "relu" ? gate.relu() : name.find("ge") == 0 ? at::gelu(gate) : at::silu(gate);
      return layer->linear2(hidden.size(-1) == 80 ? active * hidden.narrow(-1, 40, 40) : active);
    };
    const auto options = TransformerLayerOptions(rich_attention()).dim_feedforward(40).activation(activation);
    auto layer = prepared(TransformerLayer(TransformerLayerOptions(options).norm("before")));
    Tensor y = x + layer->self_attn(layer->norm1(x));
    EXPECT_TRUE(layer(x).equal(y + feed_forward(layer, layer->norm2(y))));

    layer = prepared(TransformerLayer(TransformerLayerOptions(options).norm("after")));
    y = layer->norm1(x + layer->self_attn(x));
    EXPECT_TRUE(layer(x).equal(layer->norm2(y + feed_forward(layer, y))));
  }
}

TEST(TransformerLayer, DropsEachSublayersOutput) {
  TransformerLayer layer(TransformerLayerOptions(embed_dim, heads).dropout(1));
  const Tensor x = random({2, 9, embed_dim}).to(at::kFloat);
  EXPECT_TRUE(layer(x).equal(x)); // only the residual connections are left
  layer->eval();
  EXPECT_FALSE(layer(x).equal(x));
}

TEST(TransformerStack, IsItsLayers) {
  auto stack = prepared(TransformerStack(rich_stack()));
  const Tensor x = random({2, 9, embed_dim});
  Tensor y = x;
  for (const auto& layer : *stack->layers) y = layer->as<TransformerLayer>()->forward(y);
  EXPECT_TRUE(stack(x).equal(stack->norm(y)));
  EXPECT_EQ(stack->layers->at<wmha::nn::TransformerLayerImpl>(0).options.attention().window(), Window(3, 0));
  torch::nn::Sequential sequential(stack);
  EXPECT_TRUE(sequential->forward(x).equal(stack(x)));
}

TEST(TransformerStack, Decodes) {
  auto stack = prepared(TransformerStack(rich_stack()));
  const Tensor x = random({2, 9, embed_dim});
  std::vector<wmha::nn::KeyValueCache> caches;
  Tensors outputs;
  for (const Tensor& chunk : x.split_with_sizes({1, 1, 4, 1, 2}, 1)) {
    auto [output, next] = stack->decode(chunk, caches);
    outputs.push_back(output);
    caches = next;
  }
  EXPECT_LT(difference(at::cat(outputs, 1), stack(x)), 1e-13);
  caches.pop_back();
  EXPECT_EQ(error_of([&] { stack->decode(x, caches); }), "wmha: caches must be one for each of the 2 layers, got 1");
}

TEST(TransformerStack, IsSavedAndLoaded) {
  auto stack = prepared(TransformerStack(rich_stack()));
  std::stringstream file;
  torch::save(stack, file);
  TransformerStack loaded(rich_stack());
  loaded->to(at::kDouble);
  torch::load(loaded, file);
  expect_same_parameters(stack, loaded);
  const Tensor x = random({2, 9, embed_dim});
  EXPECT_TRUE(loaded(x).equal(stack(x)));
}

TEST(TransformerStack, LoadsOnlyWhatFits) {
  const auto load = [&](const MultiheadAttentionOptions& saved, const MultiheadAttentionOptions& loaded, auto dtype) {
    TransformerStack from(1, saved), into(1, loaded);
    from->to(dtype);
    std::stringstream file;
    torch::save(from, file);
    return error_of([&] { torch::load(into, file); });
  };
  const auto learned = attention().learned_temperature("shared");
  const std::string name = "layers.0.self_attn.";
  EXPECT_EQ(load(learned, learned, at::kFloat), "no error");
  EXPECT_EQ(
      load(learned, learned, at::kDouble),
      "wmha: " + name + "log_temperature in the archive must be of the module's dtype, Float, got Double");
  EXPECT_EQ(
      load(attention(), attention().num_kv_heads(2), at::kFloat),
      "wmha: " + name + "k_proj.weight in the archive must have shape [12, 24], got [24, 24]");
  EXPECT_EQ(
      load(attention(), learned, at::kFloat), "wmha: the archive must hold " + name + "log_temperature, got none");
  EXPECT_EQ(
      load(learned, attention(), at::kFloat),
      "wmha: the archive holds " + name + "log_temperature, which the module doesn't have");
}

TEST(TransformerStack, IsCloned) {
  auto stack = prepared(TransformerStack(rich_stack()));
  TransformerStack copy(std::dynamic_pointer_cast<wmha::nn::TransformerStackImpl>(stack->clone()));
  expect_same_parameters(stack, copy);
  const Tensor x = random({2, 9, embed_dim});
  EXPECT_TRUE(copy(x).equal(stack(x)));
  torch::NoGradGuard no_grad;
  const Tensor before = stack(x);
  for (auto& parameter : copy->parameters()) parameter.add_(1);
  EXPECT_TRUE(stack(x).equal(before)) << "the copy's parameters are its own";
  EXPECT_FALSE(copy(x).equal(before));
}

TEST(TransformerStack, HasOtherDtypes) {
  auto stack = prepared(TransformerStack(rich_stack()));
  const Tensor x = random({2, 9, embed_dim}), expected = stack(x);
  stack->to(at::kBFloat16);
  const Tensor output = stack(x.to(at::kBFloat16));
  EXPECT_EQ(output.scalar_type(), at::kBFloat16);
  EXPECT_LT(difference(output.to(at::kDouble), expected), 0.2);
}

TEST(TransformerStack, IsPrinted) {
  std::ostringstream text;
  text << TransformerStack(rich_stack());
  for (const char* part :
       {"wmha::nn::TransformerStack(num_layers=2)", "wmha::nn::TransformerLayer(activation=swiglu, norm=before)",
        "wmha::nn::MultiheadAttention(embed_dim=24, num_heads=4, num_kv_heads=2, head_dim=6, value_dim=5, "
        "window=(-1, 0), temperature=1, learned_temperature=per_head, softcap=20)",
        "(q_proj): torch::nn::Linear(in_features=24"}) {
    EXPECT_NE(text.str().find(part), std::string::npos) << part << "\n" << text.str();
  }
}

// ---- Errors ----

TEST(Modules, ErrorsNameTheOption) {
  const auto expect = [](const MultiheadAttentionOptions& options, const std::string& message) {
    EXPECT_EQ(error_of([&] { MultiheadAttention module(options); }), "wmha: " + message);
    EXPECT_THROW(MultiheadAttention module(options), c10::ValueError);
  };
  expect({0, 4}, "embed_dim must be at least 1, got 0");
  expect({24, 0}, "num_heads must be between 1 and 128, got 0");
  expect({24, 129}, "num_heads must be between 1 and 128, got 129");
  expect({30, 4}, "embed_dim must be a multiple of num_heads, 4, without head_dim, got 30");
  expect(attention().num_kv_heads(3), "num_kv_heads must divide num_heads, 4, got 3");
  expect(attention().num_kv_heads(0), "num_kv_heads must be at least 1, got 0");
  expect(attention().value_dim(0), "value_dim must be at least 1, got 0");
  expect(attention().kdim(-1), "kdim must be at least 1, got -1");
  expect(attention().window({-2, 0}), "window_left must be -1 (no bound), 0 or positive, got -2");
  expect(attention().window({8, 1}).causal(true), "window_right must be -1 or 0 where causal is set, got 1");
  expect(attention().scale(std::numeric_limits<double>::infinity()), "scale must be finite, got inf");
  expect(attention().temperature(0), "temperature must be positive and finite, got 0");
  expect(attention().learned_temperature("all"), "learned_temperature must be one of none, shared, per_head, got all");
  expect(attention().softcap(-1), "softcap must be 0 (off) or positive, and finite, got -1");
  expect(attention().dropout(1.5), "dropout must be between 0 and 1, got 1.5");

  const auto expect_layer = [](const TransformerLayerOptions& options, const std::string& message) {
    EXPECT_EQ(error_of([&] { TransformerLayer module(options); }), "wmha: " + message);
  };
  const TransformerLayerOptions layer(embed_dim, heads);
  const auto with = [&](auto set) {
    TransformerLayerOptions options = layer;
    set(options);
    return options;
  };
  expect_layer(with([](auto& o) { o.dim_feedforward(0); }), "dim_feedforward must be at least 1, got 0");
  expect_layer(
      with([](auto& o) { o.activation("tanh"); }),
      "activation must be one of gelu, relu, silu, geglu, swiglu, got tanh");
  expect_layer(with([](auto& o) { o.norm("between"); }), "norm must be one of before, after, got between");
  expect_layer(with([](auto& o) { o.layer_norm_eps(-1); }), "layer_norm_eps must be 0 or positive, got -1");
  expect_layer(with([](auto& o) { o.dropout(-0.5); }), "dropout must be between 0 and 1, got -0.5");
  expect_layer(attention().kdim(5), "kdim must be embed_dim, 24, for self-attention, got 5");

  const auto expect_stack = [](const TransformerStackOptions& options, const std::string& message) {
    EXPECT_EQ(error_of([&] { TransformerStack module(options); }), "wmha: " + message);
  };
  expect_stack({0, layer}, "num_layers must be at least 1, got 0");
  expect_stack(
      TransformerStackOptions(2, layer).windows(std::vector<Window>{{3, 0}}),
      "windows must be one for each of the 2 layers, got 1");
  expect_stack(
      TransformerStackOptions(1, attention().window({1, 0})).windows(std::vector<Window>{{3, 0}}),
      "window must be (-1, -1) where windows are given, got (1, 0)");
}

} // namespace

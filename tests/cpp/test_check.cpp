// Wrong arguments through the C++ API: each is a c10::Error whose message names the argument, what was expected and
// what came, on the CPU and on fake tensors alike, with and without gradients; and the process lives on.
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <wmha/attention.h>

#include <functional>
#include <limits>
#include <string>
#include <vector>

namespace {

constexpr int64_t largest = std::numeric_limits<int64_t>::max();
constexpr int64_t smallest = std::numeric_limits<int64_t>::min();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();

at::TensorOptions on(c10::DeviceType device) { return at::TensorOptions().dtype(at::kFloat).device(device); }

/// A call that is right, until a test spoils one of its arguments.
struct Call {
  explicit Call(c10::DeviceType device)
      : device(device),
        query(at::ones({2, 4, 5, 8}, on(device))),
        key(at::ones({2, 2, 7, 8}, on(device))),
        value(at::ones({2, 2, 7, 6}, on(device))) {}

  c10::DeviceType device;
  at::Tensor query, key, value;
  wmha::AttentionOptions options;

  at::Tensor ones(at::IntArrayRef shape, at::ScalarType dtype = at::kFloat) const {
    return at::ones(shape, on(device).dtype(dtype));
  }
};

struct Spoiled {
  const char* name;
  std::function<void(Call&)> spoil;
  std::vector<std::string> words; // of the message
  bool concerns_weights = true;   // is an argument of attention_weights too
};

const std::vector<Spoiled> spoiled_calls = {
    {"query of rank 3", [](Call& c) { c.query = c.ones({2, 5, 8}); }, {"query", "4", "got 3", "[2, 5, 8]"}},
    {"key of rank 5", [](Call& c) { c.key = c.ones({1, 2, 2, 7, 8}); }, {"key", "4", "got 5"}},
    {"value of rank 0", [](Call& c) { c.value = c.ones({}); }, {"value", "4", "got 0"}, false},
    {"query of integers", [](Call& c) { c.query = c.ones({2, 4, 5, 8}, at::kLong); }, {"query", "Float", "got Long"}},
    {"query of fp8",
     [](Call& c) { c.query = c.key = c.value = at::empty({2, 2, 7, 8}, on(c.device).dtype(at::kFloat8_e5m2)); },
     {"query", "Float", "got Float8_e5m2"}},
    {"key of another dtype", [](Call& c) { c.key = c.ones({2, 2, 7, 8}, at::kHalf); }, {"key", "Float", "got Half"}},
    {"value of another dtype",
     [](Call& c) { c.value = c.ones({2, 2, 7, 6}, at::kDouble); },
     {"value", "Float", "got Double"},
     false},
    {"batch of key", [](Call& c) { c.key = c.ones({3, 2, 7, 8}); }, {"key", "batch", "2", "got 3"}},
    {"batch of value", [](Call& c) { c.value = c.ones({3, 2, 7, 6}); }, {"value", "batch", "2", "got 3"}, false},
    {"key dimension", [](Call& c) { c.key = c.ones({2, 2, 7, 9}); }, {"key", "8", "got 9"}},
    {"heads of value", [](Call& c) { c.value = c.ones({2, 4, 7, 6}); }, {"value", "heads", "2", "got 4"}, false},
    {"positions of value", [](Call& c) { c.value = c.ones({2, 2, 6, 6}); }, {"value", "7", "got 6"}, false},
    {"heads that do not divide",
     [](Call& c) { c.key = c.value = c.ones({2, 3, 7, 8}); },
     {"key", "heads", "4", "got 3"}},
    {"heads of query without any of key",
     [](Call& c) { c.key = c.value = c.ones({2, 0, 7, 8}); },
     {"key", "heads", "4", "got 0"}},
    {"no key dimension",
     [](Call& c) {
       c.query = c.ones({2, 4, 5, 0});
       c.key = c.ones({2, 2, 7, 0});
     },
     {"query", "at least 1", "got 0"}},
    {"no value dimension", [](Call& c) { c.value = c.ones({2, 2, 7, 0}); }, {"value", "at least 1", "got 0"}, false},
    {"key on another device",
     [](Call& c) {
       const auto other = c.device == c10::DeviceType::CPU ? c10::DeviceType::Meta : c10::DeviceType::CPU;
       c.key = at::ones({2, 2, 7, 8}, on(other));
     },
     {"key", "device", "cpu", "meta"}},
    {"window_left", [](Call& c) { c.options.window(-2, 0); }, {"window_left", "-1", "got -2"}},
    {"window_right", [](Call& c) { c.options.window(0, -7); }, {"window_right", "-1", "got -7"}},
    {"window of INT64_MIN",
     [](Call& c) { c.options.window(smallest, 0); },
     {"window_left", "got -9223372036854775808"}},
    {"infinite scale", [](Call& c) { c.options.scale(infinity); }, {"scale", "finite", "got inf"}},
    {"scale of NaN", [](Call& c) { c.options.scale(nan); }, {"scale", "finite", "got nan"}},
    {"temperature 0", [](Call& c) { c.options.temperature(0.0); }, {"temperature", "positive", "got 0"}},
    {"negative temperature", [](Call& c) { c.options.temperature(-0.5); }, {"temperature", "positive", "got -0.5"}},
    {"infinite temperature", [](Call& c) { c.options.temperature(infinity); }, {"temperature", "finite", "got inf"}},
    {"temperature of NaN", [](Call& c) { c.options.temperature(nan); }, {"temperature", "positive", "got nan"}},
    {"temperatures of other heads",
     [](Call& c) { c.options.temperature(c.ones({3})); },
     {"temperature", "(Hq,)", "4", "got [3]"}},
    {"temperature of rank 2", [](Call& c) { c.options.temperature(c.ones({1, 1})); }, {"temperature", "got [1, 1]"}},
    {"temperature of integers",
     [](Call& c) { c.options.temperature(c.ones({4}, at::kLong)); },
     {"temperature", "floating", "got Long"}},
    {"negative softcap", [](Call& c) { c.options.softcap(-1); }, {"softcap", "0", "got -1"}},
    {"softcap of NaN", [](Call& c) { c.options.softcap(nan); }, {"softcap", "0", "got nan"}},
    {"negative dropout", [](Call& c) { c.options.dropout(-0.1); }, {"dropout_p", "0", "1", "got -0.1"}, false},
    {"dropout above 1", [](Call& c) { c.options.dropout(1.5); }, {"dropout_p", "0", "1", "got 1.5"}, false},
    {"dropout of NaN", [](Call& c) { c.options.dropout(nan); }, {"dropout_p", "0", "1", "got nan"}, false},
};

template <typename Function>
void expect_error(const Function& function, const std::vector<std::string>& words) {
  try {
    function();
    ADD_FAILURE() << "no error";
  } catch (const c10::Error& error) {
    const std::string message = error.what_without_backtrace();
    for (const std::string& word : words) {
      EXPECT_NE(message.find(word), std::string::npos) << "'" << word << "' is missing in: " << message;
    }
  }
}

class Check : public testing::TestWithParam<std::tuple<c10::DeviceType, bool>> {
 protected:
  c10::DeviceType device() const { return std::get<0>(GetParam()); }

  Call call() const {
    Call call(device());
    if (std::get<1>(GetParam())) call.query.requires_grad_();
    return call;
  }
};

TEST_P(Check, NamesTheArgumentWhatWasExpectedAndWhatCame) {
  for (const Spoiled& spoiled : spoiled_calls) {
    SCOPED_TRACE(spoiled.name);
    Call c = call();
    spoiled.spoil(c);
    expect_error([&] { wmha::attention(c.query, c.key, c.value, c.options); }, spoiled.words);
    expect_error([&] { wmha::attention_with_lse(c.query, c.key, c.value, c.options); }, spoiled.words);
    if (spoiled.concerns_weights) {
      expect_error([&] { wmha::attention_weights(c.query, c.key, c.options); }, spoiled.words);
    }
  }
}

TEST_P(Check, AcceptsTheEndsOfEveryRange) {
  const auto accepts = [&](const char* name, const std::function<void(Call&)>& change, at::IntArrayRef shape) {
    SCOPED_TRACE(name);
    Call c = call();
    change(c);
    EXPECT_EQ(wmha::attention(c.query, c.key, c.value, c.options).sizes(), shape);
  };
  accepts("defaults", [](Call&) {}, {2, 4, 5, 6});
  accepts("the widest window", [](Call& c) { c.options.window(largest, largest); }, {2, 4, 5, 6});
  accepts("the furthest offset", [](Call& c) { c.options.window(3, 0).query_offset(largest); }, {2, 4, 5, 6});
  accepts("the furthest offset back", [](Call& c) { c.options.window(3, 0).query_offset(smallest); }, {2, 4, 5, 6});
  accepts("scale 0", [](Call& c) { c.options.scale(0); }, {2, 4, 5, 6});
  accepts("a negative scale", [](Call& c) { c.options.scale(-2); }, {2, 4, 5, 6});
  accepts("a temperature in fp64", [](Call& c) { c.options.temperature(c.ones({}, at::kDouble)); }, {2, 4, 5, 6});
  accepts("one temperature", [](Call& c) { c.options.temperature(c.ones({1})); }, {2, 4, 5, 6});
  accepts("dropout 1", [](Call& c) { c.options.dropout(1); }, {2, 4, 5, 6});
  accepts(
      "no batch", [](Call& c) { c.query = c.ones({0, 4, 5, 8}), c.key = c.value = c.ones({0, 2, 7, 8}); },
      {0, 4, 5, 8});
  accepts(
      "no heads", [](Call& c) { c.query = c.ones({2, 0, 5, 8}), c.key = c.value = c.ones({2, 0, 7, 8}); },
      {2, 0, 5, 8});
  accepts("no queries", [](Call& c) { c.query = c.ones({2, 4, 0, 8}); }, {2, 4, 0, 6});
  accepts("no keys", [](Call& c) { c.key = c.value = c.ones({2, 2, 0, 8}); }, {2, 4, 5, 8});
}

TEST_P(Check, LeavesTheInputsAlone) {
  if (device() == c10::DeviceType::Meta) GTEST_SKIP() << "fake tensors have no values";
  Call c = call();
  EXPECT_THROW(wmha::attention(c.query, c.key, c.value, c.options.dropout(2)), c10::Error);
  wmha::attention(c.query, c.key, c.value, c.options.dropout(0.5));
  EXPECT_TRUE(c.query.equal(c.ones({2, 4, 5, 8})));
  EXPECT_TRUE(c.key.equal(c.ones({2, 2, 7, 8})));
  EXPECT_TRUE(c.value.equal(c.ones({2, 2, 7, 6})));
}

TEST_P(Check, WeightsTakeNoDropoutAndNoUndefinedTensors) {
  Call c = call();
  expect_error([&] { wmha::attention_weights(c.query, c.key, c.options.dropout(0.1)); }, {"dropout"});
  EXPECT_THROW(wmha::attention(c.query, at::Tensor(), c.value), c10::Error);
  EXPECT_THROW(wmha::attention(at::Tensor(), c.key, c.value), c10::Error);
  EXPECT_THROW(
      wmha::attention(c.query, c.key, c.value, wmha::AttentionOptions().temperature(at::Tensor())), c10::Error);
}

// ---- multi_head_attention ----

struct MultiHeadCall {
  explicit MultiHeadCall(c10::DeviceType device) : device(device) {}

  at::Tensor run() const { return wmha::multi_head_attention(query, key, value, weights, heads, kv_heads, options); }
  at::Tensor ones(at::IntArrayRef shape, at::ScalarType dtype = at::kFloat) const {
    return at::ones(shape, on(device).dtype(dtype));
  }

  c10::DeviceType device;
  at::Tensor query = ones({2, 5, 10}), key = ones({2, 7, 11}), value = ones({2, 7, 12});
  wmha::ProjectionWeights weights{
      .q_weight = ones({4 * 8, 10}),
      .k_weight = ones({2 * 8, 11}),
      .v_weight = ones({2 * 6, 12}),
      .out_weight = ones({9, 4 * 6}),
      .q_bias = ones({4 * 8}),
      .out_bias = ones({9})};
  int64_t heads = 4;
  std::optional<int64_t> kv_heads = 2;
  wmha::AttentionOptions options;
};

struct SpoiledMultiHead {
  const char* name;
  std::function<void(MultiHeadCall&)> spoil;
  std::vector<std::string> words;
};

const std::vector<SpoiledMultiHead> spoiled_multi_head_calls = {
    {"query of rank 4", [](auto& c) { c.query = c.ones({2, 1, 5, 10}); }, {"query", "3", "got 4"}},
    {"key of rank 2", [](auto& c) { c.key = c.ones({7, 11}); }, {"key", "3", "got 2"}},
    {"query of integers", [](auto& c) { c.query = c.ones({2, 5, 10}, at::kInt); }, {"query", "got Int"}},
    {"value of another dtype",
     [](auto& c) { c.value = c.ones({2, 7, 12}, at::kHalf); },
     {"value", "Float", "got Half"}},
    {"batch of key", [](auto& c) { c.key = c.ones({3, 7, 11}); }, {"key", "batch", "2", "got 3"}},
    {"positions of value", [](auto& c) { c.value = c.ones({2, 8, 12}); }, {"value", "7", "got 8"}},
    {"no heads", [](auto& c) { c.heads = 0; }, {"num_heads", "at least 1", "got 0"}},
    {"negative key heads", [](auto& c) { c.kv_heads = -2; }, {"num_kv_heads", "at least 1", "got -2"}},
    {"key heads that do not divide", [](auto& c) { c.kv_heads = 3; }, {"num_kv_heads", "4", "got 3"}},
    {"q_weight of rank 1", [](auto& c) { c.weights.q_weight = c.ones({32}); }, {"q_weight", "2", "got 1"}},
    {"columns of q_weight", [](auto& c) { c.weights.q_weight = c.ones({32, 9}); }, {"q_weight", "10", "got 9"}},
    {"rows of q_weight", [](auto& c) { c.weights.q_weight = c.ones({30, 10}); }, {"q_weight", "4", "got 30"}},
    {"no rows of v_weight", [](auto& c) { c.weights.v_weight = c.ones({0, 12}); }, {"v_weight", "2", "got 0"}},
    {"rows of k_weight", [](auto& c) { c.weights.k_weight = c.ones({18, 11}); }, {"k_weight", "8", "got 9"}},
    {"columns of out_weight", [](auto& c) { c.weights.out_weight = c.ones({9, 20}); }, {"out_weight", "24", "got 20"}},
    {"weight of another dtype",
     [](auto& c) { c.weights.k_weight = c.ones({16, 11}, at::kDouble); },
     {"k_weight", "Float", "got Double"}},
    {"size of q_bias", [](auto& c) { c.weights.q_bias = c.ones({31}); }, {"q_bias", "32", "got 31"}},
    {"rank of out_bias", [](auto& c) { c.weights.out_bias = c.ones({1, 9}); }, {"out_bias", "1", "got 2"}},
    {"window_left", [](auto& c) { c.options.window(-3, 0); }, {"window_left", "-1", "got -3"}},
    {"temperature", [](auto& c) { c.options.temperature(0.0); }, {"temperature", "positive", "got 0"}},
    {"temperatures of other heads",
     [](auto& c) { c.options.temperature(c.ones({2})); },
     {"temperature", "4", "got [2]"}},
    {"dropout", [](auto& c) { c.options.dropout(1.5); }, {"dropout_p", "got 1.5"}},
};

TEST_P(Check, NamesTheArgumentOfMultiHeadAttention) {
  EXPECT_EQ(MultiHeadCall(device()).run().sizes(), (at::IntArrayRef{2, 5, 9}));
  for (const SpoiledMultiHead& spoiled : spoiled_multi_head_calls) {
    SCOPED_TRACE(spoiled.name);
    MultiHeadCall c(device());
    if (std::get<1>(GetParam())) c.query.requires_grad_();
    spoiled.spoil(c);
    expect_error([&] { c.run(); }, spoiled.words);
  }
}

INSTANTIATE_TEST_SUITE_P(
    ,
    Check,
    testing::Combine(testing::Values(c10::DeviceType::CPU, c10::DeviceType::Meta), testing::Bool()),
    [](const auto& info) {
      return c10::DeviceTypeName(std::get<0>(info.param)) + (std::get<1>(info.param) ? "WithGradients" : "");
    });

} // namespace

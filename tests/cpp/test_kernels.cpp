// The kernels of every instruction set and dtype, without the dispatcher, against the reference.
#include <gtest/gtest.h>

#include <tuple>

#include "problem.h"

namespace {

using namespace testing_wmha;

constexpr int64_t largest = std::numeric_limits<int64_t>::max();
constexpr int64_t smallest = std::numeric_limits<int64_t>::min();
constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr int64_t query_tile = wmha::cpu::query_block;
constexpr int64_t key_tile = 64;
constexpr int64_t feature_tile = 48; // three vectors of fp32 with AVX-512, the widest register tile

/// What a dtype and its arithmetic lose, relative to the largest number of a tensor (but at least to 1).
double tolerance(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return 1e-13;
    case ScalarType::Float: return 1e-5;
    case ScalarType::BFloat16: return 1.5e-2;
    default: return 2e-3;
  }
}

/// Forward, backward and merge, each in one piece. Kernels are only called for at least one task.
void run(const wmha::cpu::Kernels& kernels, Problem& problem) {
  const AttentionParams& params = problem.params;
  if (wmha::cpu::forward_tasks(params) > 0) kernels.forward(params, 0, wmha::cpu::forward_tasks(params));
  const BackwardSchedule schedule(params);
  Tensor workspace = make_workspace(problem, schedule);
  if (schedule.tasks() > 0) kernels.backward(params, schedule, workspace.data(), 0, schedule.tasks());
  if (schedule.batch_kv_heads > 0) kernels.merge(params, schedule, workspace.data(), 0, schedule.batch_kv_heads);
  EXPECT_TRUE(workspace.surroundings_untouched());
}

class Kernels : public testing::TestWithParam<std::tuple<InstructionSet, ScalarType>> {
 protected:
  void SetUp() override {
    if (!set().supported) GTEST_SKIP() << "this CPU has no " << set().name;
  }
  const InstructionSet& set() const { return std::get<0>(GetParam()); }
  const wmha::cpu::Kernels& kernels() const { return *set().kernels; }
  ScalarType dtype() const { return std::get<1>(GetParam()); }

  void expect_close(const char* name, const Tensor& actual, const Tensor& expected, double slack) {
    EXPECT_TRUE(actual.surroundings_untouched()) << name << " was written outside of its elements";
    double magnitude = 1;
    expected.for_each([&](int64_t b, int64_t h, int64_t n, int64_t d) {
      const double x = std::abs(expected.get(b, h, n, d));
      if (x < infinity) magnitude = std::max(magnitude, x);
    });
    const double bound = slack * magnitude * tolerance(dtype());
    int failures = 0;
    expected.for_each([&](int64_t b, int64_t h, int64_t n, int64_t d) {
      const double a = actual.get(b, h, n, d), e = expected.get(b, h, n, d);
      if (a == e || std::abs(a - e) <= bound || ++failures > 3) return;
      ADD_FAILURE() << name << "[" << b << ", " << h << ", " << n << ", " << d << "] is " << a << ", expected " << e
                    << " within " << bound;
    });
  }

  /// Forward and backward agree with the reference, and write where they should and nowhere else.
  void check(const Case& c) {
    SCOPED_TRACE(testing::Message() << c);
    Problem problem(dtype(), c);
    run(kernels(), problem);
    const auto expected = solve(problem, c);
    expect_close("output", problem.output, expected->output, c.slack);
    expect_close("logsumexp", problem.logsumexp, expected->logsumexp, c.slack);
    expect_close("grad_query", problem.grad_query, expected->grad_query, c.slack);
    expect_close("grad_key", problem.grad_key, expected->grad_key, c.slack);
    expect_close("grad_value", problem.grad_value, expected->grad_value, c.slack);
    expect_exact_zeros(problem);
    if (c.grad_temperature) expect_temperature_gradient(problem, *expected, c);
  }

 private:
  /// What nobody sees has no gradient and no output: zero, not something small.
  void expect_exact_zeros(const Problem& problem) {
    const wmha::Window& window = problem.params.window;
    std::vector<bool> seen(window.keys, false);
    for (int64_t i = 0; i < problem.params.queries; ++i) {
      bool sees_any = false;
      for (int64_t j = 0; j < window.keys; ++j) {
        if (!reference::sees(window, i, j)) continue;
        sees_any = true;
        seen[j] = true;
      }
      if (sees_any) continue;
      expect_zero_row("output", problem.output, i);
      expect_zero_row("grad_query", problem.grad_query, i);
      for (int64_t h = 0; h < problem.params.heads; ++h) EXPECT_EQ(problem.logsumexp.get(0, h, i, 0), -infinity);
    }
    for (int64_t j = 0; j < window.keys; ++j) {
      if (seen[j]) continue;
      expect_zero_row("grad_key", problem.grad_key, j);
      expect_zero_row("grad_value", problem.grad_value, j);
    }
  }
  static void expect_zero_row(const char* name, const Tensor& tensor, int64_t row) {
    for (int64_t h = 0; h < tensor.heads && tensor.batch > 0; ++h) {
      for (int64_t d = 0; d < tensor.dim; ++d) EXPECT_EQ(tensor.get(0, h, row, d), 0) << name << " of row " << row;
    }
  }

  void expect_temperature_gradient(const Problem& problem, const Problem& expected, const Case& c) {
    const int64_t shares = BackwardSchedule(problem.params).chunks;
    for (int64_t row = 0; row < c.batch * c.heads; ++row) {
      double sum = 0;
      for (int64_t s = row * shares; s < (row + 1) * shares; ++s) sum += problem.grad_temperature[s];
      const double expected_sum = expected.grad_temperature[row];
      // A sum over all pairs of numbers that mostly cancel: the error grows with the number of queries.
      const double bound = c.slack * tolerance(dtype()) * (1 + std::abs(expected_sum) + double(c.queries));
      EXPECT_NEAR(sum, expected_sum, bound) << "temperature's gradient of head " << row;
    }
  }
};

/// Layouts in turn, so that tests of lengths meet all of them.
Layout layout(int64_t n) {
  constexpr Layout layouts[] = {{}, {.lead = 1}, {.gap = 3}, {.lead = 3, .gap = 1, .positions_first = true}};
  return layouts[n % 4];
}

// ---- Every length, from nothing to twice the tile ----

TEST_P(Kernels, TakeAnyNumberOfQueries) {
  for (int64_t n = 0; n <= 2 * query_tile + 1; ++n) {
    check({.name = "dense", .heads = 1, .kv_heads = 1, .queries = n, .layout = layout(n)});
    check({.name = "banded", .queries = n, .left = 9, .right = 3, .layout = layout(n)});
  }
}

TEST_P(Kernels, TakeAnyNumberOfKeys) {
  for (int64_t n = 0; n <= 2 * key_tile + 1; ++n) {
    check({.name = "dense", .heads = 1, .kv_heads = 1, .keys = n, .layout = layout(n)});
    check({.name = "banded", .keys = n, .left = 30, .right = 3, .layout = layout(n)});
  }
}

TEST_P(Kernels, TakeAnyKeyDimension) {
  for (int64_t n = 1; n <= 2 * feature_tile + 1; ++n) {
    check({.name = "banded", .queries = 21, .keys = 30, .key_dim = n, .left = 9, .right = 3, .layout = layout(n)});
  }
}

TEST_P(Kernels, TakeAnyValueDimension) {
  for (int64_t n = 1; n <= 2 * feature_tile + 1; ++n) {
    check({.name = "banded", .queries = 21, .keys = 30, .value_dim = n, .left = 9, .right = 3, .layout = layout(n)});
  }
}

TEST_P(Kernels, TakeEqualLengths) {
  for (const int64_t n : {1, 15, 16, 17, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129}) {
    check({.name = "causal", .queries = n, .keys = n, .left = 20, .right = 0, .layout = layout(n)});
  }
}

TEST_P(Kernels, TakeUsualAndLargeHeadDimensions) {
  for (const int64_t dim : {32, 64, 128, 256, 300}) {
    check({.name = "usual", .key_dim = dim, .value_dim = dim, .left = 9, .right = 0});
    check({.name = "wide keys", .key_dim = dim, .value_dim = 1, .left = 9, .right = 0});
  }
}

TEST_P(Kernels, TakeNoBatchesAndNoHeads) {
  check({.name = "no batches", .batch = 0});
  check({.name = "no heads", .heads = 0, .kv_heads = 0});
}

// ---- Layouts, heads, windows ----

TEST_P(Kernels, TakeAnyStrides) {
  const Case base = {.batch = 2, .heads = 4, .kv_heads = 2, .key_dim = 16, .value_dim = 16, .left = 12, .right = 4};
  for (const Layout& layout : std::initializer_list<Layout>{
           {},
           {.lead = 1},
           {.gap = 1},
           {.positions_first = true},
           {.lead = 16, .gap = 32, .positions_first = true},
           {.lead = 5, .gap = 7, .positions_first = true},
           {.expanded = true}}) {
    Case c = base;
    c.name = "strides";
    c.layout = layout;
    check(c);
  }
}

TEST_P(Kernels, GroupHeads) {
  for (const int64_t kv_heads : {1, 2, 8}) {
    check({.name = "grouped", .batch = 2, .heads = 8, .kv_heads = kv_heads, .left = 12, .right = 4});
  }
}

TEST_P(Kernels, KeepWithinAnyWindow) {
  constexpr int64_t n = 60;
  for (const int64_t keys : {n - 7, n, n + 60}) {
    for (const int64_t left : {int64_t{-1}, int64_t{0}, int64_t{1}, n - 1, n, n + 1, 2 * n, largest}) {
      for (const int64_t right : {int64_t{-1}, int64_t{0}, int64_t{1}, n - 1, n, n + 1, 2 * n, largest}) {
        check({.name = "window", .heads = 1, .kv_heads = 1, .queries = n, .keys = keys, .key_dim = 3, .value_dim = 2,
               .left = left, .right = right});
      }
    }
  }
}

TEST_P(Kernels, KeepWithinAWindowAtAnyOffset) {
  for (const int64_t offset : {smallest, smallest + 1, int64_t{-1000}, int64_t{-100}, int64_t{-30}, int64_t{-1},
                               int64_t{0}, int64_t{5}, int64_t{60}, int64_t{100}, largest - 20, largest}) {
    for (const int64_t left : {int64_t{-1}, int64_t{0}, int64_t{20}, largest}) {
      for (const int64_t right : {int64_t{-1}, int64_t{0}, int64_t{7}, largest}) {
        check({.name = "offset", .heads = 2, .kv_heads = 1, .queries = 100, .key_dim = 3, .value_dim = 2, .left = left,
               .right = right, .offset = offset});
      }
    }
  }
}

TEST_P(Kernels, SeeExactlyTheKeysOfTheWindow) {
  const Case c = {.name = "one-hot values", .heads = 1, .kv_heads = 1, .queries = 110, .keys = 90, .value_dim = 90,
                  .left = 70, .right = 5};
  Problem problem(dtype(), c);
  problem.query.fill(0); // hence equal weights
  problem.value.fill(0);
  for (int64_t j = 0; j < c.keys; ++j) problem.value.set(0, 0, j, j, 1);
  run(kernels(), problem);
  for (int64_t i = 0; i < c.queries; ++i) {
    for (int64_t j = 0; j < c.keys; ++j) {
      ASSERT_EQ(problem.output.get(0, 0, i, j) > 0, reference::sees(problem.params.window, i, j)) << i << ", " << j;
    }
  }
}

// ---- The backward pass in several chunks ----

TEST_P(Kernels, MergeTheSharesOfChunks) {
  const Case small = {.heads = 2, .kv_heads = 1, .queries = 1100, .keys = 1100, .key_dim = 3, .value_dim = 2};
  const auto with = [&](const char* name, int64_t keys, int64_t left, int64_t right, std::optional<int64_t> offset) {
    Case c = small;
    c.name = name;
    c.keys = keys;
    c.left = left;
    c.right = right;
    c.offset = offset;
    c.temperature = {0.5, 2.0};
    ASSERT_GT(BackwardSchedule(Problem(dtype(), c).params).chunks, 1);
    check(c);
  };
  with("narrow", 1100, 30, 11, {});
  with("itself alone", 1100, 0, 0, {});
  with("dense", 300, -1, -1, {});
  with("causal", 300, -1, 0, -100);
  with("the future", 300, 0, -1, -900);
  with("the first chunk sees nothing", 500, 30, 0, {});
  with("the last chunk sees nothing", 500, 30, 0, 0);
  with("no chunk sees anything", 500, 30, 0, 5000);
  with("keys beyond the last query", 2000, 30, 5, 0);
  with("keys before the first query", 2000, 30, 5, {});
}

// ---- Options ----

TEST_P(Kernels, AgreeUnderEveryOption) {
  for (const Case& c : std::initializer_list<Case>{
           {.name = "scale 0", .scale = 0.0},
           {.name = "negative scale", .left = 20, .right = 2, .scale = -0.7},
           {.name = "temperature", .left = 20, .right = 2, .temperature = {0.5}},
           {.name = "temperature of all heads", .heads = 4, .temperature = {0.75}, .temperature_pointer = true},
           {.name = "temperatures", .heads = 4, .kv_heads = 2, .temperature = {0.5, 1.0, 2.0, 8.0}},
           {.name = "a high temperature", .temperature = {1e3}},
           {.name = "a low temperature", .left = 20, .right = 2, .temperature = {1e-3}, .slack = 100},
           {.name = "softcap", .left = 20, .right = 2, .softcap = 2},
           {.name = "a small softcap, large scores", .softcap = 0.5, .magnitude = 10, .slack = 10},
           {.name = "softcap and temperatures", .left = 20, .right = 2, .softcap = 3, .temperature = {0.5, 2.0}},
           {.name = "no gradient of logsumexp", .left = 20, .right = 2, .grad_logsumexp = false},
           {.name = "no gradient of the temperature", .left = 20, .right = 2, .grad_temperature = false},
           {.name = "scores about -120", .queries = 61, .keys = 77, .scale = 1.0, .shift = -120, .slack = 10},
           {.name = "scores about 120", .queries = 61, .keys = 77, .scale = 1.0, .shift = 120, .slack = 10},
           {.name = "scores about -1e5", .left = 20, .right = 2, .scale = 1.0, .shift = -102400, .slack = 3000},
           {.name = "products beyond fp16", .key_dim = 64, .scale = 1e-4, .magnitude = 200, .slack = 10},
       }) {
    check(c);
  }
}

TEST_P(Kernels, AgreeAtEveryPartialTileWhenScoresAreVeryNegative) {
  // Where a padded lane holds a score of 0, its weight exp(0 - logsumexp) would overflow.
  for (int64_t n = 1; n <= 2 * query_tile + 1; n += 5) {
    check({.name = "very negative", .queries = n, .keys = n + 3, .left = 30, .right = 2, .scale = 1.0, .shift = -120,
           .slack = 10});
  }
}

// ---- Dropout ----

TEST_P(Kernels, DropTheSameWeightsForwardAndBackward) {
  for (const double p : {1e-3, 0.1, 0.5, 0.9, 0.999999, 1.0}) {
    for (const Case& c : std::initializer_list<Case>{
             {.name = "dense", .batch = 2, .heads = 4, .kv_heads = 2, .dropout = p, .slack = p < 0.9 ? 1. : 10.},
             {.name = "windowed", .queries = 77, .left = 21, .right = 5, .dropout = p, .slack = p < 0.9 ? 1. : 10.},
             {.name = "with everything", .queries = 130, .keys = 133, .left = 60, .right = 6, .softcap = 2,
              .temperature = {0.5, 2.0}, .dropout = p, .slack = p < 0.9 ? 1. : 10.}}) {
      check(c);
    }
  }
}

TEST_P(Kernels, DropExactlyTheWeightsOfTheMask) {
  const Case c = {.name = "one-hot values", .batch = 2, .heads = 2, .kv_heads = 1, .queries = 60, .keys = 90,
                  .value_dim = 90, .left = 70, .right = 5, .dropout = 0.3};
  Problem problem(dtype(), c);
  problem.query.fill(0);
  problem.value.fill(0);
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t j = 0; j < c.keys; ++j) problem.value.set(b, 0, j, j, 1);
  }
  run(kernels(), problem);
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t h = 0; h < c.heads; ++h) {
      for (int64_t i = 0; i < c.queries; ++i) {
        for (int64_t j = 0; j < c.keys; ++j) {
          const bool kept = reference::dropout_factor(problem.params, b * c.heads + h, i, j) > 0;
          ASSERT_EQ(problem.output.get(b, h, i, j) > 0, kept && reference::sees(problem.params.window, i, j));
        }
      }
    }
  }
}

// ---- Nothing leaks from what a query does not see ----

double largest_finite(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return std::numeric_limits<double>::max();
    case ScalarType::Float: return std::numeric_limits<float>::max();
    case ScalarType::BFloat16: return 3e38;
    default: return 65504;
  }
}

TEST_P(Kernels, LeakNothingFromAKeyToQueriesThatDoNotSeeIt) {
  const Case c = {.name = "leak", .heads = 2, .kv_heads = 1, .queries = 120, .keys = 130, .left = 12, .right = 3};
  for (const double dropout : {0.0, 0.2}) {
    Case dropping = c;
    dropping.dropout = dropout;
    Problem before(dtype(), dropping), after(dtype(), dropping);
    constexpr int64_t key = 66;
    for (int64_t d = 0; d < c.key_dim; ++d) after.key.set(0, 0, key, d, d % 2 ? largest_finite(dtype()) : -1000);
    for (int64_t d = 0; d < c.value_dim; ++d) after.value.set(0, 0, key, d, -largest_finite(dtype()));
    run(kernels(), before);
    run(kernels(), after);
    for (int64_t h = 0; h < c.heads; ++h) {
      for (int64_t i = 0; i < c.queries; ++i) {
        if (reference::sees(after.params.window, i, key)) continue;
        ASSERT_TRUE(after.output.row_bitwise_equal(before.output, 0, h, i)) << "query " << i;
        ASSERT_TRUE(after.logsumexp.row_bitwise_equal(before.logsumexp, 0, h, i)) << "query " << i;
        ASSERT_TRUE(after.grad_query.row_bitwise_equal(before.grad_query, 0, h, i)) << "query " << i;
      }
    }
  }
}

TEST_P(Kernels, LeakNothingFromAQueryToKeysThatItDoesNotSee) {
  const Case c = {.name = "leak", .heads = 2, .kv_heads = 1, .queries = 120, .keys = 130, .left = 12, .right = 3};
  Problem before(dtype(), c), after(dtype(), c);
  constexpr int64_t query = 57;
  const double large = std::sqrt(largest_finite(dtype()));
  for (int64_t d = 0; d < c.key_dim; ++d) after.query.set(0, 1, query, d, d % 2 ? large : -large);
  for (int64_t d = 0; d < c.value_dim; ++d) after.grad_output.set(0, 1, query, d, -large);
  run(kernels(), before);
  run(kernels(), after);
  for (int64_t j = 0; j < c.keys; ++j) {
    if (reference::sees(after.params.window, query, j)) continue;
    ASSERT_TRUE(after.grad_key.row_bitwise_equal(before.grad_key, 0, 0, j)) << "key " << j;
    ASSERT_TRUE(after.grad_value.row_bitwise_equal(before.grad_value, 0, 0, j)) << "key " << j;
  }
}

TEST_P(Kernels, IgnoreNaNAndInfinityInKeysThatNoQuerySees) {
  for (const double poison : {std::numeric_limits<double>::quiet_NaN(), infinity, -infinity}) {
    Case c = {.name = "poison", .queries = 70, .keys = 200, .left = 12, .right = 3, .offset = 65, .dropout = 0.2};
    Problem clean(dtype(), c), poisoned(dtype(), c);
    const Range seen = clean.params.window.keys_of(Range{0, c.queries});
    const auto poison_unseen = [&](Tensor& tensor) {
      tensor.for_each([&](int64_t b, int64_t h, int64_t n, int64_t d) {
        if (n < seen.begin || n >= seen.end) tensor.set(b, h, n, d, poison);
      });
    };
    poison_unseen(poisoned.key);
    poison_unseen(poisoned.value);
    run(kernels(), clean);
    run(kernels(), poisoned);
    for (size_t t = 0; t < clean.outputs().size(); ++t) {
      EXPECT_TRUE(poisoned.outputs()[t]->bitwise_equal(*clean.outputs()[t])) << "tensor " << t << ", " << poison;
    }
    EXPECT_EQ(poisoned.grad_temperature, clean.grad_temperature);
  }
}

TEST_P(Kernels, PassNaNOnToThoseWhoSeeIt) {
  const Case c = {.name = "NaN", .heads = 1, .kv_heads = 1, .queries = 70, .keys = 70, .left = 4, .right = 2};
  Problem problem(dtype(), c);
  problem.key.set(0, 0, 30, 0, std::numeric_limits<double>::quiet_NaN());
  kernels().forward(problem.params, 0, wmha::cpu::forward_tasks(problem.params));
  for (int64_t i = 0; i < c.queries; ++i) {
    if (reference::sees(problem.params.window, i, 30)) {
      EXPECT_TRUE(std::isnan(problem.output.get(0, 0, i, 0))) << "query " << i;
      EXPECT_TRUE(std::isnan(problem.logsumexp.get(0, 0, i, 0))) << "query " << i;
    }
  }
}

// ---- Tasks ----

TEST_P(Kernels, GiveTheSameBitsHoweverTheTasksAreSplit) {
  for (const Case& c : std::initializer_list<Case>{
           {.name = "narrow", .batch = 2, .heads = 4, .kv_heads = 2, .queries = 1000, .keys = 1010, .left = 40,
            .right = 9, .temperature = {0.5, 1.0, 2.0, 4.0}, .dropout = 0.1},
           {.name = "causal", .heads = 2, .kv_heads = 1, .queries = 1500, .keys = 700, .right = 0}}) {
    SCOPED_TRACE(testing::Message() << c);
    Problem whole(dtype(), c), pieces(dtype(), c);
    run(kernels(), whole);

    std::mt19937 random(7);
    const auto in_pieces = [&](int64_t tasks, const auto& call) {
      std::vector<Range> ranges;
      for (int64_t begin = 0; begin < tasks;) {
        const int64_t end = std::min<int64_t>(tasks, begin + 1 + random() % 3);
        ranges.push_back({begin, end});
        begin = end;
      }
      ASSERT_GT(ranges.size(), 1) << "nothing to split";
      std::shuffle(ranges.begin(), ranges.end(), random);
      for (const Range& range : ranges) call(range.begin, range.end);
    };
    in_pieces(wmha::cpu::forward_tasks(pieces.params), [&](int64_t begin, int64_t end) {
      kernels().forward(pieces.params, begin, end);
    });
    const BackwardSchedule schedule(pieces.params);
    Tensor workspace = make_workspace(pieces, schedule);
    in_pieces(schedule.tasks(), [&](int64_t begin, int64_t end) {
      kernels().backward(pieces.params, schedule, workspace.data(), begin, end);
    });
    for (int64_t task = schedule.batch_kv_heads - 1; task >= 0; --task) {
      kernels().merge(pieces.params, schedule, workspace.data(), task, task + 1);
    }
    for (size_t t = 0; t < whole.outputs().size(); ++t) {
      EXPECT_TRUE(pieces.outputs()[t]->bitwise_equal(*whole.outputs()[t])) << "tensor " << t;
    }
    EXPECT_EQ(pieces.grad_temperature, whole.grad_temperature);
  }
}

std::string dtype_name(ScalarType dtype) {
  constexpr const char* names[] = {"Double", "Float", "BFloat16", "Half"};
  return names[static_cast<int>(dtype)];
}

INSTANTIATE_TEST_SUITE_P(
    Every,
    Kernels,
    testing::Combine(
        testing::ValuesIn(instruction_sets()),
        testing::Values(ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half)),
    [](const auto& info) { return std::get<0>(info.param).name + dtype_name(std::get<1>(info.param)); });

} // namespace

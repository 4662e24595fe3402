// Few queries on CUDA: every number of keys around the ends of splits and tiles, every head dimension, with and without
// tensor cores; and what the splits promise to the bit.
#include "../../csrc/cuda/decode_schedule.h"
#include "kernel_fixture.h"

namespace {

using namespace testing_wmha;
using wmha::cuda::DecodeSchedule;

class FewQueries : public Kernels {
 protected:
  /// check(), of what runs in splits. With gradients it would take most of the time for what other tests do.
  void check_decode(const Case& c) {
    SCOPED_TRACE(testing::Message() << c);
    Problem problem(dtype(), c);
    ASSERT_TRUE(decodes(problem.params));
    decode(set(), problem);
    const auto expected = solve_forward(problem, c);
    expect_close("output", problem.output, expected->output, c.slack);
    expect_close("logsumexp", problem.logsumexp, expected->logsumexp, c.slack);
  }

 private:
  static std::unique_ptr<Problem> solve_forward(const Problem& problem, Case c) {
    c.layout = {};
    auto solution = std::make_unique<Problem>(ScalarType::Double, c);
    solution->copy_inputs(problem);
    reference::forward(solution->params);
    return solution;
  }
};

/// Decoding, with dimensions that run on tensor cores where the type does.
Case decoding(Case c) {
  if (c.queries == 50) c.queries = 1;
  if (c.keys == 70) c.keys = 300;
  if (c.key_dim == 7) c.key_dim = 16;
  if (c.value_dim == 5) c.value_dim = 8;
  return c;
}

// ---- Sizes ----

TEST_P(FewQueries, TakeAnyNumberOfKeys) {
  constexpr int64_t split = DecodeSchedule::shortest_split;
  for (int64_t splits = 1; splits <= 3; ++splits) {
    for (int64_t n = splits * split - 18; n <= splits * split + 66; ++n) {
      if (n <= split) continue;
      check_decode(decoding({.name = "dense", .heads = 1, .kv_heads = 1, .keys = n}));
      check_decode({.name = "odd", .queries = 1, .keys = n, .layout = {.lead = n % 3}});
      // The first split begins anywhere between two multiples of 16.
      check_decode(decoding(
          {.name = "banded",
           .kv_heads = 1,
           .queries = 3,
           .keys = n + 50,
           .left = n - 1,
           .right = 2,
           .offset = n + 20}));
    }
  }
}

TEST_P(FewQueries, AreNotSplitWhereItDoesNotPay) {
  for (const Case& c : std::initializer_list<Case>{
           {.name = "few keys", .queries = 1, .keys = DecodeSchedule::shortest_split},
           {.name = "a narrow window", .queries = 1, .keys = 1000, .left = 100, .right = 0},
           {.name = "many queries", .queries = DecodeSchedule::most_queries + 1, .keys = 1000},
           {.name = "no queries", .queries = 0, .keys = 1000},
           {.name = "no keys", .queries = 1, .keys = 0},
           {.name = "no batches", .batch = 0, .queries = 1, .keys = 1000},
           {.name = "no heads", .heads = 0, .kv_heads = 0, .queries = 1, .keys = 1000},
           {.name = "no heads of queries", .heads = 0, .queries = 1, .keys = 1000}}) {
    const Problem problem(dtype(), c);
    EXPECT_FALSE(decodes(problem.params)) << c;
    EXPECT_EQ(wmha::cuda::forward_workspace_size(problem.params), 0) << c;
  }
}

TEST_P(FewQueries, TakeAnyHeadDimension) {
  for (int64_t n = 1; n <= 40; ++n) {
    check_decode({.name = "equal", .queries = 1, .keys = 150, .key_dim = n, .value_dim = n});
    check_decode({.name = "keys", .queries = 2, .keys = 150, .key_dim = n, .value_dim = 8, .left = 140});
    check_decode({.name = "values", .queries = 2, .keys = 150, .key_dim = 8, .value_dim = n, .left = 140});
  }
  for (const int64_t n :
       {48, 56, 63, 64, 65, 72, 96, 100, 120, 127, 128, 129, 136, 192, 200, 255, 256, 257, 264, 300, 520}) {
    check_decode({.name = "equal", .queries = 1, .keys = 150, .key_dim = n, .value_dim = n});
    check_decode({.name = "keys", .queries = 3, .keys = 150, .key_dim = n, .value_dim = 8, .left = 140});
    check_decode({.name = "values", .queries = 3, .keys = 150, .key_dim = 8, .value_dim = n, .left = 140});
  }
}

TEST_P(FewQueries, TakeAnyNumberOfRows) {
  for (int64_t queries = 1; queries <= DecodeSchedule::most_queries; ++queries) {
    for (const int64_t heads : {1, 2, 3, 8}) {
      check_decode(decoding(
          {.name = "rows",
           .batch = 2,
           .heads = 2 * heads,
           .kv_heads = 2,
           .queries = queries,
           .keys = 200,
           .left = 170,
           .right = 1,
           .dropout = queries % 2 * 0.2}));
    }
  }
}

TEST_P(FewQueries, TakeGroupsOfHeads) {
  for (const int64_t kv_heads : {1, 2, 8}) {
    for (const int64_t dim : {13, 64, 96, 128, 256}) {
      check_decode(
          {.name = "grouped",
           .batch = 2,
           .heads = 8,
           .kv_heads = kv_heads,
           .queries = 2,
           .keys = 333,
           .key_dim = dim,
           .value_dim = dim,
           .left = 290,
           .right = 0});
    }
  }
}

TEST_P(FewQueries, TakeAnyStrides) {
  for (const Layout& layout : std::initializer_list<Layout>{
           {.lead = 1},
           {.lead = 8},
           {.gap = 1},
           {.gap = 8},
           {.positions_first = true},
           {.lead = 16, .gap = 24, .positions_first = true},
           {.lead = 5, .gap = 7, .positions_first = true},
           {.expanded = true}}) {
    check_decode(decoding({.name = "strides", .batch = 2, .heads = 4, .kv_heads = 2, .queries = 3, .layout = layout}));
  }
}

// ---- Windows and options ----

TEST_P(FewQueries, KeepWithinAnyWindow) {
  constexpr int64_t largest = std::numeric_limits<int64_t>::max();
  for (const int64_t left : {int64_t{-1}, int64_t{200}, int64_t{255}, int64_t{256}, int64_t{1000}, largest}) {
    for (const int64_t right : {int64_t{-1}, int64_t{0}, int64_t{1}, int64_t{100}, largest}) {
      for (const int64_t offset : {-3, 150, 299, 310, 380, 430}) {
        const Case c = decoding({.name = "window", .queries = 9, .left = left, .right = right, .offset = offset});
        if (decodes(Problem(dtype(), c).params)) check_decode(c);
      }
    }
  }
}

TEST_P(FewQueries, AgreeUnderEveryOption) {
  for (const Case& c : std::initializer_list<Case>{
           {.name = "scale 0", .scale = 0.0},
           {.name = "negative scale", .queries = 4, .scale = -0.7},
           {.name = "temperature", .temperature = {0.5}},
           {.name = "temperature of all heads", .heads = 4, .temperature = {0.75}, .temperature_pointer = true},
           {.name = "temperatures", .heads = 4, .kv_heads = 2, .queries = 3, .temperature = {0.5, 1.0, 2.0, 8.0}},
           {.name = "softcap", .queries = 3, .softcap = 2},
           {.name = "softcap and temperatures", .kv_heads = 1, .softcap = 3, .temperature = {0.5, 2.0}},
           {.name = "large scores", .keys = 700, .scale = 3.0, .magnitude = 3, .slack = 10},
           {.name = "scores about -120", .scale = 1.0, .shift = -120, .slack = 10},
           {.name = "scores about 120", .scale = 1.0, .shift = 120, .slack = 10},
           {.name = "scores about -1e5", .scale = 1.0, .shift = -102400, .slack = 3000},
           {.name = "dropout", .batch = 2, .heads = 4, .kv_heads = 2, .queries = 5, .dropout = 0.3},
           {.name = "dropout of all", .dropout = 1.0},
           {.name = "longer splits", .heads = 128, .kv_heads = 128, .keys = 1120, .left = 1110}}) {
    check_decode(decoding(c));
    Case general = decoding(c);
    general.key_dim = 7;
    general.value_dim = 5;
    check_decode(general);
  }
}

// ---- Promises ----

TEST_P(FewQueries, SeeAndDropExactlyTheWeightsOfTheMask) {
  for (const double dropout : {0.0, 0.4}) {
    for (const int64_t dim : {15, 16}) {
      Case c = {.name = "one-hot values", .batch = 2, .heads = 4, .kv_heads = 2, .queries = 5};
      c.keys = 190;
      c.key_dim = dim;
      c.value_dim = dim == 16 ? 192 : 190;
      c.left = 137;
      c.right = 5;
      c.offset = 170;
      c.dropout = dropout;
      Problem problem(dtype(), c);
      problem.query.fill(0); // hence equal weights
      problem.value.fill(0);
      for (int64_t b = 0; b < c.batch; ++b) {
        for (int64_t h = 0; h < c.kv_heads; ++h) {
          for (int64_t j = 0; j < c.keys; ++j) problem.value.set(b, h, j, j, 1);
        }
      }
      ASSERT_TRUE(decodes(problem.params));
      decode(set(), problem);
      problem.output.for_each([&](int64_t b, int64_t h, int64_t i, int64_t j) {
        const bool kept = dropout == 0 || reference::dropout_factor(problem.params, b * c.heads + h, i, j) > 0;
        const bool expected = kept && reference::sees(problem.params.window, i, j);
        EXPECT_EQ(problem.output.get(b, h, i, j) > 0, expected) << "head " << h << ", query " << i << ", key " << j;
      });
    }
  }
}

TEST_P(FewQueries, IgnoreNaNAndInfinityInKeysThatNoQuerySees) {
  for (const double poison : {std::numeric_limits<double>::quiet_NaN(), infinity, -infinity}) {
    for (const int64_t dim : {7, 16}) {
      Case c = {.name = "poison", .kv_heads = 1, .queries = 3, .keys = 500, .key_dim = dim, .value_dim = dim};
      c.left = 300;
      c.right = 3;
      c.offset = 421;
      c.dropout = 0.2;
      Problem clean(dtype(), c), poisoned(dtype(), c);
      const Range seen = clean.params.window.keys_of(Range{0, c.queries});
      for (Tensor* tensor : {&poisoned.key, &poisoned.value}) {
        tensor->for_each([&](int64_t b, int64_t h, int64_t n, int64_t d) {
          if (n < seen.begin || n >= seen.end) tensor->set(b, h, n, d, poison);
        });
      }
      decode(set(), clean);
      decode(set(), poisoned);
      EXPECT_TRUE(poisoned.output.bitwise_equal(clean.output));
      EXPECT_TRUE(poisoned.logsumexp.bitwise_equal(clean.logsumexp));
    }
  }
}

TEST_P(FewQueries, LeakNothingFromAKeyToQueriesThatDoNotSeeIt) {
  const Case c = decoding({.name = "leak", .kv_heads = 1, .queries = 4, .keys = 400, .left = 300, .right = 0});
  Problem before(dtype(), c), after(dtype(), c);
  const double large = dtype() == ScalarType::Half ? 65504 : 1e30;
  for (const int64_t key : {96, 398, 399}) { // seen by the first query or by the last ones alone
    for (int64_t d = 0; d < c.key_dim; ++d) after.key.set(0, 0, key, d, d % 2 ? large : -1000);
    for (int64_t d = 0; d < c.value_dim; ++d) after.value.set(0, 0, key, d, -large);
  }
  decode(set(), before);
  decode(set(), after);
  for (int64_t h = 0; h < c.heads; ++h) {
    EXPECT_TRUE(after.output.row_bitwise_equal(before.output, 0, h, 1));
    EXPECT_TRUE(after.logsumexp.row_bitwise_equal(before.logsumexp, 0, h, 1));
    EXPECT_FALSE(after.output.row_bitwise_equal(before.output, 0, h, 3));
  }
}

TEST_P(FewQueries, PassNaNOnToThoseWhoSeeIt) {
  for (const int64_t dim : {7, 16}) {
    for (const bool everywhere : {false, true}) { // of a split
      Case c = decoding({.name = "NaN", .kv_heads = 1, .queries = 2, .keys = 400, .left = 300, .right = 0});
      c.key_dim = dim;
      Problem problem(dtype(), c);
      for (int64_t key = 98; key <= (everywhere ? 260 : 98); ++key) {
        problem.key.set(0, 0, key, 0, std::numeric_limits<double>::quiet_NaN());
      }
      decode(set(), problem);
      EXPECT_TRUE(std::isnan(problem.output.get(0, 0, 0, 0)));
      EXPECT_TRUE(std::isnan(problem.logsumexp.get(0, 0, 0, 0)));
      EXPECT_EQ(std::isnan(problem.output.get(0, 0, 1, 0)), everywhere); // sees keys from 99 on
    }
  }
}

TEST_P(FewQueries, GiveZeroToQueriesThatSeeNoKey) {
  for (const int64_t dim : {7, 16}) {
    // Where some do, the others see too few keys for a split to pay.
    Case c = {.name = "sees none", .kv_heads = 1, .queries = 16, .keys = 400, .key_dim = dim, .value_dim = dim};
    c.right = 0;
    c.offset = -5;
    Problem problem(dtype(), c);
    decode(set(), problem);
    for (int64_t i = 0; i < c.queries; ++i) {
      for (int64_t h = 0; h < c.heads; ++h) {
        EXPECT_EQ(problem.logsumexp.get(0, h, i, 0) == -infinity, i < 5) << "query " << i;
        EXPECT_TRUE(i >= 5 || problem.output.get(0, h, i, dim - 1) == 0) << "query " << i;
      }
    }
  }
}

TEST_P(FewQueries, GiveTheSameBitsEachTime) {
  for (const int64_t dim : {7, 64}) {
    const Case c = {
        .name = "repeated", .heads = 8, .kv_heads = 2, .queries = 3, .keys = 900, .key_dim = dim, .value_dim = dim};
    Problem once(dtype(), c), again(dtype(), c);
    decode(set(), once);
    decode(set(), again);
    EXPECT_TRUE(again.output.bitwise_equal(once.output));
    EXPECT_TRUE(again.logsumexp.bitwise_equal(once.logsumexp));
  }
}

TEST_P(FewQueries, AreRecognizedByForward) {
  for (const int64_t queries : {1, 17}) {
    const Case c = decoding({.name = "dispatch", .heads = 8, .kv_heads = 2, .queries = queries, .keys = 900});
    Problem through_forward(dtype(), c), directly(dtype(), c);
    Tensor workspace(directly.acc, 1, 1, 1, wmha::cuda::forward_workspace_size(directly.params));
    wmha::cuda::forward(through_forward.params, workspace.data(), test_stream());
    expect_finished();
    EXPECT_EQ(decodes(directly.params), queries == 1);
    if (decodes(directly.params)) {
      decode(set(), directly);
      EXPECT_FALSE(std::isnan(workspace.get(0, 0, 0, 0))) << "no state was written";
    } else {
      wmha::cuda::forward_in_tiles(directly.params, test_stream());
      expect_finished();
    }
    EXPECT_TRUE(through_forward.output.bitwise_equal(directly.output));
    EXPECT_TRUE(through_forward.logsumexp.bitwise_equal(directly.logsumexp));
  }
}

INSTANTIATE_TEST_SUITE_P(, FewQueries, every_kernel(), kernel_name);

} // namespace

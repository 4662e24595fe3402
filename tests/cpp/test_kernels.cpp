// The kernels against the reference: every length, layout, window and option.
#include "kernel_fixture.h"

namespace {

using namespace testing_wmha;

constexpr int64_t largest = std::numeric_limits<int64_t>::max();
constexpr int64_t smallest = std::numeric_limits<int64_t>::min();
constexpr int64_t query_tile = 96;
constexpr int64_t key_tile = 96;     // with AMX: 384
constexpr int64_t feature_tile = 48; // three vectors of fp32 with AVX-512, the widest register tile

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

TEST_P(Kernels, TakeMoreKeysThanAnyTile) {
  for (const int64_t n : {383, 384, 385, 400, 415, 416, 767, 768, 769, 800}) {
    check({.name = "dense", .heads = 1, .kv_heads = 1, .queries = 100, .keys = n, .layout = layout(n)});
    check({.name = "banded", .queries = 100, .keys = n, .left = 301, .right = 33, .layout = layout(n)});
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

TEST_P(Kernels, TakeMoreKeysThanTheSecondCacheHolds) {
  Case c{.heads = 1, .kv_heads = 1, .queries = 70, .keys = 830, .key_dim = 300, .value_dim = 299, .left = 829};
  c.name = "some queries' score of a key that later ones don't see is far from all others";
  c.offset = 845; // later queries don't see the first keys of earlier ones
  c.scale = 0.2;
  c.slack = 10;
  check(c, [&](Problem& problem) {
    for (int64_t i = 0; i < c.queries; ++i) problem.query.set(0, 0, i, 0, i / 32 == 1 ? 1 : 0);
    problem.key.set(0, 0, 70, 0, 300);
  });
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
        check(
            {.name = "window",
             .heads = 1,
             .kv_heads = 1,
             .queries = n,
             .keys = keys,
             .key_dim = 3,
             .value_dim = 2,
             .left = left,
             .right = right});
      }
    }
  }
}

TEST_P(Kernels, KeepWithinAWindowAtAnyOffset) {
  for (const int64_t offset :
       {smallest, smallest + 1, int64_t{-1000}, int64_t{-100}, int64_t{-30}, int64_t{-1}, int64_t{0}, int64_t{5},
        int64_t{60}, int64_t{100}, largest - 20, largest}) {
    for (const int64_t left : {int64_t{-1}, int64_t{0}, int64_t{20}, largest}) {
      for (const int64_t right : {int64_t{-1}, int64_t{0}, int64_t{7}, largest}) {
        check(
            {.name = "offset",
             .heads = 2,
             .kv_heads = 1,
             .queries = 100,
             .key_dim = 3,
             .value_dim = 2,
             .left = left,
             .right = right,
             .offset = offset});
      }
    }
  }
}

// ---- Few queries, many keys ----

TEST_P(Kernels, TakeFewQueries) {
  for (const int64_t keys : {0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 128, 255, 256, 257, 600, 3000}) {
    check({.name = "one", .heads = 2, .kv_heads = 2, .queries = 1, .keys = keys, .layout = layout(keys)});
    check({.name = "group", .heads = 8, .kv_heads = 1, .queries = 1, .keys = keys, .left = 500, .right = 0});
    check({.name = "three", .heads = 4, .kv_heads = 2, .queries = 3, .keys = keys, .left = 40, .layout = layout(keys)});
    check(
        {.name = "everything",
         .batch = 2,
         .heads = 4,
         .kv_heads = 2,
         .queries = 4,
         .keys = keys,
         .key_dim = 33,
         .value_dim = 100,
         .left = 300,
         .right = 1,
         .offset = keys - 6,
         .softcap = 2,
         .temperature = {0.5, 1.0, 2.0, 8.0},
         .dropout = 0.2});
  }
}

TEST_P(Kernels, TakeAnyNumberOfQueriesWhoseHeadsShareAKey) {
  constexpr int64_t dims[] = {1, 2, 4, 6, 8, 12, 16, 40};
  int64_t n = 0;
  for (int64_t queries = 1; queries <= 9; ++queries) {
    for (const int64_t group : {1, 2, 3, 5, 16}) {
      for (int64_t turn = 0; turn < 3; ++turn, ++n) { // so many dimensions for each, all of them in turn
        check(
            {.name = "few queries",
             .heads = group,
             .kv_heads = 1,
             .queries = queries,
             .key_dim = dims[n % 8],
             .value_dim = 41 - dims[n % 8],
             .left = 66,
             .right = 0,
             .layout = layout(n)});
      }
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
    ASSERT_GT(temperature_shares(set(), Problem(dtype(), c).params), c.batch * c.heads);
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
    check(
        {.name = "very negative",
         .queries = n,
         .keys = n + 3,
         .left = 30,
         .right = 2,
         .scale = 1.0,
         .shift = -120,
         .slack = 10});
  }
}

// ---- Dropout ----

TEST_P(Kernels, DropTheSameWeightsForwardAndBackward) {
  for (const double p : {1e-3, 0.1, 0.5, 0.9, 0.999999, 1.0}) {
    for (const Case& c : std::initializer_list<Case>{
             {.name = "dense", .batch = 2, .heads = 4, .kv_heads = 2, .dropout = p, .slack = p < 0.9 ? 1. : 10.},
             {.name = "windowed", .queries = 77, .left = 21, .right = 5, .dropout = p, .slack = p < 0.9 ? 1. : 10.},
             {.name = "with everything",
              .queries = 130,
              .keys = 133,
              .left = 60,
              .right = 6,
              .softcap = 2,
              .temperature = {0.5, 2.0},
              .dropout = p,
              .slack = p < 0.9 ? 1. : 10.}}) {
      check(c);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, Kernels, every_kernel(), kernel_name);

} // namespace

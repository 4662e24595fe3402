// The kernels on tensor cores: half types, head dimensions in chunks of 16 bytes. The other tests' dimensions are odd,
// so that none of them gets here.
#include "kernel_fixture.h"

namespace {

using namespace testing_wmha;

class TensorCores : public Kernels {
 protected:
  void check_on_tensor_cores(const Case& c) {
    SCOPED_TRACE(testing::Message() << c);
    ASSERT_TRUE(wmha::cuda::gradients_run_on_tensor_cores(Problem(dtype(), c).params));
    check(c);
  }
};

/// A case with head dimensions that suit.
Case with_dims(int64_t key_dim, int64_t value_dim, Case c) {
  c.key_dim = key_dim;
  c.value_dim = value_dim;
  return c;
}

TEST_P(TensorCores, TakeAnyNumberOfQueries) {
  for (int64_t n = 0; n <= 270; n += n < 130 ? 1 : 9) {
    check_on_tensor_cores(with_dims(16, 8, {.name = "dense", .heads = 1, .kv_heads = 1, .queries = n}));
    check_on_tensor_cores(with_dims(8, 32, {.name = "banded", .queries = n, .left = 9, .right = 3}));
  }
}

TEST_P(TensorCores, TakeAnyNumberOfKeys) {
  for (int64_t n = 0; n <= 270; n += n < 130 ? 1 : 9) {
    check_on_tensor_cores(with_dims(16, 8, {.name = "dense", .heads = 1, .kv_heads = 1, .keys = n}));
    check_on_tensor_cores(with_dims(8, 32, {.name = "banded", .keys = n, .left = 30, .right = 3}));
  }
}

TEST_P(TensorCores, TakeAnyHeadDimension) {
  for (int64_t n = 8; n <= 256; n += 8) {
    check_on_tensor_cores(with_dims(n, n, {.name = "equal", .queries = 70, .keys = 90, .left = 20, .right = 3}));
    check_on_tensor_cores(with_dims(n, 8, {.name = "keys", .queries = 21, .keys = 30, .left = 9, .right = 3}));
    check_on_tensor_cores(with_dims(8, n, {.name = "values", .queries = 21, .keys = 30, .left = 9, .right = 3}));
  }
}

TEST_P(TensorCores, TakeNothing) {
  check_on_tensor_cores(with_dims(16, 16, {.name = "no batch", .batch = 0}));
  check_on_tensor_cores(with_dims(16, 16, {.name = "no query heads", .heads = 0}));
  check_on_tensor_cores(with_dims(16, 16, {.name = "no heads", .heads = 0, .kv_heads = 1}));
}

TEST_P(TensorCores, TakeAnyStridesInChunks) {
  for (const Layout& layout : std::initializer_list<Layout>{
           {.lead = 8}, {.gap = 8}, {.positions_first = true}, {.lead = 16, .gap = 24, .positions_first = true}}) {
    check_on_tensor_cores(
        with_dims(24, 40, {.batch = 2, .heads = 4, .kv_heads = 2, .left = 12, .right = 4, .layout = layout}));
  }
}

TEST_P(TensorCores, KeepWithinAnyWindow) {
  for (const int64_t keys : {40, 100, 190}) {
    for (const int64_t left : {-1, 0, 1, 15, 16, 17, 63, 64, 65, 1000}) {
      for (const int64_t right : {-1, 0, 1, 15, 16, 17, 64, 1000}) {
        check_on_tensor_cores(with_dims(
            8, 8,
            {.name = "window", .heads = 1, .kv_heads = 1, .queries = 100, .keys = keys, .left = left, .right = right}));
      }
    }
  }
  for (const int64_t offset : {-1000, -100, -30, -1, 0, 5, 60, 100, 1000}) {
    check_on_tensor_cores(
        with_dims(8, 8, {.name = "offset", .queries = 100, .left = 20, .right = 7, .offset = offset}));
  }
}

TEST_P(TensorCores, AgreeUnderEveryOption) {
  for (const Case& c : std::initializer_list<Case>{
           {.name = "scale 0", .scale = 0.0},
           {.name = "negative scale", .left = 20, .right = 2, .scale = -0.7},
           {.name = "temperatures", .heads = 4, .kv_heads = 2, .temperature = {0.5, 1.0, 2.0, 8.0}},
           {.name = "softcap", .left = 20, .right = 2, .softcap = 2},
           {.name = "scores about -120", .queries = 61, .keys = 77, .scale = 1.0, .shift = -120, .slack = 10},
           {.name = "scores about 120", .queries = 61, .keys = 77, .scale = 1.0, .shift = 120, .slack = 10},
           {.name = "dropout", .batch = 2, .queries = 90, .left = 50, .right = 9, .dropout = 0.3},
           {.name = "grouped", .batch = 2, .heads = 8, .kv_heads = 1, .left = 12, .right = 4, .dropout = 0.1},
       }) {
    check_on_tensor_cores(with_dims(64, 64, c));
    check_on_tensor_cores(with_dims(128, 16, c));
  }
}

TEST_P(TensorCores, SeeAndDropExactlyTheWeightsOfTheMask) {
  for (const double dropout : {0.0, 0.4}) {
    const Case c = with_dims(
        16, 200,
        {.name = "one-hot values",
         .heads = 1,
         .kv_heads = 1,
         .queries = 150,
         .keys = 200,
         .left = 70,
         .right = 5,
         .dropout = dropout});
    Problem problem(dtype(), c);
    problem.query.fill(0); // hence equal weights
    problem.value.fill(0);
    for (int64_t j = 0; j < c.keys; ++j) problem.value.set(0, 0, j, j, 1);
    run(set(), problem);
    for (int64_t i = 0; i < c.queries; ++i) {
      for (int64_t j = 0; j < c.keys; ++j) {
        const bool kept = dropout == 0 || reference::dropout_factor(problem.params, 0, i, j) > 0;
        ASSERT_EQ(problem.output.get(0, 0, i, j) > 0, kept && reference::sees(problem.params.window, i, j));
      }
    }
  }
}

TEST_P(TensorCores, IgnoreNaNInKeysThatNoQuerySees) {
  const Case c = with_dims(
      16, 16, {.name = "poison", .queries = 70, .keys = 200, .left = 12, .right = 3, .offset = 65, .dropout = 0.2});
  Problem clean(dtype(), c), poisoned(dtype(), c);
  const Range seen = clean.params.window.keys_of(Range{0, c.queries});
  for (Tensor* tensor : {&poisoned.key, &poisoned.value}) {
    tensor->for_each([&](int64_t b, int64_t h, int64_t n, int64_t d) {
      if (n < seen.begin || n >= seen.end) tensor->set(b, h, n, d, std::numeric_limits<double>::quiet_NaN());
    });
  }
  run(set(), clean);
  run(set(), poisoned);
  for (size_t t = 0; t < clean.outputs().size(); ++t) {
    EXPECT_TRUE(poisoned.outputs()[t]->bitwise_equal(*clean.outputs()[t])) << "tensor " << t;
  }
}

auto half_types() {
  std::vector<std::tuple<KernelSet, ScalarType>> kernels;
  for (const KernelSet& set : kernel_sets()) {
    for (const ScalarType dtype : {ScalarType::BFloat16, ScalarType::Half}) kernels.emplace_back(set, dtype);
  }
  return testing::ValuesIn(kernels);
}

INSTANTIATE_TEST_SUITE_P(, TensorCores, half_types(), kernel_name);

} // namespace

// What the kernels promise to the bit: who sees whom, what dropout drops, what must not leak.
#include "kernel_fixture.h"

namespace {

using namespace testing_wmha;

class KernelPromises : public Kernels {};

// ---- Masks ----

TEST_P(KernelPromises, SeeExactlyTheKeysOfTheWindow) {
  const Case c = {
      .name = "one-hot values",
      .heads = 1,
      .kv_heads = 1,
      .queries = 110,
      .keys = 90,
      .value_dim = 90,
      .left = 70,
      .right = 5};
  Problem problem(dtype(), c);
  problem.query.fill(0); // hence equal weights
  problem.value.fill(0);
  for (int64_t j = 0; j < c.keys; ++j) problem.value.set(0, 0, j, j, 1);
  run(set(), problem);
  for (int64_t i = 0; i < c.queries; ++i) {
    for (int64_t j = 0; j < c.keys; ++j) {
      ASSERT_EQ(problem.output.get(0, 0, i, j) > 0, reference::sees(problem.params.window, i, j)) << i << ", " << j;
    }
  }
}

TEST_P(KernelPromises, DropExactlyTheWeightsOfTheMask) {
  const Case c = {
      .name = "one-hot values",
      .batch = 2,
      .heads = 2,
      .kv_heads = 1,
      .queries = 60,
      .keys = 90,
      .value_dim = 90,
      .left = 70,
      .right = 5,
      .dropout = 0.3};
  Problem problem(dtype(), c);
  problem.query.fill(0);
  problem.value.fill(0);
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t j = 0; j < c.keys; ++j) problem.value.set(b, 0, j, j, 1);
  }
  run(set(), problem);
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

TEST_P(KernelPromises, LeakNothingFromAKeyToQueriesThatDoNotSeeIt) {
  const Case c = {.name = "leak", .heads = 2, .kv_heads = 1, .queries = 120, .keys = 130, .left = 12, .right = 3};
  for (const double dropout : {0.0, 0.2}) {
    Case dropping = c;
    dropping.dropout = dropout;
    Problem before(dtype(), dropping), after(dtype(), dropping);
    constexpr int64_t key = 66;
    for (int64_t d = 0; d < c.key_dim; ++d) after.key.set(0, 0, key, d, d % 2 ? largest_finite(dtype()) : -1000);
    for (int64_t d = 0; d < c.value_dim; ++d) after.value.set(0, 0, key, d, -largest_finite(dtype()));
    run(set(), before);
    run(set(), after);
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

TEST_P(KernelPromises, LeakNothingFromAQueryToKeysThatItDoesNotSee) {
  const Case c = {.name = "leak", .heads = 2, .kv_heads = 1, .queries = 120, .keys = 130, .left = 12, .right = 3};
  Problem before(dtype(), c), after(dtype(), c);
  constexpr int64_t query = 57;
  const double large = std::sqrt(largest_finite(dtype()));
  for (int64_t d = 0; d < c.key_dim; ++d) after.query.set(0, 1, query, d, d % 2 ? large : -large);
  for (int64_t d = 0; d < c.value_dim; ++d) after.grad_output.set(0, 1, query, d, -large);
  run(set(), before);
  run(set(), after);
  for (int64_t j = 0; j < c.keys; ++j) {
    if (reference::sees(after.params.window, query, j)) continue;
    ASSERT_TRUE(after.grad_key.row_bitwise_equal(before.grad_key, 0, 0, j)) << "key " << j;
    ASSERT_TRUE(after.grad_value.row_bitwise_equal(before.grad_value, 0, 0, j)) << "key " << j;
  }
}

TEST_P(KernelPromises, IgnoreNaNAndInfinityInKeysThatNoQuerySees) {
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
    run(set(), clean);
    run(set(), poisoned);
    for (size_t t = 0; t < clean.outputs().size(); ++t) {
      EXPECT_TRUE(poisoned.outputs()[t]->bitwise_equal(*clean.outputs()[t])) << "tensor " << t << ", " << poison;
    }
    EXPECT_EQ(poisoned.grad_temperature, clean.grad_temperature);
  }
}

TEST_P(KernelPromises, PassNaNOnToThoseWhoSeeIt) {
  const Case c = {.name = "NaN", .heads = 1, .kv_heads = 1, .queries = 70, .keys = 70, .left = 4, .right = 2};
  Problem problem(dtype(), c);
  problem.key.set(0, 0, 30, 0, std::numeric_limits<double>::quiet_NaN());
  run(set(), problem);
  for (int64_t i = 0; i < c.queries; ++i) {
    if (reference::sees(problem.params.window, i, 30)) {
      EXPECT_TRUE(std::isnan(problem.output.get(0, 0, i, 0))) << "query " << i;
      EXPECT_TRUE(std::isnan(problem.logsumexp.get(0, 0, i, 0))) << "query " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, KernelPromises, every_kernel(), kernel_name);

} // namespace

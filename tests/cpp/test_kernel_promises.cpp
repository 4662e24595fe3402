// What the kernels promise to the bit: who sees whom, what dropout drops, what must not leak, and that the result does
// not depend on how the tasks are split.
#include <sys/mman.h>

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
  run(kernels(), problem);
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

TEST_P(KernelPromises, LeakNothingFromAKeyToQueriesThatDoNotSeeIt) {
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

TEST_P(KernelPromises, LeakNothingFromAQueryToKeysThatItDoesNotSee) {
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
    run(kernels(), clean);
    run(kernels(), poisoned);
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
  Tasks tasks(0, wmha::cpu::forward_tasks(problem.params));
  kernels().forward(problem.params, tasks);
  for (int64_t i = 0; i < c.queries; ++i) {
    if (reference::sees(problem.params.window, i, 30)) {
      EXPECT_TRUE(std::isnan(problem.output.get(0, 0, i, 0))) << "query " << i;
      EXPECT_TRUE(std::isnan(problem.logsumexp.get(0, 0, i, 0))) << "query " << i;
    }
  }
}

// ---- Large tensors ----

/// Address space without memory, for rows that lie far apart.
class AddressSpace {
 public:
  explicit AddressSpace(size_t bytes) : bytes_(bytes) {
    address_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  ~AddressSpace() {
    if (available()) munmap(address_, bytes_);
  }
  AddressSpace(const AddressSpace&) = delete;
  AddressSpace& operator=(const AddressSpace&) = delete;

  bool available() const { return address_ != MAP_FAILED; }
  char* data() const { return static_cast<char*>(address_); }

 private:
  size_t bytes_;
  void* address_;
};

TEST_P(KernelPromises, CountElementsBeyondWhatAnIntHolds) {
  const Case c = {.name = "far apart", .heads = 1, .kv_heads = 1, .queries = 3, .keys = 3};
  constexpr int64_t stride = (int64_t{1} << 31) + 5;
  Problem near(dtype(), c), far(dtype(), c);
  const int64_t element = far.key.element_size();
  const AddressSpace space(c.keys * stride * element);
  if (!space.available()) GTEST_SKIP() << "this system reserves memory for all address space";
  // Query, key and value share the space, as do their gradients: `place` elements into each row.
  const auto move = [&](auto& view, int64_t dim, int64_t place, bool copy) {
    char* to = space.data() + place * element;
    for (int64_t n = 0; copy && n < c.keys; ++n) {
      std::memcpy(
          to + n * stride * element, static_cast<const char*>(view.data) + n * view.position_stride * element,
          dim * element);
    }
    view.data = to;
    view.position_stride = stride;
  };
  run(kernels(), near);
  move(far.params.query, c.key_dim, 0, true);
  move(far.params.key, c.key_dim, 100, true);
  move(far.params.value, c.value_dim, 200, true);
  move(far.params.grad_output, c.value_dim, 300, true);
  move(far.params.output, c.value_dim, 400, false);
  move(far.params.grad_query, c.key_dim, 500, false);
  move(far.params.grad_key, c.key_dim, 600, false);
  move(far.params.grad_value, c.value_dim, 700, false);
  run(kernels(), far);
  const auto expect_equal = [&](const wmha::OutputView& actual, const wmha::OutputView& expected, int64_t dim) {
    for (int64_t n = 0; n < c.keys; ++n) {
      const auto row = [&](const wmha::OutputView& view) {
        return static_cast<const char*>(view.data) + n * view.position_stride * element;
      };
      EXPECT_EQ(std::memcmp(row(actual), row(expected), dim * element), 0) << "row " << n;
    }
  };
  expect_equal(far.params.output, near.params.output, c.value_dim);
  expect_equal(far.params.grad_query, near.params.grad_query, c.key_dim);
  expect_equal(far.params.grad_key, near.params.grad_key, c.key_dim);
  expect_equal(far.params.grad_value, near.params.grad_value, c.value_dim);
}

// ---- Tasks ----

TEST_P(KernelPromises, GiveTheSameBitsHoweverTheTasksAreSplit) {
  for (const Case& c : std::initializer_list<Case>{
           {.name = "narrow",
            .batch = 2,
            .heads = 4,
            .kv_heads = 2,
            .queries = 1000,
            .keys = 1010,
            .left = 40,
            .right = 9,
            .temperature = {0.5, 1.0, 2.0, 4.0},
            .dropout = 0.1},
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
      for (const Range& range : ranges) {
        Tasks tasks(range.begin, range.end);
        call(tasks);
      }
    };
    in_pieces(wmha::cpu::forward_tasks(pieces.params), [&](Tasks& tasks) { kernels().forward(pieces.params, tasks); });
    const BackwardSchedule schedule(pieces.params);
    Tensor workspace = make_workspace(pieces, schedule);
    in_pieces(
        schedule.tasks(), [&](Tasks& tasks) { kernels().backward(pieces.params, schedule, workspace.data(), tasks); });
    in_pieces(schedule.merge_tasks(), [&](Tasks& tasks) {
      kernels().merge_backward(pieces.params, schedule, workspace.data(), tasks);
    });
    for (size_t t = 0; t < whole.outputs().size(); ++t) {
      EXPECT_TRUE(pieces.outputs()[t]->bitwise_equal(*whole.outputs()[t])) << "tensor " << t;
    }
    EXPECT_EQ(pieces.grad_temperature, whole.grad_temperature);
  }
}

INSTANTIATE_TEST_SUITE_P(, KernelPromises, every_kernel(), kernel_name);

} // namespace

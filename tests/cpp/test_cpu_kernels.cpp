// What concerns the CPU kernels alone: results don't depend on how tasks are split, and any memory will do.
#include <sys/mman.h>

#include "kernel_fixture.h"

namespace {

using namespace testing_wmha;

class CpuKernels : public Kernels {};

/// call(tasks) for one to three tasks at a time, in any order.
template <typename Call>
void in_pieces(int64_t tasks, const Call& call) {
  std::mt19937 random(7);
  std::vector<Range> ranges;
  for (int64_t begin = 0; begin < tasks;) {
    const int64_t end = std::min<int64_t>(tasks, begin + 1 + random() % 3);
    ranges.push_back({begin, end});
    begin = end;
  }
  ASSERT_GT(ranges.size(), 1) << "nothing to split";
  std::shuffle(ranges.begin(), ranges.end(), random);
  for (const Range& range : ranges) run_tasks(range, call);
}

void run_in_pieces(const KernelSet& set, Problem& problem, int64_t threads) {
  const wmha::cpu::Kernels& kernels = *set.kernels;
  problem.expect_temperature_shares(temperature_shares(set, problem.params));
  const AttentionParams& params = problem.params;
  in_pieces(wmha::cpu::forward_tasks(params, kernels.blocking), [&](Tasks& tasks) { kernels.forward(params, tasks); });
  const BackwardSchedule schedule(params, kernels.blocking, threads);
  Tensor workspace = make_workspace(problem, schedule);
  in_pieces(schedule.tasks(), [&](Tasks& tasks) { kernels.backward(params, schedule, workspace.data(), tasks); });
  in_pieces(
      schedule.merge_tasks(), [&](Tasks& tasks) { kernels.merge_backward(params, schedule, workspace.data(), tasks); });
}

TEST_P(CpuKernels, GiveTheSameBitsHoweverTheTasksAreSplit) {
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
           {.name = "causal", .heads = 2, .kv_heads = 1, .queries = 1500, .keys = 700, .right = 0},
           {.name = "the first chunk sees nothing",
            .heads = 2,
            .kv_heads = 2,
            .queries = 1100,
            .keys = 550,
            .key_dim = 3,
            .value_dim = 2,
            .left = 30,
            .right = 0},
           {.name = "wide",
            .heads = 2,
            .kv_heads = 2,
            .queries = 1500,
            .keys = 1500,
            .key_dim = 3,
            .value_dim = 2,
            .left = 140,
            .right = 70}}) {
    SCOPED_TRACE(testing::Message() << c);
    Problem whole(dtype(), c);
    run(set(), whole);
    for (const int64_t threads : {int64_t{1}, int64_t{2}, many_threads}) {
      SCOPED_TRACE(testing::Message() << threads << " threads");
      Problem pieces(dtype(), c);
      run_in_pieces(set(), pieces, threads);
      for (size_t t = 0; t < whole.outputs().size(); ++t) {
        EXPECT_TRUE(pieces.outputs()[t]->bitwise_equal(*whole.outputs()[t])) << "tensor " << t;
      }
      EXPECT_EQ(pieces.grad_temperature, whole.grad_temperature);
    }
  }
}

TEST_P(CpuKernels, SpreadInfinityAlikeHoweverTheTasksAreSplit) {
  const Case c{.name = "infinity", .heads = 1, .kv_heads = 1, .queries = 400, .keys = 400, .left = 40, .right = 0};
  Problem whole(dtype(), c), pieces(dtype(), c);
  for (Problem* problem : {&whole, &pieces}) {
    for (int64_t key = 0; key < c.keys; key += 50) {
      problem->value.set(0, 0, key, 0, std::numeric_limits<double>::infinity());
    }
  }
  const int64_t count = wmha::cpu::forward_tasks(whole.params, set().kernels->blocking);
  run_tasks({0, count}, [&](Tasks& tasks) { set().kernels->forward(whole.params, tasks); }, count);
  for (int64_t task = 0; task < count; ++task) {
    run_tasks({task, task + 1}, [&](Tasks& tasks) { set().kernels->forward(pieces.params, tasks); });
  }
  EXPECT_TRUE(pieces.output.bitwise_equal(whole.output));
}

// ---- Keys that are packed once for many blocks of queries ----

TEST_P(CpuKernels, KeepPackedKeysForTheNextBlock) {
  for (const int64_t dim : {7, 32, 80}) {
    for (const int64_t left : {0, 31, 100, 257}) {
      check(
          {.name = "sliding",
           .kv_heads = 1,
           .queries = 500,
           .keys = 480,
           .key_dim = dim,
           .value_dim = dim,
           .left = left,
           .right = 5,
           .layout = {.lead = left % 2, .gap = left % 3}});
    }
  }
  check(
      {.name = "more than is kept",
       .heads = 1,
       .kv_heads = 1,
       .queries = 100,
       .keys = 1100,
       .key_dim = 260,
       .value_dim = 260,
       .right = 0});
}

// ---- The reference of the softmax ----

TEST_P(CpuKernels, FollowScoresThatRiseAndFall) {
  const std::initializer_list<std::pair<const char*, double (*)(int64_t)>> scores_of_keys{
      {"rising", [](int64_t key) { return 4.0 * (key / 2); }},
      {"falling", [](int64_t key) { return -4.0 * (key / 2); }},
      {"low at first", [](int64_t key) { return key < 200 ? -1000.0 : 0.0; }},
      {"high at first", [](int64_t key) { return key < 40 ? 200.0 : -200.0; }},
      {"high now and then", [](int64_t key) { return key % 67 == 5 ? 200.0 : 0.0; }},
      {"higher and higher", [](int64_t key) { return key % 101 == 7 ? static_cast<double>(key) : -40.0; }},
      {"low, but for the first and the last", [](int64_t key) { return key % 499 == 0 ? 16.0 : -256.0; }},
  };
  for (const int64_t left : {-1, 30, 300}) {
    for (const auto& [name, score] : scores_of_keys) {
      const Case c{
          .name = name,
          .heads = 1,
          .kv_heads = 1,
          .queries = 230,
          .keys = 500,
          .left = left,
          .right = left < 0 ? -1 : 3,
          .scale = 1,
          .dropout = 0.1,
          .grad_temperature = false, // a sum of numbers as large as the scores
          .magnitude = 0.25,
          .slack = 50};
      check(c, [&, score = score](Problem& problem) {
        for (int64_t i = 0; i < c.queries; ++i) problem.query.set(0, 0, i, 0, 1);
        for (int64_t j = 0; j < c.keys; ++j) problem.key.set(0, 0, j, 0, score(j));
      });
    }
  }
}

TEST_P(CpuKernels, AverageValuesWhateverTheScores) {
  for (const double scale : {1e6, -1e12, 1e30}) {
    const Case c{.name = "large scores", .queries = 130, .keys = 500, .left = 300, .right = 3, .scale = scale};
    SCOPED_TRACE(testing::Message() << c);
    Problem problem(dtype(), c);
    const wmha::AttentionParams& params = problem.params;
    run_tasks({0, wmha::cpu::forward_tasks(params, set().kernels->blocking)}, [&](Tasks& tasks) {
      set().kernels->forward(params, tasks);
    });
    problem.output.for_each([&](int64_t b, int64_t h, int64_t n, int64_t d) {
      EXPECT_LE(std::abs(problem.output.get(b, h, n, d)), 1 + tolerance(dtype())); // values are in [-1, 1]
    });
    problem.logsumexp.for_each([&](int64_t b, int64_t h, int64_t n, int64_t d) {
      EXPECT_TRUE(std::isfinite(problem.logsumexp.get(b, h, n, d)));
    });
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

TEST_P(CpuKernels, CountElementsBeyondWhatAnIntHolds) {
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
  run(set(), near);
  move(far.params.query, c.key_dim, 0, true);
  move(far.params.key, c.key_dim, 100, true);
  move(far.params.value, c.value_dim, 200, true);
  move(far.params.grad_output, c.value_dim, 300, true);
  move(far.params.output, c.value_dim, 400, false);
  move(far.params.grad_query, c.key_dim, 500, false);
  move(far.params.grad_key, c.key_dim, 600, false);
  move(far.params.grad_value, c.value_dim, 700, false);
  run(set(), far);
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

INSTANTIATE_TEST_SUITE_P(, CpuKernels, every_kernel(), kernel_name);

} // namespace

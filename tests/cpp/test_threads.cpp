// The kernels' tasks on several threads at once, as the thread sanitizer likes them: plain std::thread, no OpenMP,
// whose runtime it can't see into.
#include <gtest/gtest.h>

#include <thread>

#include "cpu_kernels.h"

namespace {

using namespace testing_wmha;

/// Runs kernel(tasks) on some threads at once.
template <typename Kernel>
void on_threads(int threads, int64_t count, const Kernel& kernel) {
  TaskQueues queues({0, count}, /*run=*/1, threads);
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      Tasks tasks(queues, t);
      kernel(tasks);
    });
  }
  for (std::thread& thread : pool) thread.join();
}

void run(const KernelSet& set, Problem& problem, int threads) {
  const wmha::cpu::Kernels& kernels = *set.kernels;
  problem.expect_temperature_shares(temperature_shares(set, problem.params));
  on_threads(threads, wmha::cpu::forward_tasks(problem.params, kernels.blocking), [&](Tasks& tasks) {
    kernels.forward(problem.params, tasks);
  });
  const BackwardSchedule schedule(problem.params, kernels.blocking, threads);
  Tensor workspace = make_workspace(problem, schedule);
  on_threads(threads, schedule.tasks(), [&](Tasks& tasks) {
    kernels.backward(problem.params, schedule, workspace.data(), tasks);
  });
  on_threads(threads, schedule.merge_tasks(), [&](Tasks& tasks) {
    kernels.merge_backward(problem.params, schedule, workspace.data(), tasks);
  });
}

class Threads : public testing::TestWithParam<KernelSet> {};

TEST_P(Threads, GiveTheSameBitsAsOne) {
  if (!GetParam().supported) GTEST_SKIP() << "this machine has no " << GetParam().name;
  for (const ScalarType dtype : GetParam().dtypes) {
    for (const Case& c : std::initializer_list<Case>{
             {.name = "narrow",
              .batch = 2,
              .heads = 4,
              .kv_heads = 2,
              .queries = 1000,
              .keys = 1000,
              .left = 40,
              .right = 3,
              .temperature = {0.5, 1.0, 2.0, 4.0},
              .dropout = 0.1,
              .layout = {.lead = 1, .positions_first = true}},
             {.name = "causal", .heads = 2, .kv_heads = 1, .queries = 1000, .keys = 300, .right = 0, .softcap = 5}}) {
      SCOPED_TRACE(testing::Message() << c);
      Problem serial(dtype, c);
      run(GetParam(), serial, 1);
      for (const int threads : {2, 3, 8}) {
        Problem parallel(dtype, c);
        run(GetParam(), parallel, threads);
        for (size_t t = 0; t < serial.outputs().size(); ++t) {
          EXPECT_TRUE(parallel.outputs()[t]->bitwise_equal(*serial.outputs()[t])) << "tensor " << t;
        }
        EXPECT_EQ(parallel.grad_temperature, serial.grad_temperature);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, Threads, testing::ValuesIn(kernel_sets()), [](const auto& info) {
  return std::string(info.param.name);
});

} // namespace

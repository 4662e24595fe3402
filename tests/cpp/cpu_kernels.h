// The CPU kernels as the tests call them.
#pragma once

#include <ATen/cpu/Utils.h>

#include "../../csrc/cpu/kernels.h"
#include "problem.h"

#ifdef WMHA_X86
namespace wmha::cpu::AMX_EMULATED {
extern const Kernels kernels;
}
#endif

namespace testing_wmha {

using wmha::cpu::BackwardSchedule;
using wmha::cpu::DecodeSchedule;
using wmha::cpu::TaskQueues;
using wmha::cpu::Tasks;

inline void* allocate(size_t bytes) { return std::malloc(std::max<size_t>(bytes, 1)); }
inline void release(void* memory) { std::free(memory); }

constexpr int64_t many_threads = 1000; // for which each chunk of the backward pass is a task

/// One instruction set's kernels.
struct KernelSet {
  const char* name;
  const wmha::cpu::Kernels* kernels;
  bool supported; // by this CPU
  std::vector<ScalarType> dtypes = {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
};

inline std::vector<KernelSet> kernel_sets() {
  std::vector<KernelSet> sets = {{"Default", &wmha::cpu::DEFAULT::kernels, true}};
#ifdef WMHA_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  sets.push_back({"AVX2", &wmha::cpu::AVX2::kernels, avx2});
  sets.push_back({"AVX512", &wmha::cpu::AVX512::kernels, avx512});
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  const bool amx = avx512_bf16 && __builtin_cpu_supports("amx-bf16") && at::cpu::init_amx();
  const std::vector<ScalarType> bf16 = {ScalarType::BFloat16};
  sets.push_back({"AVX512BF16", &wmha::cpu::AVX512_BF16::kernels, avx512_bf16, bf16});
  sets.push_back({"AMX", &wmha::cpu::AMX::kernels, amx, bf16});
  sets.push_back({"AMXEmulated", &wmha::cpu::AMX_EMULATED::kernels, avx512_bf16, bf16});
#endif
  return sets;
}

/// Memory for what the tasks of a schedule leave, full of NaN.
template <typename Schedule>
Tensor make_workspace(const Problem& problem, const Schedule& schedule) {
  return Tensor(problem.acc, 1, 1, 1, schedule.workspace_size());
}

/// kernel(tasks) on one thread, `run` tasks at a time.
template <typename Kernel>
void run_tasks(Range range, const Kernel& kernel, int64_t run = 1) {
  TaskQueues queues(range, run, /*threads=*/1);
  Tasks tasks(queues, /*thread=*/0);
  kernel(tasks);
}

inline int64_t temperature_shares(const KernelSet& set, const AttentionParams& params) {
  return params.batch * params.heads * BackwardSchedule(params, set.kernels->blocking, many_threads).chunks;
}

/// Forward and backward, each in one piece.
inline void run(const KernelSet& set, Problem& problem) {
  problem.expect_temperature_shares(temperature_shares(set, problem.params));
  const AttentionParams& params = problem.params;
  constexpr int64_t at_once = 5; // tasks of more than one head, where these are short
  run_tasks(
      {0, wmha::cpu::forward_tasks(params, set.kernels->blocking)},
      [&](Tasks& tasks) { set.kernels->forward(params, tasks); }, at_once);
  const BackwardSchedule schedule(params, set.kernels->blocking, many_threads);
  Tensor workspace = make_workspace(problem, schedule);
  run_tasks(
      {0, schedule.tasks()}, [&](Tasks& tasks) { set.kernels->backward(params, schedule, workspace.data(), tasks); });
  run_tasks({0, schedule.merge_tasks()}, [&](Tasks& tasks) {
    set.kernels->merge_backward(params, schedule, workspace.data(), tasks);
  });
  EXPECT_TRUE(workspace.surroundings_untouched());
}

/// Is there a forward pass of its own for so few queries?
inline bool decodes(const AttentionParams& params) { return DecodeSchedule::applies(params); }

inline void decode(const KernelSet& set, Problem& problem) {
  const DecodeSchedule schedule(problem.params);
  Tensor workspace = make_workspace(problem, schedule);
  run_tasks({0, schedule.tasks()}, [&](Tasks& tasks) {
    set.kernels->decode(problem.params, schedule, workspace.data(), tasks);
  });
  run_tasks({0, schedule.merge_tasks()}, [&](Tasks& tasks) {
    set.kernels->merge_decode(problem.params, schedule, workspace.data(), tasks);
  });
  EXPECT_TRUE(workspace.surroundings_untouched());
}

} // namespace testing_wmha

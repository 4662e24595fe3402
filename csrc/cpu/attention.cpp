// The operators on CPU tensors: check, allocate, describe the problem to the kernels, run them on all threads.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/cpu/Utils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include "../check.h"
#include "../ops.h"
#include "../problem.h"
#include "kernels.h"
#include "result_memory.h"

namespace wmha {
namespace {

#ifdef WMHA_X86
/// The kernels of bf16 tensors on CPUs with AVX-512. Products of bf16 pairs run at twice the rate of fp32 on AMD's
/// CPUs; on Intel's without AMX they run at the same rate, and fp32 is more exact.
const cpu::Kernels& kernels_of_bf16() {
  if (!__builtin_cpu_supports("avx512bf16")) return cpu::AVX512::kernels;
  if (__builtin_cpu_supports("amx-bf16") && at::cpu::init_amx()) return cpu::AMX::kernels;
  return __builtin_cpu_is("amd") ? cpu::AVX512_BF16::kernels : cpu::AVX512::kernels;
}
#endif

/// The kernels of the instruction set that PyTorch itself has chosen (ATEN_CPU_CAPABILITY is honoured).
const cpu::Kernels& kernels_for([[maybe_unused]] ScalarType dtype) {
#ifdef WMHA_X86
  static const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") {
    static const cpu::Kernels& of_bf16 = kernels_of_bf16();
    return dtype == ScalarType::BFloat16 ? of_bf16 : cpu::AVX512::kernels;
  }
  if (capability == "AVX2") return cpu::AVX2::kernels;
#endif
  return cpu::DEFAULT::kernels;
}

/// Runs kernel(tasks) on all threads until no task is left. Which thread runs which task has no bearing on the result.
/// task_size: multiplications of a task in vector registers, or what takes as long.
template <typename Kernel>
void run_tasks(int64_t count, int64_t task_size, const Kernel& kernel) {
  if (count == 0) return;
  constexpr int64_t runs = 8; // for each thread: neighbouring tasks share keys, and the last run should be short
  constexpr int64_t least_size = 1 << 17; // of a run: 2 us, it takes one to start a thread
  const int64_t least_run = ceil_div(least_size, std::max<int64_t>(task_size, 1));
  const int64_t threads = std::min<int64_t>(ceil_div(count, least_run), at::get_num_threads());
  cpu::TaskQueues queues({0, count}, std::max(least_run, count / (threads * runs)), threads);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      cpu::Tasks tasks(queues, thread);
      kernel(tasks);
    }
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward_cpu(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const AttentionOptions& options) {
  const Problem problem = Problem::of_forward(query, key, value, options);
  const AttentionParams& params = problem.params;
  const cpu::Kernels& kernels = kernels_for(params.dtype);
  if (cpu::DecodeSchedule::applies(params)) {
    const cpu::DecodeSchedule schedule(params);
    const at::Tensor workspace = cpu::empty({schedule.workspace_size()}, problem.logsumexp.options());
    run_tasks(schedule.tasks(), schedule.task_size(), [&](cpu::Tasks& tasks) {
      kernels.decode(params, schedule, workspace.data_ptr(), tasks);
    });
    run_tasks(schedule.merge_tasks(), schedule.merge_task_size(), [&](cpu::Tasks& tasks) {
      kernels.merge_decode(params, schedule, workspace.const_data_ptr(), tasks);
    });
  } else {
    const int64_t task_size = cpu::forward_task_size(params, kernels.blocking);
    run_tasks(cpu::forward_tasks(params, kernels.blocking), task_size, [&](cpu::Tasks& tasks) {
      kernels.forward(params, tasks);
    });
  }
  return {problem.output, problem.logsumexp, problem.rng_state};
}

/// shares (B, Hq, chunks) -> the gradient of a temperature of any of its shapes, summed in one order.
void sum_temperature_shares(const std::vector<double>& shares, int64_t heads, int64_t chunks, at::Tensor& gradient) {
  const bool per_head = gradient.numel() > 1;
  std::vector<double> sums(gradient.numel(), 0.0);
  for (size_t i = 0; i < shares.size(); ++i) sums[per_head ? i / chunks % heads : 0] += shares[i];
  gradient.copy_(at::from_blob(sums.data(), gradient.sizes(), at::kDouble));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward_cpu(
    const at::Tensor& grad_output,
    const std::optional<at::Tensor>& grad_logsumexp,
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const at::Tensor& output,
    const at::Tensor& logsumexp,
    const at::Tensor& rng_state,
    const AttentionOptions& options) {
  Problem problem =
      Problem::of_backward(grad_output, grad_logsumexp, query, key, value, output, logsumexp, rng_state, options);
  AttentionParams& params = problem.params;
  const cpu::Kernels& kernels = kernels_for(params.dtype);
  const cpu::BackwardSchedule schedule(params, kernels.blocking, at::get_num_threads());
  const at::Tensor workspace = cpu::empty({schedule.workspace_size()}, problem.logsumexp.options());
  std::vector<double> shares;
  if (problem.temperature.defined()) {
    shares.resize(params.batch * params.heads * schedule.chunks);
    params.grad_temperature = shares.data();
  }
  run_tasks(schedule.tasks(), schedule.task_size(), [&](cpu::Tasks& tasks) {
    kernels.backward(params, schedule, workspace.data_ptr(), tasks);
  });
  run_tasks(schedule.merge_tasks(), schedule.merge_task_size(), [&](cpu::Tasks& tasks) {
    kernels.merge_backward(params, schedule, workspace.const_data_ptr(), tasks);
  });
  if (problem.temperature.defined()) {
    sum_temperature_shares(shares, params.heads, schedule.chunks, problem.grad_temperature);
  }
  return {problem.grad_query, problem.grad_key, problem.grad_value, problem.grad_temperature};
}

at::Tensor dropout_mask_cpu(
    const at::Tensor& rng_state,
    int64_t batch,
    int64_t heads,
    int64_t queries,
    int64_t keys,
    double dropout_p,
    int64_t first_query,
    int64_t first_key) {
  check_dropout_mask(rng_state, dropout_p);
  const at::Tensor mask = at::empty({batch, heads, queries, keys}, rng_state.options().dtype(at::kBool));
  const Dropout dropout = Dropout::with_probability(dropout_p);
  const auto seed = static_cast<uint64_t>(rng_state[0].item<int64_t>());
  const auto offset = rng_state[1].item<int64_t>();
  bool* rows = mask.mutable_data_ptr<bool>();
  at::parallel_for(0, batch * heads * queries, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t key = 0; key < keys; ++key) {
        const PhiloxWords counter =
            Dropout::counter(first_key + key, first_query + row % queries, row / queries, offset);
        const PhiloxWords words =
            philox<Dropout::rounds>(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
        rows[row * keys + key] = dropout.keeps(words, first_key + key);
      }
    }
  });
  return mask;
}

} // namespace

TORCH_LIBRARY_IMPL(wmha, CPU, library) {
  implement_kernels<forward_cpu, backward_cpu>(library);
  library.impl("_dropout_mask", dropout_mask_cpu);
}

} // namespace wmha

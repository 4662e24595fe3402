// The operators on CPU tensors: check, allocate, describe the problem to the kernels, run them on all threads.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/cpu/Utils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include "../check.h"
#include "../ops.h"
#include "../rng_state.h"
#include "kernels.h"

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
template <typename Kernel>
void run_tasks(int64_t count, const Kernel& kernel) {
  if (count == 0) return;
  constexpr int64_t runs = 8; // for each thread: neighbouring tasks share keys, and the last run should be short
  const int64_t threads = std::min<int64_t>(count, at::get_num_threads());
  cpu::Tasks tasks(0, count, std::max<int64_t>(1, count / (threads * runs)));
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) { kernel(tasks); });
}

ScalarType kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble: return ScalarType::Double;
    case at::kBFloat16: return ScalarType::BFloat16;
    case at::kHalf: return ScalarType::Half;
    default: return ScalarType::Float;
  }
}

template <typename Pointer>
TensorView<Pointer> view(const at::Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

at::Tensor with_contiguous_rows(const at::Tensor& tensor) {
  return tensor.stride(3) == 1 || tensor.size(3) == 1 ? tensor : tensor.contiguous();
}

/// One call's tensors, kept alive for the kernels, and their description.
struct Problem {
  at::Tensor query;
  at::Tensor key;
  at::Tensor value;
  at::Tensor temperature;
  AttentionParams params{};

  Problem(
      const at::Tensor& query_,
      const at::Tensor& key_,
      const at::Tensor& value_,
      const AttentionShape& shape,
      const AttentionOptions& options)
      : query(with_contiguous_rows(query_)), key(with_contiguous_rows(key_)), value(with_contiguous_rows(value_)) {
    params.dtype = kernel_dtype(query.scalar_type());
    params.batch = query.size(0);
    params.heads = query.size(1);
    params.kv_heads = key.size(1);
    params.queries = query.size(2);
    params.key_dim = query.size(3);
    params.value_dim = value.size(3);
    params.window = {
        options.window_left_.expect_int(), options.window_right_.expect_int(), shape.query_offset.expect_int(),
        key.size(2)};
    params.scale = shape.scale;
    params.softcap = options.softcap_;
    params.temperature = options.temperature_;
    if (options.temperature_tensor_.has_value()) {
      temperature = options.temperature_tensor_->to(acc_dtype(query.scalar_type())).contiguous();
      params.temperature_data = temperature.data_ptr();
      params.temperature_stride = temperature.numel() > 1 ? 1 : 0;
    }
    params.dropout = Dropout::with_probability(options.dropout_p_);
    params.query = view<const void*>(query);
    params.key = view<const void*>(key);
    params.value = view<const void*>(value);
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward_cpu(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const AttentionOptions& options) {
  const AttentionShape shape = check_attention(query, key, value, options);
  Problem problem(query, key, value, shape, options);
  AttentionParams& params = problem.params;
  const at::Tensor output = empty_laid_out_like(query, {params.batch, params.heads, params.queries, params.value_dim});
  const at::Tensor logsumexp =
      at::empty({params.batch, params.heads, params.queries}, query.options().dtype(acc_dtype(query.scalar_type())));
  const at::Tensor rng_state = draw_rng_state(query, options);
  params.rng_state = rng_state.const_data_ptr<int64_t>();
  params.output = view<void*>(output);
  params.logsumexp = logsumexp.data_ptr();
  const cpu::Kernels& kernels = kernels_for(params.dtype);
  if (cpu::DecodeSchedule::applies(params)) {
    const cpu::DecodeSchedule schedule(params);
    const at::Tensor workspace = at::empty({schedule.workspace_size()}, logsumexp.options());
    run_tasks(
        schedule.tasks(), [&](cpu::Tasks& tasks) { kernels.decode(params, schedule, workspace.data_ptr(), tasks); });
    run_tasks(schedule.merge_tasks(), [&](cpu::Tasks& tasks) {
      kernels.merge_decode(params, schedule, workspace.const_data_ptr(), tasks);
    });
  } else {
    run_tasks(cpu::forward_tasks(params), [&](cpu::Tasks& tasks) { kernels.forward(params, tasks); });
  }
  return {output, logsumexp, rng_state};
}

at::Tensor attention_cpu(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const AttentionOptions& options) {
  return std::get<0>(forward_cpu(query, key, value, options));
}

std::tuple<at::Tensor, at::Tensor> attention_with_lse_cpu(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const AttentionOptions& options) {
  auto [output, logsumexp, rng_state] = forward_cpu(query, key, value, options);
  return {output, logsumexp};
}

/// shares (B, Hq, chunks) -> the gradient of a temperature of any of its shapes, summed in one order.
void sum_temperature_shares(const std::vector<double>& shares, int64_t heads, int64_t chunks, at::Tensor& gradient) {
  const bool per_head = gradient.numel() > 1;
  std::vector<double> sums(gradient.numel(), 0.0);
  for (size_t i = 0; i < shares.size(); ++i) sums[per_head ? i / chunks % heads : 0] += shares[i];
  gradient.copy_(at::from_blob(sums.data(), gradient.sizes(), at::kDouble));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward_cpu(
    const at::Tensor& grad_output_,
    const std::optional<at::Tensor>& grad_logsumexp_,
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const at::Tensor& output_,
    const at::Tensor& logsumexp_,
    const at::Tensor& rng_state,
    const AttentionOptions& options) {
  const AttentionShape shape = check_attention(query, key, value, options);
  check_backward(shape, query, grad_output_, grad_logsumexp_, output_, logsumexp_, rng_state);
  Problem problem(query, key, value, shape, options);
  AttentionParams& params = problem.params;
  const at::Tensor grad_output = with_contiguous_rows(grad_output_);
  const at::Tensor output = with_contiguous_rows(output_);
  const at::Tensor logsumexp = logsumexp_.contiguous();
  const at::Tensor grad_logsumexp = grad_logsumexp_.has_value() ? grad_logsumexp_->contiguous() : at::Tensor();
  auto [grad_query, grad_key, grad_value, grad_temperature] = empty_gradients(query, key, value, options);
  params.rng_state = rng_state.const_data_ptr<int64_t>();
  params.output = view<void*>(output);
  params.logsumexp = logsumexp.data_ptr();
  params.grad_output = view<const void*>(grad_output);
  params.grad_logsumexp = grad_logsumexp.defined() ? grad_logsumexp.const_data_ptr() : nullptr;
  params.grad_query = view<void*>(grad_query);
  params.grad_key = view<void*>(grad_key);
  params.grad_value = view<void*>(grad_value);

  const cpu::Kernels& kernels = kernels_for(params.dtype);
  const cpu::BackwardSchedule schedule(params);
  const at::Tensor workspace = at::empty({schedule.workspace_size()}, logsumexp.options());
  std::vector<double> shares;
  if (options.temperature_tensor_.has_value()) {
    shares.resize(params.batch * params.heads * schedule.chunks);
    params.grad_temperature = shares.data();
  }
  run_tasks(
      schedule.tasks(), [&](cpu::Tasks& tasks) { kernels.backward(params, schedule, workspace.data_ptr(), tasks); });
  run_tasks(schedule.merge_tasks(), [&](cpu::Tasks& tasks) {
    kernels.merge_backward(params, schedule, workspace.const_data_ptr(), tasks);
  });
  if (options.temperature_tensor_.has_value()) {
    sum_temperature_shares(shares, params.heads, schedule.chunks, grad_temperature);
  }
  return {grad_query, grad_key, grad_value, grad_temperature};
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
  implement_attention<attention_cpu>(library, "attention");
  implement_attention<attention_with_lse_cpu>(library, "attention_with_lse");
  implement_attention<forward_cpu>(library, "_attention_forward");
  implement_backward<backward_cpu>(library);
  library.impl("_dropout_mask", dropout_mask_cpu);
}

} // namespace wmha

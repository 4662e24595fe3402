// The operators on CUDA tensors: check, allocate, launch on the current stream.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../check.h"
#include "../ops.h"
#include "../problem.h"
#include "kernels.h"

namespace wmha {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward_cuda(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const AttentionOptions& options) {
  const c10::cuda::CUDAGuard guard(query.device());
  const Problem problem = Problem::of_forward(query, key, value, options);
  const at::Tensor workspace = at::empty({cuda::forward_workspace_size(problem.params)}, problem.logsumexp.options());
  cuda::forward(problem.params, workspace.data_ptr(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {problem.output, problem.logsumexp, problem.rng_state};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward_cuda(
    const at::Tensor& grad_output,
    const std::optional<at::Tensor>& grad_logsumexp,
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const at::Tensor& output,
    const at::Tensor& logsumexp,
    const at::Tensor& rng_state,
    const AttentionOptions& options) {
  const c10::cuda::CUDAGuard guard(query.device());
  Problem problem =
      Problem::of_backward(grad_output, grad_logsumexp, query, key, value, output, logsumexp, rng_state, options);
  AttentionParams& params = problem.params;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor workspace = at::empty({cuda::workspace_size(params)}, problem.logsumexp.options());
  at::Tensor shares;
  if (problem.temperature.defined()) {
    shares = at::empty({cuda::temperature_shares(params)}, query.options().dtype(at::kDouble));
    params.grad_temperature = shares.mutable_data_ptr<double>();
  }
  cuda::backward(params, workspace.data_ptr(), stream);
  if (problem.temperature.defined()) {
    const bool per_head = problem.grad_temperature.numel() > 1;
    cuda::sum_temperature_shares(
        params, per_head, kernel_dtype(problem.grad_temperature.scalar_type()), problem.grad_temperature.data_ptr(),
        stream);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {problem.grad_query, problem.grad_key, problem.grad_value, problem.grad_temperature};
}

at::Tensor dropout_mask_cuda(
    const at::Tensor& rng_state,
    int64_t batch,
    int64_t heads,
    int64_t queries,
    int64_t keys,
    double dropout_p,
    int64_t first_query,
    int64_t first_key) {
  check_dropout_mask(rng_state, dropout_p);
  const c10::cuda::CUDAGuard guard(rng_state.device());
  const at::Tensor mask = at::empty({batch, heads, queries, keys}, rng_state.options().dtype(at::kBool));
  cuda::dropout_mask(
      {mask.mutable_data_ptr<bool>(), batch * heads, queries, keys, first_query, first_key},
      Dropout::with_probability(dropout_p), rng_state.const_data_ptr<int64_t>(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return mask;
}

} // namespace

TORCH_LIBRARY_IMPL(wmha, CUDA, library) {
  implement_kernels<forward_cuda, backward_cuda>(library);
  library.impl("_dropout_mask", dropout_mask_cuda);
}

} // namespace wmha

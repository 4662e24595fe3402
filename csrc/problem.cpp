#include "problem.h"

#include <ATen/ops/empty.h>

#include "check.h"
#include "rng_state.h"

namespace wmha {

ScalarType kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble: return ScalarType::Double;
    case at::kBFloat16: return ScalarType::BFloat16;
    case at::kHalf: return ScalarType::Half;
    default: return ScalarType::Float;
  }
}

namespace {

template <typename Pointer>
TensorView<Pointer> view(const at::Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

at::Tensor with_contiguous_rows(const at::Tensor& tensor) {
  return tensor.stride(3) == 1 || tensor.size(3) == 1 ? tensor : tensor.contiguous();
}

/// What both passes have in common.
Problem describe(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const AttentionShape& shape,
    const AttentionOptions& options) {
  Problem problem;
  problem.query = with_contiguous_rows(query);
  problem.key = with_contiguous_rows(key);
  problem.value = with_contiguous_rows(value);
  AttentionParams& params = problem.params;
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
    problem.temperature = options.temperature_tensor_->to(acc_dtype(query.scalar_type())).contiguous();
    params.temperature_data = problem.temperature.data_ptr();
    params.temperature_stride = problem.temperature.numel() > 1 ? 1 : 0;
  }
  params.dropout = Dropout::with_probability(options.dropout_p_);
  params.query = view<const void*>(problem.query);
  params.key = view<const void*>(problem.key);
  params.value = view<const void*>(problem.value);
  return problem;
}

} // namespace

Problem Problem::of_forward(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const AttentionOptions& options) {
  Problem problem = describe(query, key, value, check_attention(query, key, value, options), options);
  AttentionParams& params = problem.params;
  problem.output = empty_laid_out_like(query, {params.batch, params.heads, params.queries, params.value_dim});
  problem.logsumexp =
      at::empty({params.batch, params.heads, params.queries}, query.options().dtype(acc_dtype(query.scalar_type())));
  problem.rng_state = draw_rng_state(query, options);
  params.output = view<void*>(problem.output);
  params.logsumexp = problem.logsumexp.data_ptr();
  params.rng_state = problem.rng_state.const_data_ptr<int64_t>();
  return problem;
}

Problem Problem::of_backward(
    const at::Tensor& grad_output,
    const std::optional<at::Tensor>& grad_logsumexp,
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const at::Tensor& output,
    const at::Tensor& logsumexp,
    const at::Tensor& rng_state,
    const AttentionOptions& options) {
  const AttentionShape shape = check_attention(query, key, value, options);
  check_backward(shape, query, grad_output, grad_logsumexp, output, logsumexp, rng_state, options);
  Problem problem = describe(query, key, value, shape, options);
  problem.output = with_contiguous_rows(output);
  problem.logsumexp = logsumexp.contiguous();
  problem.rng_state = rng_state;
  problem.grad_output = with_contiguous_rows(grad_output);
  if (grad_logsumexp.has_value()) problem.grad_logsumexp = grad_logsumexp->contiguous();
  std::tie(problem.grad_query, problem.grad_key, problem.grad_value, problem.grad_temperature) =
      empty_gradients(query, key, value, options);

  AttentionParams& params = problem.params;
  params.output = view<void*>(problem.output);
  params.logsumexp = problem.logsumexp.data_ptr();
  params.rng_state = problem.rng_state.const_data_ptr<int64_t>();
  params.grad_output = view<const void*>(problem.grad_output);
  params.grad_logsumexp = problem.grad_logsumexp.defined() ? problem.grad_logsumexp.const_data_ptr() : nullptr;
  params.grad_query = view<void*>(problem.grad_query);
  params.grad_key = view<void*>(problem.grad_key);
  params.grad_value = view<void*>(problem.grad_value);
  return problem;
}

} // namespace wmha

// Shapes, dtypes and strides for fake tensors.
#include <ATen/ops/empty.h>

#include "check.h"
#include "ops.h"
#include "rng_state.h"

namespace wmha {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward_meta(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const AttentionOptions& options) {
  const AttentionShape shape = check_attention(query, key, value, options);
  return {
      empty_laid_out_like(query, {shape.batch, shape.heads, shape.queries, shape.value_dim}),
      at::empty_symint(
          {shape.batch, shape.heads, shape.queries}, query.options().dtype(acc_dtype(query.scalar_type()))),
      at::empty({rng_state_size(options)}, query.options().dtype(at::kLong))};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward_meta(
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
  return empty_gradients(query, key, value, options);
}

at::Tensor dropout_mask_meta(
    const at::Tensor& rng_state,
    c10::SymInt batch,
    c10::SymInt heads,
    c10::SymInt queries,
    c10::SymInt keys,
    double dropout_p,
    c10::SymInt /*first_query*/,
    c10::SymInt /*first_key*/) {
  check_dropout_mask(rng_state, dropout_p);
  return at::empty_symint({batch, heads, queries, keys}, rng_state.options().dtype(at::kBool));
}

} // namespace

TORCH_LIBRARY_IMPL(wmha, Meta, library) {
  implement_kernels<forward_meta, backward_meta>(library);
  library.impl("_dropout_mask", dropout_mask_meta);
}

} // namespace wmha

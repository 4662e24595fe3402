// Every argument check. CPU, CUDA, Meta and the composite form call these, so that no path skips one.
#pragma once

#include <wmha/attention.h>

namespace wmha {

/// The problem's geometry and the defaults filled in. Sizes may be symbolic.
struct AttentionShape {
  c10::SymInt batch;
  c10::SymInt heads;
  c10::SymInt kv_heads;
  c10::SymInt queries;
  c10::SymInt keys;
  c10::SymInt key_dim;
  c10::SymInt value_dim;
  c10::SymInt query_offset;
  double scale;

  /// Query heads that share a key head.
  c10::SymInt group() const { return kv_heads > 0 ? heads / kv_heads : c10::SymInt(0); }
};

/// Raises c10::Error for arguments that the contract of attention doesn't allow.
AttentionShape check_attention(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const AttentionOptions& options);

/// The same for attention_weights; value_dim is 0.
AttentionShape check_attention_weights(const at::Tensor& query, const at::Tensor& key, const AttentionOptions& options);

/// The same for multi_head_attention's own arguments; the rest is checked by the attention inside.
void check_multi_head_attention(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const ProjectionWeights& weights,
    int64_t num_heads,
    int64_t num_kv_heads);

/// The same for what the backward operator takes beside the forward's arguments.
void check_backward(
    const AttentionShape& shape,
    const at::Tensor& query,
    const at::Tensor& grad_output,
    const std::optional<at::Tensor>& grad_logsumexp,
    const at::Tensor& output,
    const at::Tensor& logsumexp,
    const at::Tensor& rng_state,
    const AttentionOptions& options);

/// The same for the operator that returns the dropout mask.
void check_dropout_mask(const at::Tensor& rng_state, double dropout_p);

/// fp64 for fp64, fp32 for all others: the type of arithmetic, logsumexp and temperature.
at::ScalarType acc_dtype(at::ScalarType dtype);

/// An uninitialised (batch, heads, positions, features) tensor with the options of `like`, dense. Where in `like` the
/// heads lie closer together than positions, as in a (B, N, H, D) tensor seen through a transpose, it lies so too; else
/// it is contiguous.
at::Tensor empty_laid_out_like(const at::Tensor& like, c10::SymIntArrayRef sizes);

/// The same for values that exist already.
at::Tensor laid_out_like(const at::Tensor& like, const at::Tensor& values);

/// Uninitialised gradients of query, key, value and temperature (no elements if that is a number).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> empty_gradients(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const AttentionOptions& options);

} // namespace wmha

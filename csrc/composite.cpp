#include "composite.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <limits>

#include "autocast.h"
#include "check.h"
#include "ops.h"
#include "philox.h"
#include "rng_state.h"
#include "window.h"

namespace wmha {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

/// The dtype of the arithmetic: acc_dtype, or fp64 under autocast, which leaves that alone but would cast the matrix
/// products of anything else down, forward and backward.
at::ScalarType composite_dtype(const at::Tensor& query) {
  return is_inside_autocast(query.device().type()) ? at::kDouble : acc_dtype(query.scalar_type());
}

/// Half-open, possibly symbolic.
struct SymRange {
  c10::SymInt begin;
  c10::SymInt end;

  c10::SymInt size() const { return end - begin; }
};

/// The keys that queries [begin, end) see between them, and who sees which: the tensor form of csrc/window.h.
class BandedWindow {
 public:
  BandedWindow(const AttentionShape& shape, const AttentionOptions& options)
      : left_(options.window_left_), right_(options.window_right_), offset_(shape.query_offset), keys_(shape.keys) {}

  /// visible[i][j]: does query queries.begin + i see key keys.begin + j?
  at::Tensor visible(const SymRange& queries, const SymRange& keys, const at::TensorOptions& options) const {
    const auto integer = options.dtype(at::kLong).requires_grad(false);
    const at::Tensor key = at::arange(keys.begin, keys.end, integer);
    const at::Tensor position = add(at::arange(queries.begin, queries.end, integer).unsqueeze(1), offset_);
    at::Tensor visible = at::ones_symint({queries.size(), keys.size()}, options.dtype(at::kBool).requires_grad(false));
    if (left_ >= 0) visible = visible & (key >= add(position, -left_));
    if (right_ >= 0) visible = visible & (key <= add(position, right_));
    return visible;
  }

  /// All keys outside of it are invisible to the queries. All keys where a size is symbolic.
  SymRange keys_of(const SymRange& queries) const {
    if (!is_concrete(queries.end)) return {0, keys_};
    const Range keys = concrete().keys_of(Range{as_int(queries.begin), as_int(queries.end)});
    return {keys.begin, keys.end};
  }

  /// Chunks of queries about as long as the window is wide, so that the work stays banded; one chunk where a size is
  /// symbolic.
  std::vector<SymRange> chunks(const c10::SymInt& queries) const {
    if (!is_concrete(queries)) return {{0, queries}};
    constexpr int64_t shortest = 256;
    const int64_t span = left_ < 0 || right_ < 0 ? as_int(keys_) : saturating_add(as_int(left_), as_int(right_));
    const int64_t chunk = std::max(shortest, std::min(span, as_int(keys_)));
    const int64_t count = as_int(queries);
    std::vector<SymRange> chunks;
    for (int64_t begin = 0; begin == 0 || begin < count; begin += chunk) {
      chunks.push_back({begin, std::min(begin + chunk, count)});
    }
    return chunks;
  }

 private:
  static int64_t as_int(const c10::SymInt& value) { return value.guard_int(__FILE__, __LINE__); }
  bool is_concrete(const c10::SymInt& queries) const {
    return !(
        queries.is_symbolic() || keys_.is_symbolic() || offset_.is_symbolic() || left_.is_symbolic() ||
        right_.is_symbolic());
  }
  /// tensor + amount, saturating.
  at::Tensor add(const at::Tensor& tensor, const c10::SymInt& amount) const {
    using Limits = std::numeric_limits<int64_t>;
    constexpr int64_t harmless = int64_t{1} << 60; // such numbers, and positions, can be added without a thought
    const bool may_overflow = left_ > harmless || right_ > harmless || offset_ > harmless || offset_ < -harmless;
    if (!may_overflow) return tensor.add(amount);
    return amount > 0 ? tensor.clamp_max(Limits::max() - amount).add(amount)
                      : tensor.clamp_min(Limits::min() - amount).add(amount);
  }

  Window concrete() const { return {as_int(left_), as_int(right_), as_int(offset_), as_int(keys_)}; }

  c10::SymInt left_;
  c10::SymInt right_;
  c10::SymInt offset_;
  c10::SymInt keys_;
};

/// (B, Hq, N, D) -> (B, Hkv, Hq / Hkv, N, D), and back.
at::Tensor group_heads(const at::Tensor& tensor, const AttentionShape& shape) {
  return tensor.unflatten_symint(1, {shape.kv_heads, shape.group()});
}

/// z of the visible pairs, -inf for all others: (B, Hkv, group, queries, keys). q is grouped, k (B, Hkv, keys, Dk).
at::Tensor scores(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& visible,
    const AttentionShape& shape,
    const AttentionOptions& options) {
  at::Tensor z = at::matmul(q * shape.scale, k.unsqueeze(2).transpose(-1, -2));
  if (options.softcap_ > 0) z = (z / options.softcap_).tanh() * options.softcap_;
  if (options.temperature_tensor_.has_value()) {
    const at::Tensor temperature = options.temperature_tensor_->to(z.scalar_type());
    z = z / temperature.expand_symint({shape.heads}).reshape_symint({shape.kv_heads, shape.group(), 1, 1});
  } else {
    z = z / options.temperature_;
  }
  return z.masked_fill(visible.logical_not(), -infinity);
}

struct Softmax {
  at::Tensor weights;   // as scores
  at::Tensor logsumexp; // (B, Hkv, group, queries)
};

/// Softmax over the last dimension; weights 0 and logsumexp -inf where nothing is visible.
Softmax softmax(const at::Tensor& z, const at::Tensor& visible) {
  const at::Tensor sees_none = visible.any(-1).logical_not();
  at::Tensor maximum = at::zeros({1}, z.options());
  if (z.sym_size(-1) > 0) { maximum = z.detach().amax(-1, /*keepdim=*/true).masked_fill(sees_none.unsqueeze(-1), 0); }
  const at::Tensor exponential = (z - maximum).exp();
  const at::Tensor sum = exponential.sum(-1).masked_fill(sees_none, 1);
  // The zeros are written once more so that no gradient, however large, reaches a pair that isn't visible.
  return {
      (exponential / sum.unsqueeze(-1)).masked_fill(visible.logical_not(), 0),
      (sum.log() + maximum.squeeze(-1)).masked_fill(sees_none, -infinity)};
}

/// Rows that take part in no visible pair become 0, whatever they hold: 0 * NaN would be NaN.
at::Tensor without_unseen(const at::Tensor& rows, const at::Tensor& seen) {
  return rows.masked_fill(seen.logical_not().unsqueeze(-1), 0);
}

at::Tensor dropout_mask(
    const at::Tensor& rng_state,
    const AttentionShape& shape,
    const SymRange& queries,
    const SymRange& keys,
    double dropout_p) {
  using Signature = at::Tensor(
      const at::Tensor&, c10::SymInt, c10::SymInt, c10::SymInt, c10::SymInt, double, c10::SymInt, c10::SymInt);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("wmha::_dropout_mask", "").typed<Signature>();
  const at::Tensor mask =
      op.call(rng_state, shape.batch, shape.heads, queries.size(), keys.size(), dropout_p, queries.begin, keys.begin);
  return group_heads(mask, shape);
}

at::Tensor attention_composite(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const AttentionOptions& options) {
  return std::get<0>(composite_attention(query, key, value, options));
}

std::tuple<at::Tensor, at::Tensor> attention_with_lse_composite(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const AttentionOptions& options) {
  return composite_attention(query, key, value, options);
}

/// wmha::attention_weights. The whole matrix is the result, hence one chunk.
template <typename Temperature>
at::Tensor attention_weights_composite(
    const at::Tensor& query,
    const at::Tensor& key,
    c10::SymInt window_left,
    c10::SymInt window_right,
    std::optional<double> scale,
    Temperature temperature,
    double softcap,
    std::optional<c10::SymInt> query_offset) {
  AttentionOptions options;
  options.window(window_left, window_right).temperature(temperature).softcap(softcap);
  options.scale_ = scale;
  options.query_offset_ = query_offset;
  const AttentionShape shape = check_attention_weights(query, key, options);
  const at::ScalarType acc = composite_dtype(query);
  const at::Tensor visible = BandedWindow(shape, options).visible({0, shape.queries}, {0, shape.keys}, query.options());
  const at::Tensor q = group_heads(without_unseen(query.to(acc), visible.any(1)), shape);
  const at::Tensor k = without_unseen(key.to(acc), visible.any(0));
  const at::Tensor weights = softmax(scores(q, k, visible, shape, options), visible).weights;
  return weights.flatten(1, 2).to(query.scalar_type());
}

at::Tensor multi_head_attention_composite(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const at::Tensor& q_weight,
    const at::Tensor& k_weight,
    const at::Tensor& v_weight,
    const std::optional<at::Tensor>& q_bias,
    const std::optional<at::Tensor>& k_bias,
    const std::optional<at::Tensor>& v_bias,
    const at::Tensor& out_weight,
    const std::optional<at::Tensor>& out_bias,
    int64_t num_heads,
    std::optional<int64_t> optional_kv_heads,
    const AttentionOptions& options) {
  const int64_t num_kv_heads = optional_kv_heads.value_or(num_heads);
  const ProjectionWeights weights{q_weight, k_weight, v_weight, out_weight, q_bias, k_bias, v_bias, out_bias};
  check_multi_head_attention(query, key, value, weights, num_heads, num_kv_heads);
  const auto project = [](const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                          int64_t heads) {
    const at::Tensor projected = at::linear(input, weight, bias); // (B, N, heads * D)
    return projected.unflatten_symint(-1, {heads, weight.sym_size(0) / heads}).transpose(1, 2);
  };
  const at::Tensor output = attention(
      project(query, q_weight, q_bias, num_heads), project(key, k_weight, k_bias, num_kv_heads),
      project(value, v_weight, v_bias, num_kv_heads), options);
  return at::linear(output.transpose(1, 2).flatten(2), out_weight, out_bias);
}

} // namespace

std::tuple<at::Tensor, at::Tensor> composite_attention(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const AttentionOptions& options,
    std::optional<at::Tensor> rng_state) {
  const AttentionShape shape = check_attention(query, key, value, options);
  const double dropout_p = options.dropout_p_;
  if (dropout_p > 0 && !rng_state.has_value()) rng_state = draw_rng_state(query, options);
  const double inverse_keep = Dropout::with_probability(dropout_p).inverse_keep;
  const at::ScalarType acc = composite_dtype(query);
  const BandedWindow window(shape, options);
  // Before the slices, so that gradients of keys that several chunks see are summed in acc.
  const at::Tensor query_acc = query.to(acc);
  const at::Tensor key_acc = key.to(acc);
  const at::Tensor value_acc = value.to(acc);

  std::vector<at::Tensor> outputs;
  std::vector<at::Tensor> logsumexps;
  for (const SymRange& queries : window.chunks(shape.queries)) {
    const SymRange keys = window.keys_of(queries);
    const at::Tensor visible = window.visible(queries, keys, query.options());
    const at::Tensor seen = visible.any(0);
    const at::Tensor q =
        group_heads(without_unseen(query_acc.slice_symint(2, queries.begin, queries.end), visible.any(1)), shape);
    const at::Tensor k = without_unseen(key_acc.slice_symint(2, keys.begin, keys.end), seen);
    const at::Tensor v = without_unseen(value_acc.slice_symint(2, keys.begin, keys.end), seen);
    auto [weights, logsumexp] = softmax(scores(q, k, visible, shape, options), visible);
    if (dropout_p > 0) {
      weights = weights * (dropout_mask(*rng_state, shape, queries, keys, dropout_p).to(acc) * inverse_keep);
    }
    outputs.push_back(at::matmul(weights, v.unsqueeze(2)));
    logsumexps.push_back(logsumexp);
  }
  const at::Tensor output = at::cat(outputs, 3).flatten(1, 2).to(query.scalar_type());
  const at::Tensor logsumexp = at::cat(logsumexps, 3).flatten(1, 2).to(acc_dtype(query.scalar_type()));
  return {laid_out_like(query, output), logsumexp};
}

namespace {

/// The operators that are compositions on every device.
void implement_compositions(torch::Library& library) {
  library.impl("attention_weights.temperature_tensor", attention_weights_composite<const at::Tensor&>);
  library.impl("attention_weights", attention_weights_composite<double>);
  using T = const at::Tensor&;
  using Optional = const std::optional<at::Tensor>&;
  implement<
      multi_head_attention_composite, T, T, T, T, T, T, Optional, Optional, Optional, T, Optional, int64_t,
      std::optional<int64_t>>(library, "multi_head_attention");
}

} // namespace

TORCH_LIBRARY_IMPL(wmha, CompositeImplicitAutograd, library) { implement_compositions(library); }

// vmap: compositions of operators that have batching rules.
TORCH_LIBRARY_IMPL(wmha, FuncTorchBatched, library) {
  implement_compositions(library);
  implement_attention<attention_composite>(library, "attention");
  implement_attention<attention_with_lse_composite>(library, "attention_with_lse");
}

} // namespace wmha

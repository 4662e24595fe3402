#include "check.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

#include <cmath>

#include "cpu/result_memory.h"

namespace wmha {
namespace {

bool lies_by_position(const at::Tensor& tensor) { return tensor.sym_stride(1) < tensor.sym_stride(2); }

bool is_supported(at::ScalarType dtype) {
  return dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}

void check_dim(const char* name, const at::Tensor& tensor, int64_t dim, const char* axes) {
  TORCH_CHECK(
      tensor.dim() == dim, "wmha: ", name, " must have ", dim, " dimensions ", axes, ", got ", tensor.dim(), ": ",
      tensor.sym_sizes());
}

void check_size(
    const char* name,
    const char* axis,
    const c10::SymInt& size,
    const c10::SymInt& expected,
    const char* as) {
  TORCH_CHECK(size == expected, "wmha: ", name, " must have the ", axis, " of ", as, ", ", expected, ", got ", size);
}

void check_layout(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.layout() == at::kStrided, "wmha: ", name, " must have the strided layout, got ", tensor.layout());
}

/// Same dtype and device as query.
void check_like_query(const char* name, const at::Tensor& tensor, const at::Tensor& query) {
  check_layout(name, tensor);
  TORCH_CHECK(
      tensor.scalar_type() == query.scalar_type(), "wmha: ", name, " must have the dtype of query, ",
      query.scalar_type(), ", got ", tensor.scalar_type());
  TORCH_CHECK(
      tensor.device() == query.device(), "wmha: ", name, " must be on the device of query, ", query.device(), ", got ",
      tensor.device());
}

void check_shape(const char* name, const at::Tensor& tensor, c10::SymIntArrayRef expected) {
  TORCH_CHECK(
      tensor.sym_sizes().equals(expected), "wmha: ", name, " must have shape ", expected, ", got ", tensor.sym_sizes());
}

void check_query(const at::Tensor& query) {
  check_layout("query", query);
  TORCH_CHECK(
      is_supported(query.scalar_type()), "wmha: query must be of dtype Double, Float, BFloat16 or Half, got ",
      query.scalar_type());
}

void check_window(const char* name, const c10::SymInt& window) {
  TORCH_CHECK(window >= -1, "wmha: ", name, " must be -1 (no bound), 0 or positive, got ", window);
}

void check_temperature(const at::Tensor& query, const c10::SymInt& heads, const AttentionOptions& options) {
  if (!options.temperature_tensor_.has_value()) {
    TORCH_CHECK(
        std::isfinite(options.temperature_) && options.temperature_ > 0,
        "wmha: temperature must be positive and finite, got ", options.temperature_);
    return;
  }
  const at::Tensor& temperature = *options.temperature_tensor_;
  TORCH_CHECK(temperature.defined(), "wmha: temperature must be a number or a tensor, got an undefined tensor");
  TORCH_CHECK(
      at::isFloatingType(temperature.scalar_type()), "wmha: temperature must be of a floating point dtype, got ",
      temperature.scalar_type());
  TORCH_CHECK(
      temperature.dim() == 0 ||
          (temperature.dim() == 1 && (temperature.sym_size(0) == 1 || temperature.sym_size(0) == heads)),
      "wmha: temperature must have shape (), (1,) or (Hq,) with Hq = ", heads, ", got ", temperature.sym_sizes());
  TORCH_CHECK(
      temperature.device() == query.device(), "wmha: temperature must be on the device of query, ", query.device(),
      ", got ", temperature.device());
}

void check_dropout_p(double dropout_p) {
  TORCH_CHECK(dropout_p >= 0 && dropout_p <= 1, "wmha: dropout_p must be between 0 and 1, got ", dropout_p);
}

void check_rng_state(const at::Tensor& rng_state) {
  check_shape("rng_state", rng_state, {2});
  TORCH_CHECK(
      rng_state.scalar_type() == at::kLong, "wmha: rng_state must be of dtype Long, got ", rng_state.scalar_type());
}

void check_options(const at::Tensor& query, const c10::SymInt& heads, const AttentionOptions& options) {
  check_window("window_left", options.window_left_);
  check_window("window_right", options.window_right_);
  if (options.scale_.has_value()) {
    TORCH_CHECK(std::isfinite(*options.scale_), "wmha: scale must be finite, got ", *options.scale_);
  }
  check_temperature(query, heads, options);
  TORCH_CHECK(
      std::isfinite(options.softcap_) && options.softcap_ >= 0,
      "wmha: softcap must be 0 (off) or positive, and finite, got ", options.softcap_);
  check_dropout_p(options.dropout_p_);
}

} // namespace

AttentionShape check_attention_weights(
    const at::Tensor& query,
    const at::Tensor& key,
    const AttentionOptions& options) {
  check_query(query);
  check_dim("query", query, 4, "(batch, heads, queries, key_dim)");
  check_dim("key", key, 4, "(batch, kv_heads, keys, key_dim)");
  check_like_query("key", key, query);
  check_size("key", "batch size", key.sym_size(0), query.sym_size(0), "query");
  check_size("key", "last dimension", key.sym_size(3), query.sym_size(3), "query");
  TORCH_CHECK(query.sym_size(3) >= 1, "wmha: query must have a last dimension of at least 1, got 0");
  const c10::SymInt heads = query.sym_size(1);
  const c10::SymInt kv_heads = key.sym_size(1);
  TORCH_CHECK(
      kv_heads > 0 ? heads % kv_heads == 0 : heads == 0, "wmha: the heads of key must divide the heads of query, ",
      heads, ", got ", kv_heads);
  check_options(query, heads, options);
  return {
      .batch = query.sym_size(0),
      .heads = heads,
      .kv_heads = kv_heads,
      .queries = query.sym_size(2),
      .keys = key.sym_size(2),
      .key_dim = query.sym_size(3),
      .value_dim = 0,
      .query_offset = options.query_offset_.value_or(key.sym_size(2) - query.sym_size(2)),
      .scale = options.scale_.has_value()
                   ? *options.scale_
                   : 1 / std::sqrt(static_cast<double>(query.sym_size(3).guard_int(__FILE__, __LINE__)))};
}

AttentionShape check_attention(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const AttentionOptions& options) {
  AttentionShape shape = check_attention_weights(query, key, options);
  check_dim("value", value, 4, "(batch, kv_heads, keys, value_dim)");
  check_like_query("value", value, query);
  check_size("value", "batch size", value.sym_size(0), shape.batch, "query");
  check_size("value", "heads", value.sym_size(1), shape.kv_heads, "key");
  check_size("value", "positions", value.sym_size(2), shape.keys, "key");
  shape.value_dim = value.sym_size(3);
  TORCH_CHECK(shape.value_dim >= 1, "wmha: value must have a last dimension of at least 1, got 0");
  return shape;
}

void check_multi_head_attention(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const ProjectionWeights& weights,
    int64_t num_heads,
    int64_t num_kv_heads) {
  TORCH_CHECK(num_heads >= 1, "wmha: num_heads must be at least 1, got ", num_heads);
  TORCH_CHECK(num_kv_heads >= 1, "wmha: num_kv_heads must be at least 1, got ", num_kv_heads);
  TORCH_CHECK(
      num_heads % num_kv_heads == 0, "wmha: num_kv_heads must divide num_heads, ", num_heads, ", got ", num_kv_heads);
  check_query(query);

  const auto check_input = [&](const char* name, const at::Tensor& input) {
    check_dim(name, input, 3, "(batch, positions, embedding)");
    check_like_query(name, input, query);
    check_size(name, "batch size", input.sym_size(0), query.sym_size(0), "query");
  };
  check_input("query", query);
  check_input("key", key);
  check_input("value", value);
  check_size("value", "positions", value.sym_size(1), key.sym_size(1), "key");

  const auto check_weight = [&](const char* name, const at::Tensor& weight, int64_t heads, const at::Tensor& input,
                                const char* input_name) {
    check_dim(name, weight, 2, "(heads * head_dim, embedding)");
    check_like_query(name, weight, query);
    TORCH_CHECK(
        weight.sym_size(0) > 0 && weight.sym_size(0) % heads == 0, "wmha: ", name, " must have a multiple of ", heads,
        " rows, one block for each head, got ", weight.sym_size(0));
    check_size(name, "columns", weight.sym_size(1), input.sym_size(2), input_name);
  };
  check_weight("q_weight", weights.q_weight, num_heads, query, "query's embedding");
  check_weight("k_weight", weights.k_weight, num_kv_heads, key, "key's embedding");
  check_weight("v_weight", weights.v_weight, num_kv_heads, value, "value's embedding");
  check_size(
      "k_weight", "rows for each head", weights.k_weight.sym_size(0) / num_kv_heads,
      weights.q_weight.sym_size(0) / num_heads, "q_weight");
  check_dim("out_weight", weights.out_weight, 2, "(output embedding, heads * value_dim)");
  check_like_query("out_weight", weights.out_weight, query);
  check_size(
      "out_weight", "columns", weights.out_weight.sym_size(1), weights.v_weight.sym_size(0) / num_kv_heads * num_heads,
      "the heads' values");

  const auto check_bias = [&](const char* name, const std::optional<at::Tensor>& bias, const at::Tensor& weight) {
    if (!bias.has_value() || !bias->defined()) return;
    check_dim(name, *bias, 1, "(rows of its weight)");
    check_like_query(name, *bias, query);
    check_size(name, "size", bias->sym_size(0), weight.sym_size(0), "its weight's rows");
  };
  check_bias("q_bias", weights.q_bias, weights.q_weight);
  check_bias("k_bias", weights.k_bias, weights.k_weight);
  check_bias("v_bias", weights.v_bias, weights.v_weight);
  check_bias("out_bias", weights.out_bias, weights.out_weight);
}

void check_backward(
    const AttentionShape& shape,
    const at::Tensor& query,
    const at::Tensor& grad_output,
    const std::optional<at::Tensor>& grad_logsumexp,
    const at::Tensor& output,
    const at::Tensor& logsumexp,
    const at::Tensor& rng_state,
    const AttentionOptions& options) {
  const std::array output_shape{shape.batch, shape.heads, shape.queries, shape.value_dim};
  const std::array logsumexp_shape{shape.batch, shape.heads, shape.queries};
  const auto check_logsumexp = [&](const char* name, const at::Tensor& tensor) {
    check_shape(name, tensor, logsumexp_shape);
    TORCH_CHECK(
        tensor.scalar_type() == acc_dtype(query.scalar_type()), "wmha: ", name, " must be of dtype ",
        acc_dtype(query.scalar_type()), ", got ", tensor.scalar_type());
  };
  check_shape("grad_output", grad_output, output_shape);
  check_like_query("grad_output", grad_output, query);
  check_shape("output", output, output_shape);
  check_like_query("output", output, query);
  check_logsumexp("logsumexp", logsumexp);
  if (grad_logsumexp.has_value()) check_logsumexp("grad_logsumexp", *grad_logsumexp);
  if (options.dropout_p_ == 0) return; // nothing reads rng_state
  check_rng_state(rng_state);
  TORCH_CHECK(
      rng_state.device() == query.device(), "wmha: rng_state must be on the device of query, ", query.device(),
      ", got ", rng_state.device());
}

void check_dropout_mask(const at::Tensor& rng_state, double dropout_p) {
  check_rng_state(rng_state);
  check_dropout_p(dropout_p);
}

at::ScalarType acc_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

at::Tensor empty_laid_out_like(const at::Tensor& like, c10::SymIntArrayRef sizes) {
  const auto empty = [&](c10::SymIntArrayRef sizes) {
    if (like.is_cpu()) return cpu::empty(C10_AS_INTARRAYREF_SLOW(sizes), like.options());
    return at::empty_symint(sizes, like.options());
  };
  if (!lies_by_position(like)) return empty(sizes);
  return empty({sizes[0], sizes[2], sizes[1], sizes[3]}).transpose(1, 2);
}

at::Tensor laid_out_like(const at::Tensor& like, const at::Tensor& values) {
  return lies_by_position(like) ? values.transpose(1, 2).contiguous().transpose(1, 2) : values.contiguous();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> empty_gradients(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const AttentionOptions& options) {
  const auto empty = [](const at::Tensor& tensor) { return empty_laid_out_like(tensor, tensor.sym_sizes()); };
  return {
      empty(query), empty(key), empty(value),
      options.temperature_tensor_.has_value()
          ? at::empty_like(*options.temperature_tensor_, at::MemoryFormat::Contiguous)
          : at::empty({0}, query.options())};
}

} // namespace wmha

// wmha::nn::MultiheadAttention.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/nn/init.h>
#include <wmha/nn.h>

#include <cmath>
#include <ostream>

#include "check.h"

namespace wmha::nn {
namespace {

constexpr int64_t max_heads = 128;

/// Checks the options, and fills in defaults that depend on other options.
MultiheadAttentionOptions complete(MultiheadAttentionOptions options) {
  const int64_t embed_dim = options.embed_dim(), num_heads = options.num_heads();
  const auto fill = [](const char* name, std::optional<int64_t>& size, int64_t otherwise) {
    if (!size.has_value()) size = otherwise;
    check_positive(name, *size);
  };
  check_positive("embed_dim", embed_dim);
  TORCH_CHECK_VALUE(
      num_heads >= 1 && num_heads <= max_heads, "wmha: num_heads must be between 1 and ", max_heads, ", got ",
      num_heads);
  fill("num_kv_heads", options.num_kv_heads(), num_heads);
  TORCH_CHECK_VALUE(
      num_heads % *options.num_kv_heads() == 0, "wmha: num_kv_heads must divide num_heads, ", num_heads, ", got ",
      *options.num_kv_heads());
  TORCH_CHECK_VALUE(
      options.head_dim().has_value() || embed_dim % num_heads == 0, "wmha: embed_dim must be a multiple of num_heads, ",
      num_heads, ", without head_dim, got ", embed_dim);
  fill("head_dim", options.head_dim(), embed_dim / num_heads);
  fill("value_dim", options.value_dim(), *options.head_dim());
  fill("kdim", options.kdim(), embed_dim);
  fill("vdim", options.vdim(), embed_dim);

  auto& [left, right] = options.window();
  TORCH_CHECK_VALUE(left >= -1, "wmha: window_left must be -1 (no bound), 0 or positive, got ", left);
  TORCH_CHECK_VALUE(right >= -1, "wmha: window_right must be -1 (no bound), 0 or positive, got ", right);
  TORCH_CHECK_VALUE(
      !options.causal() || right <= 0, "wmha: window_right must be -1 or 0 where causal is set, got ", right);
  if (options.causal()) right = 0;

  const double scale = options.scale().value_or(1), temperature = options.temperature(), softcap = options.softcap();
  TORCH_CHECK_VALUE(std::isfinite(scale), "wmha: scale must be finite, got ", scale);
  TORCH_CHECK_VALUE(
      std::isfinite(temperature) && temperature > 0, "wmha: temperature must be positive and finite, got ",
      temperature);
  check_choice("learned_temperature", options.learned_temperature(), {"none", "shared", "per_head"});
  TORCH_CHECK_VALUE(
      std::isfinite(softcap) && softcap >= 0, "wmha: softcap must be 0 (off) or positive, and finite, got ", softcap);
  check_probability("dropout", options.dropout());
  return options;
}

/// (B, N, H * D) -> (B, H, N, D)
at::Tensor split_heads(const at::Tensor& projected, int64_t heads, int64_t dim) {
  return projected.unflatten(-1, {heads, dim}).transpose(1, 2);
}

/// The last `count` positions of (B, H, N, D), or all for -1. A copy where a view would keep much else in memory.
at::Tensor last(const at::Tensor& tensor, int64_t count) {
  const int64_t surplus = tensor.size(2) - count;
  if (count < 0 || surplus <= 0) return tensor;
  const at::Tensor view = tensor.narrow(2, surplus, count);
  return surplus > count ? view.clone() : view;
}

} // namespace

MultiheadAttentionImpl::MultiheadAttentionImpl(MultiheadAttentionOptions options_)
    : options(complete(std::move(options_))) {
  reset();
}

void MultiheadAttentionImpl::reset() {
  const int64_t heads = options.num_heads(), kv_heads = *options.num_kv_heads();
  const auto projection = [&](const char* name, int64_t in, int64_t out) {
    return register_module(name, torch::nn::Linear(torch::nn::LinearOptions(in, out).bias(options.bias())));
  };
  q_proj = projection("q_proj", options.embed_dim(), heads * *options.head_dim());
  k_proj = projection("k_proj", *options.kdim(), kv_heads * *options.head_dim());
  v_proj = projection("v_proj", *options.vdim(), kv_heads * *options.value_dim());
  out_proj = projection("out_proj", heads * *options.value_dim(), options.embed_dim());
  if (options.learned_temperature() != "none") {
    const int64_t learned = options.learned_temperature() == "shared" ? 1 : heads;
    log_temperature = register_parameter("log_temperature", torch::empty({learned}));
  }
  reset_parameters();
}

void MultiheadAttentionImpl::reset_parameters() {
  for (const auto& projection : {q_proj, k_proj, v_proj}) torch::nn::init::xavier_uniform_(projection->weight);
  out_proj->reset_parameters();
  for (const auto& projection : {q_proj, k_proj, v_proj, out_proj}) {
    if (projection->bias.defined()) torch::nn::init::zeros_(projection->bias);
  }
  if (log_temperature.defined()) torch::nn::init::constant_(log_temperature, std::log(options.temperature()));
}

AttentionOptions MultiheadAttentionImpl::attention_options() const {
  const auto [left, right] = options.window();
  auto result = AttentionOptions().window(left, right).softcap(options.softcap());
  if (options.scale().has_value()) result.scale(*options.scale());
  if (is_training()) result.dropout(options.dropout());
  return log_temperature.defined() ? result.temperature(log_temperature.exp())
                                   : result.temperature(options.temperature());
}

at::Tensor MultiheadAttentionImpl::forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value) {
  TORCH_CHECK(key.defined() || !value.defined(), "wmha: value must come with key, got value alone");
  const at::Tensor& keys = key.defined() ? key : query;
  const auto bias = [](const torch::nn::Linear& projection) {
    return projection->bias.defined() ? std::optional(projection->bias) : std::nullopt;
  };
  const ProjectionWeights weights{
      .q_weight = q_proj->weight,
      .k_weight = k_proj->weight,
      .v_weight = v_proj->weight,
      .out_weight = out_proj->weight,
      .q_bias = bias(q_proj),
      .k_bias = bias(k_proj),
      .v_bias = bias(v_proj),
      .out_bias = bias(out_proj)};
  return multi_head_attention(
      query, keys, value.defined() ? value : keys, weights, options.num_heads(), options.num_kv_heads(),
      attention_options());
}

std::tuple<at::Tensor, KeyValueCache> MultiheadAttentionImpl::decode(
    const at::Tensor& x,
    const std::optional<KeyValueCache>& cache) {
  const auto [left, right] = options.window();
  TORCH_CHECK(right == 0, "wmha: window_right must be 0 (causal) for decode, got ", right);
  const at::Tensor query = split_heads(q_proj(x), options.num_heads(), *options.head_dim());
  at::Tensor key = split_heads(k_proj(x), *options.num_kv_heads(), *options.head_dim());
  at::Tensor value = split_heads(v_proj(x), *options.num_kv_heads(), *options.value_dim());
  if (cache.has_value()) {
    key = at::cat({cache->key, key}, 2);
    value = at::cat({cache->value, value}, 2);
  }
  const at::Tensor length = cache.has_value() ? cache->length : at::zeros({}, x.options().dtype(at::kLong));
  const at::Tensor heads = attention(query, key, value, attention_options()); // (B, Hq, N, Dv)
  return {out_proj(heads.transpose(1, 2).flatten(2)), {last(key, left), last(value, left), length + x.size(1)}};
}

void MultiheadAttentionImpl::load(torch::serialize::InputArchive& archive) {
  check_archive(*this, archive);
  Module::load(archive);
}

void MultiheadAttentionImpl::pretty_print(std::ostream& stream) const {
  const auto& o = options;
  stream << "wmha::nn::MultiheadAttention(embed_dim=" << o.embed_dim() << ", num_heads=" << o.num_heads()
         << ", num_kv_heads=" << *o.num_kv_heads() << ", head_dim=" << *o.head_dim() << ", value_dim=" << *o.value_dim()
         << ", window=(" << o.window().first << ", " << o.window().second << ")";
  if (o.scale().has_value()) stream << ", scale=" << *o.scale();
  if (o.temperature() != 1 || o.learned_temperature() != "none") stream << ", temperature=" << o.temperature();
  if (o.learned_temperature() != "none") stream << ", learned_temperature=" << o.learned_temperature();
  if (o.softcap() != 0) stream << ", softcap=" << o.softcap();
  if (o.dropout() != 0) stream << ", dropout=" << o.dropout();
  stream << ")";
}

} // namespace wmha::nn

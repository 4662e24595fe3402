// wmha::nn::TransformerLayer and TransformerStack.
#include <ATen/ops/gelu.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>
#include <wmha/nn.h>

#include <ostream>

#include "check.h"

namespace wmha::nn {
namespace {

/// Checks the layer's own options, and fills in the default that depends on another.
TransformerLayerOptions complete(TransformerLayerOptions options) {
  const int64_t embed_dim = options.attention().embed_dim();
  const auto check_input = [&](const char* name, const std::optional<int64_t>& size) {
    TORCH_CHECK_VALUE(
        size.value_or(embed_dim) == embed_dim, "wmha: ", name, " must be embed_dim, ", embed_dim,
        ", for self-attention, got ", *size);
  };
  check_input("kdim", options.attention().kdim());
  check_input("vdim", options.attention().vdim());
  if (!options.dim_feedforward().has_value()) options.dim_feedforward() = 4 * embed_dim;
  check_positive("dim_feedforward", *options.dim_feedforward());
  check_choice("activation", options.activation(), {"gelu", "relu", "silu", "geglu", "swiglu"});
  check_choice("norm", options.norm(), {"before", "after"});
  TORCH_CHECK_VALUE(
      options.layer_norm_eps() >= 0, "wmha: layer_norm_eps must be 0 or positive, got ", options.layer_norm_eps());
  check_probability("dropout", options.dropout());
  return options;
}

void check_stack(const TransformerStackOptions& options) {
  check_positive("num_layers", options.num_layers());
  if (!options.windows().has_value()) return;
  const auto [left, right] = options.layer().attention().window();
  TORCH_CHECK_VALUE(
      left == -1 && right == -1, "wmha: window must be (-1, -1) where windows are given, got (", left, ", ", right,
      ")");
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(options.windows()->size()) == options.num_layers(),
      "wmha: windows must be one for each of the ", options.num_layers(), " layers, got ", options.windows()->size());
}

torch::nn::LayerNorm layer_norm(const TransformerLayerOptions& options) {
  return torch::nn::LayerNorm(
      torch::nn::LayerNormOptions({options.attention().embed_dim()}).eps(options.layer_norm_eps()));
}

bool is_gated(const std::string& activation) { return activation == "geglu" || activation == "swiglu"; }

} // namespace

TransformerLayerImpl::TransformerLayerImpl(TransformerLayerOptions options_) : options(complete(std::move(options_))) {
  reset();
}

void TransformerLayerImpl::reset() {
  const auto linear = [&](const char* name, int64_t in, int64_t out) {
    const auto linear_options = torch::nn::LinearOptions(in, out).bias(options.attention().bias());
    return register_module(name, torch::nn::Linear(linear_options));
  };
  const int64_t embed_dim = options.attention().embed_dim(), width = *options.dim_feedforward();
  self_attn = register_module("self_attn", MultiheadAttention(options.attention()));
  linear1 = linear("linear1", embed_dim, is_gated(options.activation()) ? 2 * width : width);
  linear2 = linear("linear2", width, embed_dim);
  norm1 = register_module("norm1", layer_norm(options));
  norm2 = register_module("norm2", layer_norm(options));
  dropout = register_module("dropout", torch::nn::Dropout(options.dropout()));
}

void TransformerLayerImpl::reset_parameters() {
  self_attn->reset_parameters();
  linear1->reset_parameters();
  linear2->reset_parameters();
  norm1->reset_parameters();
  norm2->reset_parameters();
}

at::Tensor TransformerLayerImpl::forward(const at::Tensor& x) {
  return after_attention(x, self_attn(attention_input(x)));
}

std::tuple<at::Tensor, KeyValueCache> TransformerLayerImpl::decode(
    const at::Tensor& x,
    const std::optional<KeyValueCache>& cache) {
  auto [attended, kept] = self_attn->decode(attention_input(x), cache);
  return {after_attention(x, attended), std::move(kept)};
}

at::Tensor TransformerLayerImpl::attention_input(const at::Tensor& x) {
  return options.norm() == "before" ? norm1(x) : x;
}

at::Tensor TransformerLayerImpl::after_attention(const at::Tensor& x, const at::Tensor& attended) {
  const at::Tensor sum = x + dropout(attended);
  if (options.norm() == "before") return sum + dropout(feed_forward(norm2(sum)));
  const at::Tensor normed = norm1(sum);
  return norm2(normed + dropout(feed_forward(normed)));
}

at::Tensor TransformerLayerImpl::feed_forward(const at::Tensor& x) {
  const std::string& activation = options.activation();
  const auto activate = [&](const at::Tensor& hidden) {
    if (activation == "relu") return at::relu(hidden);
    return activation == "gelu" || activation == "geglu" ? at::gelu(hidden) : at::silu(hidden);
  };
  const at::Tensor hidden = linear1(x);
  if (!is_gated(activation)) return linear2(activate(hidden));
  const std::vector<at::Tensor> halves = hidden.chunk(2, -1);
  return linear2(activate(halves[0]) * halves[1]);
}

void TransformerLayerImpl::load(torch::serialize::InputArchive& archive) {
  check_archive(*this, archive);
  Module::load(archive);
}

void TransformerLayerImpl::pretty_print(std::ostream& stream) const {
  stream << "wmha::nn::TransformerLayer(activation=" << options.activation() << ", norm=" << options.norm() << ")";
}

TransformerStackImpl::TransformerStackImpl(TransformerStackOptions options_) : options(std::move(options_)) {
  check_stack(options);
  reset();
}

void TransformerStackImpl::reset() {
  layers = register_module("layers", torch::nn::ModuleList());
  for (int64_t i = 0; i < options.num_layers(); ++i) {
    TransformerLayerOptions layer = options.layer();
    if (options.windows().has_value()) layer.attention().window(options.windows()->at(i));
    layers->push_back(TransformerLayer(layer));
  }
  if (options.final_norm()) norm = register_module("norm", layer_norm(options.layer()));
}

void TransformerStackImpl::reset_parameters() {
  for (const auto& layer : *layers) layer->as<TransformerLayer>()->reset_parameters();
  if (norm) norm->reset_parameters();
}

at::Tensor TransformerStackImpl::forward(const at::Tensor& x) {
  at::Tensor y = x;
  for (const auto& layer : *layers) y = layer->as<TransformerLayer>()->forward(y);
  return norm ? norm(y) : y;
}

std::tuple<at::Tensor, std::vector<KeyValueCache>> TransformerStackImpl::decode(
    const at::Tensor& x,
    const std::vector<KeyValueCache>& caches) {
  TORCH_CHECK(
      caches.empty() || caches.size() == layers->size(), "wmha: caches must be one for each of the ", layers->size(),
      " layers, got ", caches.size());
  at::Tensor y = x;
  std::vector<KeyValueCache> kept(layers->size());
  for (size_t i = 0; i < layers->size(); ++i) {
    const auto cache = caches.empty() ? std::nullopt : std::optional(caches[i]);
    std::tie(y, kept[i]) = layers[i]->as<TransformerLayer>()->decode(y, cache);
  }
  return {norm ? norm(y) : y, std::move(kept)};
}

void TransformerStackImpl::load(torch::serialize::InputArchive& archive) {
  check_archive(*this, archive);
  Module::load(archive);
}

void TransformerStackImpl::pretty_print(std::ostream& stream) const {
  stream << "wmha::nn::TransformerStack(num_layers=" << options.num_layers() << ")";
}

} // namespace wmha::nn

// Modules around the operators, in LibTorch's conventions: attention with its projections, a transformer's layer and a
// stack of layers.
//
//   auto attention = wmha::nn::MultiheadAttentionOptions(512, 8).window({256, 0}).learned_temperature("per_head");
//   auto layer = wmha::nn::TransformerLayerOptions(attention).dropout(0.1);
//   wmha::nn::TransformerStack stack(wmha::nn::TransformerStackOptions(6, layer));
//   at::Tensor y = stack(x); // (B, N, 512) -> (B, N, 512)
//
// They have the names, options, defaults and parameter names of the Python modules in wmha.nn, and with the same seed
// the same initial parameters. Parameters move in both directions: Python reads what torch::save(stack, path) wrote by
// stack.load_state_dict(torch.jit.load(path).state_dict()), and torch::load(stack, path) reads what Python wrote by
// torch.jit.script(stack).save(path). Either side makes a module with the same options first; here it must have the
// dtype of the file.
//
// Inputs are (batch, positions, embedding). Invalid options raise c10::ValueError at construction, with the name of the
// option, what was expected and what came.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>
#include <torch/nn/pimpl.h>
#include <wmha/attention.h>

#include <cstdint>
#include <iosfwd>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace wmha::nn {

/// How many positions before and after its own a query sees; -1: all on that side.
using Window = std::pair<int64_t, int64_t>;

/// What decode() remembers of the positions before: no more of them than the window reaches back.
struct KeyValueCache {
  at::Tensor key;    // (B, Hkv, n, Dk), the last n positions; n <= window_left, or all positions without a bound
  at::Tensor value;  // (B, Hkv, n, Dv)
  at::Tensor length; // int64 of shape (), on the device of key: positions seen so far, which is the next one's number
};

struct MultiheadAttentionOptions {
  MultiheadAttentionOptions(int64_t embed_dim, int64_t num_heads) : embed_dim_(embed_dim), num_heads_(num_heads) {}

  /// E, features of query and output.
  TORCH_ARG(int64_t, embed_dim);
  /// Hq, 1 to 128.
  TORCH_ARG(int64_t, num_heads);
  /// Hkv, a divisor of num_heads; each key and value head serves num_heads / num_kv_heads query heads. Default:
  /// num_heads.
  TORCH_ARG(std::optional<int64_t>, num_kv_heads);
  /// Dk, dimension of a query and key head. Default: embed_dim / num_heads.
  TORCH_ARG(std::optional<int64_t>, head_dim);
  /// Dv, dimension of a value head. Default: head_dim.
  TORCH_ARG(std::optional<int64_t>, value_dim);
  /// Features of the input `key`. Default: embed_dim.
  TORCH_ARG(std::optional<int64_t>, kdim);
  /// Features of the input `value`. Default: embed_dim.
  TORCH_ARG(std::optional<int64_t>, vdim);
  /// The four projections have biases.
  TORCH_ARG(bool, bias) = true;
  /// What a query sees: {256, 0} is causal with 256 positions of context.
  TORCH_ARG(Window, window) = { -1, -1 };
  /// No position after the query's own; the same as 0 for the window's right side, which may be -1 or 0 then.
  TORCH_ARG(bool, causal) = false;
  /// Factor on <q, k>. Default: 1 / sqrt(Dk).
  TORCH_ARG(std::optional<double>, scale);
  /// Divides the scores; positive. Where it is learned, it starts with this.
  TORCH_ARG(double, temperature) = 1.0;
  /// "none", "shared" (one for all heads) or "per_head". A learned temperature is exp(log_temperature), which stays
  /// positive; log_temperature has shape (1,) or (num_heads,).
  TORCH_ARG(std::string, learned_temperature) = "none";
  /// Scores are squashed into (-softcap, softcap); 0: off.
  TORCH_ARG(double, softcap) = 0.0;
  /// Probability with which an attention weight is dropped, in training mode only.
  TORCH_ARG(double, dropout) = 0.0;
};

/// Projections, windowed attention and output projection: wmha::multi_head_attention with its weights. They start as
/// those of torch.nn.MultiheadAttention with separate projections do: q, k and v xavier_uniform, the output projection
/// as torch::nn::Linear's, biases 0.
class WMHA_API MultiheadAttentionImpl : public torch::nn::Cloneable<MultiheadAttentionImpl> {
 public:
  MultiheadAttentionImpl(int64_t embed_dim, int64_t num_heads)
      : MultiheadAttentionImpl(MultiheadAttentionOptions(embed_dim, num_heads)) {}
  explicit MultiheadAttentionImpl(MultiheadAttentionOptions options_);

  void reset() override;
  /// Draws new initial parameters.
  void reset_parameters();
  /// Reads exactly the module's parameters, of its own dtype.
  void load(torch::serialize::InputArchive& archive) override;
  void pretty_print(std::ostream& stream) const override;

  /// Self-attention of query (B, Nq, embed_dim), or its attention to key (B, Nk, kdim) and value (B, Nk, vdim; by
  /// default, key) -> (B, Nq, embed_dim). The last query sits on the last key: where there are fewer queries than keys,
  /// theirs are the last positions.
  at::Tensor forward(const at::Tensor& query, const at::Tensor& key = {}, const at::Tensor& value = {});

  /// Self-attention of x (B, N, embed_dim), the next positions of a sequence, of which the cache holds what they see of
  /// those before -> output (B, N, embed_dim) and the cache for the next call. Without a cache a sequence begins.
  ///
  /// Called with the parts of a sequence, one after the other, it gives the parts of what forward gives for the whole.
  /// It needs a causal window. Without a bound to the left the cache grows by every position, else it holds the last
  /// window_left. The cache given isn't changed, so that a sequence can go on from it in more than one way.
  std::tuple<at::Tensor, KeyValueCache> decode(
      const at::Tensor& x,
      const std::optional<KeyValueCache>& cache = std::nullopt);

  /// As given, with the defaults that depend on other options filled in, and window_right 0 where causal is set.
  MultiheadAttentionOptions options;
  torch::nn::Linear q_proj{nullptr};   // embed_dim -> Hq * Dk
  torch::nn::Linear k_proj{nullptr};   // kdim -> Hkv * Dk
  torch::nn::Linear v_proj{nullptr};   // vdim -> Hkv * Dv
  torch::nn::Linear out_proj{nullptr}; // Hq * Dv -> embed_dim
  at::Tensor log_temperature;          // undefined where the temperature isn't learned

 private:
  AttentionOptions attention_options() const;
};
TORCH_MODULE(MultiheadAttention);

struct TransformerLayerOptions {
  TransformerLayerOptions(int64_t embed_dim, int64_t num_heads) : attention_(embed_dim, num_heads) {}
  /* implicit */ TransformerLayerOptions(MultiheadAttentionOptions attention) : attention_(std::move(attention)) {}

  /// Of the attention inside; its embed_dim and bias are the feed-forward network's too.
  TORCH_ARG(MultiheadAttentionOptions, attention);
  /// Width of the feed-forward network. Default: 4 * embed_dim.
  TORCH_ARG(std::optional<int64_t>, dim_feedforward);
  /// "gelu", "relu", "silu", or gated, act(a) * b with twice the rows in linear1, first those of a: "geglu", "swiglu".
  TORCH_ARG(std::string, activation) = "gelu";
  /// "before" or "after" each sublayer.
  TORCH_ARG(std::string, norm) = "before";
  /// Epsilon of the layer norms.
  TORCH_ARG(double, layer_norm_eps) = 1e-5;
  /// On each sublayer's output, in training mode only.
  TORCH_ARG(double, dropout) = 0.0;
};

/// Self-attention and a feed-forward network, each with a residual connection and a layer norm: x +
/// dropout(sublayer(norm(x))) with the norm before, norm(x + dropout(sublayer(x))) with the norm after. The
/// parameters start as those of its submodules do.
class WMHA_API TransformerLayerImpl : public torch::nn::Cloneable<TransformerLayerImpl> {
 public:
  TransformerLayerImpl(int64_t embed_dim, int64_t num_heads)
      : TransformerLayerImpl(TransformerLayerOptions(embed_dim, num_heads)) {}
  explicit TransformerLayerImpl(TransformerLayerOptions options_);

  void reset() override;
  /// Draws new initial parameters.
  void reset_parameters();
  /// Reads exactly the module's parameters, of its own dtype.
  void load(torch::serialize::InputArchive& archive) override;
  void pretty_print(std::ostream& stream) const override;

  /// (B, N, embed_dim) -> (B, N, embed_dim)
  at::Tensor forward(const at::Tensor& x);
  /// forward for the next positions of a sequence: see MultiheadAttentionImpl::decode.
  std::tuple<at::Tensor, KeyValueCache> decode(
      const at::Tensor& x,
      const std::optional<KeyValueCache>& cache = std::nullopt);

  /// As given, with the default of dim_feedforward filled in.
  TransformerLayerOptions options;
  MultiheadAttention self_attn{nullptr};
  torch::nn::Linear linear1{nullptr};
  torch::nn::Linear linear2{nullptr};
  torch::nn::LayerNorm norm1{nullptr};
  torch::nn::LayerNorm norm2{nullptr};
  torch::nn::Dropout dropout{nullptr};

 private:
  at::Tensor attention_input(const at::Tensor& x);
  at::Tensor after_attention(const at::Tensor& x, const at::Tensor& attended);
  at::Tensor feed_forward(const at::Tensor& x);
};
TORCH_MODULE(TransformerLayer);

struct TransformerStackOptions {
  TransformerStackOptions(int64_t num_layers, TransformerLayerOptions layer)
      : num_layers_(num_layers), layer_(std::move(layer)) {}

  TORCH_ARG(int64_t, num_layers);
  /// Of every layer.
  TORCH_ARG(TransformerLayerOptions, layer);
  /// One for each layer, in place of the attention's window. Default: the same for all.
  TORCH_ARG(std::optional<std::vector<Window>>, windows);
  /// A layer norm, `norm`, after the last layer.
  TORCH_ARG(bool, final_norm) = false;
};

/// Layers one after the other, each with its own window if wanted.
class WMHA_API TransformerStackImpl : public torch::nn::Cloneable<TransformerStackImpl> {
 public:
  TransformerStackImpl(int64_t num_layers, TransformerLayerOptions layer)
      : TransformerStackImpl(TransformerStackOptions(num_layers, std::move(layer))) {}
  explicit TransformerStackImpl(TransformerStackOptions options_);

  void reset() override;
  /// Draws new initial parameters.
  void reset_parameters();
  /// Reads exactly the module's parameters, of its own dtype.
  void load(torch::serialize::InputArchive& archive) override;
  void pretty_print(std::ostream& stream) const override;

  /// (B, N, embed_dim) -> (B, N, embed_dim)
  at::Tensor forward(const at::Tensor& x);
  /// forward for the next positions of a sequence, with one cache for each layer, or none where a sequence begins: see
  /// MultiheadAttentionImpl::decode.
  std::tuple<at::Tensor, std::vector<KeyValueCache>> decode(
      const at::Tensor& x,
      const std::vector<KeyValueCache>& caches = {});

  TransformerStackOptions options;
  torch::nn::ModuleList layers{nullptr};
  torch::nn::LayerNorm norm{nullptr}; // empty without final_norm
};
TORCH_MODULE(TransformerStack);

} // namespace wmha::nn

// Windowed multi-head attention: the public C++ API.
//
//   auto options = wmha::AttentionOptions().window(256, 0).temperature(0.8);
//   at::Tensor output = wmha::attention(query, key, value, options);
//
// Shapes: B batch, Hq query heads, Hkv key/value heads (Hkv divides Hq), Nq queries, Nk keys, Dk key and Dv value
// dimension; E, Ek, Ev the embedding dimensions of query, key and value. Floating dtypes: fp64, fp32, bf16, fp16, the
// same for query, key and value. Any strides are accepted; only a last dimension that is not contiguous is copied.
//
// Query i sits at key position p(i) = i + query_offset and sees key j iff p(i) - left <= j <= p(i) + right:
//
//   z_ij  = softcap(scale * <q_i, k_j>) / temperature_h      softcap(x) = c * tanh(x / c), off when c == 0
//   lse_i = log sum_{j seen} exp(z_ij)
//   P_ij  = exp(z_ij - lse_i)
//   out_i = sum_j keep_ij / (1 - p) * P_ij * v_j             keep ~ Bernoulli(1 - p)
//
// A query that sees no key gives output 0, logsumexp -inf and zero gradients. Wrong arguments raise c10::Error with the
// name of the argument, what was expected and what came. All functions are differentiable.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <tuple>
#include <utility>

#define WMHA_API __attribute__((visibility("default")))

namespace wmha {

/// The options of every operator, with the operators' defaults. Setters return *this, so that they chain.
struct AttentionOptions {
  /// How many keys before and after its own position a query sees; -1: all on that side. Default: (-1, -1).
  AttentionOptions& window(c10::SymInt left, c10::SymInt right) {
    window_left_ = std::move(left);
    window_right_ = std::move(right);
    return *this;
  }
  /// No key after the query's own position: window_right = 0.
  AttentionOptions& causal() {
    window_right_ = 0;
    return *this;
  }
  /// Factor on <q, k>; finite, may be 0 or negative. Default: 1/sqrt(Dk).
  AttentionOptions& scale(double value) {
    scale_ = value;
    return *this;
  }
  /// Divides the scores; positive and finite. Default: 1.
  AttentionOptions& temperature(double value) {
    temperature_ = value;
    temperature_tensor_.reset();
    return *this;
  }
  /// A learned temperature of shape (), (1,) or (Hq,), differentiable, of any floating dtype.
  AttentionOptions& temperature(at::Tensor value) {
    temperature_tensor_ = std::move(value);
    return *this;
  }
  /// Scores are squashed into (-cap, cap) by cap * tanh(score / cap); 0: off (the default).
  AttentionOptions& softcap(double cap) {
    softcap_ = cap;
    return *this;
  }
  /// Probability in [0, 1] with which an attention weight is dropped. Default: 0.
  AttentionOptions& dropout(double probability) {
    dropout_p_ = probability;
    return *this;
  }
  /// Key position of query 0. Default: Nk - Nq, the last query on the last key.
  AttentionOptions& query_offset(c10::SymInt offset) {
    query_offset_ = std::move(offset);
    return *this;
  }
  /// Where the dropout seed is drawn from. Default: PyTorch's default generator of the device.
  AttentionOptions& generator(at::Generator value) {
    generator_ = std::move(value);
    return *this;
  }

  c10::SymInt window_left_ = -1;
  c10::SymInt window_right_ = -1;
  std::optional<double> scale_;
  double temperature_ = 1.0;
  std::optional<at::Tensor> temperature_tensor_; // takes precedence over temperature_
  double softcap_ = 0.0;
  double dropout_p_ = 0.0;
  std::optional<c10::SymInt> query_offset_;
  std::optional<at::Generator> generator_;
};

/// query (B, Hq, Nq, Dk), key (B, Hkv, Nk, Dk), value (B, Hkv, Nk, Dv) -> output (B, Hq, Nq, Dv).
/// The output lies in memory as (B, Nq, Hq, Dv) where the query does, else it is contiguous.
WMHA_API at::Tensor attention(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const AttentionOptions& options = {});

/// attention, and logsumexp (B, Hq, Nq) in fp32 (fp64 for fp64 inputs), both differentiable.
WMHA_API std::tuple<at::Tensor, at::Tensor> attention_with_lse(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const AttentionOptions& options = {});

/// The matrix P, without dropout: (B, Hq, Nq, Nk). Takes memory for all of it; meant for looking at.
/// Errors if options set a dropout probability or a generator.
WMHA_API at::Tensor attention_weights(
    const at::Tensor& query,
    const at::Tensor& key,
    const AttentionOptions& options = {});

/// Weights and biases of multi_head_attention, laid out as torch::nn::Linear does.
struct ProjectionWeights {
  at::Tensor q_weight;                               // (Hq * Dk, E)
  at::Tensor k_weight;                               // (Hkv * Dk, Ek)
  at::Tensor v_weight;                               // (Hkv * Dv, Ev)
  at::Tensor out_weight;                             // (Eo, Hq * Dv)
  std::optional<at::Tensor> q_bias = std::nullopt;   // (Hq * Dk,)
  std::optional<at::Tensor> k_bias = std::nullopt;   // (Hkv * Dk,)
  std::optional<at::Tensor> v_bias = std::nullopt;   // (Hkv * Dv,)
  std::optional<at::Tensor> out_bias = std::nullopt; // (Eo,)
};

/// query (B, Nq, E), key (B, Nk, Ek), value (B, Nk, Ev) -> (B, Nq, Eo): projections, attention, output projection.
/// num_kv_heads defaults to num_heads.
WMHA_API at::Tensor multi_head_attention(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const ProjectionWeights& weights,
    int64_t num_heads,
    std::optional<int64_t> num_kv_heads = std::nullopt,
    const AttentionOptions& options = {});

} // namespace wmha

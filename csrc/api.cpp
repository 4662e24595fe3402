// The C++ functions: each is its operator, called through the dispatcher.
#include "ops.h"

namespace wmha {

using Tensor = const at::Tensor&;
using OptionalTensor = const std::optional<at::Tensor>&;

at::Tensor attention(Tensor query, Tensor key, Tensor value, const AttentionOptions& options) {
  static const Operator<at::Tensor, Tensor, Tensor, Tensor> op("wmha::attention");
  return op(query, key, value, options);
}

std::tuple<at::Tensor, at::Tensor> attention_with_lse(
    Tensor query,
    Tensor key,
    Tensor value,
    const AttentionOptions& options) {
  static const Operator<std::tuple<at::Tensor, at::Tensor>, Tensor, Tensor, Tensor> op("wmha::attention_with_lse");
  return op(query, key, value, options);
}

at::Tensor attention_weights(Tensor query, Tensor key, const AttentionOptions& options) {
  TORCH_CHECK(
      options.dropout_p_ == 0 && !options.generator_.has_value(),
      "wmha: attention_weights takes neither dropout nor a generator");
  const auto call = [&]<typename Temperature>(const char* overload, Temperature temperature) {
    using Signature = at::Tensor(
        Tensor, Tensor, c10::SymInt, c10::SymInt, std::optional<double>, Temperature, double,
        std::optional<c10::SymInt>);
    return c10::Dispatcher::singleton()
        .findSchemaOrThrow("wmha::attention_weights", overload)
        .typed<Signature>()
        .call(
            query, key, options.window_left_, options.window_right_, options.scale_, temperature, options.softcap_,
            options.query_offset_);
  };
  if (!options.temperature_tensor_.has_value()) return call("", options.temperature_);
  return call.template operator()<Tensor>("temperature_tensor", *options.temperature_tensor_);
}

at::Tensor multi_head_attention(
    Tensor query,
    Tensor key,
    Tensor value,
    const ProjectionWeights& weights,
    int64_t num_heads,
    std::optional<int64_t> num_kv_heads,
    const AttentionOptions& options) {
  static const Operator<
      at::Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor,
      Tensor, OptionalTensor, int64_t, std::optional<int64_t>>
      op("wmha::multi_head_attention");
  return op(
      query, key, value, weights.q_weight, weights.k_weight, weights.v_weight, weights.q_bias, weights.k_bias,
      weights.v_bias, weights.out_weight, weights.out_bias, num_heads, num_kv_heads, options);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_forward(
    Tensor query,
    Tensor key,
    Tensor value,
    const AttentionOptions& options) {
  static const Operator<std::tuple<at::Tensor, at::Tensor, at::Tensor>, Tensor, Tensor, Tensor> op(
      "wmha::_attention_forward");
  return op(query, key, value, options);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_backward(
    Tensor grad_output,
    OptionalTensor grad_logsumexp,
    Tensor query,
    Tensor key,
    Tensor value,
    Tensor output,
    Tensor logsumexp,
    Tensor rng_state,
    const AttentionOptions& options) {
  static const Operator<
      std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>, Tensor, OptionalTensor, Tensor, Tensor, Tensor,
      Tensor, Tensor, Tensor>
      op("wmha::_attention_backward");
  return op(grad_output, grad_logsumexp, query, key, value, output, logsumexp, rng_state, options);
}

} // namespace wmha

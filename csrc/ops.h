// Between the operators' long argument lists and AttentionOptions: the one place in C++ that spells the list.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>
#include <wmha/attention.h>

#include <optional>
#include <string>
#include <tuple>

namespace wmha {

/// The options in the order of the schemas. Temperature is double or const at::Tensor&.
template <typename Options, typename Temperature>
auto in_schema_order(Options& options, Temperature& temperature) {
  return std::tie(
      options.window_left_, options.window_right_, options.scale_, temperature, options.softcap_, options.dropout_p_,
      options.query_offset_, options.generator_);
}

/// An operator's kernel with the argument list of its schema, around an implementation that takes (Leading...,
/// const AttentionOptions&).
template <auto implementation, typename Temperature, typename... Leading>
struct Unpacked {
  static auto call(
      Leading... leading,
      c10::SymInt window_left,
      c10::SymInt window_right,
      std::optional<double> scale,
      Temperature temperature,
      double softcap,
      double dropout_p,
      std::optional<c10::SymInt> query_offset,
      std::optional<at::Generator> generator) {
    AttentionOptions options;
    options.window_left_ = std::move(window_left);
    options.window_right_ = std::move(window_right);
    options.scale_ = scale;
    options.temperature(temperature);
    options.softcap_ = softcap;
    options.dropout_p_ = dropout_p;
    options.query_offset_ = std::move(query_offset);
    options.generator_ = std::move(generator);
    return implementation(leading..., options);
  }
};

/// Registers an implementation for the operator with a number as temperature and the one with a tensor.
template <auto implementation, typename... Leading>
void implement(torch::Library& library, const std::string& name) {
  library.impl((name + ".temperature_tensor").c_str(), Unpacked<implementation, const at::Tensor&, Leading...>::call);
  library.impl(name.c_str(), Unpacked<implementation, double, Leading...>::call);
}

/// implement() for (query, key, value, options).
template <auto implementation>
void implement_attention(torch::Library& library, const std::string& name) {
  implement<implementation, const at::Tensor&, const at::Tensor&, const at::Tensor&>(library, name);
}

/// wmha::attention and wmha::attention_with_lse of a device, from its wmha::_attention_forward.
template <auto forward>
at::Tensor attention_of(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const AttentionOptions& options) {
  return std::get<0>(forward(query, key, value, options));
}
template <auto forward>
std::tuple<at::Tensor, at::Tensor> attention_with_lse_of(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const AttentionOptions& options) {
  auto [output, logsumexp, rng_state] = forward(query, key, value, options);
  return {output, logsumexp};
}

/// Registers a device's kernels: `forward` as attention_forward below, `backward` as attention_backward.
template <auto forward, auto backward>
void implement_kernels(torch::Library& library) {
  using T = const at::Tensor&;
  implement_attention<attention_of<forward>>(library, "attention");
  implement_attention<attention_with_lse_of<forward>>(library, "attention_with_lse");
  implement_attention<forward>(library, "_attention_forward");
  implement<backward, T, const std::optional<at::Tensor>&, T, T, T, T, T, T>(library, "_attention_backward");
}

/// Calls an operator through the dispatcher.
template <typename Return, typename... Leading>
class Operator {
  template <typename Temperature>
  using Signature = Return(
      Leading...,
      c10::SymInt,
      c10::SymInt,
      std::optional<double>,
      Temperature,
      double,
      double,
      std::optional<c10::SymInt>,
      std::optional<at::Generator>);
  template <typename Temperature>
  using Handle = c10::TypedOperatorHandle<Signature<Temperature>>;

 public:
  explicit Operator(const char* name)
      : with_number_(find<double>(name, "")), with_tensor_(find<const at::Tensor&>(name, "temperature_tensor")) {}

  Return operator()(Leading... leading, const AttentionOptions& options) const {
    const auto call = [&](const auto& handle, const auto& temperature) {
      return std::apply(
          [&](const auto&... rest) { return handle.call(leading..., rest...); }, in_schema_order(options, temperature));
    };
    if (options.temperature_tensor_.has_value()) return call(with_tensor_, *options.temperature_tensor_);
    return call(with_number_, options.temperature_);
  }

 private:
  template <typename Temperature>
  static Handle<Temperature> find(const char* name, const char* overload) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature<Temperature>>();
  }

  Handle<double> with_number_;
  Handle<const at::Tensor&> with_tensor_;
};

/// wmha::_attention_forward: output, logsumexp and rng_state, the int64 (seed, offset) of the dropout mask
/// or, without dropout, nothing.
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_forward(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const AttentionOptions& options);

/// wmha::_attention_backward: gradients of query, key, value and temperature (no elements for a number).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad_output,
    const std::optional<at::Tensor>& grad_logsumexp,
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const at::Tensor& output,
    const at::Tensor& logsumexp,
    const at::Tensor& rng_state,
    const AttentionOptions& options);

} // namespace wmha

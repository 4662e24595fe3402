// First-order gradients by the fused kernels; everything beyond by the composite form.
#include <ATen/FuncTorchTLS.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>

#include "composite.h"
#include "ops.h"

namespace wmha {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// The options as one list that autograd can keep and compiled autograd can hash; no tensor, no generator.
c10::impl::GenericList to_list(AttentionOptions options) {
  options.generator_.reset();
  c10::impl::GenericList list(c10::AnyType::get());
  const auto add = [&](const auto&... fields) { (list.push_back(at::IValue(fields)), ...); };
  std::apply(add, in_schema_order(options, options.temperature_));
  return list;
}

AttentionOptions from_list(const c10::impl::GenericList& list) {
  AttentionOptions options;
  size_t i = 0;
  const auto take = [&](auto&... fields) {
    ((fields = list.get(i++).to<std::remove_reference_t<decltype(fields)>>()), ...);
  };
  std::apply(take, in_schema_order(options, options.temperature_));
  return options;
}

/// Differentiable to any order: the gradients of the composite form, dropout mask and all.
std::vector<at::Tensor> composite_backward(
    const std::array<at::Tensor, 4>& inputs,
    const AttentionOptions& options,
    const at::Tensor& rng_state,
    const at::Tensor& grad_output,
    const at::Tensor& grad_logsumexp) {
  const auto& [query, key, value, temperature] = inputs;
  const auto [output, logsumexp] = composite_attention(query, key, value, options, rng_state);
  variable_list outputs;
  variable_list grad_outputs;
  const auto add = [&](const at::Tensor& result, const at::Tensor& gradient) {
    if (!gradient.defined()) return;
    outputs.push_back(result);
    grad_outputs.push_back(gradient);
  };
  add(output, grad_output);
  add(logsumexp, grad_logsumexp);

  variable_list wanted;
  for (const at::Tensor& input : inputs) {
    if (input.defined() && input.requires_grad()) wanted.push_back(input);
  }
  const variable_list gradients = torch::autograd::grad(
      outputs, wanted, grad_outputs, /*retain_graph=*/true, /*create_graph=*/true, /*allow_unused=*/true);
  variable_list result;
  size_t i = 0;
  for (const at::Tensor& input : inputs) {
    const bool is_wanted = input.defined() && input.requires_grad();
    result.push_back(is_wanted ? gradients[i++] : at::Tensor());
    if (is_wanted && !result.back().defined()) result.back() = at::zeros_like(input);
  }
  return result;
}

class AttentionFunction : public torch::autograd::Function<AttentionFunction> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(
      AutogradContext* context,
      const at::Tensor& query,
      const at::Tensor& key,
      const at::Tensor& value,
      const std::optional<at::Tensor>& temperature,
      const AttentionOptions& options) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [output, logsumexp, rng_state] = attention_forward(query, key, value, options);
    context->save_for_backward({query, key, value, temperature.value_or(at::Tensor()), output, logsumexp, rng_state});
    context->saved_data["options"] = to_list(options);
    context->set_materialize_grads(false);
    return {output, logsumexp};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    at::Tensor grad_output = gradients[0];
    const at::Tensor& grad_logsumexp = gradients[1];
    variable_list result(5); // query, key, value, temperature, options
    if (!grad_output.defined() && !grad_logsumexp.defined()) return result;
    const variable_list saved = context->get_saved_variables();
    const std::array inputs{saved[0], saved[1], saved[2], saved[3]};
    const auto& [query, key, value, temperature] = inputs;
    const at::Tensor& output = saved[4];
    const at::Tensor& rng_state = saved[6];
    AttentionOptions options = from_list(context->saved_data["options"].toList());
    if (temperature.defined()) options.temperature(temperature);

    if (at::GradMode::is_enabled()) { // under create_graph only
      const auto composed = composite_backward(inputs, options, rng_state, grad_output, grad_logsumexp);
      std::copy(composed.begin(), composed.end(), result.begin());
      return result;
    }
    if (!grad_output.defined()) grad_output = at::zeros_like(output);
    const auto optional_grad_logsumexp = grad_logsumexp.defined() ? std::optional(grad_logsumexp) : std::nullopt;
    std::tie(result[0], result[1], result[2], result[3]) = attention_backward(
        grad_output, optional_grad_logsumexp, query, key, value, output, saved[5], rng_state, options);
    if (!temperature.defined()) result[3] = at::Tensor();
    return result;
  }
};

/// Is a torch.func transform active? The accessor stays non-null after the first one, hence the question it throws at.
bool in_functorch_transform() {
  const auto& functorch = at::functorch::functorchTLSAccessor();
  if (functorch == nullptr) return false;
  try {
    functorch->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) { return true; }
  return false;
}

template <typename Predicate>
bool any_input(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const AttentionOptions& options,
    const Predicate& predicate) {
  return predicate(query) || predicate(key) || predicate(value) ||
         (options.temperature_tensor_.has_value() && predicate(*options.temperature_tensor_));
}

std::tuple<at::Tensor, at::Tensor> attention_with_lse_autograd(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const AttentionOptions& options) {
  const auto has_forward_gradient = [](const at::Tensor& tensor) {
    return tensor.defined() && tensor._fw_grad(/*level=*/0).defined();
  };
  const auto requires_grad = [](const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); };
  if (in_functorch_transform() || any_input(query, key, value, options, has_forward_gradient)) {
    return composite_attention(query, key, value, options);
  }
  if (at::GradMode::is_enabled() && any_input(query, key, value, options, requires_grad)) {
    const variable_list results = AttentionFunction::apply(query, key, value, options.temperature_tensor_, options);
    return {results[0], results[1]};
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return attention_with_lse(query, key, value, options);
}

at::Tensor attention_autograd(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const AttentionOptions& options) {
  return std::get<0>(attention_with_lse_autograd(query, key, value, options));
}

} // namespace

TORCH_LIBRARY_IMPL(wmha, Autograd, library) {
  implement_attention<attention_autograd>(library, "attention");
  implement_attention<attention_with_lse_autograd>(library, "attention_with_lse");
  // The private operators are what AttentionFunction is made of; differentiating them on their own is an error.
  for (const char* name : {"_attention_forward", "_attention_backward"}) {
    library.impl(name, torch::autograd::autogradNotImplementedFallback());
    library.impl(
        (std::string(name) + ".temperature_tensor").c_str(), torch::autograd::autogradNotImplementedFallback());
  }
}

} // namespace wmha

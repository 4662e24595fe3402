// Autocast: one boxed kernel for all operators.
#include "autocast.h"

#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <utility>

namespace wmha {
namespace {

thread_local bool inside = false;

struct Inside {
  const bool before = std::exchange(inside, true);
  ~Inside() { inside = before; }
};

/// Casts every floating tensor but the temperature (and fp64 tensors) to the autocast dtype and calls the operator.
template <c10::DispatchKey key, c10::DeviceType device>
void autocast(const c10::OperatorHandle& op, c10::DispatchKeySet /*keys*/, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::DispatchKeySet{key}};
  const Inside inside_autocast;
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  const auto& arguments = op.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    at::IValue& argument = (*stack)[first + i];
    if (argument.isTensor() && arguments[i].name() != "temperature") {
      argument = at::autocast::cached_cast(dtype, argument.toTensor(), device);
    }
  }
  op.callBoxed(stack);
}

template <c10::DispatchKey key, c10::DeviceType device>
void implement_autocast(torch::Library& library) {
  for (const std::string name : {"attention", "attention_with_lse", "attention_weights", "multi_head_attention"}) {
    for (const std::string overload : {"", ".temperature_tensor"}) {
      library.impl((name + overload).c_str(), torch::CppFunction::makeFromBoxedFunction<&autocast<key, device>>());
    }
  }
}

} // namespace

bool is_inside_autocast(c10::DeviceType device) { return inside || at::autocast::is_autocast_enabled(device); }

TORCH_LIBRARY_IMPL(wmha, AutocastCPU, library) {
  implement_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>(library);
}

TORCH_LIBRARY_IMPL(wmha, AutocastCUDA, library) {
  implement_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>(library);
}

} // namespace wmha

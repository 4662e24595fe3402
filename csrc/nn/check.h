// Checks of the modules' options, in the sentences of Python's wmha.nn, and of what they load.
#pragma once

#include <c10/util/Exception.h>
#include <torch/nn/module.h>
#include <torch/serialize/input-archive.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace wmha::nn {

inline void check_positive(const char* name, int64_t size) {
  TORCH_CHECK_VALUE(size >= 1, "wmha: ", name, " must be at least 1, got ", size);
}

inline void check_probability(const char* name, double value) {
  TORCH_CHECK_VALUE(value >= 0 && value <= 1, "wmha: ", name, " must be between 0 and 1, got ", value);
}

inline void check_choice(const char* name, const std::string& value, const std::vector<std::string>& choices) {
  std::string list;
  for (const std::string& choice : choices) list += (list.empty() ? "" : ", ") + choice;
  TORCH_CHECK_VALUE(
      std::find(choices.begin(), choices.end(), value) != choices.end(), "wmha: ", name, " must be one of ", list,
      ", got ", value);
}

/// The archive holds exactly the module's parameters. LibTorch itself would take a tensor of another dtype for one of
/// the module's own and leave it full of nonsense.
inline void check_archive(
    const torch::nn::Module& module,
    torch::serialize::InputArchive& archive,
    const std::string& prefix = "") {
  const auto parameters = module.named_parameters(/*recurse=*/false);
  for (const auto& parameter : parameters) {
    at::Tensor saved;
    TORCH_CHECK(
        archive.try_read(parameter.key(), saved), "wmha: the archive must hold ", prefix, parameter.key(),
        ", got none");
    const at::Tensor& own = parameter.value();
    TORCH_CHECK(
        saved.scalar_type() == own.scalar_type(), "wmha: ", prefix, parameter.key(),
        " in the archive must be of the module's dtype, ", own.scalar_type(), ", got ", saved.scalar_type());
    TORCH_CHECK(
        saved.sizes() == own.sizes(), "wmha: ", prefix, parameter.key(), " in the archive must have shape ",
        own.sizes(), ", got ", saved.sizes());
  }
  for (const std::string& key : archive.keys()) {
    c10::IValue value;
    archive.read(key, value);
    TORCH_CHECK(
        !value.isTensor() || parameters.contains(key), "wmha: the archive holds ", prefix, key,
        ", which the module doesn't have");
  }
  for (const auto& child : module.named_children()) {
    torch::serialize::InputArchive nested;
    if (archive.try_read(child.key(), nested)) check_archive(*child.value(), nested, prefix + child.key() + ".");
  }
}

} // namespace wmha::nn

// One call's tensors, checked, and their description for the kernels of any device.
#pragma once

#include <ATen/core/Tensor.h>
#include <wmha/attention.h>

#include <optional>

#include "params.h"

namespace wmha {

/// As the kernels name it.
ScalarType kernel_dtype(at::ScalarType dtype);

/// Keeps alive what `params` points at.
struct Problem {
  AttentionParams params{};
  at::Tensor query;
  at::Tensor key;
  at::Tensor value;
  at::Tensor temperature; // undefined for a number
  at::Tensor output;
  at::Tensor logsumexp;
  at::Tensor rng_state;

  // Of the backward pass:
  at::Tensor grad_output;
  at::Tensor grad_logsumexp; // undefined: none
  at::Tensor grad_query;
  at::Tensor grad_key;
  at::Tensor grad_value;
  at::Tensor grad_temperature; // no elements for a number

  /// A forward pass, with the tensors for its results; draws the dropout seed.
  static Problem of_forward(
      const at::Tensor& query,
      const at::Tensor& key,
      const at::Tensor& value,
      const AttentionOptions& options);

  /// A backward pass, with the tensors for its results.
  static Problem of_backward(
      const at::Tensor& grad_output,
      const std::optional<at::Tensor>& grad_logsumexp,
      const at::Tensor& query,
      const at::Tensor& key,
      const at::Tensor& value,
      const at::Tensor& output,
      const at::Tensor& logsumexp,
      const at::Tensor& rng_state,
      const AttentionOptions& options);
};

} // namespace wmha

// The operator in a few ATen calls.
#pragma once

#include <wmha/attention.h>

namespace wmha {

/// attention_with_lse, differentiable to any order and in every mode that PyTorch's own operators support. Without
/// `rng_state` it draws one as the fused kernels do.
std::tuple<at::Tensor, at::Tensor> composite_attention(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const AttentionOptions& options,
    std::optional<at::Tensor> rng_state = std::nullopt);

} // namespace wmha

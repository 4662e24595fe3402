// The seed of a call's dropout mask.
#pragma once

#include <wmha/attention.h>

namespace wmha {

/// The int64 tensor (seed, offset) on the device of query, drawn from the options' generator or the device's default
/// one; zeros without dropout. Made of ATen's own random operators, so that vmap's randomness rules hold.
at::Tensor draw_rng_state(const at::Tensor& query, const AttentionOptions& options);

} // namespace wmha

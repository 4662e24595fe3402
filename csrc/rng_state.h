// The seed of a call's dropout mask.
#pragma once

#include <wmha/attention.h>

namespace wmha {

/// Elements of a call's random state: (seed, offset); none without dropout, so that nothing is launched for it. The
/// backward pass doesn't look at it then.
inline int64_t rng_state_size(const AttentionOptions& options) { return options.dropout_p_ == 0 ? 0 : 2; }

/// The int64 tensor (seed, offset) on the device of query, drawn from the options' generator or the device's default
/// one, or empty without dropout. The offset is 0 on the CPU; on CUDA it is drawn, too: one launch. Made of ATen's own
/// operators, so that vmap's randomness rules hold.
at::Tensor draw_rng_state(const at::Tensor& query, const AttentionOptions& options);

} // namespace wmha

#include "rng_state.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/zeros.h>

#include <limits>

namespace wmha {

at::Tensor draw_rng_state(const at::Tensor& query, const AttentionOptions& options) {
  const auto integer = query.options().dtype(at::kLong);
  if (options.dropout_p_ == 0) return at::zeros({2}, integer);
  const at::Tensor seed = at::randint(std::numeric_limits<int64_t>::max(), {1}, options.generator_, integer);
  return at::constant_pad_nd(seed, {0, 1});
}

} // namespace wmha

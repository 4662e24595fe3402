#include "rng_state.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/randint.h>

#include <limits>

namespace wmha {

at::Tensor draw_rng_state(const at::Tensor& query, const AttentionOptions& options) {
  const auto integer = query.options().dtype(at::kLong);
  const int64_t size = rng_state_size(options);
  if (size == 0) return at::empty({0}, integer);
  return at::randint(std::numeric_limits<int64_t>::max(), {size}, options.generator_, integer);
}

} // namespace wmha

#include "rng_state.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/randint.h>

#include <limits>

namespace wmha {

at::Tensor draw_rng_state(const at::Tensor& query, const AttentionOptions& options) {
  const auto integer = query.options().dtype(at::kLong);
  if (rng_state_size(options) == 0) return at::empty({0}, integer);
  const auto draw = [&](int64_t numbers) {
    return at::randint(std::numeric_limits<int64_t>::max(), {numbers}, options.generator_, integer);
  };
  return query.is_cuda() ? draw(2) : at::constant_pad_nd(draw(1), {0, 1});
}

} // namespace wmha

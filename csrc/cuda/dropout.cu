// The dropout mask itself, for the composite form and for tests.
#include "kernels.h"
#include "scores.cuh"

namespace wmha::cuda {
namespace {

constexpr int threads = 256;

/// A thread makes one element.
__global__ __launch_bounds__(
    threads) void dropout_mask_kernel(DropoutMask mask, Dropout dropout, const int64_t* rng_state) {
  const int64_t element = int64_t{blockIdx.x} * threads + threadIdx.x;
  if (element >= mask.heads * mask.queries * mask.keys) return;
  const int64_t key = mask.first_key + element % mask.keys;
  const int64_t query = mask.first_query + element / mask.keys % mask.queries;
  mask.data[element] = keeps(dropout, rng_state, key, query, element / mask.keys / mask.queries);
}

} // namespace

void dropout_mask(const DropoutMask& mask, const Dropout& dropout, const int64_t* rng_state, cudaStream_t stream) {
  const int64_t elements = mask.heads * mask.queries * mask.keys;
  if (elements == 0) return;
  dropout_mask_kernel<<<static_cast<unsigned>((elements + threads - 1) / threads), threads, 0, stream>>>(
      mask, dropout, rng_state);
}

} // namespace wmha::cuda

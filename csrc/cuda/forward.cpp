// Which kernel takes the forward pass.
#include "kernels.h"

namespace wmha::cuda {

bool runs_on_tensor_cores(const AttentionParams& params) {
  constexpr int64_t chunk = 8; // elements of 16 bytes
  constexpr int64_t widest = 256;
  constexpr int64_t longest = int64_t{1} << 30; // places of keys are ints
  const auto in_chunks = [](const auto& view, int64_t dim) {
    return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && dim % chunk == 0 && view.batch_stride % chunk == 0 &&
           view.head_stride % chunk == 0 && view.position_stride % chunk == 0;
  };
  const bool half = params.dtype == ScalarType::Half || params.dtype == ScalarType::BFloat16;
  return half && params.keys() <= longest && params.key_dim <= widest && params.value_dim <= widest &&
         in_chunks(params.query, params.key_dim) && in_chunks(params.key, params.key_dim) &&
         in_chunks(params.value, params.value_dim) && in_chunks(params.output, params.value_dim);
}

void forward(const AttentionParams& params, cudaStream_t stream) {
  if (runs_on_tensor_cores(params)) {
    tensor_core_forward(params, stream);
  } else {
    general_forward(params, stream);
  }
}

} // namespace wmha::cuda

// Which kernel takes the forward pass.
#include "decode_schedule.h"
#include "kernels.h"

namespace wmha::cuda {

bool runs_on_tensor_cores(const AttentionParams& params) {
  constexpr int64_t chunk = 8; // elements of 16 bytes
  constexpr int64_t widest = 256;
  constexpr int64_t longest = int64_t{1} << 30; // places of keys are ints
  const bool half = params.dtype == ScalarType::Half || params.dtype == ScalarType::BFloat16;
  return half && params.keys() <= longest && params.key_dim <= widest && params.value_dim <= widest &&
         in_chunks(params.query, params.key_dim, chunk) && in_chunks(params.key, params.key_dim, chunk) &&
         in_chunks(params.value, params.value_dim, chunk) && in_chunks(params.output, params.value_dim, chunk);
}

void forward_in_tiles(const AttentionParams& params, cudaStream_t stream) {
  if (runs_on_tensor_cores(params)) {
    tensor_core_forward(params, stream);
  } else {
    general_forward(params, stream);
  }
}

int64_t forward_workspace_size(const AttentionParams& params) {
  return decodes(params) ? DecodeSchedule(params).workspace_size() : 0;
}

void forward(const AttentionParams& params, void* workspace, cudaStream_t stream) {
  if (decodes(params)) {
    decode(params, workspace, stream);
  } else {
    forward_in_tiles(params, stream);
  }
}

} // namespace wmha::cuda

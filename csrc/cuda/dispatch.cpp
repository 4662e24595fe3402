// Which kernels take a call.
#include "decode_schedule.h"
#include "kernels.h"

namespace wmha::cuda {

constexpr int64_t half_chunk = 8; // elements of 16 bytes

bool runs_on_tensor_cores(const AttentionParams& params) {
  constexpr int64_t widest = 256;
  constexpr int64_t longest = int64_t{1} << 30; // places are ints
  const bool half = params.dtype == ScalarType::Half || params.dtype == ScalarType::BFloat16;
  return half && params.queries <= longest && params.keys() <= longest && params.key_dim <= widest &&
         params.value_dim <= widest && in_chunks(params.query, params.key_dim, half_chunk) &&
         in_chunks(params.key, params.key_dim, half_chunk) && in_chunks(params.value, params.value_dim, half_chunk) &&
         in_chunks(params.output, params.value_dim, half_chunk);
}

bool gradients_run_on_tensor_cores(const AttentionParams& params) {
  return runs_on_tensor_cores(params) && in_chunks(params.grad_output, params.value_dim, half_chunk) &&
         in_chunks(params.grad_query, params.key_dim, half_chunk) &&
         in_chunks(params.grad_key, params.key_dim, half_chunk) &&
         in_chunks(params.grad_value, params.value_dim, half_chunk);
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

void backward(const AttentionParams& params, void* workspace, cudaStream_t stream) {
  if (gradients_run_on_tensor_cores(params)) {
    tensor_core_grad_query(params, workspace, stream);
    tensor_core_grad_key_value(params, workspace, stream);
  } else {
    general_backward(params, workspace, stream);
  }
}

} // namespace wmha::cuda

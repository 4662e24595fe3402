// Which kernels take a call.
#include "kernels.h"

namespace wmha::cuda {

namespace {

constexpr int64_t chunk = 8; // elements of 16 bytes

template <typename Pointer>
bool in_chunks(const TensorView<Pointer>& view, int64_t dim) {
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && dim % chunk == 0 && view.batch_stride % chunk == 0 &&
         view.head_stride % chunk == 0 && view.position_stride % chunk == 0;
}

} // namespace

bool runs_on_tensor_cores(const AttentionParams& params) {
  constexpr int64_t widest = 256;
  constexpr int64_t longest = int64_t{1} << 30; // places are ints
  const bool half = params.dtype == ScalarType::Half || params.dtype == ScalarType::BFloat16;
  return half && params.queries <= longest && params.keys() <= longest && params.key_dim <= widest &&
         params.value_dim <= widest && in_chunks(params.query, params.key_dim) &&
         in_chunks(params.key, params.key_dim) && in_chunks(params.value, params.value_dim) &&
         in_chunks(params.output, params.value_dim);
}

bool gradients_run_on_tensor_cores(const AttentionParams& params) {
  return runs_on_tensor_cores(params) && in_chunks(params.grad_output, params.value_dim) &&
         in_chunks(params.grad_query, params.key_dim) && in_chunks(params.grad_key, params.key_dim) &&
         in_chunks(params.grad_value, params.value_dim);
}

void forward(const AttentionParams& params, cudaStream_t stream) {
  if (runs_on_tensor_cores(params)) {
    tensor_core_forward(params, stream);
  } else {
    general_forward(params, stream);
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

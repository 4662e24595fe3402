// The CUDA kernels. They know no torch: each function launches on the stream and returns.
//
// Errors of a launch are left to cudaGetLastError().
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../params.h"

namespace wmha::cuda {

struct DecodeSchedule;

/// Elements of acc that forward() needs.
int64_t forward_workspace_size(const AttentionParams& params);

/// output and logsumexp. `workspace` is uninitialised.
void forward(const AttentionParams& params, void* workspace, cudaStream_t stream);

/// The same without and with splits of the keys: for anything, and for what decodes(params).
void forward_in_tiles(const AttentionParams& params, cudaStream_t stream);
void decode(const AttentionParams& params, void* workspace, cudaStream_t stream);

/// Are there so few queries, and so many keys, that splits pay?
bool decodes(const AttentionParams& params);

/// Their kernels: for anything, and for what runs_on_tensor_cores(params).
void general_forward(const AttentionParams& params, cudaStream_t stream);
void tensor_core_forward(const AttentionParams& params, cudaStream_t stream);
void general_decode(const AttentionParams&, const DecodeSchedule&, void* workspace, cudaStream_t stream);
void tensor_core_decode(const AttentionParams&, const DecodeSchedule&, void* workspace, cudaStream_t stream);

/// Are the tensors of a half type, no wider than 256, no longer than 2^30, and in chunks of 16 bytes?
bool runs_on_tensor_cores(const AttentionParams& params);
/// Those of the backward pass too?
bool gradients_run_on_tensor_cores(const AttentionParams& params);

/// Do rows of `dim` elements, and all their chunks of `chunk` elements (16 bytes), begin at multiples of 16 bytes?
template <typename Pointer>
bool in_chunks(const TensorView<Pointer>& view, int64_t dim, int64_t chunk) {
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && dim % chunk == 0 && view.batch_stride % chunk == 0 &&
         view.head_stride % chunk == 0 && view.position_stride % chunk == 0;
}

/// Elements of acc that backward() needs: up to two for each query.
inline int64_t workspace_size(const AttentionParams& params) {
  return 2 * params.batch * params.heads * params.queries;
}

/// Doubles that params.grad_temperature needs.
int64_t temperature_shares(const AttentionParams& params);

/// grad_query, grad_key, grad_value, and the shares of the temperature's gradient if params.grad_temperature isn't
/// null. `workspace` is uninitialised.
void backward(const AttentionParams& params, void* workspace, cudaStream_t stream);

/// Its kernels: for anything; and for what gradients_run_on_tensor_cores(params), in this order.
void general_backward(const AttentionParams& params, void* workspace, cudaStream_t stream);
void tensor_core_grad_query(const AttentionParams& params, void* workspace, cudaStream_t stream);
void tensor_core_grad_key_value(const AttentionParams& params, const void* workspace, cudaStream_t stream);

/// gradient[h] (per_head) or gradient[0], of type `dtype`: the sum of the heads' shares, in one order.
void sum_temperature_shares(
    const AttentionParams& params,
    bool per_head,
    ScalarType dtype,
    void* gradient,
    cudaStream_t stream);

/// Where dropout keeps a weight: data[head][i][j] for query first_query + i and key first_key + j.
struct DropoutMask {
  bool* data;
  int64_t heads; // of all batches
  int64_t queries;
  int64_t keys;
  int64_t first_query;
  int64_t first_key;
};
void dropout_mask(const DropoutMask& mask, const Dropout& dropout, const int64_t* rng_state, cudaStream_t stream);

} // namespace wmha::cuda

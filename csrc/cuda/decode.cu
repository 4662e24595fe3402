// Few queries against many keys: which kernel attends to the splits, and the kernel that merges what they leave.
#include "decode.cuh"
#include "kernels.h"

namespace wmha::cuda {
namespace {

constexpr int warps = 8;
constexpr int threads = 32 * warps;

/// A block of threads merges the states of one row, one vector of 32 lanes. A warp has every eighth split.
template <typename T>
__global__ __launch_bounds__(
    threads) void merge_kernel(AttentionParams params, DecodeSchedule schedule, acc_type<T>* workspace) {
  using Acc = acc_type<T>;
  constexpr int width = 32 * Vector<Acc>::size;
  __shared__ Acc largest[warps];
  __shared__ Acc totals[warps];
  __shared__ Vector<Acc> sums[warps][32];
  const DecodeStates<Acc> states(schedule, workspace);
  const int parts = (schedule.state_width + width - 1) / width;
  const int block = static_cast<int>(blockIdx.x);
  const int row = block / parts; // of all heads
  const int first_feature = block % parts * width;
  const int query = row % schedule.queries;
  const int batch_head = row / schedule.queries;
  const int heads = schedule.group * schedule.kv_heads;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int64_t first_state = int64_t{row} * schedule.splits;

  Acc reference = -infinity<Acc>();
  for (int split = threadIdx.x; split < schedule.splits; split += threads) {
    const SoftmaxState<Acc> state = states.softmax[first_state + split];
    if (!state.empty()) reference = max(reference, state.reference);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) reference = max(reference, __shfl_xor_sync(all_lanes, reference, lanes));
  if (lane == 0) largest[warp] = reference;
  __syncthreads();
  for (const Acc of_warp : largest) reference = max(reference, of_warp);

  const int feature = first_feature + lane * Vector<Acc>::size;
  Acc total = 0;
  Vector<Acc> sum{};
#pragma unroll 4
  for (int split = warp; split < schedule.splits; split += warps) {
    const SoftmaxState<Acc> state = states.softmax[first_state + split];
    const Acc factor = state.factor(reference);
    total += factor * state.sum;
    if (feature >= schedule.state_width) continue;
    const Vector<Acc> values = states.vector(first_state + split, feature);
#pragma unroll
    for (int i = 0; i < Vector<Acc>::size; ++i) sum.x[i] += factor * values.x[i];
  }
  sums[warp][lane] = sum;
  if (lane == 0) totals[warp] = total;
  __syncthreads();

  total = 0;
  for (const Acc of_warp : totals) total += of_warp;
  const bool sees_none = params.window.keys_of(query).size() == 0;
  const Acc normalizer = sees_none ? Acc(0) : static_cast<Acc>(params.dropout.inverse_keep) / total;
  T* const output = at<T>(params.output, batch_head / heads, batch_head % heads, query) + first_feature;
  if (threadIdx.x < width && first_feature + threadIdx.x < params.value_dim) {
    Acc value = 0;
    for (const auto& of_warp : sums)
      value += of_warp[threadIdx.x / Vector<Acc>::size].x[threadIdx.x % Vector<Acc>::size];
    output[threadIdx.x] = static_cast<T>(normalizer * value);
  }
  if (threadIdx.x == 0 && first_feature == 0) {
    static_cast<Acc*>(params.logsumexp)[row] =
        sees_none ? -infinity<Acc>() : (reference + log2(total)) * static_cast<Acc>(ln_of_2);
  }
}

} // namespace

bool decodes(const AttentionParams& params) { return DecodeSchedule::applies(params); }

void decode(const AttentionParams& params, void* workspace, cudaStream_t stream) {
  const DecodeSchedule schedule(params);
  if (runs_on_tensor_cores(params)) {
    tensor_core_decode(params, schedule, workspace, stream);
  } else {
    general_decode(params, schedule, workspace, stream);
  }
  with_scalar_type(params.dtype, [&](auto type) {
    using T = decltype(type);
    using Acc = acc_type<T>;
    const int64_t tasks =
        params.batch * params.heads * params.queries * ceil_div(schedule.state_width, 32 * Vector<Acc>::size);
    merge_kernel<T>
        <<<static_cast<unsigned>(tasks), threads, 0, stream>>>(params, schedule, static_cast<Acc*>(workspace));
  });
}

} // namespace wmha::cuda

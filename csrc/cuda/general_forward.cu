// The forward pass for any type and any head dimension: a block of threads has 64 queries of one head and 64 features
// of the output.
#include "general_tiles.cuh"
#include "kernels.h"

namespace wmha::cuda {
namespace {

template <typename T>
__global__ __launch_bounds__(threads) void forward_kernel(AttentionParams params) {
  using Acc = acc_type<T>;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = reinterpret_cast<SharedTiles<Acc>&>(memory);
  const QueryTask task(params, params.value_dim);
  const auto query_rows = rows_of<T>(params.query, task.batch, task.head, task.queries, params.key_dim);
  const ScoreTransform<Acc> transform(params, task.head);
  const int ty = threadIdx.x / 16;
  const int tx = threadIdx.x % 16;

  Range seen[4];
  Acc reference[4];
  Acc sum[4];
  Part<Acc> output;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t query = task.first_query + ty + 16 * i;
    seen[i] = query < task.queries.end ? params.window.keys_of(query) : Range{0, 0};
    reference[i] = -infinity<Acc>();
    sum[i] = 0;
  }

  const Range keys = params.window.keys_of(task.queries);
  for (int64_t first_key = keys.begin; first_key < keys.end; first_key += tile) {
    const Range positions{first_key, min(first_key + tile, keys.end)};
    Part<Acc> weights =
        multiply(query_rows, rows_of<T>(params.key, task.batch, task.kv_head, positions, params.key_dim), shared);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Acc largest = reference[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t key = first_key + tx + 16 * j;
        const Acc score = transform(weights.at[i][j]);
        weights.at[i][j] = seen[i].begin <= key && key < seen[i].end ? score : -infinity<Acc>();
        largest = max(largest, weights.at[i][j]);
      }
      largest = largest_of_row(largest);
      // A query that has seen no key yet: any finite reference keeps 2^(-inf - reference) = 0.
      const Acc next = largest == -infinity<Acc>() ? Acc(0) : largest;
      const Acc rescale = exp2_of(reference[i] - next);
      reference[i] = next;
      sum[i] *= rescale;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Acc weight = exp2_of(weights.at[i][j] - next);
        sum[i] += weight;
        weights.at[i][j] = weight;
        output.at[i][j] *= rescale;
        if (params.dropout.enabled() && !keeps(
                                            params.dropout, params.rng_state, first_key + tx + 16 * j,
                                            task.first_query + ty + 16 * i, task.batch_head)) {
          weights.at[i][j] = 0;
        }
      }
    }
    const auto values = rows_of<T>(params.value, task.batch, task.kv_head, positions, params.value_dim);
    add_product(weights, values, task.first_feature, shared, output);
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t query = task.first_query + ty + 16 * i;
    const Acc total = sum_of_row(sum[i]);
    if (query >= task.queries.end) continue;
    const bool sees_none = seen[i].size() == 0;
    const Acc normalizer = sees_none ? Acc(0) : static_cast<Acc>(params.dropout.inverse_keep) / total;
    T* target = at<T>(params.output, task.batch, task.head, query);
    store_row(output, i, normalizer, task.first_feature, static_cast<int>(params.value_dim), target);
    if (tx == 0 && task.first_feature == 0) {
      static_cast<Acc*>(params.logsumexp)[task.batch_head * params.queries + query] =
          sees_none ? -infinity<Acc>() : (reference[i] + log2(total)) * static_cast<Acc>(ln_of_2);
    }
  }
}

} // namespace

void general_forward(const AttentionParams& params, cudaStream_t stream) {
  const int64_t tasks = params.batch * params.heads * ceil_div(params.queries, tile) * ceil_div(params.value_dim, tile);
  with_scalar_type(params.dtype, [&](auto type) {
    using T = decltype(type);
    launch<acc_type<T>>(forward_kernel<T>, tasks, stream, params);
  });
}

} // namespace wmha::cuda

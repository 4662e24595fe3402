// The backward pass for any type and any head dimension, in the terms of csrc/cpu/backward.cpp. One kernel goes over
// blocks of queries for grad_query, one over blocks of keys for grad_key and grad_value: both make the weights again
// from logsumexp, nothing is added by atomics, and the result is bitwise repeatable.
#include "general_tiles.cuh"
#include "kernels.h"

namespace wmha::cuda {
namespace {

/// What the pass needs to know of one query.
template <typename Acc>
struct QueryState {
  int64_t position;
  Range seen;
  Acc logsumexp; // times log2 e
  Acc delta;     // <dO, O> - dlse

  __device__ QueryState(const AttentionParams& params, const Acc* deltas, int64_t batch_head, int64_t query)
      : position(query), seen{0, 0}, logsumexp(0), delta(0) {
    if (query >= params.queries) return;
    const int64_t row = batch_head * params.queries + query;
    seen = params.window.keys_of(query);
    logsumexp = static_cast<const Acc*>(params.logsumexp)[row] * static_cast<Acc>(log2_of_e);
    delta = deltas[row];
  }
};

/// From the products of one query and key to its weight on the value, the gradient of its product, and its share of
/// the temperature's gradient. All are 0 where the query doesn't see the key.
template <typename Acc>
struct PairGradients {
  Acc value_weight = 0;
  Acc grad_product = 0;
  Acc temperature = 0; // dz * z * log2 e

  __device__ PairGradients(
      const AttentionParams& params,
      const ScoreTransform<Acc>& transform,
      const QueryState<Acc>& query,
      int64_t batch_head,
      int64_t key,
      Acc product,
      Acc grad_weight) {
    if (key < query.seen.begin || query.seen.end <= key) return;
    const Acc z = transform(product);
    const Acc weight = exp2_of(z - query.logsumexp);
    value_weight = weight;
    if (params.dropout.enabled()) {
      const Acc factor = keeps(params.dropout, params.rng_state, key, query.position, batch_head)
                             ? static_cast<Acc>(params.dropout.inverse_keep)
                             : Acc(0);
      value_weight *= factor;
      grad_weight *= factor;
    }
    const Acc grad_z = weight * (grad_weight - query.delta);
    temperature = grad_z * z;
    grad_product = grad_z * transform.derivative(z);
  }
};

/// deltas[row] = <dO, O> - dlse, a warp for each row of (batch, head, query).
template <typename T>
__global__ __launch_bounds__(threads) void delta_kernel(AttentionParams params, acc_type<T>* deltas) {
  using Acc = acc_type<T>;
  const int64_t row = (int64_t{blockIdx.x} * threads + threadIdx.x) / 32;
  if (row >= params.batch * params.heads * params.queries) return;
  const int64_t query = row % params.queries;
  const int64_t head = row / params.queries % params.heads;
  const int64_t batch = row / params.queries / params.heads;
  const T* output = at<const T>(params.output, batch, head, query);
  const T* grad_output = at<T>(params.grad_output, batch, head, query);
  Acc delta = 0;
  for (int64_t d = threadIdx.x % 32; d < params.value_dim; d += 32) {
    delta += static_cast<Acc>(output[d]) * static_cast<Acc>(grad_output[d]);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) delta += __shfl_xor_sync(all_lanes, delta, lanes);
  if (params.grad_logsumexp != nullptr) delta -= static_cast<const Acc*>(params.grad_logsumexp)[row];
  if (threadIdx.x % 32 == 0) deltas[row] = delta;
}

/// A block has 64 queries of one head and 64 features of grad_query.
template <typename T>
__global__ __launch_bounds__(threads) void grad_query_kernel(AttentionParams params, const acc_type<T>* deltas) {
  using Acc = acc_type<T>;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = reinterpret_cast<SharedTiles<Acc>&>(memory);
  const QueryTask task(params, params.key_dim);
  const auto query_rows = rows_of<T>(params.query, task.batch, task.head, task.queries, params.key_dim);
  const auto grad_output_rows = rows_of<T>(params.grad_output, task.batch, task.head, task.queries, params.value_dim);
  const ScoreTransform<Acc> transform(params, task.head);
  const int ty = threadIdx.x / 16;
  const int tx = threadIdx.x % 16;
  double temperature = 0;
  Part<Acc> grad_query;

  const Range keys = params.window.keys_of(task.queries);
  for (int64_t first_key = keys.begin; first_key < keys.end; first_key += tile) {
    const Range positions{first_key, min(first_key + tile, keys.end)};
    const auto key_rows = rows_of<T>(params.key, task.batch, task.kv_head, positions, params.key_dim);
    const auto value_rows = rows_of<T>(params.value, task.batch, task.kv_head, positions, params.value_dim);
    Part<Acc> grad_products = multiply(query_rows, key_rows, shared);
    const Part<Acc> grad_weights = multiply(grad_output_rows, value_rows, shared);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const QueryState<Acc> query(params, deltas, task.batch_head, task.first_query + ty + 16 * i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const PairGradients<Acc> pair(
            params, transform, query, task.batch_head, first_key + tx + 16 * j, grad_products.at[i][j],
            grad_weights.at[i][j]);
        temperature += pair.temperature;
        grad_products.at[i][j] = pair.grad_product;
      }
    }
    add_product(grad_products, key_rows, task.first_feature, shared, grad_query);
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t query = task.first_query + ty + 16 * i;
    if (query >= task.queries.end) continue;
    T* target = at<T>(params.grad_query, task.batch, task.head, query);
    store_row(grad_query, i, Acc(1), task.first_feature, static_cast<int>(params.key_dim), target);
  }
  if (params.grad_temperature == nullptr || task.first_feature > 0) return;
  __shared__ double rows[16];
  temperature = sum_of_row(temperature);
  if (tx == 0) rows[ty] = temperature;
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0;
    for (const double row : rows) sum += row;
    // z is proportional to 1 / temperature.
    params.grad_temperature[task.index] = -sum * ln_of_2 * transform.inverse_temperature;
  }
}

/// A block has 64 keys of one key head and 64 features of grad_key and of grad_value.
template <typename T>
__global__ __launch_bounds__(threads) void grad_key_value_kernel(AttentionParams params, const acc_type<T>* deltas) {
  using Acc = acc_type<T>;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = reinterpret_cast<SharedTiles<Acc>&>(memory);
  const int64_t chunks = ceil_div(max(params.key_dim, params.value_dim), tile);
  const int64_t blocks = ceil_div(params.keys(), tile);
  const int first_feature = static_cast<int>(blockIdx.x % chunks) * tile;
  const int64_t first_key = blockIdx.x / chunks % blocks * tile;
  const int64_t batch = blockIdx.x / chunks / blocks / params.kv_heads;
  const int64_t kv_head = blockIdx.x / chunks / blocks % params.kv_heads;
  const int64_t group = params.group();
  const Range keys{first_key, min(first_key + tile, params.keys())};
  const auto key_rows = rows_of<T>(params.key, batch, kv_head, keys, params.key_dim);
  const auto value_rows = rows_of<T>(params.value, batch, kv_head, keys, params.value_dim);
  const Range seeing = params.window.queries_of(keys, params.queries);
  const int ty = threadIdx.x / 16;
  const int tx = threadIdx.x % 16;
  Part<Acc> grad_key;
  Part<Acc> grad_value;

  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const int64_t batch_head = batch * params.heads + head;
    const ScoreTransform<Acc> transform(params, head);
    for (int64_t first_query = seeing.begin; first_query < seeing.end; first_query += tile) {
      const Range queries{first_query, min(first_query + tile, seeing.end)};
      const auto query_rows = rows_of<T>(params.query, batch, head, queries, params.key_dim);
      const auto grad_output_rows = rows_of<T>(params.grad_output, batch, head, queries, params.value_dim);
      Part<Acc> grad_products = multiply(key_rows, query_rows, shared);
      Part<Acc> weights = multiply(value_rows, grad_output_rows, shared);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const QueryState<Acc> query(params, deltas, batch_head, first_query + tx + 16 * j);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const PairGradients<Acc> pair(
              params, transform, query, batch_head, first_key + ty + 16 * i, grad_products.at[i][j], weights.at[i][j]);
          grad_products.at[i][j] = pair.grad_product;
          weights.at[i][j] = pair.value_weight;
        }
      }
      add_product(weights, grad_output_rows, first_feature, shared, grad_value);
      add_product(grad_products, query_rows, first_feature, shared, grad_key);
    }
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t key = first_key + ty + 16 * i;
    if (key >= keys.end) continue;
    T* grad_key_row = at<T>(params.grad_key, batch, kv_head, key);
    store_row(grad_key, i, Acc(1), first_feature, static_cast<int>(params.key_dim), grad_key_row);
    T* grad_value_row = at<T>(params.grad_value, batch, kv_head, key);
    store_row(grad_value, i, Acc(1), first_feature, static_cast<int>(params.value_dim), grad_value_row);
  }
}

/// One block for each sum: threads take shares in turn, then the first one adds up what they have.
template <typename T>
__global__ __launch_bounds__(threads) void sum_shares_kernel(
    const double* shares,
    int64_t batch,
    int64_t heads,
    int64_t shares_of_head,
    bool per_head,
    T* gradient) {
  __shared__ double sums[threads];
  double sum = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t first_head = per_head ? blockIdx.x : 0;
    const int64_t last_head = per_head ? blockIdx.x + 1 : heads;
    for (int64_t i = first_head * shares_of_head + threadIdx.x; i < last_head * shares_of_head; i += threads) {
      sum += shares[b * heads * shares_of_head + i];
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int i = 1; i < threads; ++i) sum += sums[i];
  gradient[blockIdx.x] = static_cast<T>(sum);
}

} // namespace

int64_t temperature_shares(const AttentionParams& params) {
  return params.batch * params.heads * ceil_div(params.queries, tile);
}

void general_backward(const AttentionParams& params, void* workspace, cudaStream_t stream) {
  const int64_t rows = params.batch * params.heads * params.queries;
  const int64_t query_tasks =
      params.batch * params.heads * ceil_div(params.queries, tile) * ceil_div(params.key_dim, tile);
  const int64_t key_tasks = params.batch * params.kv_heads * ceil_div(params.keys(), tile) *
                            ceil_div(max(params.key_dim, params.value_dim), tile);
  with_scalar_type(params.dtype, [&](auto type) {
    using T = decltype(type);
    using Acc = acc_type<T>;
    const auto deltas = static_cast<Acc*>(workspace);
    if (rows > 0) {
      delta_kernel<T><<<static_cast<unsigned>(ceil_div(rows, threads / 32)), threads, 0, stream>>>(params, deltas);
    }
    launch<Acc, AttentionParams, const Acc*>(grad_query_kernel<T>, query_tasks, stream, params, deltas);
    launch<Acc, AttentionParams, const Acc*>(grad_key_value_kernel<T>, key_tasks, stream, params, deltas);
  });
}

void sum_temperature_shares(
    const AttentionParams& params,
    bool per_head,
    ScalarType dtype,
    void* gradient,
    cudaStream_t stream) {
  const unsigned sums = per_head ? static_cast<unsigned>(params.heads) : 1;
  if (sums == 0) return;
  with_scalar_type(dtype, [&](auto type) {
    using T = decltype(type);
    sum_shares_kernel<T><<<sums, threads, 0, stream>>>(
        params.grad_temperature, params.batch, params.heads, ceil_div(params.queries, tile), per_head,
        static_cast<T*>(gradient));
  });
}

} // namespace wmha::cuda

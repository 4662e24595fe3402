// The gradients of key and value for half types on tensor cores: a block of threads has 64 keys of one key head, a warp
// 16 of them. The queries of all heads that share the key head pass by. Of wide heads one gradient is made at a time,
// since the sums of both don't fit into registers.
#include "gradient_tiles.cuh"
#include "kernels.h"

namespace wmha::cuda {
namespace {

using namespace gradients;

template <typename T, int dim, bool of_key, bool of_value>
__global__ __launch_bounds__(threads) void grad_key_value_kernel(
    const __grid_constant__ AttentionParams params,
    const QueryConstants* query_constants) {
  constexpr bool kept = dim <= 32; // own rows in registers; the sums take most of them
  constexpr int columns = tile_columns(dim);
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ __align__(16) QueryConstants shared_constants[2 * columns];
  T* const shared = reinterpret_cast<T*>(memory);
  const HalfTile<T, dim> key_tile{shared};
  const HalfTile<T, dim> value_tile{shared + block_rows * dim};
  const HalfTile<T, dim> query_tile{shared + 2 * block_rows * dim};
  const HalfTile<T, dim> grad_output_tile{shared + (2 * block_rows + 2 * columns) * dim};
  const int lane = threadIdx.x % 32;
  const int warp_row = threadIdx.x / 32 * warp_rows;

  const auto blocks = static_cast<unsigned>(ceil_div(params.keys(), block_rows));
  const int64_t first_key = int64_t{blockIdx.x % blocks} * block_rows;
  const unsigned batch = blockIdx.x / blocks / static_cast<unsigned>(params.kv_heads);
  const unsigned kv_head = blockIdx.x / blocks % static_cast<unsigned>(params.kv_heads);
  const auto heads = static_cast<unsigned>(params.group());
  const int keys = static_cast<int>(min(params.keys() - first_key, int64_t{block_rows}));
  const Window window = params.window;
  const Range queries = window.queries_of(Range{first_key, first_key + keys}, params.queries);
  const Places block_queries(queries, queries.begin);
  if (block_queries.end > 0) { // else there may be nothing to load
    const Places seen_keys(window.keys_of(queries), first_key);
    RowCopy<T, dim, threads, Order::pairs>(key_tile, params.key, batch, kv_head, first_key, params.key_dim)
        .template start<block_rows>(0, 0, max(seen_keys.begin, 0), min(seen_keys.end, keys));
    RowCopy<T, dim, threads, Order::pairs>(value_tile, params.value, batch, kv_head, first_key, params.value_dim)
        .template start<block_rows>(0, 0, max(seen_keys.begin, 0), min(seen_keys.end, keys));
  }

  const int warp_keys = max(min(keys - warp_row, warp_rows), 0);
  const RowsSeen<2> seen(warp_keys, lane / 4 * 2, 1, [&](int row) {
    const int64_t key = first_key + warp_row + row;
    return Places(window.queries_of(Range{key, key + 1}, params.queries), queries.begin);
  });
  OwnRows<T, dim, kept> key(by_row(key_tile).after(warp_row));
  OwnRows<T, dim, kept> value(by_row(value_tile).after(warp_row));
  const LanePlace<T, dim> query_place = by_column(query_tile);
  const LanePlace<T, dim> grad_output_place = by_column(grad_output_tile);
  const LanePlace<T, dim> query_row_place = by_row(query_tile);
  const LanePlace<T, dim> grad_output_row_place = by_row(grad_output_tile);
  Sums grad_key[of_key ? dim / 8 : 1] = {};
  Sums grad_value[of_value ? dim / 8 : 1] = {};
  ScoreTransform<float> transform(params, kv_head * heads);

  for (unsigned head = kv_head * heads; head < (kv_head + 1) * heads; ++head) {
    const unsigned batch_head = batch * static_cast<unsigned>(params.heads) + head;
    PairGradients<T, false> gradients(params, head, batch_head);
    if (params.temperature_stride > 0) {
      const auto ratio = static_cast<float>(transform.inverse_temperature / gradients.transform.inverse_temperature);
#pragma unroll
      for (int i = 0; i < (of_key ? dim / 2 : 0); ++i) grad_key[i / 4].x[i / 2 % 2][i % 2] *= ratio;
    }
    transform = gradients.transform;
    const RowCopy<T, dim, threads> copy_queries(query_tile, params.query, batch, head, queries.begin, params.key_dim);
    const RowCopy<T, dim, threads> copy_grad_outputs(
        grad_output_tile, params.grad_output, batch, head, queries.begin, params.value_dim);
    const QueryConstants* const constants_of_head = query_constants + batch_head * params.queries + queries.begin;
    const auto copy = [&](int first, int to) {
      copy_queries.template start<columns>(first, to, 0, block_queries.end);
      copy_grad_outputs.template start<columns>(first, to, 0, block_queries.end);
      const int column = threadIdx.x;
      if (column < columns) {
        copy_pair(
            shared_constants + to + column, constants_of_head + first + column, first + column < block_queries.end);
      }
    };
    __syncthreads();
    if (block_queries.end > 0) copy(0, 0);

    // `count` groups of 16 queries, from query `first` on, which begin at row `place` of the tiles.
    const auto attend = [&](int first, int place, auto count, auto tests) {
      constexpr int tiles = 2 * decltype(count)::value; // of 8 queries
      Sums score[tiles];
      Sums grad_weight[tiles];
      multiply(key, query_place.after(place), score);
      multiply(value, grad_output_place.after(place), grad_weight);
      QueryConstants constants[tiles][2];
#pragma unroll
      for (int i = 0; i < 2 * tiles; ++i) {
        constants[i / 2][i % 2] = shared_constants[place + i / 2 * 8 + lane % 4 * 2 + i % 2];
      }
      LeftFragment value_weight[tiles / 2];
      LeftFragment grad_product[tiles / 2];
      gradients(
          score, grad_weight, [&](int n, int, int j) { return constants[n][j]; }, tests,
          [&](int n, int i, int j) { return seen.row[i].holds(first + 8 * n + lane % 4 * 2 + j); },
          [&](const HeadDropout& dropout, int n) {
            // Each of the four lanes that share eight keys makes the words of another query.
            const int mine = lane / 4 % 4;
            PhiloxWords words = dropout.words(
                first_key + warp_row + lane / 16 * 8,
                queries.begin + first + 8 * (n + mine / 2) + lane % 4 * 2 + mine % 2);
            transpose_in_fours<4>(words.word);
            return words;
          },
          false, value_weight, grad_product);
      if constexpr (of_value) add_product(value_weight, grad_output_row_place.after(place), grad_value);
      if constexpr (of_key) add_product(grad_product, query_row_place.after(place), grad_key);
    };

    for (int first = 0, stage = 0; first < block_queries.end; first += columns, stage ^= columns) {
      wait_for_copies();
      __syncthreads();
      if (first == 0) {
        key.load();
        value.load();
      }
      if (first + columns < block_queries.end) copy(first + columns, stage ^ columns);
      for_each_group<columns>(
          seen, first, [&](int place, auto count, auto tests) { attend(first + place, stage + place, count, tests); });
    }
  }

  wait_for_copies(); // of keys, where there is no head to do so
  __syncthreads();
  const auto store = [&](const auto& sums, float factor, const OutputView& view, int64_t features) {
    round_rows(sums, factor, factor, key_tile, warp_row);
    __syncwarp();
    store_rows<Order::pairs, warp_rows>(
        key_tile, warp_row, view, batch, kv_head, first_key + warp_row, warp_keys, features);
    __syncwarp();
  };
  if constexpr (of_key) store(grad_key, transform.gradient_factor, params.grad_key, params.key_dim);
  if constexpr (of_value) {
    store(grad_value, static_cast<float>(params.dropout.inverse_keep), params.grad_value, params.value_dim);
  }
}

template <typename T, int dim, bool of_key, bool of_value>
void launch(const AttentionParams& params, const QueryConstants* constants, cudaStream_t stream) {
  constexpr int bytes = shared_bytes<T, dim>;
  const int64_t tasks = params.batch * params.kv_heads * ceil_div(params.keys(), block_rows);
  if (tasks == 0) return;
  const auto kernel = grad_key_value_kernel<T, dim, of_key, of_value>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  kernel<<<static_cast<unsigned>(tasks), threads, bytes, stream>>>(params, constants);
}

} // namespace

void tensor_core_grad_key_value(const AttentionParams& params, const void* workspace, cudaStream_t stream) {
  with_tile(params, [&](auto type, auto dim) {
    using T = decltype(type);
    constexpr int d = decltype(dim)::value;
    const auto constants = static_cast<const QueryConstants*>(workspace);
    if constexpr (d <= 128) {
      launch<T, d, true, true>(params, constants, stream);
    } else {
      launch<T, d, true, false>(params, constants, stream);
      launch<T, d, false, true>(params, constants, stream);
    }
  });
}

} // namespace wmha::cuda

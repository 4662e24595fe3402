// Products of 64 x 64 tiles on any type of arithmetic and for any number of features: a thread has four rows and four
// columns of the tile, in registers.
//
//   thread (ty, tx), each 0 to 15, has the rows ty + 16 i and the columns tx + 16 j of products of features,
//   and the columns 4 tx + j of sums over positions; i, j = 0 to 3.
#pragma once

#include "scores.cuh"

namespace wmha::cuda {

constexpr int tile = 64;
constexpr int threads = 256;
constexpr int features_at_once = 32;

/// What a block of threads is for, where it has 64 queries of one head and 64 of `dim` features.
struct QueryTask {
  int first_feature;
  int64_t index; // of (batch, head, block of queries)
  int64_t first_query;
  int64_t batch_head;
  int64_t batch;
  int64_t head;
  int64_t kv_head;
  Range queries;

  __device__ QueryTask(const AttentionParams& params, int64_t dim) {
    const int64_t chunks = ceil_div(dim, tile);
    const int64_t blocks = ceil_div(params.queries, tile);
    first_feature = static_cast<int>(blockIdx.x % chunks) * tile;
    index = blockIdx.x / chunks;
    first_query = index % blocks * tile;
    batch_head = index / blocks;
    batch = batch_head / params.heads;
    head = batch_head % params.heads;
    kv_head = params.kv_head(head);
    queries = {first_query, min(first_query + tile, params.queries)};
  }
};

/// A thread's part of a tile.
template <typename Acc>
struct Part {
  Acc at[4][4] = {};
};

template <typename Acc>
struct alignas(16) Quad {
  Acc x[4];
};

/// Rows of 64 elements, row r of them for feature or position r. The 16 quads of a row are stored in an order that
/// differs from row to row, so that neither a warp that writes along rows nor one that reads across them meets the same
/// banks twice.
template <typename Acc>
struct Columns {
  Acc* data;

  __device__ Acc* place(int row, int quad) const { return data + row * tile + ((quad ^ (row & 7)) * 4); }
  __device__ Quad<Acc>& quad(int row, int quad) const { return *reinterpret_cast<Quad<Acc>*>(place(row, quad)); }
};

/// What a block of threads shares. `weights` take the place of the operands, which are used up then.
template <typename Acc>
struct SharedTiles {
  union {
    struct {
      Acc left[features_at_once * tile];
      Acc right[features_at_once * tile];
    };
    Acc weights[tile * tile];
  };
  Acc rows[tile * tile];
};

/// Positions of one head: `count` rows, features contiguous.
template <typename T>
struct HeadRows {
  const T* data;
  int64_t stride;
  int count;
  int dim;
};

template <typename T>
__device__ HeadRows<T> rows_of(const InputView& view, int64_t batch, int64_t head, Range positions, int64_t dim) {
  return {
      at<T>(view, batch, head, positions.begin), view.position_stride, static_cast<int>(positions.size()),
      static_cast<int>(dim)};
}

/// Features [first, first + 32) of up to 64 rows as columns; zeros beyond both ends. Row g + 16 i becomes element i of
/// quad g. Eight lanes read neighbouring features.
template <typename T, typename Acc>
__device__ void load_columns(const HeadRows<T>& rows, int first, Acc* shared) {
  const Columns<Acc> columns{shared};
  const int lane = threadIdx.x % 32;
  for (int step = threadIdx.x / 32; step < features_at_once / 8 * 16; step += threads / 32) {
    const int quad = step % 16;
    const int feature = step / 16 * 8 + lane % 8;
    const int row = quad + lane / 8 * 16;
    const bool there = row < rows.count && first + feature < rows.dim;
    columns.place(feature, quad)[lane / 8] =
        there ? static_cast<Acc>(rows.data[row * rows.stride + first + feature]) : Acc(0);
  }
}

/// Features [first, first + 64) of up to 64 rows; zeros beyond both ends.
template <typename T, typename Acc>
__device__ void load_rows(const HeadRows<T>& rows, int first, Acc* shared) {
  const int feature = threadIdx.x % tile;
  for (int row = threadIdx.x / tile; row < tile; row += threads / tile) {
    const bool there = row < rows.count && first + feature < rows.dim;
    shared[row * tile + feature] = there ? static_cast<Acc>(rows.data[row * rows.stride + first + feature]) : Acc(0);
  }
}

/// Scalar products of each row of `left` with each row of `right`.
template <typename T, typename Acc>
__device__ Part<Acc> multiply(const HeadRows<T>& left, const HeadRows<T>& right, SharedTiles<Acc>& shared) {
  Part<Acc> product;
  const int ty = threadIdx.x / 16;
  const int tx = threadIdx.x % 16;
  for (int first = 0; first < left.dim; first += features_at_once) {
    __syncthreads();
    load_columns(left, first, shared.left);
    load_columns(right, first, shared.right);
    __syncthreads();
#pragma unroll 8
    for (int feature = 0; feature < features_at_once; ++feature) {
      const Quad<Acc> row = Columns<Acc>{shared.left}.quad(feature, ty);
      const Quad<Acc> column = Columns<Acc>{shared.right}.quad(feature, tx);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) product.at[i][j] += row.x[i] * column.x[j];
      }
    }
  }
  return product;
}

/// sum[row] += sum over the columns of weights[row][column] * (row `column` of `rows`, features [first, first + 64)).
template <typename T, typename Acc>
__device__ void add_product(
    const Part<Acc>& weights,
    const HeadRows<T>& rows,
    int first,
    SharedTiles<Acc>& shared,
    Part<Acc>& sum) {
  const int ty = threadIdx.x / 16;
  const int tx = threadIdx.x % 16;
  const Columns<Acc> columns{shared.weights};
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    Quad<Acc>& quad = columns.quad(tx + 16 * j, ty);
#pragma unroll
    for (int i = 0; i < 4; ++i) quad.x[i] = weights.at[i][j];
  }
  load_rows(rows, first, shared.rows);
  __syncthreads();
#pragma unroll 8
  for (int position = 0; position < tile; ++position) {
    const Quad<Acc> weight = columns.quad(position, ty);
    const auto& row = reinterpret_cast<const Quad<Acc>&>(shared.rows[position * tile + 4 * tx]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sum.at[i][j] += weight.x[i] * row.x[j];
    }
  }
}

/// Stores row `row` of a sum: features first + 4 tx + j of the tensor's row.
template <typename T, typename Acc>
__device__ void store_row(const Part<Acc>& sum, int i, Acc factor, int first, int dim, T* target) {
  const int tx = threadIdx.x % 16;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int feature = first + 4 * tx + j;
    if (feature < dim) target[feature] = static_cast<T>(factor * sum.at[i][j]);
  }
}

/// The largest of x, and the sum, among the 16 threads that share rows.
template <typename Acc>
__device__ Acc largest_of_row(Acc x) {
  for (int lanes = 8; lanes > 0; lanes /= 2) x = max(x, __shfl_xor_sync(all_lanes, x, lanes));
  return x;
}
template <typename Acc>
__device__ Acc sum_of_row(Acc x) {
  for (int lanes = 8; lanes > 0; lanes /= 2) x += __shfl_xor_sync(all_lanes, x, lanes);
  return x;
}

/// Lets `kernel` use as much shared memory as it wants, and launches it on one block for each task.
template <typename Acc, typename... Arguments>
void launch(void (*kernel)(Arguments...), int64_t tasks, cudaStream_t stream, Arguments... arguments) {
  if (tasks == 0) return;
  constexpr int bytes = sizeof(SharedTiles<Acc>);
  if (bytes > 48 << 10) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  kernel<<<static_cast<unsigned>(tasks), threads, bytes, stream>>>(arguments...);
}

} // namespace wmha::cuda

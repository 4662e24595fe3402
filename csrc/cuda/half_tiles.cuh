// Tiles of half types in shared memory: how they lie there, how they are filled, where a lane finds its part of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "../params.h"
#include "tensor_core.cuh"

namespace wmha::cuda {

/// Rows of `dim` elements. The chunks of a row are stored in an order that differs from row to row, so that the same
/// chunk of eight neighbouring rows lies in different banks.
template <typename T, int dim>
struct HalfTile {
  static constexpr int ordered = dim / chunk % 8 == 0 ? 8 : 4; // neighbouring chunks that change places

  T* data;

  __device__ static int order(int row) { return ordered == 8 ? row & 7 : row >> 1 & 3; }
  __device__ static int offset(int row, int part) { return row * dim + (part ^ order(row)) * chunk; }
  __device__ uint32_t address(int row, int part) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(data + offset(row, part)));
  }
};

template <typename Function, int... i>
__device__ void call_with(std::integer_sequence<int, i...>, const Function& function) {
  (function(std::integral_constant<int, i>()), ...);
}

/// Calls function with the constants 0 to n - 1 in turn: a loop whose counter instructions can hold.
template <int n, typename Function>
__device__ void unrolled(const Function& function) {
  call_with(std::make_integer_sequence<int, n>(), function);
}

/// Where a lane finds its chunk of 16 x 16 elements, for ldmatrix.
template <typename T, int dim>
class LanePlace {
 public:
  /// The lane's place in the 16 x 16 elements: a row, and the left (0) or right (1) chunk.
  __device__ LanePlace(const HalfTile<T, dim>& tile, int row, int part) : address_(tile.address(row, part)) {}

  /// The same, `rows` (a multiple of 16) further down.
  __device__ LanePlace after(int rows) const {
    LanePlace place = *this;
    place.address_ += rows * dim * bytes;
    return place;
  }

  /// For 16 rows from `row` and 16 features from `feature`, both multiples of 16. The order of chunks is an exclusive
  /// or with bits of the row, hence one of addresses: rows begin at multiples of all chunks that change places.
  template <int row, int feature>
  __device__ auto at() const {
    constexpr int ordered = HalfTile<T, dim>::ordered * chunk;
    constexpr int offset = (row * dim + feature / ordered * ordered) * bytes;
    return SharedAddress<offset>{address_ ^ (feature % ordered * bytes)};
  }

 private:
  static constexpr int bytes = sizeof(T);
  uint32_t address_;
};

/// The places for load_left() and load_right_transposed().
template <typename T, int dim>
__device__ LanePlace<T, dim> by_row(const HalfTile<T, dim>& tile) {
  const int lane = threadIdx.x % 32;
  return {tile, lane % 16, lane / 16};
}
/// The places for load_right().
template <typename T, int dim>
__device__ LanePlace<T, dim> by_column(const HalfTile<T, dim>& tile) {
  const int lane = threadIdx.x % 32;
  return {tile, lane % 8 + lane / 16 * 8, lane / 8 % 2};
}

/// Tile row r holds position r, or neighbouring positions are in the rows that one lane has sums of, r and r + 8.
enum class Order { plain, pairs };

template <Order order>
__device__ int position_of(int row) {
  return order == Order::plain ? row : (row & ~15) | (row & 7) << 1 | (row >> 3 & 1);
}

/// Copies rows of a tensor to a tile, in the background: what one thread does of it. A row's chunks are copied by
/// neighbouring threads.
template <typename T, int dim, int threads, Order order = Order::plain>
class RowCopy {
 public:
  /// Position 0 is position `first` of a head, and so on; of each the first `features`, a multiple of 8, zeros behind
  /// them.
  __device__ RowCopy(
      const HalfTile<T, dim>& tile,
      const InputView& view,
      int64_t batch,
      int64_t head,
      int64_t first,
      int64_t features)
      : features_(static_cast<int>(features)),
        to_(tile.address(threadIdx.x / width, part())),
        row_bytes_(view.position_stride * static_cast<int64_t>(sizeof(T))),
        from_(reinterpret_cast<const char*>(at<T>(view, batch, head, first)) + position() * row_bytes_ + part() * 16) {
    asm("" : "+r"(to_), "+l"(from_)); // kept, not computed again at each use
  }

  /// Begins to copy `rows` positions from `first` on, to the tile's row `to` (a multiple of 16) and after;
  /// zeros instead of those outside [begin, end).
  template <int rows>
  __device__ void start(int first, int to, int begin, int end) const {
    const char* from = from_ + first * row_bytes_;
    const uint32_t target = to_ + to * dim * static_cast<int>(sizeof(T));
    if (begin <= first && first + rows <= end && features_ == dim) {
      copy<rows>(from, target, [](int, int) { return true; });
    } else {
      copy<rows>(from, target, [&](int row, int next) {
        const int place = first + row + position();
        return begin <= place && place < end && (next + part()) * chunk < features_;
      });
    }
  }

 private:
  /// Of each chunk, whether there(row, part) it is.
  template <int rows, typename There>
  __device__ void copy(const char* from, uint32_t to, const There& there) const {
    unrolled<rows * width / threads>([&](auto step) {
      unrolled<dim / chunk / width>([&](auto i) {
        constexpr int row = step * threads / width, part = i * width;
        copy_chunk<(row * dim + part * chunk) * sizeof(T), part * 16>(to, from, there(row, part));
      });
      from += threads / width * row_bytes_;
    });
  }

  static constexpr int width = HalfTile<T, dim>::ordered; // chunks of a row at once
  /// Of the thread's first chunk.
  __device__ static int position() { return position_of<order>(threadIdx.x / width); }
  __device__ static int part() { return threadIdx.x % width; }

  int features_;
  uint32_t to_;
  int64_t row_bytes_;
  const char* from_;
};

/// A warp rounds 16 rows of sums, each of a lane's two times its factor, to the tile's rows from `first` on.
template <typename T, int dim>
__device__ void round_rows(
    const Sums (&sums)[dim / 8],
    float factor0,
    float factor1,
    const HalfTile<T, dim>& tile,
    int first) {
  const int row = threadIdx.x % 32 / 4; // and row + 8, whose chunks are in the same order
  T* const target = tile.data + (first + row) * dim + threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < dim / 8; ++n) {
    T* const pair = target + (n ^ HalfTile<T, dim>::order(row)) * chunk;
    const auto& x = sums[n].x;
    *reinterpret_cast<uint32_t*>(pair) = round_pair<T>(x[0][0] * factor0, x[0][1] * factor0);
    *reinterpret_cast<uint32_t*>(pair + 8 * dim) = round_pair<T>(x[1][0] * factor1, x[1][1] * factor1);
  }
}

/// A warp stores `rows` rows of a tile, from its row `first_row` on, in whole chunks: positions [0, `positions`) of
/// them, as positions `first` and after of a head; of each `features`.
template <Order order, int rows, typename T, int dim>
__device__ void store_rows(
    const HalfTile<T, dim>& tile,
    int first_row,
    const OutputView& view,
    int64_t batch,
    int64_t head,
    int64_t first,
    int positions,
    int64_t features) {
  constexpr int width = HalfTile<T, dim>::ordered; // chunks of a row at once
  const int part = threadIdx.x % width;
#pragma unroll
  for (int step = 0; step < rows; step += 32 / width) {
    const int row = step + threadIdx.x % 32 / width;
    const int position = position_of<order>(row);
    if (position >= positions) continue;
    T* const target = at<T>(view, batch, head, first + position);
#pragma unroll
    for (int i = 0; i < dim / chunk; i += width) {
      if ((i + part) * chunk >= features) continue;
      *reinterpret_cast<uint4*>(target + (i + part) * chunk) =
          *reinterpret_cast<const uint4*>(tile.data + HalfTile<T, dim>::offset(first_row + row, i + part));
    }
  }
}

/// Calls function(T(), std::integral_constant<int, dim>()) with the type of the tensors and the features of their
/// tiles.
template <typename Function>
void with_tile(const AttentionParams& params, const Function& function) {
  const int64_t widest = params.key_dim > params.value_dim ? params.key_dim : params.value_dim;
  const auto with_type = [&](auto type) {
    if (widest <= 32) return function(type, std::integral_constant<int, 32>());
    if (widest <= 64) return function(type, std::integral_constant<int, 64>());
    if (widest <= 96) return function(type, std::integral_constant<int, 96>());
    if (widest <= 128) return function(type, std::integral_constant<int, 128>());
    if (widest <= 192) return function(type, std::integral_constant<int, 192>());
    function(type, std::integral_constant<int, 256>());
  };
  params.dtype == ScalarType::Half ? with_type(__half()) : with_type(__nv_bfloat16());
}

} // namespace wmha::cuda

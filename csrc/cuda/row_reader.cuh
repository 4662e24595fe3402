// From a tensor of a half type straight to registers: one lane's share of tiles of its rows.
#pragma once

#include "decode.cuh"
#include "tensor_core.cuh"

namespace wmha::cuda {

/// 16 bytes: eight elements.
struct alignas(16) Chunk {
  uint32_t x[4];
};

template <typename T>
__device__ Chunk load_chunk(const T* from) {
  const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(from));
  return {{loaded.x, loaded.y, loaded.z, loaded.w}};
}

/// One lane's share of the rows of a tensor, a tile of keys at a time. A row's neighbouring chunks are read by `lanes`
/// neighbouring lanes.
template <typename T, int lanes, int chunks>
class RowReader {
 public:
  /// Row 0 of `data` is the task's key 0. The lane reads of the tile at `first` row first + lane_row and others, and of
  /// each the chunk lane_chunk (below `lanes`) and others.
  __device__ RowReader(
      const DecodeTask& task,
      const T* data,
      int64_t stride,
      int64_t dim,
      int first,
      int lane_row,
      int lane_chunk)
      : from_(data + (first + lane_row) * stride + lane_chunk * chunk),
        stride_(stride),
        features_(static_cast<int>(dim) - lane_chunk * chunk),
        row_(first + lane_row),
        lane_row_(lane_row),
        begin_(task.begin),
        last_(task.end - 1),
        whole_(dim == lanes * chunks * chunk) {}

  /// Rows first + lane_row + further(i) of the tile, and moves on to the warp's next tile. Instead of rows outside of
  /// the split, whose weights will be 0, the nearest one inside; zeros beyond the tensor's features.
  template <int rows, typename Further>
  __device__ void load(Chunk (&to)[rows][chunks], const Further& further) {
    const int first = row_ - lane_row_;
    if (whole_ && begin_ <= first && first + decode_tile - 1 <= last_) {
#pragma unroll
      for (int i = 0; i < rows; ++i) {
        const T* const row = from_ + further(i) * stride_;
#pragma unroll
        for (int c = 0; c < chunks; ++c) to[i][c] = load_chunk(row + c * lanes * chunk);
      }
    } else {
#pragma unroll
      for (int i = 0; i < rows; ++i) {
        const T* const row = from_ + (min(max(row_ + further(i), begin_), last_) - row_) * stride_;
#pragma unroll
        for (int c = 0; c < chunks; ++c) {
          to[i][c] = c * lanes * chunk < features_ ? load_chunk(row + c * lanes * chunk) : Chunk{};
        }
      }
    }
    row_ += decode_step;
    from_ += decode_step * stride_;
  }

 private:
  const T* from_; // the lane's first chunk of row_
  int64_t stride_;
  int features_; // from the lane's first chunk on
  int row_;
  int lane_row_;
  int begin_;
  int last_;
  bool whole_;
};

} // namespace wmha::cuda

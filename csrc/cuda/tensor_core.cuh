// The instructions of tensor cores (sm_80 and newer), and tiles of half types in shared memory.
//
// Fragments of mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"): a lane has of the sums the rows lane / 4
// and lane / 4 + 8, of each the columns 2 (lane % 4) and the next.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace wmha::cuda {

/// 16 x 16 of the left operand.
struct LeftFragment {
  uint32_t x[4];
};

/// 16 x 16 of the right operand: two neighbours of 8 columns.
struct RightFragments {
  uint32_t x[2][2];
};

/// 16 x 8 sums: of two rows two columns each.
struct Sums {
  float x[2][2];
};

template <typename T>
__device__ void multiply_add(Sums& sum, const LeftFragment& left, const uint32_t (&right)[2]) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum.x[0][0]), "+f"(sum.x[0][1]), "+f"(sum.x[1][0]), "+f"(sum.x[1][1])
        : "r"(left.x[0]), "r"(left.x[1]), "r"(left.x[2]), "r"(left.x[3]), "r"(right[0]), "r"(right[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum.x[0][0]), "+f"(sum.x[0][1]), "+f"(sum.x[1][0]), "+f"(sum.x[1][1])
        : "r"(left.x[0]), "r"(left.x[1]), "r"(left.x[2]), "r"(left.x[3]), "r"(right[0]), "r"(right[1]));
  }
}

/// The same with a sum of 0 before.
template <typename T>
__device__ Sums multiply(const LeftFragment& left, const uint32_t (&right)[2]) {
  Sums sum;
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=f"(sum.x[0][0]), "=f"(sum.x[0][1]), "=f"(sum.x[1][0]), "=f"(sum.x[1][1])
        : "r"(left.x[0]), "r"(left.x[1]), "r"(left.x[2]), "r"(left.x[3]), "r"(right[0]), "r"(right[1]), "f"(0.0f));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=f"(sum.x[0][0]), "=f"(sum.x[0][1]), "=f"(sum.x[1][0]), "=f"(sum.x[1][1])
        : "r"(left.x[0]), "r"(left.x[1]), "r"(left.x[2]), "r"(left.x[3]), "r"(right[0]), "r"(right[1]), "f"(0.0f));
  }
  return sum;
}

/// Two numbers rounded to T, the first in the lower half.
template <typename T>
__device__ uint32_t round_pair(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, __half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

/// 2^x; 0 for -inf.
__device__ inline float fast_exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

/// Lane q of each four neighbours gets as word t what its neighbour t has as word q.
__device__ inline void transpose_in_fours(uint32_t (&word)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t& low = word[bit == 1 ? 2 * i : i];
      uint32_t& high = word[bit == 1 ? 2 * i + 1 : i + 2];
      const uint32_t received = __shfl_xor_sync(0xFFFFFFFFu, upper ? low : high, bit);
      (upper ? low : high) = received;
    }
  }
}

constexpr int chunk = 8; // elements of 16 bytes, what one lane moves

/// Rows of `dim` elements of a half type in shared memory. The chunks of a row are stored in an order that differs from
/// row to row, so that the same chunk of eight neighbouring rows lies in different banks.
template <typename T, int dim>
struct HalfTile {
  static constexpr int ordered = dim / chunk % 8 == 0 ? 8 : 4; // neighbouring chunks that change places

  T* data;

  __device__ static int offset(int row, int part) {
    const int order = ordered == 8 ? row & 7 : row >> 1 & 3;
    return row * dim + (part ^ order) * chunk;
  }
  __device__ uint32_t address(int row, int part) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(data + offset(row, part)));
  }
};

/// Where a lane finds its chunk of 16 x 16 elements, for ldmatrix. All but a constant is computed beforehand.
template <typename T, int dim>
class LaneAddresses {
 public:
  /// The lane's place in the 16 x 16 elements: a row, and the left (0) or right (1) chunk.
  __device__ LaneAddresses(const HalfTile<T, dim>& tile, int row, int part) {
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      of_pair_[i] = tile.address(row, 2 * i + part);
      asm("" : "+r"(of_pair_[i])); // kept, not computed again at each use
    }
  }

  /// The same, `rows` (a multiple of 16) further down.
  __device__ LaneAddresses after(int rows) const {
    LaneAddresses addresses = *this;
    for (uint32_t& address : addresses.of_pair_) address += rows * dim * static_cast<int>(sizeof(T));
    return addresses;
  }

  /// For 16 rows from `row` and 16 features from `feature`, both multiples of 16.
  __device__ uint32_t at(int row, int feature) const {
    const int pair = feature / 16;
    return of_pair_[pair % pairs] + (row * dim + pair / pairs * pairs * 16) * static_cast<int>(sizeof(T));
  }

 private:
  static constexpr int pairs = HalfTile<T, dim>::ordered / 2;
  uint32_t of_pair_[pairs];
};

/// The places for load_left() and load_right_transposed().
template <typename T, int dim>
__device__ LaneAddresses<T, dim> by_row(const HalfTile<T, dim>& tile) {
  const int lane = threadIdx.x % 32;
  return {tile, lane % 16, lane / 16};
}
/// The places for load_right().
template <typename T, int dim>
__device__ LaneAddresses<T, dim> by_column(const HalfTile<T, dim>& tile) {
  const int lane = threadIdx.x % 32;
  return {tile, lane % 8 + lane / 16 * 8, lane / 8 % 2};
}

/// Four 8 x 8 matrices, of each the lane's two elements.
__device__ inline void load_matrices(uint32_t address, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
               : "r"(address)
               : "memory");
}

/// 16 rows and features as the left operand.
__device__ inline LeftFragment load_left(uint32_t address) {
  LeftFragment fragment;
  load_matrices(address, fragment.x[0], fragment.x[1], fragment.x[2], fragment.x[3]);
  return fragment;
}
/// 16 rows as columns of the right operand: products along the features.
__device__ inline RightFragments load_right(uint32_t address) {
  RightFragments fragments;
  auto& x = fragments.x;
  load_matrices(address, x[0][0], x[0][1], x[1][0], x[1][1]);
  return fragments;
}
/// 16 features as columns of the right operand: products along the rows.
__device__ inline RightFragments load_right_transposed(uint32_t address) {
  RightFragments fragments;
  auto& x = fragments.x;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0][0]), "=r"(x[0][1]), "=r"(x[1][0]), "=r"(x[1][1])
               : "r"(address)
               : "memory");
  return fragments;
}

/// Copies rows of a tensor to a tile, in the background: what one thread does of it. A row's chunks are copied by
/// neighbouring threads.
template <typename T, int dim, int threads>
class RowCopy {
 public:
  /// Row 0 of the tile comes from `data`, and so on; of each the first `features`, a multiple of 8, zeros behind them.
  __device__ RowCopy(const HalfTile<T, dim>& tile, const T* data, int64_t stride, int features)
      : row_(threadIdx.x / width),
        part_(threadIdx.x % width),
        features_(features),
        to_(tile.address(row_, part_)),
        row_bytes_(stride * static_cast<int64_t>(sizeof(T))),
        from_(reinterpret_cast<const char*>(data) + row_ * row_bytes_ + part_ * 16) {
    asm("" : "+r"(to_), "+l"(from_)); // kept, not computed again at each use
  }

  /// Begins to copy `rows` rows from row `first` of the tensor on, to the tile's row `to` (a multiple of 16) and after;
  /// zeros instead of those outside [begin, end).
  template <int rows>
  __device__ void start(int first, int to, int begin, int end) const {
    const char* from = from_ + first * row_bytes_;
    const uint32_t target = to_ + to * dim * static_cast<int>(sizeof(T));
    if (begin <= first && first + rows <= end && features_ == dim) {
      copy<rows>(from, target, [](int, int) { return 16; });
    } else {
      copy<rows>(from, target, [&](int row, int part) {
        const int place = first + row + row_;
        return begin <= place && place < end && (part + part_) * chunk < features_ ? 16 : 0;
      });
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

 private:
  /// Of each chunk, so many bytes (16 or 0) are copied, and zeros put behind them.
  template <int rows, typename Bytes>
  __device__ void copy(const char* from, uint32_t to, const Bytes& bytes) const {
#pragma unroll
    for (int row = 0; row < rows; row += threads / width) {
#pragma unroll
      for (int part = 0; part < dim / chunk; part += width) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                         to + (row * dim + part * chunk) * static_cast<int>(sizeof(T))),
                     "l"(from + part * 16), "r"(bytes(row, part))
                     : "memory");
      }
      from += threads / width * row_bytes_;
    }
  }

  static constexpr int width = HalfTile<T, dim>::ordered; // chunks of a row at once
  int row_;
  int part_;
  int features_;
  uint32_t to_;
  int64_t row_bytes_;
  const char* from_;
};

/// Waits until all but the last `pending` copies that this thread began are done.
template <int pending>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

} // namespace wmha::cuda

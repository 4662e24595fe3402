// The instructions of tensor cores (sm_80 and newer), and what goes with them.
//
// Fragments of mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"): a lane has of the sums the rows lane / 4
// and lane / 4 + 8, of each the columns 2 (lane % 4) and the next.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "scores.cuh"

namespace wmha::cuda {

constexpr int chunk = 8; // elements of 16 bytes, what one lane moves

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

/// sum + left * right.
template <typename T>
__device__ Sums multiply_add(const LeftFragment& left, const uint32_t (&right)[2], const Sums& sum) {
  Sums next;
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(next.x[0][0]), "=f"(next.x[0][1]), "=f"(next.x[1][0]), "=f"(next.x[1][1])
        : "r"(left.x[0]), "r"(left.x[1]), "r"(left.x[2]), "r"(left.x[3]), "r"(right[0]), "r"(right[1]),
          "f"(sum.x[0][0]), "f"(sum.x[0][1]), "f"(sum.x[1][0]), "f"(sum.x[1][1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(next.x[0][0]), "=f"(next.x[0][1]), "=f"(next.x[1][0]), "=f"(next.x[1][1])
        : "r"(left.x[0]), "r"(left.x[1]), "r"(left.x[2]), "r"(left.x[3]), "r"(right[0]), "r"(right[1]),
          "f"(sum.x[0][0]), "f"(sum.x[0][1]), "f"(sum.x[1][0]), "f"(sum.x[1][1]));
  }
  return next;
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

/// 16 x 16 sums as the left operand of the next product.
template <typename T>
__device__ LeftFragment round_sums(const Sums& left, const Sums& right) {
  return {
      {round_pair<T>(left.x[0][0], left.x[0][1]), round_pair<T>(left.x[1][0], left.x[1][1]),
       round_pair<T>(right.x[0][0], right.x[0][1]), round_pair<T>(right.x[1][0], right.x[1][1])}};
}

/// 2^x; 0 for -inf.
__device__ inline float fast_exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

/// tanh(x) within 2^-20 of it: 1 - 2 / (1 + e^2x), where that doesn't cancel, else the first terms of its series.
__device__ inline float fast_tanh(float x) {
  const float square = x * x;
  const float series = x + x * square * (-1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315)));
  return square < 0.0625f ? series : 1 - __fdividef(2, 1 + fast_exp2(2 * 1.44269504f * x));
}

/// Of four lanes whose numbers differ in the bits `first_bit` and 2 * first_bit: the q-th gets as word t what the t-th
/// has as word q.
template <int first_bit>
__device__ void transpose_in_fours(uint32_t (&word)[4]) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = threadIdx.x & (first_bit * step);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t& low = word[step == 1 ? 2 * i : i];
      uint32_t& high = word[step == 1 ? 2 * i + 1 : i + 2];
      const uint32_t received = __shfl_xor_sync(all_lanes, upper ? low : high, first_bit * step);
      low = upper ? received : low;
      high = upper ? high : received;
    }
  }
}

/// A place in shared memory. The constant part of it costs no instruction.
template <int offset>
struct SharedAddress {
  uint32_t base;
};

/// 16 rows and features as the left operand.
template <int offset>
__device__ LeftFragment load_left(SharedAddress<offset> address) {
  LeftFragment fragment;
  auto& x = fragment.x;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4+%5];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address.base), "n"(offset)
               : "memory");
  return fragment;
}
/// 16 rows as columns of the right operand: products along the features.
template <int offset>
__device__ RightFragments load_right(SharedAddress<offset> address) {
  RightFragments fragments;
  auto& x = fragments.x;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4+%5];"
               : "=r"(x[0][0]), "=r"(x[0][1]), "=r"(x[1][0]), "=r"(x[1][1])
               : "r"(address.base), "n"(offset)
               : "memory");
  return fragments;
}
/// 16 features as columns of the right operand: products along the rows.
template <int offset>
__device__ RightFragments load_right_transposed(SharedAddress<offset> address) {
  RightFragments fragments;
  auto& x = fragments.x;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4+%5];"
               : "=r"(x[0][0]), "=r"(x[0][1]), "=r"(x[1][0]), "=r"(x[1][1])
               : "r"(address.base), "n"(offset)
               : "memory");
  return fragments;
}

/// Begins to copy 16 bytes to shared memory, or to put zeros there.
template <int to_offset, int from_offset>
__device__ void copy_chunk(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0+%3], [%1+%4], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0),
               "n"(to_offset), "n"(from_offset)
               : "memory");
}

/// The same for the 8 bytes of two numbers.
template <typename Pair>
__device__ void copy_pair(Pair* to, const Pair* from, bool there) {
  static_assert(sizeof(Pair) == 8);
  asm volatile(
      "cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(there ? 8 : 0)
      : "memory");
}

/// Waits until all copies that this thread began are done.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

} // namespace wmha::cuda

// Rows turned into columns.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "operands.h"

namespace wmha::cpu::CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AVX512)
using Registers = __m512i[16]; // 16 x 16 words

/// Turns rows into columns. (With at::vec's function, which keeps them in memory, narrow windows take 3 to 5 % longer.)
inline void transpose(Registers& rows) {
  Registers next;
  WMHA_UNROLL
  for (int i = 0; i < 16; i += 2) { // words of two rows
    next[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    next[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  WMHA_UNROLL
  for (int i = 0; i < 16; i += 4) { // of four: quarter q of rows[i + c] is of column 4 q + c
    rows[i] = _mm512_unpacklo_epi64(next[i], next[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(next[i], next[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(next[i + 1], next[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(next[i + 1], next[i + 3]);
  }
  WMHA_UNROLL
  for (int c = 0; c < 4; ++c) {
    const __m512i even_low = _mm512_shuffle_i32x4(rows[c], rows[c + 4], 0x88); // quarters 0 and 2 of both
    const __m512i odd_low = _mm512_shuffle_i32x4(rows[c], rows[c + 4], 0xdd);  // quarters 1 and 3
    const __m512i even_high = _mm512_shuffle_i32x4(rows[c + 8], rows[c + 12], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(rows[c + 8], rows[c + 12], 0xdd);
    next[c] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    next[c + 4] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    next[c + 8] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    next[c + 12] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
  std::copy_n(next, 16, rows);
}

/// A left operand turned into a right one: packed[d][r] = factor * rows[r][d] for d < depth, zeros for r in [count,
/// lanes). lanes: count, in whole vectors. factor: 1 unless M is a number.
template <typename M, typename Acc>
  requires(sizeof(M) == sizeof(float))
void pack_columns(
    RowMajor<const M> rows,
    int64_t count,
    int64_t depth,
    int64_t lanes,
    [[maybe_unused]] Acc factor,
    std::type_identity_t<M>* packed) {
  for (int64_t lane = 0; lane < lanes; lane += 16) {
    const auto used = static_cast<__mmask16>(first_of_32(count - lane));
    for (int64_t d = 0; d < depth; d += 16) {
      const auto columns = static_cast<__mmask16>(first_of_32(depth - d));
      Registers words;
      WMHA_UNROLL
      for (int r = 0; r < 16; ++r) {
        words[r] = _mm512_maskz_loadu_epi32(columns, rows.row(std::min(lane + r, count - 1)) + d);
      }
      transpose(words);
      WMHA_UNROLL
      for (int c = 0; c < 16; ++c) {
        if (c >= depth - d) break;
        __m512i column = _mm512_maskz_mov_epi32(used, words[c]);
        if constexpr (std::is_same_v<M, Acc>) {
          column = _mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(column), _mm512_set1_ps(factor)));
        }
        _mm512_storeu_si512(packed + (d + c) * lanes + lane, column);
      }
    }
  }
}
#endif

/// The same for other instruction sets and types.
template <typename M, typename Acc>
void pack_columns(
    RowMajor<const M> rows,
    int64_t count,
    int64_t depth,
    int64_t lanes,
    Acc factor,
    std::type_identity_t<M>* packed) {
  static_assert(std::is_same_v<M, Acc>);
  at::vec::transpose_mxn<M>(
      rows.data, rows.row_stride, packed, lanes, static_cast<int>(count), static_cast<int>(depth));
  for (int64_t lane = 0; lane < lanes; lane += Vec<Acc>::size()) {
    const Vec<Acc> exists = Vec<Acc>::arange(static_cast<Acc>(lane), 1) < Vec<Acc>(static_cast<Acc>(count));
    for (int64_t d = 0; d < depth; ++d) {
      Acc* const place = packed + d * lanes + lane;
      (Vec<Acc>(factor) * (Vec<Acc>::loadu(place) & exists)).store(place);
    }
  }
}

} // namespace wmha::cpu::CPU_CAPABILITY

// Squares of 32 rows by 32 features of bf16, turned in registers into what the tile registers of AMX multiply.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "columns.h"
#include "rows.h"

namespace wmha::cpu::CPU_CAPABILITY {

constexpr int64_t square = 32;       // rows or features
constexpr int64_t square_pairs = 16; // of either
constexpr int64_t square_size = square * square_pairs;

/// A square of a tensor's rows, from feature `first` on: zeros where there is nothing, and rows that aren't `used`.
class Square {
 public:
  Square(Rows<c10::BFloat16> rows, int64_t first, Range used)
      : data_(rows.data + first), stride_(rows.stride), used_(used), features_(first_of_32(rows.dim - first)) {}

  __m512i operator[](int64_t r) const {
    if (!used_.contains(r)) return _mm512_setzero_si512();
    return _mm512_maskz_loadu_epi16(features_, data_ + r * stride_);
  }

 private:
  const c10::BFloat16* data_;
  int64_t stride_;
  Range used_;
  __mmask32 features_;
};

/// function(square, first_feature) for the squares that make up 32 rows.
template <typename Function>
void for_squares(Rows<c10::BFloat16> rows, Range used, const Function& function) {
  for (int64_t d = 0; d < rows.dim; d += square) function(Square(rows, d, used), d);
}

/// The square as a right operand, pairs of rows: packed[feature / 16][r / 2][feature % 16].
inline void pack_interleaved(const Square& rows, BFloat16Pair* packed) {
  WMHA_UNROLL
  for (int64_t pair = 0; pair < square_pairs; ++pair) {
    const auto [low, high] = interleave(rows[2 * pair], rows[2 * pair + 1]);
    _mm512_storeu_si512(packed + pair * square_pairs, low);
    _mm512_storeu_si512(packed + (16 + pair) * square_pairs, high);
  }
}

/// The square as a right operand, pairs of features: packed[r / 16][feature / 2][r % 16].
inline void pack_transposed(const Square& rows, BFloat16Pair* packed) {
  for (int64_t first = 0; first < square; first += square_pairs) {
    Registers words;
    WMHA_UNROLL
    for (int r = 0; r < 16; ++r) words[r] = rows[first + r];
    transpose(words);
    WMHA_UNROLL
    for (int c = 0; c < 16; ++c) _mm512_storeu_si512(packed + (first + c) * square_pairs, words[c]);
  }
}

/// The square, turned over, as a left operand: pairs of rows, packed[feature][r / 2].
inline void pack_left_columns(const Square& rows, BFloat16Pair* packed) {
  Registers low;
  Registers high;
  WMHA_UNROLL
  for (int64_t pair = 0; pair < 16; ++pair) {
    const auto [first, second] = interleave(rows[2 * pair], rows[2 * pair + 1]);
    low[pair] = first;
    high[pair] = second;
  }
  transpose(low);
  transpose(high);
  WMHA_UNROLL
  for (int c = 0; c < 16; ++c) {
    _mm512_storeu_si512(packed + c * square_pairs, low[c]);
    _mm512_storeu_si512(packed + (16 + c) * square_pairs, high[c]);
  }
}

/// Rounds sums[feature][row], a square of them, and writes `count` rows of `features` features.
inline void store_columns(const float* sums, int64_t count, int64_t features, c10::BFloat16* target, int64_t stride) {
  for (int64_t first = 0; first < count; first += square_pairs) {
    Registers words;
    WMHA_UNROLL
    for (int64_t pair = 0; pair < 16; ++pair) {
      const float* const place = sums + 2 * pair * square + first;
      words[pair] = Multiplicand<BFloat16Pair>::round({Vec<float>::loadu(place), Vec<float>::loadu(place + square)});
    }
    transpose(words);
    WMHA_UNROLL
    for (int64_t r = 0; r < 16; ++r) {
      if (first + r < count) _mm512_mask_storeu_epi16(target + (first + r) * stride, first_of_32(features), words[r]);
    }
  }
}

/// Rounds factor * sums[row][feature], a square of them, and writes `count` rows of `features` features.
inline void store_rows(
    const float* sums,
    int64_t count,
    int64_t features,
    float factor,
    c10::BFloat16* target,
    int64_t stride) {
  const auto scaled = [&](const float* place) { return Vec<float>(factor) * Vec<float>::loadu(place); };
  for (int64_t r = 0; r < count; ++r, sums += square, target += stride) {
    const __m512i row = round_to<c10::BFloat16>(scaled(sums), scaled(sums + square_pairs));
    _mm512_mask_storeu_epi16(target, first_of_32(features), row);
  }
}

} // namespace wmha::cpu::CPU_CAPABILITY

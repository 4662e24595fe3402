// Sums, and the like, across the lanes of vectors.
#pragma once

#include <cstdint>

#include "operands.h"

namespace wmha::cpu::CPU_CAPABILITY {

/// Lane i of the result is the sum of all lanes of vectors[i].
template <typename Acc>
Vec<Acc> sum_each(const Vec<Acc> (&vectors)[Vec<Acc>::size()]) {
  constexpr int lanes = Vec<Acc>::size();
  Acc parts[lanes][lanes];
  for (int i = 0; i < lanes; ++i) vectors[i].store(parts[i]);
  Acc sums[lanes] = {};
  for (int i = 0; i < lanes; ++i) {
    for (int lane = 0; lane < lanes; ++lane) sums[i] += parts[i][lane];
  }
  return Vec<Acc>::loadu(sums);
}

#if defined(CPU_CAPABILITY_AVX512)
/// Lane i of the result is all lanes of vectors[i], combined.
template <typename Combine>
Vec<float> combine_each(const Vec<float> (&vectors)[16], const Combine& combine) {
  // Halves are combined until each quarter of a register holds four vectors' results, then quarters are.
  __m512 quads[4];
  WMHA_UNROLL
  for (int i = 0; i < 4; ++i) {
    __m512 pairs[2];
    WMHA_UNROLL
    for (int j = 0; j < 2; ++j) {
      const __m512 a = vectors[4 * i + 2 * j];
      const __m512 b = vectors[4 * i + 2 * j + 1];
      pairs[j] = combine(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); // a, b, a, b in each quarter
    }
    const __m512d low = _mm512_castps_pd(pairs[0]);
    const __m512d high = _mm512_castps_pd(pairs[1]);
    quads[i] =
        combine(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  }
  const auto combine_quarters = [&](__m512 a, __m512 b) {
    return combine(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return combine_quarters(combine_quarters(quads[0], quads[1]), combine_quarters(quads[2], quads[3]));
}

inline Vec<float> sum_each(const Vec<float> (&vectors)[16]) {
  return combine_each(vectors, [](Vec<float> a, Vec<float> b) { return a + b; });
}
#elif defined(CPU_CAPABILITY_AVX2)
inline Vec<float> sum_each(const Vec<float> (&vectors)[8]) {
  const auto quad = [&](const Vec<float>* of) {
    return _mm256_hadd_ps(_mm256_hadd_ps(of[0], of[1]), _mm256_hadd_ps(of[2], of[3]));
  };
  const __m256 low = quad(vectors);
  const __m256 high = quad(vectors + 4);
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}
#endif

} // namespace wmha::cpu::CPU_CAPABILITY

// Sums, and the like, across the lanes of vectors.
#pragma once

#include <cstdint>
#include <cstring>

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

/// vectors: F of them, lanes [row][feature], F features. Lanes [vector][row] of the result are the sums over features.
template <int64_t F, typename Acc>
[[gnu::always_inline]] inline Vec<Acc> sum_features(const Vec<Acc>* vectors) {
  if constexpr (F == 1) {
    return vectors[0];
  } else if constexpr (F == Vec<Acc>::size()) {
    return sum_each(*reinterpret_cast<const Vec<Acc>(*)[F]>(vectors));
  } else {
    Vec<Acc> pairs[F / 2];
    WMHA_UNROLL
    for (int64_t i = 0; i < F / 2; ++i) {
      const auto [even, odd] = at::vec::deinterleave2(vectors[2 * i], vectors[2 * i + 1]);
      pairs[i] = even + odd;
    }
    return sum_features<F / 2>(pairs);
  }
}

/// Each lane of the result is those R, 2 R, ... lanes from it, combined.
template <int64_t R, typename Acc, typename Combine>
Vec<Acc> combine_lanes(Vec<Acc> vector, const Combine& combine) {
  constexpr int64_t lanes = Vec<Acc>::size();
  for (int64_t distance = R; distance < lanes; distance *= 2) {
    Acc twice[2 * lanes];
    vector.store(twice);
    vector.store(twice + lanes);
    vector = combine(vector, Vec<Acc>::loadu(twice + distance));
  }
  return vector;
}

#if defined(CPU_CAPABILITY_AVX512)
template <int64_t R, typename Combine>
Vec<float> combine_lanes(Vec<float> vector, const Combine& combine) {
  if (R <= 8) vector = combine(vector, Vec<float>(_mm512_shuffle_f32x4(vector, vector, 0x4e)));
  if (R <= 4) vector = combine(vector, Vec<float>(_mm512_shuffle_f32x4(vector, vector, 0xb1)));
  if (R <= 2) vector = combine(vector, Vec<float>(_mm512_permute_ps(vector, 0x4e)));
  if (R <= 1) vector = combine(vector, Vec<float>(_mm512_permute_ps(vector, 0xb1)));
  return vector;
}
#elif defined(CPU_CAPABILITY_AVX2)
template <int64_t R, typename Combine>
Vec<float> combine_lanes(Vec<float> vector, const Combine& combine) {
  if (R <= 4) vector = combine(vector, Vec<float>(_mm256_permute2f128_ps(vector, vector, 0x01)));
  if (R <= 2) vector = combine(vector, Vec<float>(_mm256_permute_ps(vector, 0x4e)));
  if (R <= 1) vector = combine(vector, Vec<float>(_mm256_permute_ps(vector, 0xb1)));
  return vector;
}
#endif

/// F elements, fewer than a vector's, repeated over its lanes.
template <int64_t F, typename Acc>
Vec<Acc> load_repeated(const Acc* source) {
  constexpr size_t bytes = F * sizeof(Acc);
  if constexpr (F == 1) {
    return Vec<Acc>(*source);
  } else if constexpr (bytes == sizeof(int64_t)) {
    int64_t bits;
    std::memcpy(&bits, source, bytes);
    return at::vec::cast<Acc>(Vec<int64_t>(bits));
#if defined(CPU_CAPABILITY_AVX512)
  } else if constexpr (bytes == sizeof(__m128i)) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    return at::vec::cast<Acc>(Vec<int64_t>(_mm512_broadcast_i32x4(bits)));
  } else if constexpr (bytes == sizeof(__m256i)) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    return at::vec::cast<Acc>(Vec<int64_t>(_mm512_broadcast_i64x4(bits)));
#elif defined(CPU_CAPABILITY_AVX2)
  } else if constexpr (bytes == sizeof(__m128i)) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    return at::vec::cast<Acc>(Vec<int64_t>(_mm256_broadcastsi128_si256(bits)));
#endif
  } else {
    Acc repeated[Vec<Acc>::size()];
    for (int64_t i = 0; i < Vec<Acc>::size(); ++i) repeated[i] = source[i % F];
    return Vec<Acc>::loadu(repeated);
  }
}

} // namespace wmha::cpu::CPU_CAPABILITY

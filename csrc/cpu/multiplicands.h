// What a tile multiplies in one step: a number of the arithmetic's type or, where the instruction set has a product of
// two bf16 pairs that adds to fp32, a pair of neighbouring terms of the sum.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>

#include <bit>
#include <cstdint>
#include <type_traits>

#include "../window.h"

namespace wmha::cpu::CPU_CAPABILITY {

template <typename T>
using Vec = at::vec::Vectorized<T>;

/// The type of the arithmetic: fp64 for fp64, fp32 for all others.
template <typename T>
using acc_type = std::conditional_t<std::is_same_v<T, double>, double, float>;

/// A multiplicand M: sums are of type Sum, a step takes `terms` terms of a sum.
template <typename M>
struct Multiplicand {
  using Sum = M;
  static constexpr int terms = 1;

  static Vec<M> load(const M* place) { return Vec<M>::loadu(place); }
  static Vec<M> broadcast(M left) { return Vec<M>(left); }
  static Vec<M> multiply_add(Vec<M> left, Vec<M> right, Vec<M> sum) { return at::vec::fmadd(left, right, sum); }

  /// Stores the terms of one step, a vector of each.
  static void store(const Vec<M> (&terms)[1], M* place) { terms[0].store(place); }
  /// Stores neighbouring terms, one in each lane.
  static void store_neighbours(Vec<M> terms, M* place) { terms.store(place); }
};

#if defined(CPU_CAPABILITY_AVX512_BF16)
/// Two neighbouring terms, anywhere in a row of bf16.
struct [[gnu::may_alias]] BFloat16Pair {
  uint16_t first;
  uint16_t second;
};

template <>
struct Multiplicand<BFloat16Pair> {
  using Sum = float;
  static constexpr int terms = 2;

  static __m512i load(const BFloat16Pair* place) { return _mm512_loadu_si512(place); }
  static __m512i broadcast(BFloat16Pair left) { return _mm512_set1_epi32(std::bit_cast<int>(left)); }
  static Vec<float> multiply_add(__m512i left, __m512i right, Vec<float> sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  }

  static void store(const Vec<float> (&terms)[2], BFloat16Pair* place) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(terms[0]));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(terms[1]));
    _mm512_storeu_si512(place, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  static void store_neighbours(Vec<float> terms, BFloat16Pair* place) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(place), (__m256i)_mm512_cvtneps_pbh(terms));
  }
};

template <typename T>
using multiplicand_type = std::conditional_t<std::is_same_v<T, c10::BFloat16>, BFloat16Pair, acc_type<T>>;
#else
/// What tensors of element type T are multiplied as.
template <typename T>
using multiplicand_type = acc_type<T>;
#endif

/// The steps that so many terms take.
template <typename M>
constexpr int64_t steps(int64_t terms) {
  return (terms + Multiplicand<M>::terms - 1) / Multiplicand<M>::terms;
}

/// The steps that hold at least one of the terms.
template <typename M>
constexpr Range steps(Range terms) {
  const int64_t first = terms.begin / Multiplicand<M>::terms;
  return {first, terms.size() > 0 ? steps<M>(terms.end) : first};
}

} // namespace wmha::cpu::CPU_CAPABILITY

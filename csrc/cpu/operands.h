// What tiles multiply: matrices of multiplicands. A multiplicand is a number of the arithmetic's type or, where the
// instruction set has a product of two bf16 pairs that adds to fp32, a pair of neighbouring terms of the sum.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
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

/// The larger one of each pair, or the score if that is NaN.
template <typename Acc>
Vec<Acc> larger(Vec<Acc> score, Vec<Acc> other) {
  return at::vec::clamp_min(score, other);
}

#if defined(CPU_CAPABILITY_AVX512)
/// The first `count` of 32, all of them if there are more.
inline __mmask32 first_of_32(int64_t count) {
  return static_cast<__mmask32>((uint64_t{1} << std::min<int64_t>(count, 32)) - 1);
}

inline __m512i lane_numbers() { return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }
#endif

/// Is the mask set in any lane?
template <typename Acc>
bool any(Vec<Acc> mask) {
  return mask.zero_mask() != (1 << Vec<Acc>::size()) - 1;
}

// Arrays live in registers only if every loop over them is unrolled before anything else happens.
#define WMHA_UNROLL _Pragma("GCC unroll 16")

/// function(constants...), each of the flags as a std::true_type or std::false_type: loops are compiled once for each.
template <typename Function>
void with_flags(const Function& function) {
  function();
}
template <typename Function, typename... Flags>
void with_flags(const Function& function, bool flag, Flags... flags) {
  const auto with = [&](auto constant) {
    with_flags([&](auto... constants) { function(constant, constants...); }, flags...);
  };
  flag ? with(std::true_type()) : with(std::false_type());
}

/// A row-major matrix: element (r, c) lies at data[r * row_stride + c].
template <typename T>
struct RowMajor {
  T* data;
  int64_t row_stride;

  T* row(int64_t r) const { return data + r * row_stride; }
  operator RowMajor<const T>() const
    requires(!std::is_const_v<T>)
  {
    return {data, row_stride};
  }
};

/// A multiplicand M: sums are of type Sum, a step takes `terms` terms of a sum. A tile takes `steps_at_once` steps, and
/// has a multiple of `columns` columns.
template <typename M>
struct Multiplicand {
  using Sum = M;
  static constexpr int64_t terms = 1;
  static constexpr int64_t steps_at_once = 1;
  static constexpr int64_t columns = Vec<Sum>::size();

  static Vec<M> load(const M* place) { return Vec<M>::loadu(place); }
  static Vec<M> broadcast(M left) { return Vec<M>(left); }
  static Vec<M> multiply_add(Vec<M> left, Vec<M> right, Vec<M> sum) { return at::vec::fmadd(left, right, sum); }

  /// Stores the terms of one step, a vector of each.
  static void store(const Vec<M> (&terms)[1], M* place) { terms[0].store(place); }
  /// Stores rows whose lanes are neighbouring terms.
  static void store_rows(const Vec<M> (&rows)[1], M* place, int64_t /*row_stride*/) { rows[0].store(place); }
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
  static constexpr int64_t terms = 2;
#if defined(CPU_CAPABILITY_AMX)
  static constexpr int64_t steps_at_once = 16;
  static constexpr int64_t columns = 32;
#else
  static constexpr int64_t steps_at_once = 1;
  static constexpr int64_t columns = Vec<Sum>::size();
#endif

  static __m512i load(const BFloat16Pair* place) { return _mm512_loadu_si512(place); }
  static __m512i broadcast(BFloat16Pair left) { return _mm512_set1_epi32(std::bit_cast<int>(left)); }
  static Vec<float> multiply_add(__m512i left, __m512i right, Vec<float> sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  }

  static __m512i round(const Vec<float> (&terms)[2]) {
    const auto halves = (__m512i)_mm512_cvtne2ps_pbh(terms[1], terms[0]); // to be interleaved: 0, 16, 1, 17, ...
    const __m512i lanes = lane_numbers();
    const __m512i places =
        _mm512_add_epi32(_mm512_set1_epi32(16 << 16), _mm512_or_si512(lanes, _mm512_slli_epi32(lanes, 16)));
    return _mm512_permutexvar_epi16(places, halves);
  }
  static void store(const Vec<float> (&terms)[2], BFloat16Pair* place) { _mm512_storeu_si512(place, round(terms)); }
  static void store_rows(const Vec<float> (&rows)[2], BFloat16Pair* place, int64_t row_stride) {
    const auto halves = (__m512i)_mm512_cvtne2ps_pbh(rows[1], rows[0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(place), _mm512_castsi512_si256(halves));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(place + row_stride), _mm512_extracti64x4_epi64(halves, 1));
  }
};

template <typename T>
using multiplicand_type = std::conditional_t<std::is_same_v<T, c10::BFloat16>, BFloat16Pair, acc_type<T>>;
#else
/// What tensors of element type T are multiplied as.
template <typename T>
using multiplicand_type = acc_type<T>;
#endif

/// Are scores scaled after the product? Queries of bf16 can't be scaled before it without another rounding.
template <typename M>
constexpr bool scales_products = !std::is_same_v<M, typename Multiplicand<M>::Sum>;

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

/// The steps that so many terms take, whole tiles of them.
template <typename M>
constexpr int64_t steps(int64_t terms) {
  using Step = Multiplicand<M>;
  return round_up(terms, Step::terms * Step::steps_at_once) / Step::terms;
}

/// The steps that hold at least one of the terms, whole tiles of them.
template <typename M>
constexpr Range steps(Range terms) {
  constexpr int64_t tile = Multiplicand<M>::steps_at_once;
  const int64_t first = terms.begin / Multiplicand<M>::terms / tile * tile;
  return {first, terms.size() > 0 ? steps<M>(terms.end) : first};
}

/// The terms that a sum of so many takes, whole tiles of them.
template <typename M>
constexpr int64_t whole_terms(int64_t terms) {
  return steps<M>(terms) * Multiplicand<M>::terms;
}

/// So many columns, rounded up to whole tiles.
template <typename M>
constexpr int64_t whole_columns(int64_t columns) {
  return round_up(columns, Multiplicand<M>::columns);
}

/// The tiles' columns that hold at least one of these.
template <typename M>
constexpr Range whole_columns(Range columns) {
  constexpr int64_t tile = Multiplicand<M>::columns;
  return {columns.begin / tile * tile, whole_columns<M>(columns.end)};
}

} // namespace wmha::cpu::CPU_CAPABILITY

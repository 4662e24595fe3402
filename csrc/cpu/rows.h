// Rows of the tensors, as the tiles want them: in the type of the arithmetic, padded to whole vectors.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <tuple>
#include <type_traits>

#include "../params.h"
#include "tiles.h"

namespace wmha::cpu::CPU_CAPABILITY {

/// n, rounded up to whole vectors of T.
template <typename T>
constexpr int64_t padded(int64_t n) {
  constexpr int64_t lanes = at::vec::Vectorized<T>::size();
  return (n + lanes - 1) / lanes * lanes;
}

/// Memory for so many elements, uninitialised. Starts on a cache line. Not by std::aligned_alloc: glibc's takes three
/// times as long as malloc, which small calls feel.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t elements) {
    const size_t bytes = elements * sizeof(T);
    size_t space = bytes + line;
    void* start = memory_ = std::malloc(space);
    if (memory_ == nullptr) throw std::bad_alloc();
    data_ = static_cast<T*>(std::align(line, bytes, start, space));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(memory_); }

  operator T*() const { return data_; }
  T* data() const { return data_; }

 private:
  static constexpr size_t line = 64;
  void* memory_;
  T* data_;
};

/// The row of a tensor with elements T.
template <typename T, typename Pointer>
auto at(const TensorView<Pointer>& view, int64_t batch, int64_t head, int64_t position) {
  using Element = std::conditional_t<std::is_same_v<Pointer, void*>, T, const T>;
  return static_cast<Element*>(view.data) + view.offset(batch, head, position);
}

/// Rows of a tensor: features are contiguous, rows `stride` elements apart.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  int64_t count;
  int64_t dim;

  const T* row(int64_t r) const { return data + r * stride; }
  /// Do they follow one another without a gap?
  bool are_dense() const { return stride == dim; }
  /// If they do, the same as one long row.
  Rows as_one() const { return {data, 0, 1, count * dim}; }
  /// Some of the rows, as far as they exist.
  Rows part(Range some) const {
    const int64_t begin = std::min(some.begin, count);
    return {row(begin), stride, std::min(some.end, count) - begin, dim};
  }
};

/// The positions of one head as rows.
template <typename T, typename Pointer>
Rows<T> rows_of(const TensorView<Pointer>& view, int64_t batch, int64_t head, Range positions, int64_t dim) {
  return {at<T>(view, batch, head, positions.begin), view.position_stride, positions.size(), dim};
}

/// Brings a cache line into the second cache. Always inlined: of a function that only prefetches, g++ drops the calls.
[[gnu::always_inline]] inline void prefetch(const void* data) { __builtin_prefetch(data, /*for writing*/ 0, 2); }

[[gnu::always_inline]] inline void prefetch_for_writing(const void* data) { __builtin_prefetch(data, 1, 2); }

/// Brings rows into the first cache.
template <typename T>
[[gnu::always_inline]] inline void prefetch_first(Rows<T> rows) {
  if (rows.are_dense()) rows = rows.as_one();
  for (int64_t r = 0; r < rows.count; ++r) {
    for (int64_t d = 0; d < rows.dim; d += 64 / sizeof(T)) __builtin_prefetch(rows.row(r) + d, 0, 3);
  }
}

inline at::vec::Vectorized<float> load_as_acc(const c10::BFloat16* source) {
  at::vec::Vectorized<float> converted;
  at::vec::load_fp32_from_bf16(source, converted);
  return converted;
}

inline at::vec::Vectorized<float> load_as_acc(const c10::Half* source) {
  at::vec::Vectorized<float> converted;
  at::vec::load_fp32_from_fp16(source, converted);
  return converted;
}

inline at::vec::Vectorized<float> load_as_acc(const float* source) { return at::vec::Vectorized<float>::loadu(source); }

inline at::vec::Vectorized<double> load_as_acc(const double* source) {
  return at::vec::Vectorized<double>::loadu(source);
}

/// So many elements, fewer than a vector's, and zeros.
inline at::vec::Vectorized<float> load_as_acc(const c10::BFloat16* source, int64_t count) {
  return std::get<0>(at::vec::convert_bfloat16_float(at::vec::Vectorized<c10::BFloat16>::loadu(source, count)));
}

inline at::vec::Vectorized<float> load_as_acc(const c10::Half* source, int64_t count) {
  return std::get<0>(at::vec::convert_half_float(at::vec::Vectorized<c10::Half>::loadu(source, count)));
}

template <typename Acc>
at::vec::Vectorized<Acc> load_as_acc(const Acc* source, int64_t count) {
  return at::vec::Vectorized<Acc>::loadu(source, count);
}

/// function(first, load) for each vector of features; load(row + first) reads them, and zeros behind the last.
template <typename Acc, typename Function>
[[gnu::always_inline]] inline void for_vectors(Range features, const Function& function) {
  constexpr int64_t size = Vec<Acc>::size();
  int64_t d = features.begin;
  for (; d + size <= features.end; d += size) function(d, [](const auto* source) { return load_as_acc(source); });
  const int64_t rest = features.end - d;
  if (rest > 0) function(d, [&](const auto* source) { return load_as_acc(source, rest); });
}

/// Sums up to the product of two rows.
template <typename T>
Vec<acc_type<T>> multiply_rows(const T* left, const T* right, int64_t dim) {
#if defined(CPU_CAPABILITY_AVX512_BF16)
  Vec<float> products(0.0f);
  for (int64_t d = 0; d < dim; d += 32) {
    const __mmask32 mask = first_of_32(dim - d);
    const auto load = [&](const T* row) { return (__m512bh)_mm512_maskz_loadu_epi16(mask, row + d); };
    products = _mm512_dpbf16_ps(products, load(left), load(right));
  }
  return products;
#else
  using Acc = acc_type<T>;
  Vec<Acc> sums(Acc(0));
  for_vectors<Acc>(
      {0, dim}, [&](int64_t d, const auto& load) { sums = at::vec::fmadd(load(left + d), load(right + d), sums); });
  return sums;
#endif
}

template <typename T>
at::vec::Vectorized<T> round_to(at::vec::Vectorized<float> low, at::vec::Vectorized<float> high) {
#if defined(CPU_CAPABILITY_AVX512_BF16)
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#else
  if constexpr (std::is_same_v<T, c10::Half>)
    return at::vec::convert_float_half(low, high);
  else
    return at::vec::convert_float_bfloat16(low, high);
#endif
}

#if defined(CPU_CAPABILITY_AVX512_BF16)
/// Two rows of 32 elements as pairs.
struct Interleaved {
  __m512i first;
  __m512i second;
};
inline Interleaved interleave(__m512i low, __m512i high) {
  const __m512i lanes = lane_numbers();
  const __m512i first = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(32)), 16));
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  return {_mm512_permutex2var_epi16(low, first, high), _mm512_permutex2var_epi16(low, second, high)};
}

/// The first `count` elements of two rows as `width` pairs, 16 or 32. Zeros behind them, and for a row that is null.
inline void interleave(
    const c10::BFloat16* low,
    const c10::BFloat16* high,
    int64_t count,
    int64_t width,
    BFloat16Pair* pairs) {
  const __mmask32 mask = first_of_32(count);
  const auto load = [&](const c10::BFloat16* row) {
    return row == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(mask, row);
  };
  const auto [first, second] = interleave(load(low), load(high));
  _mm512_storeu_si512(pairs, first);
  if (width > 16) _mm512_storeu_si512(pairs + 16, second);
}
#endif

/// A copy of the rows in the type of the arithmetic, padded to whole vectors, zeros behind each, in `scratch` (count x
/// padded(dim)).
template <typename Acc, typename T>
RowMajor<const Acc> copy_rows(Rows<T> rows, Acc* scratch) {
  const int64_t width = padded<Acc>(rows.dim);
  for (int64_t r = 0; r < rows.count; ++r) {
    const T* const from = rows.row(r);
    Acc* const to = scratch + r * width;
    for_vectors<Acc>({0, rows.dim}, [&](int64_t d, const auto& load) { load(from + d).store(to + d); });
  }
  return {scratch, width};
}

/// Are the rows a left operand?
template <typename M, typename T>
bool are_left(Rows<T> rows) {
  constexpr int64_t terms = Multiplicand<M>::terms;
  if constexpr (terms == 1) return std::is_same_v<T, M> && padded<M>(rows.dim) == rows.dim;
  return rows.dim == whole_terms<M>(rows.dim) && rows.count % left_rows_at_once == 0 && rows.stride % terms == 0;
}

/// These rows.
template <typename M, typename T>
RowMajor<const M> as_left(Rows<T> rows) {
  return {reinterpret_cast<const M*>(rows.data), rows.stride / Multiplicand<M>::terms};
}

/// The stride of rows that were copied to be a left operand.
template <typename M>
constexpr int64_t left_width(int64_t dim) {
  return Multiplicand<M>::terms == 1 ? whole_columns<M>(dim) : steps<M>(dim);
}

/// A copy of the rows as a left operand, multiplicands along the features, in `scratch`: [count, whole tiles of
/// them][left_width(dim)]. Rows beyond the last hold anything.
template <typename M, typename T>
RowMajor<const M> copy_left_rows(Rows<T> rows, M* scratch) {
  if constexpr (Multiplicand<M>::terms == 1) {
    return copy_rows<M>(rows, scratch);
  } else {
    constexpr int64_t terms = Multiplicand<M>::terms;
    const int64_t width = left_width<M>(rows.dim);
    for (int64_t r = 0; r < rows.count; ++r) {
      T* to = reinterpret_cast<T*>(scratch + r * width);
      std::copy_n(rows.row(r), rows.dim, to);
      std::fill(to + rows.dim, to + width * terms, T(0));
    }
    return {scratch, width};
  }
}

/// The same, or the rows themselves where they already are that.
template <typename M, typename T>
RowMajor<const M> left_rows(Rows<T> rows, M* scratch) {
  return are_left<M>(rows) ? as_left<M>(rows) : copy_left_rows<M>(rows, scratch);
}

/// The rows as a right operand, multiplicands of neighbouring rows: [steps(count)][whole_columns(dim)]. Rows that share
/// a multiplicand with others but aren't `used` become zeros: whatever they hold, it has no part in a sum.
template <typename M, typename T>
RowMajor<const M> right_rows(Rows<T> rows, Range used, M* scratch) {
  if constexpr (Multiplicand<M>::terms == 1) {
    return left_rows<M>(rows, scratch);
  } else {
    const int64_t width = whole_columns<M>(rows.dim);
    const auto row = [&](int64_t r) { return used.begin <= r && r < used.end ? rows.row(r) : nullptr; };
    for (int64_t step = 0; step < steps<M>(rows.count); ++step) {
      const T* low = row(2 * step);
      const T* high = row(2 * step + 1);
      for (int64_t d = 0; d < width; d += 32) {
        const int64_t count = std::clamp<int64_t>(rows.dim - d, 0, 32);
        const int64_t pairs = std::min<int64_t>(width - d, 32);
        interleave(low ? low + d : low, high ? high + d : high, count, pairs, scratch + step * width + d);
      }
    }
    return {scratch, width};
  }
}

/// target[d] = factor * source[d], rounded to T.
template <typename T, typename Acc>
void store_row(const Acc* source, int64_t dim, Acc factor, T* target) {
  using Vec = at::vec::Vectorized<Acc>;
  int64_t d = 0;
  if constexpr (!std::is_same_v<T, Acc>) {
    for (; d + 2 * Vec::size() <= dim; d += 2 * Vec::size()) {
      const Vec low = Vec(factor) * Vec::loadu(source + d);
      const Vec high = Vec(factor) * Vec::loadu(source + d + Vec::size());
      round_to<T>(low, high).store(target + d);
    }
  }
  for (; d < dim; ++d) target[d] = static_cast<T>(factor * source[d]);
}

/// Calls function(T()) with the element type of the tensors: one that this instruction set is for.
template <typename Function>
void with_scalar_type([[maybe_unused]] ScalarType dtype, const Function& function) {
#if defined(CPU_CAPABILITY_AVX512_BF16)
  function(c10::BFloat16());
#else
  switch (dtype) {
    case ScalarType::Double: return function(double());
    case ScalarType::Float: return function(float());
    case ScalarType::BFloat16: return function(c10::BFloat16());
    case ScalarType::Half: return function(c10::Half());
  }
#endif
}

} // namespace wmha::cpu::CPU_CAPABILITY

// Rows of the tensors, as the tiles want them: in the type of the arithmetic, padded to whole vectors.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
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

/// Memory for so many elements, uninitialised. Starts on a cache line.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t elements)
      : data_(static_cast<T*>(std::aligned_alloc(line, (elements * sizeof(T) + line) / line * line))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  operator T*() const { return data_; }
  T* data() const { return data_; }

 private:
  static constexpr size_t line = 64;
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
};

/// The positions of one head as rows.
template <typename T, typename Pointer>
Rows<T> rows_of(const TensorView<Pointer>& view, int64_t batch, int64_t head, Range positions, int64_t dim) {
  return {at<T>(view, batch, head, positions.begin), view.position_stride, positions.size(), dim};
}

/// Brings a row into the second cache, to be read or (for_writing) overwritten.
template <typename T, bool for_writing = false>
void prefetch(const T* row, int64_t dim) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t d = 0; d < dim; d += line) __builtin_prefetch(row + d, for_writing, 2);
}

inline at::vec::Vectorized<float> load_as_float(const c10::BFloat16* source) {
  at::vec::Vectorized<float> converted;
  at::vec::load_fp32_from_bf16(source, converted);
  return converted;
}

inline at::vec::Vectorized<float> load_as_float(const c10::Half* source) {
  at::vec::Vectorized<float> converted;
  at::vec::load_fp32_from_fp16(source, converted);
  return converted;
}

template <typename T>
at::vec::Vectorized<T> round_to(at::vec::Vectorized<float> low, at::vec::Vectorized<float> high) {
  if constexpr (std::is_same_v<T, c10::Half>)
    return at::vec::convert_float_half(low, high);
  else
    return at::vec::convert_float_bfloat16(low, high);
}

#if defined(CPU_CAPABILITY_AVX512_BF16)
/// The first `count` (at most 16) elements of two rows as pairs; zeros behind them, and for a row that is null.
inline void interleave(const c10::BFloat16* low, const c10::BFloat16* high, int64_t count, BFloat16Pair* pairs) {
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  const auto load = [&](const c10::BFloat16* row) {
    return _mm512_cvtepu16_epi32(row == nullptr ? _mm256_setzero_si256() : _mm256_maskz_loadu_epi16(mask, row));
  };
  _mm512_storeu_si512(pairs, _mm512_or_si512(load(low), _mm512_slli_epi32(load(high), 16)));
}
#endif

/// The rows in the type of the arithmetic, padded to whole vectors, zeros behind each. Points at the rows themselves
/// where they already are that; else copies into `scratch` (count x padded(dim)).
template <typename Acc, typename T>
RowMajor<const Acc> load_rows(Rows<T> rows, Acc* scratch) {
  const int64_t width = padded<Acc>(rows.dim);
  if constexpr (std::is_same_v<T, Acc>) {
    if (width == rows.dim) return {rows.data, rows.stride};
  }
  for (int64_t r = 0; r < rows.count; ++r) {
    const T* from = rows.row(r);
    Acc* to = scratch + r * width;
    int64_t d = 0;
    if constexpr (!std::is_same_v<T, Acc>) {
      for (; d + Vec<Acc>::size() <= rows.dim; d += Vec<Acc>::size()) load_as_float(from + d).store(to + d);
    }
    for (; d < rows.dim; ++d) to[d] = static_cast<Acc>(from[d]);
    for (; d < width; ++d) to[d] = Acc(0);
  }
  return {scratch, width};
}

/// The rows as a left operand, multiplicands along the features: [count, whole tiles of them][steps(dim)]. Rows beyond
/// the last hold anything.
template <typename M, typename T>
RowMajor<const M> left_rows(Rows<T> rows, M* scratch) {
  if constexpr (Multiplicand<M>::terms == 1) {
    return load_rows<M>(rows, scratch);
  } else {
    constexpr int64_t terms = Multiplicand<M>::terms;
    const int64_t width = steps<M>(rows.dim);
    const bool whole = rows.dim == width * terms && rows.count % left_rows_at_once == 0;
    if (whole && rows.stride % terms == 0) return {reinterpret_cast<const M*>(rows.data), rows.stride / terms};
    for (int64_t r = 0; r < rows.count; ++r) {
      T* to = reinterpret_cast<T*>(scratch + r * width);
      std::copy_n(rows.row(r), rows.dim, to);
      std::fill(to + rows.dim, to + width * terms, T(0));
    }
    return {scratch, width};
  }
}

/// The rows as a right operand, multiplicands of neighbouring rows: [steps(count)][whole_columns(dim)]. Rows that share
/// a multiplicand with others but aren't `used` become zeros: whatever they hold, it has no part in a sum.
template <typename M, typename T>
RowMajor<const M> right_rows(Rows<T> rows, Range used, M* scratch) {
  if constexpr (Multiplicand<M>::terms == 1) {
    return load_rows<M>(rows, scratch);
  } else {
    constexpr int64_t vector = Vec<float>::size();
    const int64_t width = whole_columns<M>(rows.dim);
    const auto row = [&](int64_t r) { return used.begin <= r && r < used.end ? rows.row(r) : nullptr; };
    for (int64_t step = 0; step < steps<M>(rows.count); ++step) {
      const T* low = row(2 * step);
      const T* high = row(2 * step + 1);
      for (int64_t d = 0; d < width; d += vector) {
        const int64_t count = std::clamp<int64_t>(rows.dim - d, 0, vector);
        interleave(low ? low + d : low, high ? high + d : high, count, scratch + step * width + d);
      }
    }
    return {scratch, width};
  }
}

/// A left operand turned into a right one, or back: packed[d][r] = factor * rows[r][d] for d < depth, zeros for r in
/// [count, lanes).
/// factor: 1 unless M is a number.
template <typename M, typename Acc>
void pack_columns(
    RowMajor<const M> rows,
    int64_t count,
    int64_t depth,
    int64_t lanes,
    Acc factor,
    std::type_identity_t<M>* packed) {
  static_assert(sizeof(M) == sizeof(Acc));
  at::vec::transpose_mxn<Acc>( // moves bits
      reinterpret_cast<const Acc*>(rows.data), rows.row_stride, reinterpret_cast<Acc*>(packed), lanes,
      static_cast<int>(count), static_cast<int>(depth));
  for (int64_t d = 0; d < depth; ++d) {
    M* row = packed + d * lanes;
    std::fill(row + count, row + lanes, M{});
    if constexpr (std::is_same_v<M, Acc>) {
      for (int64_t lane = 0; lane < lanes; lane += Vec<Acc>::size()) {
        (Vec<Acc>::loadu(row + lane) * Vec<Acc>(factor)).store(row + lane);
      }
    }
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

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

/// The type of the arithmetic: fp64 for fp64, fp32 for all others.
template <typename T>
using acc_type = std::conditional_t<std::is_same_v<T, double>, double, float>;

/// n, rounded up to whole vectors of T.
template <typename T>
constexpr int64_t padded(int64_t n) {
  constexpr int64_t lanes = at::vec::Vectorized<T>::size();
  return (n + lanes - 1) / lanes * lanes;
}

/// One allocation, handed out in pieces. Pieces start on cache lines.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t elements) : end_(static_cast<T*>(std::aligned_alloc(line, rounded(elements) * sizeof(T)))) {
    if (end_ == nullptr) throw std::bad_alloc();
    begin_ = end_;
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(begin_); }

  T* take(int64_t elements) {
    T* piece = end_;
    end_ += rounded(elements);
    return piece;
  }

  /// What a piece of so many elements takes.
  static constexpr int64_t rounded(int64_t elements) {
    constexpr int64_t per_line = line / sizeof(T);
    return (elements + per_line - 1) / per_line * per_line;
  }

 private:
  static constexpr int64_t line = 64;
  T* begin_;
  T* end_;
};

/// The row of a tensor with elements T.
template <typename T, typename Pointer>
auto at(const TensorView<Pointer>& view, int64_t batch, int64_t head, int64_t position) {
  using Element = std::conditional_t<std::is_same_v<Pointer, void*>, T, const T>;
  return static_cast<Element*>(view.data) + view.offset(batch, head, position);
}

/// Brings a row into the second cache.
template <typename T>
void prefetch(const T* row, int64_t dim) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t d = 0; d < dim; d += line) __builtin_prefetch(row + d, 0, 2);
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

/// rows x dim elements at `source` (row stride `stride`) as rows of whole vectors, zeros behind each row. Points at the
/// source itself where it already is that; else copies into `scratch` (rows x padded(dim)).
template <typename T, typename Acc>
RowMajor<const Acc> load_rows(const T* source, int64_t stride, int64_t rows, int64_t dim, Acc* scratch) {
  using Vec = at::vec::Vectorized<Acc>;
  const int64_t width = padded<Acc>(dim);
  if constexpr (std::is_same_v<T, Acc>) {
    if (width == dim) return {source, stride};
  }
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = source + r * stride;
    Acc* to = scratch + r * width;
    int64_t d = 0;
    if constexpr (!std::is_same_v<T, Acc>) {
      for (; d + Vec::size() <= dim; d += Vec::size()) { load_as_float(from + d).store(to + d); }
    }
    for (; d < dim; ++d) to[d] = static_cast<Acc>(from[d]);
    for (; d < width; ++d) to[d] = Acc(0);
  }
  return {scratch, width};
}

/// The same rows as columns: packed[d][r] = factor * rows[r][d], zeros for r in [count, lanes).
template <typename Acc>
void pack_columns(RowMajor<const Acc> rows, int64_t count, int64_t dim, int64_t lanes, Acc factor, Acc* packed) {
  at::vec::transpose_mxn<Acc>(
      rows.data, rows.row_stride, packed, lanes, static_cast<int>(count), static_cast<int>(dim));
  for (int64_t d = 0; d < dim; ++d) {
    Acc* row = packed + d * lanes;
    std::fill(row + count, row + lanes, Acc(0));
    for (int64_t lane = 0; lane < lanes; lane += Vec<Acc>::size()) {
      (Vec<Acc>::loadu(row + lane) * Vec<Acc>(factor)).store(row + lane);
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

/// Calls function(T()) with the element type of the tensors.
template <typename Function>
void with_scalar_type(ScalarType dtype, const Function& function) {
  switch (dtype) {
    case ScalarType::Double: return function(double());
    case ScalarType::Float: return function(float());
    case ScalarType::BFloat16: return function(c10::BFloat16());
    case ScalarType::Half: return function(c10::Half());
  }
}

} // namespace wmha::cpu::CPU_CAPABILITY

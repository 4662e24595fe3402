// Rows of the tensors, as the tiles want them: in the type of the arithmetic, padded to whole vectors.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

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

/// rows x dim elements at `source` (row stride `stride`) as rows of whole vectors, zeros behind each row. Points at the
/// source itself where it already is that; else copies into `scratch` (rows x padded(dim)).
template <typename T, typename Acc>
RowMajor<const Acc> load_rows(const T* source, int64_t stride, int64_t rows, int64_t dim, Acc* scratch) {
  const int64_t width = padded<Acc>(dim);
  if constexpr (std::is_same_v<T, Acc>) {
    if (width == dim) return {source, stride};
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < dim; ++d) scratch[r * width + d] = static_cast<Acc>(source[r * stride + d]);
    for (int64_t d = dim; d < width; ++d) scratch[r * width + d] = Acc(0);
  }
  return {scratch, width};
}

/// The same rows as columns: packed[d][r] = factor * source[r][d], zeros for r in [rows, lanes).
template <typename T, typename Acc>
void pack_columns(const T* source, int64_t stride, int64_t rows, int64_t dim, Acc factor, int64_t lanes, Acc* packed) {
  for (int64_t d = 0; d < dim; ++d) {
    for (int64_t r = 0; r < rows; ++r) packed[d * lanes + r] = factor * static_cast<Acc>(source[r * stride + d]);
    for (int64_t r = rows; r < lanes; ++r) packed[d * lanes + r] = Acc(0);
  }
}

/// target[d] = factor * source[d], rounded to T.
template <typename T, typename Acc>
void store_row(const Acc* source, int64_t dim, Acc factor, T* target) {
  for (int64_t d = 0; d < dim; ++d) target[d] = static_cast<T>(factor * source[d]);
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

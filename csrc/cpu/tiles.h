// Matrix products in register tiles. Compiled once per instruction set.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>

namespace wmha::cpu::CPU_CAPABILITY {

/// A matrix whose element (r, c) lies at data[r * row_stride + c * column_stride].
template <typename T>
struct Strided {
  const T* data;
  int64_t row_stride;
  int64_t column_stride;
};

/// A row-major matrix: element (r, c) lies at data[r * row_stride + c].
template <typename T>
struct RowMajor {
  T* data;
  int64_t row_stride;

  T* row(int64_t r) const { return data + r * row_stride; }
};

// A tile is as many rows, times up to three vectors of columns, as fit the registers beside three vectors of the right
// operand and one broadcast element of the left: 24 + 4 of 32 with AVX-512, 12 + 4 of 16 elsewhere.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int tile_rows = 8;
#else
constexpr int tile_rows = 4;
#endif

/// sum[R][C vectors] += left[R][depth] * right[depth][C vectors]; starts from zero unless `accumulate`.
template <typename T, int R, int C>
void multiply_tile(int64_t depth, Strided<T> left, RowMajor<const T> right, RowMajor<T> sum, bool accumulate) {
  using Vec = at::vec::Vectorized<T>;
  Vec tile[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) tile[r][c] = accumulate ? Vec::loadu(sum.row(r) + c * Vec::size()) : Vec(T(0));
  }
  for (int64_t t = 0; t < depth; ++t) {
    Vec columns[C];
    for (int c = 0; c < C; ++c) columns[c] = Vec::loadu(right.row(t) + c * Vec::size());
    for (int r = 0; r < R; ++r) {
      const Vec element(left.data[r * left.row_stride + t * left.column_stride]);
      for (int c = 0; c < C; ++c) tile[r][c] = at::vec::fmadd(element, columns[c], tile[r][c]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) tile[r][c].store(sum.row(r) + c * Vec::size());
  }
}

/// A row of tiles: R rows, any number of columns that is a multiple of the vector length.
template <typename T, int R>
void multiply_rows(
    int64_t columns,
    int64_t depth,
    Strided<T> left,
    RowMajor<const T> right,
    RowMajor<T> sum,
    bool accumulate) {
  constexpr int64_t lanes = at::vec::Vectorized<T>::size();
  for (int64_t vectors = columns / lanes; vectors > 0;) {
    const int64_t width = vectors == 4 ? 2 : vectors < 3 ? vectors : 3; // 2 + 2 keeps more sums in flight than 3 + 1
    if (width == 3) multiply_tile<T, R, 3>(depth, left, right, sum, accumulate);
    if (width == 2) multiply_tile<T, R, 2>(depth, left, right, sum, accumulate);
    if (width == 1) multiply_tile<T, R, 1>(depth, left, right, sum, accumulate);
    right.data += width * lanes;
    sum.data += width * lanes;
    vectors -= width;
  }
}

/// sum[rows][columns] (+)= left[rows][depth] * right[depth][columns].
/// columns: a multiple of the vector length. The order of summation over depth is the same for every element.
template <typename T>
void multiply(
    int64_t rows,
    int64_t columns,
    int64_t depth,
    Strided<T> left,
    RowMajor<const T> right,
    RowMajor<T> sum,
    bool accumulate) {
  const auto advance = [&](int64_t count) {
    left.data += count * left.row_stride;
    sum.data += count * sum.row_stride;
    rows -= count;
  };
  for (; rows >= tile_rows; advance(tile_rows))
    multiply_rows<T, tile_rows>(columns, depth, left, right, sum, accumulate);
  for (; rows >= 4; advance(4)) multiply_rows<T, 4>(columns, depth, left, right, sum, accumulate);
  for (; rows >= 2; advance(2)) multiply_rows<T, 2>(columns, depth, left, right, sum, accumulate);
  for (; rows >= 1; advance(1)) multiply_rows<T, 1>(columns, depth, left, right, sum, accumulate);
}

} // namespace wmha::cpu::CPU_CAPABILITY

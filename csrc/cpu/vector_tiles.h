// Matrix products in tiles of vector registers.
//
//              right: C vectors of columns                  A tile's sums stay in registers over the whole depth. Each
//             +---------+---------+---------+               step loads C vectors of the right operand and broadcasts
//             |         |         |         |  depth        one element of the left operand for each row.
//             +---------+---------+---------+
//   left      +---------+---------+---------+
//   R rows    |  tile[r][c]  += left(r, t) * right[t][c]
//   x depth   +---------+---------+---------+
//
// Included by tiles.h, which it is a part of.
#pragma once

#include <algorithm>
#include <cstdint>

#include "operands.h"

namespace wmha::cpu::CPU_CAPABILITY {

// As many rows as fit the registers beside three vectors of the right operand and one broadcast element of the left:
// 24 + 4 of 32 with AVX-512, 12 + 4 of 16 elsewhere. Divides the length of every vector.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int tile_rows = 8;
#else
constexpr int tile_rows = 4;
#endif
constexpr int tile_vectors = 3;
constexpr int64_t left_rows_at_once = 1; // a left operand may hold any number of rows

template <typename T, int R, int C>
using Tile = Vec<T>[R][C];

/// A left operand that lies in rows. Rows beyond the last one repeat it, so that a tile reads no memory that isn't
/// there.
template <typename M>
struct LeftRows {
  const M* row[tile_rows];

  LeftRows(RowMajor<const M> matrix, int64_t rows) {
    for (int64_t r = 0; r < tile_rows; ++r) row[r] = matrix.row(std::min(r, rows - 1));
  }
  M operator()(int r, int64_t t) const { return row[r][t]; }
};

/// One tile. target.start(vector, tile) gives the sums' first values, target.finish(vector, tile) takes them. Not
/// inlined: in a larger function the compiler would keep some of the sums in memory.
template <typename M, int R, int C, typename Left, typename Target>
[[gnu::noinline]] void multiply_tile(
    int64_t vector,
    int64_t depth,
    Left left,
    RowMajor<const M> right,
    const Target& target) {
  using Step = Multiplicand<M>;
  using Sum = typename Step::Sum;
  Tile<Sum, R, C> tile;
  target.start(vector, tile);
  const M* columns = right.data + vector * Vec<Sum>::size();
#pragma GCC unroll 4 // the end of a shorter loop is foreseen: up to 6 % faster
  for (int64_t t = 0; t < depth; ++t, columns += right.row_stride) {
    decltype(Step::load(columns)) column[C];
    WMHA_UNROLL
    for (int c = 0; c < C; ++c) column[c] = Step::load(columns + c * Vec<Sum>::size());
    WMHA_UNROLL
    for (int r = 0; r < R; ++r) {
      const auto element = Step::broadcast(left(r, t));
      WMHA_UNROLL
      for (int c = 0; c < C; ++c) tile[r][c] = Step::multiply_add(element, column[c], tile[r][c]);
    }
  }
  target.finish(vector, tile);
}

/// A row of tiles: the product of tile_rows rows of `left` (depth steps wide) and the vectors [begin, end) of the
/// columns of `right` (depth steps high). The order of summation over depth is the same for every element.
template <typename M, typename Left, typename Target>
void multiply(
    int64_t begin,
    int64_t end,
    int64_t depth,
    const Left& left,
    RowMajor<const M> right,
    const Target& target) {
  while (begin < end) {
    const int64_t rest = end - begin;
    const int64_t width = rest == 4 ? 2 : std::min<int64_t>(rest, tile_vectors); // 2 + 2 runs faster than 3 + 1
    if (width == 3) multiply_tile<M, tile_rows, 3>(begin, depth, left, right, target);
    if (width == 2) multiply_tile<M, tile_rows, 2>(begin, depth, left, right, target);
    if (width == 1) multiply_tile<M, tile_rows, 1>(begin, depth, left, right, target);
    begin += width;
  }
}

// Tiles of sums may have fewer rows and more vectors, where these divide the width: fewer elements are loaded for each
// product. (Up to 7 % faster.)
#if defined(CPU_CAPABILITY_AVX512)
constexpr int wide_tile_rows = 6;
#else
constexpr int wide_tile_rows = tile_rows;
#endif
constexpr int wide_tile_vectors = 4;

/// The rows of a tile of sums that are so many vectors wide.
constexpr int sum_rows(int64_t vectors) { return vectors % wide_tile_vectors == 0 ? wide_tile_rows : tile_rows; }

/// As multiply(), of all columns and sum_rows(vectors) rows.
template <typename M, typename Left, typename Target>
void multiply_sums(int64_t vectors, int64_t depth, const Left& left, RowMajor<const M> right, const Target& target) {
  if constexpr (wide_tile_rows < tile_rows) {
    if (sum_rows(vectors) == wide_tile_rows) {
      for (int64_t begin = 0; begin < vectors; begin += wide_tile_vectors) {
        multiply_tile<M, wide_tile_rows, wide_tile_vectors>(begin, depth, left, right, target);
      }
      return;
    }
  }
  multiply<M>(0, vectors, depth, left, right, target);
}

template <typename T, int R, int C>
void load_tile(RowMajor<const T> from, int64_t vector, Tile<T, R, C>& tile) {
  from.data += vector * Vec<T>::size();
  WMHA_UNROLL
  for (int r = 0; r < R; ++r) {
    WMHA_UNROLL
    for (int c = 0; c < C; ++c) tile[r][c] = Vec<T>::loadu(from.row(r) + c * Vec<T>::size());
  }
}

template <typename T, int R, int C>
void store_tile(Tile<T, R, C>& tile, RowMajor<T> to, int64_t vector) {
  to.data += vector * Vec<T>::size();
  WMHA_UNROLL
  for (int r = 0; r < R; ++r) {
    WMHA_UNROLL
    for (int c = 0; c < C; ++c) tile[r][c].store(to.row(r) + c * Vec<T>::size());
  }
}

template <typename T, int R, int C>
void clear_tile(Tile<T, R, C>& tile) {
  WMHA_UNROLL
  for (int r = 0; r < R; ++r) {
    WMHA_UNROLL
    for (int c = 0; c < C; ++c) tile[r][c] = Vec<T>(T(0));
  }
}

/// A target: rows of `product` become the product.
template <typename T>
struct StoreTo {
  RowMajor<T> product;

  template <int R, int C>
  void start(int64_t, Tile<T, R, C>& tile) const {
    clear_tile<T>(tile);
  }
  template <int R, int C>
  void finish(int64_t vector, Tile<T, R, C>& tile) const {
    store_tile<T>(tile, product, vector);
  }
};

/// A target: the product is added to rows of `sum`.
template <typename T>
struct AddTo {
  RowMajor<T> sum;

  template <int R, int C>
  void start(int64_t vector, Tile<T, R, C>& tile) const {
    load_tile<T>({sum.data, sum.row_stride}, vector, tile);
  }
  template <int R, int C>
  void finish(int64_t vector, Tile<T, R, C>& tile) const {
    store_tile<T>(tile, sum, vector);
  }
};

} // namespace wmha::cpu::CPU_CAPABILITY

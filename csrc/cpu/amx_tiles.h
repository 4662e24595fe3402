// Matrix products in the tile registers of AMX.
//
//                       right: 2 x 16 columns
//                      +----------+----------+
//                      |    6     |    7     |  depth, 16 pairs a step
//                      +----------+----------+
//   left        +---+  +----------+----------+
//   2 x 16 rows | 4 |  |    0     |    1     |         numbers: registers
//               +---+  +----------+----------+
//               | 5 |  |    2     |    3     |
//               +---+  +----------+----------+
//
// Included by tiles.h, which it is a part of.
#pragma once

#include <cstdint>

#include "amx.h"
#include "operands.h"

namespace wmha::cpu::CPU_CAPABILITY {

constexpr int tile_rows = 2 * register_rows;
// A left operand must hold whole tiles of rows, whatever the last ones are.
constexpr int64_t left_rows_at_once = tile_rows;

constexpr int64_t register_pairs = register_rows * register_bytes / sizeof(BFloat16Pair);

/// Adds a product of one step to the sums. The right operand lies in memory as in the registers, one after the other:
/// that is up to 4 % faster than rows of both.
inline void multiply_add(RowMajor<const BFloat16Pair> left, const BFloat16Pair* right) {
  const int64_t stride = left.row_stride * sizeof(BFloat16Pair);
  load_register<4>(left.data, stride);
  load_register<6>(right, register_bytes);
  multiply_add_registers<0, 4, 6>();
  load_register<7>(right + register_pairs, register_bytes);
  multiply_add_registers<1, 4, 7>();
  load_register<5>(left.row(register_rows), stride);
  multiply_add_registers<2, 5, 6>();
  multiply_add_registers<3, 5, 7>();
}

/// Adds a product of `depth` pairs, whole steps of them, one after the other in the right operand.
inline void multiply_add(RowMajor<const BFloat16Pair> left, const BFloat16Pair* right, int64_t depth) {
  for (int64_t t = 0; t < depth; t += Multiplicand<BFloat16Pair>::steps_at_once) {
    multiply_add({left.data + t, left.row_stride}, right + t * Multiplicand<BFloat16Pair>::columns);
  }
}

inline void clear_sums() {
  clear_register<0>();
  clear_register<1>();
  clear_register<2>();
  clear_register<3>();
}

inline void load_sums(RowMajor<const float> from, int64_t column) {
  const int64_t stride = from.row_stride * sizeof(float);
  load_register<0>(from.data + column, stride);
  load_register<1>(from.data + column + register_rows, stride);
  load_register<2>(from.row(register_rows) + column, stride);
  load_register<3>(from.row(register_rows) + column + register_rows, stride);
}

inline void store_sums(RowMajor<float> to, int64_t column) {
  const int64_t stride = to.row_stride * sizeof(float);
  store_register<0>(to.data + column, stride);
  store_register<1>(to.data + column + register_rows, stride);
  store_register<2>(to.row(register_rows) + column, stride);
  store_register<3>(to.row(register_rows) + column + register_rows, stride);
}

} // namespace wmha::cpu::CPU_CAPABILITY

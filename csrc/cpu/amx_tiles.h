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

/// Adds to one register of sums what is its part in a product of one step; to be called for all in turn. The right
/// operand lies in memory as in the registers, one after the other: that is up to 4 % faster than rows of both.
template <int sum>
void multiply_add(RowMajor<const BFloat16Pair> left, const BFloat16Pair* right) {
  const int64_t stride = left.row_stride * sizeof(BFloat16Pair);
  if constexpr (sum == 0) {
    load_register<4>(left.data, stride);
    load_register<6>(right, register_bytes);
  }
  if constexpr (sum == 1) load_register<7>(right + register_pairs, register_bytes);
  if constexpr (sum == 2) load_register<5>(left.row(register_rows), stride);
  multiply_add_registers<sum, 4 + sum / 2, 6 + sum % 2>();
}

/// A product of `depth` pairs, whole steps of them, one after the other in the right operand, that is added to the sums
/// a part at a time, so that other work can be done meanwhile.
class StepwiseProduct {
 public:
  StepwiseProduct(RowMajor<const BFloat16Pair> left, const BFloat16Pair* right, int64_t depth)
      : left_(left), right_(right), depth_(depth) {}

  /// The next part, one of four of a step: that in register `sum`.
  template <int sum>
  void add() {
    if (depth_ <= 0) return;
    multiply_add<sum>(left_, right_);
    if constexpr (sum == 3) {
      constexpr int64_t step = Multiplicand<BFloat16Pair>::steps_at_once;
      left_.data += step;
      right_ += step * Multiplicand<BFloat16Pair>::columns;
      depth_ -= step;
    }
  }

  /// All steps that are left.
  void finish() {
    while (depth_ > 0) {
      add<0>();
      add<1>();
      add<2>();
      add<3>();
    }
  }

 private:
  RowMajor<const BFloat16Pair> left_;
  const BFloat16Pair* right_;
  int64_t depth_; // that is left
};

/// Adds a product of `depth` pairs.
inline void multiply_add(RowMajor<const BFloat16Pair> left, const BFloat16Pair* right, int64_t depth) {
  StepwiseProduct(left, right, depth).finish();
}

/// Adds a product of one step.
inline void multiply_add(RowMajor<const BFloat16Pair> left, const BFloat16Pair* right) {
  multiply_add(left, right, Multiplicand<BFloat16Pair>::steps_at_once);
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

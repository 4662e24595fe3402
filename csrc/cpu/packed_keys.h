// Keys and values in the form a product wants, kept from one block of queries to the next: neighbouring blocks see
// mostly the same keys.
//
//    buffer  [ packed, in sight no more | packed, in sight | free . . . ]
//              first_                     seen.begin         end_
#pragma once

#include <algorithm>
#include <cstdint>

#include "rows.h"
#include "scores.h"

namespace wmha::cpu::CPU_CAPABILITY {

// A form says how many neighbouring keys are packed together (a group), how many elements they take, and how. Rows that
// aren't `used` are not read; unless they are rows of their own, they become zeros.

/// The left operand of K Q^T and V dO^T: copy_left_rows().
template <typename T>
struct LeftForm {
  using M = multiplicand_type<T>;
  static constexpr int64_t group = 1;
  static constexpr int64_t overread = tile_rows; // groups behind the last that a product may read

  static int64_t group_size(int64_t dim) { return left_width<M>(dim); }
  static int64_t row_stride(int64_t dim) { return left_width<M>(dim); }
  static bool is_in_place(Rows<T> rows) { return are_left<M>(rows); }
  static RowMajor<const M> pack(Rows<T> rows, Range /*used*/, M* packed) { return copy_left_rows<M>(rows, packed); }
};

/// What the right operands have in common: `steps_at_once` steps are packed together.
template <typename T>
struct RightOperandForm {
  using M = multiplicand_type<T>;
  static constexpr int64_t group = Multiplicand<M>::terms * Multiplicand<M>::steps_at_once;
  static constexpr int64_t overread = 0;

  static bool is_in_place(Rows<T> /*rows*/) { return false; }
};

/// The right operand of P V and dS K: right_rows().
template <typename T>
struct RightRowsForm : RightOperandForm<T> {
  using M = multiplicand_type<T>;

  static int64_t group_size(int64_t dim) { return whole_columns<M>(dim) * Multiplicand<M>::steps_at_once; }
  static int64_t row_stride(int64_t dim) { return whole_columns<M>(dim); }
  static RowMajor<const M> pack(Rows<T> rows, Range used, M* packed) { return right_rows<M>(rows, used, packed); }

  /// The first keys become zeros.
  static void clear(int64_t keys, int64_t dim, M* packed) {
    const int64_t width = whole_columns<M>(dim);
    std::fill_n(packed, keys / 2 * width, M{});
    M* const last = packed + keys / 2 * width;
    for (int64_t d = 0; keys % 2 == 1 && d < width; ++d) last[d].first = 0;
  }
};

template <typename T>
using RightForm = std::conditional_t<Multiplicand<multiplicand_type<T>>::terms == 1, LeftForm<T>, RightRowsForm<T>>;

/// Keys and values in form Form, LeftForm<T> or RightForm<T>.
template <typename T, typename Form>
class PackedKeys {
  using M = multiplicand_type<T>;

 public:
  /// `most_keys`: those that a block of queries sees, at most. `all_keys`: of the tensor.
  PackedKeys(int64_t dim, int64_t most_keys, int64_t all_keys)
      : dim_(dim),
        all_keys_(all_keys),
        group_size_(Form::group_size(dim)),
        copies_scattered_(are_kept(most_keys) && most_keys > 2 * key_block),
        capacity_(are_kept(most_keys) ? std::min(2 * most_keys, all_keys) : key_block),
        packed_((ceil_div(capacity_, Form::group) + Form::overread) * group_size_) {}

  /// The keys of `tile` of one head, packed or where they are. The tile may begin before the first key of `seen`, with
  /// zeros; keys before that one are not asked for again.
  RowMajor<const M> of(const InputView& view, int64_t batch, int64_t head, Range tile, Range seen) {
    // A product reads whole tiles of rows, whatever the last ones hold.
    const Range whole{tile.begin, std::min(tile.begin + round_up(tile.size(), left_rows_at_once), all_keys_)};
    const Rows<T> rows = rows_of<T>(view, batch, head, whole, dim_);
    if (Form::is_in_place(rows) && (rows.are_dense() || !copies_scattered_)) return as_left<M>(rows);
    const bool is_missing = std::max(tile.begin, seen.begin) < oldest_ || tile.begin > end_;
    if (batch != batch_ || head != head_ || is_missing) restart(batch, head, tile.begin);
    if (tile.end - first_ > capacity_) forget(seen.begin);
    if (tile.end - first_ > capacity_ || !starts_group(tile.begin)) restart(batch, head, tile.begin);
    if (tile.end > end_) {
      const Range missing{end_ - (end_ - first_) % Form::group, tile.end}; // a part of a group is packed again
      const Range used{std::max<int64_t>(seen.begin - missing.begin, 0), missing.size()};
      Form::pack(rows_of<T>(view, batch, head, missing, dim_), used, place(missing.begin));
      end_ = tile.end;
    }
    if (tile.begin < seen.begin) {
      if constexpr (std::is_same_v<Form, RightRowsForm<T>>) { // other forms' keys are masked after the product
        Form::clear(seen.begin - tile.begin, dim_, place(tile.begin));
      }
      oldest_ = seen.begin;
    }
    return {place(tile.begin), Form::row_stride(dim_)};
  }

 private:
  // Beyond, memory is spared: keys are packed anew for each block, which takes a tenth of the time.
  static constexpr int64_t most_bytes = int64_t{2} << 20;

  bool are_kept(int64_t keys) const {
    return ceil_div(keys, Form::group) * group_size_ * static_cast<int64_t>(sizeof(M)) <= most_bytes;
  }
  bool starts_group(int64_t key) const { return (key - first_) % Form::group == 0; }
  M* place(int64_t key) const { return packed_ + (key - first_) / Form::group * group_size_; }

  void restart(int64_t batch, int64_t head, int64_t key) {
    batch_ = batch;
    head_ = head;
    first_ = oldest_ = end_ = key;
  }

  /// Moves the group of `oldest` and those behind it to the buffer's begin.
  void forget(int64_t oldest) {
    if (oldest <= first_ || oldest > end_) return;
    const int64_t first = oldest - (oldest - first_) % Form::group;
    std::copy_n(place(first), ceil_div(end_ - first, Form::group) * group_size_, packed_.data());
    first_ = first;
    oldest_ = std::max(oldest_, first);
  }

  const int64_t dim_;
  const int64_t all_keys_;
  const int64_t group_size_; // elements of a group of keys
  // Rows that lie apart, as those of (B, N, H, D) do, compete for a few sets of the first cache. Where many blocks read
  // them, copies are faster, by up to a quarter.
  const bool copies_scattered_;
  const int64_t capacity_; // keys
  Buffer<M> packed_;
  int64_t batch_ = -1;
  int64_t head_ = -1;
  int64_t first_ = 0;  // the key at the buffer's begin
  int64_t oldest_ = 0; // those before it are zeros or gone
  int64_t end_ = 0;
};

} // namespace wmha::cpu::CPU_CAPABILITY

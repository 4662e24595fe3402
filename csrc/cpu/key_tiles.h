// Keys and values in tiles of 32 as right operands of AMX's products, kept from one block of queries to the next:
// neighbouring blocks see mostly the same keys.
//
//   tiles of a head   | packed, gone | packed . . . . . . . | to come
//                                     end_ - slots_          end_
#pragma once

#include <algorithm>
#include <cstdint>

#include "squares.h"

namespace wmha::cpu::CPU_CAPABILITY {

/// The tiles that keys are cut into, so that the last one that a tile of queries sees is whole.
struct KeyTiles {
  int64_t first; // key of tile 0, at most 0

  explicit KeyTiles(const Window& window)
      : first(window.right < 0 ? 0 : -modulo(-(window.right % square + window.offset % square), square)) {}

  int64_t of(int64_t key) const { return (key - first) / square; }
  Range of(Range keys) const { return {of(keys.begin), keys.size() > 0 ? of(keys.end - 1) + 1 : of(keys.begin)}; }
  Range keys_of(int64_t tile) const { return {first + tile * square, first + (tile + 1) * square}; }
};

/// That so many neighbouring tiles of queries see, or 1.
inline int64_t most_key_tiles(const AttentionParams& params, int64_t query_tiles) {
  const KeyTiles key_tiles(params.window);
  int64_t most = 1;
  for (int64_t begin = 0; begin < params.queries; begin += square) {
    const Range queries{begin, std::min(begin + query_tiles * square, params.queries)};
    most = std::max(most, key_tiles.of(params.window.keys_of(queries)).size());
  }
  return most;
}

/// Packed tiles of one head at a time, of the keys that a block of queries sees: those from one to the next block never
/// go back.
class PackedTiles {
  using T = c10::BFloat16;
  using M = BFloat16Pair;

 public:
  /// Room for all tiles that 32 queries see or, if these don't fit the second cache, for those that do, but for
  /// `least`.
  PackedTiles(const AttentionParams& params, int64_t least)
      : params_(params),
        tiles_(params.window),
        key_size_(steps<M>(params.key_dim) * square),
        value_width_(whole_columns<M>(params.value_dim)),
        seen_(most_key_tiles(params, 1)),
        slots_(std::min(seen_, std::max(least, most_bytes / tile_bytes()))),
        keys_(slots_ * key_size_),
        values_(slots_ * value_size()) {}

  const KeyTiles& tiles() const { return tiles_; }
  /// Tiles that it has room for.
  int64_t size() const { return slots_; }
  /// Are these all that 32 queries see?
  bool holds_all() const { return slots_ == seen_; }

  /// Packs tiles, as many as there is room for, unless they are. Of keys that aren't in sight, they hold zeros.
  void pack(int64_t batch, int64_t head, Range tiles, Range in_sight) {
    const int64_t batch_head = batch * params_.heads + head;
    if (batch_head != batch_head_ || tiles.begin < std::max(first_, end_ - slots_) || tiles.begin > end_) {
      batch_head_ = batch_head;
      first_ = end_ = tiles.begin;
    }
    for (; end_ < tiles.end; ++end_) pack(batch, params_.kv_head(head), end_, in_sight);
    clear_values(tiles.begin, in_sight.begin - tiles_.keys_of(tiles.begin).begin);
  }

  /// Tiles are packed anew.
  void forget() { batch_head_ = -1; }

  /// The right operand of Q K^T.
  M* keys_of(int64_t tile) const { return keys_ + tile % slots_ * key_size_; }
  /// The right operands of P V, one for 32 features.
  M* values_of(int64_t tile) const { return values_ + tile % slots_ * value_size(); }

 private:
  static constexpr int64_t most_bytes = int64_t{1} << 20;

  int64_t value_size() const { return square_pairs * value_width_; }

  int64_t tile_bytes() const { return static_cast<int64_t>((key_size_ + value_size()) * sizeof(M)); }

  void pack(int64_t batch, int64_t kv_head, int64_t tile, Range in_sight) {
    const Range all = tiles_.keys_of(tile);
    const Range used{std::max(in_sight.begin - all.begin, int64_t{0}), std::min(in_sight.end - all.begin, square)};
    const auto rows = [&](const auto& view, int64_t dim) { return rows_of<T>(view, batch, kv_head, all, dim); };
    for_squares(rows(params_.key, params_.key_dim), used, [&](const Square& part, int64_t d) {
      pack_transposed(part, keys_of(tile) + d * square_pairs);
    });
    for_squares(rows(params_.value, params_.value_dim), used, [&](const Square& part, int64_t d) {
      pack_interleaved(part, values_of(tile) + d * square_pairs);
    });
  }

  /// Those of a tile's first keys become zeros.
  void clear_values(int64_t tile, int64_t keys) {
    if (keys <= 0) return;
    for (int64_t d = 0; d < value_width_; d += register_rows) {
      M* const first = values_of(tile) + d * square_pairs;
      M* const last = first + keys / 2 * square_pairs;
      std::fill(first, last, M{});
      constexpr __mmask32 second = 0xaaaaaaaa; // of each pair
      if (keys % 2 == 1) _mm512_storeu_si512(last, _mm512_maskz_mov_epi16(second, _mm512_loadu_si512(last)));
    }
  }

  const AttentionParams& params_;
  const KeyTiles tiles_;
  const int64_t key_size_; // of a tile
  const int64_t value_width_;
  const int64_t seen_; // tiles, by 32 queries, at most
  const int64_t slots_;
  Buffer<M> keys_;   // [slots][squares of key_dim][square_size]
  Buffer<M> values_; // [slots][squares of value_dim][square_size]
  int64_t batch_head_ = -1;
  int64_t first_ = 0; // tile since which none has been left out
  int64_t end_ = 0;
};

} // namespace wmha::cpu::CPU_CAPABILITY

// Few queries against many keys, as in decoding with a cache: the keys that they see are cut into splits, so that even
// one sequence with few heads fills a device. How many follows from the problem's shape alone, never from the device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../params.h"

namespace wmha::cuda {

/// A "row" is one query of one of the heads that share a key head; a "state" is what a split leaves of a row: its
/// softmax's reference and sum, and sums of Dv values.
struct DecodeSchedule {
  static constexpr int64_t most_queries = 16;
  static constexpr int64_t shortest_split = 128; // keys; of less, states are a large part of what is read and written
  static constexpr int64_t longest_split = 1024; // keys; many blocks for each multiprocessor even out its load
  static constexpr int64_t wanted_splits = 1024; // of all heads: several for each multiprocessor
  static constexpr int64_t alignment = 16;       // keys; each split but the first begins at a multiple of it

  // No more of anything than a grid has blocks: 32 bits, of which divisions are quick.
  int group; // heads that share a key head
  int queries;
  int rows; // of one key head
  int kv_heads;
  int batch_kv_heads;
  int split_keys; // but for the first and the last split
  int splits;
  int state_width; // values of a state, with padding to whole vectors of 16 bytes
  Range keys;      // that at least one query sees
  Range common;    // that every query sees; its end may come before its begin

  /// With more queries, a block's rows hold less than one head's, and blocks of 64 queries read keys less often. With
  /// fewer keys there is nothing to split.
  static bool applies(const AttentionParams& params) {
    return params.batch > 0 && params.heads > 0 && params.queries > 0 && params.queries <= most_queries &&
           params.window.keys_of(Range{0, params.queries}).size() > shortest_split;
  }

  /// Precondition: at least one query sees a key.
  explicit DecodeSchedule(const AttentionParams& params)
      : group(static_cast<int>(params.group())),
        queries(static_cast<int>(params.queries)),
        rows(group * queries),
        kv_heads(static_cast<int>(params.kv_heads)),
        batch_kv_heads(static_cast<int>(params.batch) * kv_heads),
        keys(params.window.keys_of(Range{0, params.queries})),
        common{params.window.keys_of(params.queries - 1).begin, params.window.keys_of(0).end} {
    const int64_t wanted = ceil_div(keys.size(), ceil_div(wanted_splits, batch_kv_heads));
    split_keys = static_cast<int>(ceil_div(std::clamp(wanted, shortest_split, longest_split), alignment) * alignment);
    splits = static_cast<int>(ceil_div(keys.end - first_key(), split_keys));
    const int64_t vector = params.dtype == ScalarType::Double ? 2 : 4;
    state_width = static_cast<int>(ceil_div(params.value_dim, vector) * vector);
  }

  /// Where the first split begins: at the first key or a few before it.
  WMHA_HOST_DEVICE int64_t first_key() const { return keys.begin / alignment * alignment; }

  WMHA_HOST_DEVICE int64_t states() const { return int64_t{batch_kv_heads} * rows * splits; }
  int64_t workspace_size() const { return states() * (state_width + 2); }

  /// The state of row `row` of key head `batch_kv_head` = batch * Hkv + kv_head: also of query row % Nq of head
  /// batch * Hq + kv_head * (Hq / Hkv) + row / Nq.
  WMHA_HOST_DEVICE int64_t state(int batch_kv_head, int row, int split) const {
    return (int64_t{batch_kv_head} * rows + row) * splits + split;
  }
};

} // namespace wmha::cuda

// What the next block of queries will need, brought into the second cache a few rows at a time, between tiles, so that
// memory is seldom waited for. (It saves a tenth of the time, with narrow windows a third.)
#pragma once

#include <algorithm>
#include <cstdint>

#include "rows.h"
#include "scores.h"

namespace wmha::cpu::CPU_CAPABILITY {

/// The rows of all tensors behind a block of queries that sees `keys`.
template <typename T>
class LookAhead {
 public:
  LookAhead(const AttentionParams& params, int64_t batch, int64_t head, Range block, Range keys)
      : rows_(ceil_div(block.size() * tile_rows, std::max<int64_t>(keys.size(), 1))) {
    const int64_t kv_head = params.kv_head(head);
    const Range next_queries{block.end, std::min(block.end + block.size(), params.queries)};
    const Range next_keys{keys.end, std::min(keys.end + block.size(), params.keys())};
    tensors_[0] = rows_of<T>(params.query, batch, head, next_queries, params.key_dim);
    tensors_[1] = rows_of<T>(params.output, batch, head, next_queries, params.value_dim);
    tensors_[2] = rows_of<T>(params.key, batch, kv_head, next_keys, params.key_dim);
    tensors_[3] = rows_of<T>(params.value, batch, kv_head, next_keys, params.value_dim);
    if (params.grad_output.data != nullptr) { // the backward pass
      tensors_[4] = rows_of<T>(params.grad_output, batch, head, next_queries, params.value_dim);
    }
  }

  /// To be called for each group of tile_rows keys.
  void fetch() {
    for (Rows<T>& rows : tensors_) {
      const Rows<T> next{rows.data, rows.stride, std::min(rows_, rows.count), rows.dim};
      prefetch(next);
      rows = {rows.row(next.count), rows.stride, rows.count - next.count, rows.dim};
    }
  }

 private:
  Rows<T> tensors_[5]{}; // what is left of them
  int64_t rows_;         // of each, at a time
};

} // namespace wmha::cpu::CPU_CAPABILITY

// What the next block of queries will need, and where this one's gradients will go, brought into the second cache while
// this one is worked on, so that memory is seldom waited for: a few lines at a time, since a burst of prefetches holds
// up all else. (It saves a tenth of the time, with narrow windows a third.)
#pragma once

#include <algorithm>
#include <cstdint>

#include "rows.h"
#include "scores.h"

namespace wmha::cpu::CPU_CAPABILITY {

// Rows that lie apart, as those of (B, N, H, D) do, aren't foreseen by the hardware, and a block takes so little time
// with AMX that they would come too late: they are fetched a block earlier. (Narrow windows: forward a tenth to a
// quarter faster. In vector registers it makes them 3 % slower.)
#if defined(CPU_CAPABILITY_AMX)
constexpr bool fetches_scattered_early = true;
#else
constexpr bool fetches_scattered_early = false;
#endif

/// The rows of all tensors behind a block of queries that sees `keys`. tensors: 4, in the backward pass 8.
template <typename T, int64_t tensors>
class LookAhead {
 public:
  /// calls: of fetch(), about.
  LookAhead(const AttentionParams& params, int64_t batch, int64_t head, Range block, Range keys, int64_t calls) {
    const int64_t kv_head = params.kv_head(head);
    const bool are_dense = rows_of<T>(params.query, batch, head, block, params.key_dim).are_dense();
    const int64_t between = fetches_scattered_early && !are_dense ? block.size() : 0;
    const auto next = [&](int64_t end, int64_t count) {
      const int64_t begin = std::min(end + between, count);
      return Range{begin, std::min(begin + block.size(), count)};
    };
    const Range next_queries = next(block.end, params.queries);
    const Range next_keys = next(keys.end, params.keys());
    tensors_[0] = rows_of<T>(params.query, batch, head, next_queries, params.key_dim);
    tensors_[1] = rows_of<T>(params.output, batch, head, next_queries, params.value_dim);
    tensors_[2] = rows_of<T>(params.key, batch, kv_head, next_keys, params.key_dim);
    tensors_[3] = rows_of<T>(params.value, batch, kv_head, next_keys, params.value_dim);
    if constexpr (tensors == 8) {
      const Range oldest_keys{keys.begin, std::min(keys.begin + block.size(), params.keys())};
      tensors_[4] = rows_of<T>(params.grad_output, batch, head, next_queries, params.value_dim);
      tensors_[5] = rows_of<T>(params.grad_query, batch, head, block, params.key_dim);
      tensors_[6] = rows_of<T>(params.grad_key, batch, kv_head, oldest_keys, params.key_dim);
      tensors_[7] = rows_of<T>(params.grad_value, batch, kv_head, oldest_keys, params.value_dim);
    }
    const auto is_dense = [](const Rows<T>& rows) { return rows.are_dense() || rows.count == 0; };
    if (std::all_of(tensors_, std::end(tensors_), is_dense)) {
      for (Rows<T>& rows : tensors_) rows = rows.as_one();
    }
    int64_t most_rows = 0;
    for (const Rows<T>& rows : tensors_) {
      longest_ = std::max(longest_, rows.dim);
      most_rows = std::max(most_rows, rows.count);
    }
    const int64_t lines = std::max<int64_t>(most_rows * ceil_div(longest_, line), 1);
    lines_at_once_ = ceil_div(lines, std::max<int64_t>(calls, 1));
    interval_ = calls * lines_at_once_ / lines;
  }

  void fetch() {
    if (++calls_ < interval_) return;
    calls_ = 0;
    for (int64_t i = 0; i < lines_at_once_; ++i) fetch_lines();
  }

 private:
  static constexpr int64_t line = 64 / sizeof(T);

  /// One line of each tensor.
  void fetch_lines() {
    WMHA_UNROLL
    for (int64_t i = 0; i < tensors; ++i) {
      if (place_ >= tensors_[i].dim) continue;
      const T* const place = tensors_[i].data + place_;
      i < first_written ? prefetch(place) : prefetch_for_writing(place);
    }
    place_ += line;
    if (place_ < longest_) return;
    place_ = 0;
    for (Rows<T>& rows : tensors_) {
      rows.data += rows.stride;
      if (--rows.count <= 0) rows.dim = 0;
    }
  }

  static constexpr int64_t first_written = 5;

  Rows<T> tensors_[tensors];
  int64_t longest_ = 0;   // row
  int64_t lines_at_once_; // of each tensor
  int64_t interval_;      // calls from one time to the next
  int64_t calls_ = 0;
  int64_t place_ = 0; // in the rows
};

} // namespace wmha::cpu::CPU_CAPABILITY

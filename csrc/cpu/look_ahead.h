// What the next block of queries will need, brought into the second cache a few rows at a time, between tiles, so that
// memory is seldom waited for. (It saves a tenth of the time, with narrow windows a third.)
#pragma once

#include <algorithm>
#include <cstdint>

#include "rows.h"
#include "scores.h"

namespace wmha::cpu::CPU_CAPABILITY {

/// Rows of a tensor that will be needed soon.
template <typename T>
class RowsAhead {
 public:
  RowsAhead() = default;
  /// The positions [first, first + count) that there are of `positions`.
  template <typename Pointer>
  RowsAhead(
      const TensorView<Pointer>& view,
      int64_t batch,
      int64_t head,
      int64_t first,
      int64_t count,
      int64_t positions,
      int64_t dim)
      : row_(at<T>(view, batch, head, first)),
        stride_(view.position_stride),
        count_(std::min(count, positions - first)),
        dim_(dim) {}

  void fetch(int64_t rows) {
    for (; rows > 0 && count_ > 0; --rows, --count_, row_ += stride_) prefetch(row_, dim_);
  }

 private:
  const T* row_ = nullptr;
  int64_t stride_ = 0;
  int64_t count_ = 0;
  int64_t dim_ = 0;
};

/// The rows of all tensors behind a block of queries that sees `keys`.
template <typename T>
class LookAhead {
 public:
  LookAhead(const AttentionParams& params, int64_t batch, int64_t head, Range block, Range keys)
      : rows_(ceil_div(block.size() * tile_rows, std::max<int64_t>(keys.size(), 1))) {
    const int64_t kv_head = params.kv_head(head);
    const int64_t count = block.size();
    tensors_[0] = {params.query, batch, head, block.end, count, params.queries, params.key_dim};
    tensors_[1] = {params.output, batch, head, block.end, count, params.queries, params.value_dim};
    tensors_[2] = {params.key, batch, kv_head, keys.end, count, params.keys(), params.key_dim};
    tensors_[3] = {params.value, batch, kv_head, keys.end, count, params.keys(), params.value_dim};
    if (params.grad_output.data != nullptr) { // the backward pass
      tensors_[4] = {params.grad_output, batch, head, block.end, count, params.queries, params.value_dim};
    }
  }

  /// To be called for each group of tile_rows keys.
  void fetch() {
    for (RowsAhead<T>& tensor : tensors_) tensor.fetch(rows_);
  }

 private:
  RowsAhead<T> tensors_[5];
  int64_t rows_; // of each, at a time
};

} // namespace wmha::cpu::CPU_CAPABILITY

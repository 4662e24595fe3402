// Where the backward pass sums up grad_key and grad_value. See BackwardSchedule for who sums up what.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "key_shares.h"
#include "rows.h"
#include "schedule.h"
#include "scores.h"

namespace wmha::cpu::CPU_CAPABILITY {

/// Rounds the sums of one key to T and writes them to the tensors. Those of grad_value lack the factor of dropout.
template <typename T>
void store_key_gradients(
    const AttentionParams& params,
    int64_t batch_kv_head,
    int64_t key,
    const acc_type<T>* grad_key,
    const acc_type<T>* grad_value) {
  using Acc = acc_type<T>;
  const int64_t batch = batch_kv_head / params.kv_heads;
  const int64_t kv_head = batch_kv_head % params.kv_heads;
  store_row(grad_key, params.key_dim, Acc(1), at<T>(params.grad_key, batch, kv_head, key));
  const auto inverse_keep = static_cast<Acc>(params.dropout.inverse_keep);
  store_row(grad_value, params.value_dim, inverse_keep, at<T>(params.grad_value, batch, kv_head, key));
}

/// The sums of the keys in sight while a chunk's queries pass by, in a buffer that follows the window:
///
///    buffer  [ . . . . | keys in sight | zeros . . . ]
///                      first_          end_             keys before first_ have all they get and are written out
template <typename T>
class KeyGradients {
  using Acc = acc_type<T>;

 public:
  KeyGradients(const AttentionParams& params, const BackwardSchedule& schedule, Acc* workspace)
      : params_(params),
        schedule_(schedule),
        shares_(schedule, workspace),
        key_width_(whole_columns<multiplicand_type<T>>(params.key_dim)),
        value_width_(whole_columns<multiplicand_type<T>>(params.value_dim)),
        capacity_(std::min(2 * most_keys_of_block(params) + key_slack, schedule.most_keys)),
        grad_key_((capacity_ + tile_rows) * key_width_),
        grad_value_((capacity_ + tile_rows) * value_width_) {}

  void start(int64_t batch_kv_head, int64_t chunk) {
    batch_kv_head_ = batch_kv_head;
    shares_.start(batch_kv_head, chunk);
    base_ = first_ = end_ = schedule_.keys_of(chunk).begin;
  }

  /// Makes room for a block of queries that sees `keys`; both ends never decrease within a chunk.
  void advance_to(Range keys) {
    write_until(keys.begin);
    if (keys.end - base_ > capacity_) {
      std::memmove(grad_key_, key_rows(first_).data, (end_ - first_) * key_width_ * sizeof(Acc));
      std::memmove(grad_value_, value_rows(first_).data, (end_ - first_) * value_width_ * sizeof(Acc));
      base_ = first_;
    }
    if (keys.end > end_) {
      std::fill_n(key_rows(end_).data, (keys.end - end_) * key_width_, Acc(0));
      std::fill_n(value_rows(end_).data, (keys.end - end_) * value_width_, Acc(0));
      end_ = keys.end;
    }
  }

  void finish() { write_until(end_); }

  /// The sums of `key` and the keys after it. The tile_rows rows behind the last key in sight may be overwritten.
  RowMajor<Acc> key_rows(int64_t key) const { return {grad_key_ + (key - base_) * key_width_, key_width_}; }
  RowMajor<Acc> value_rows(int64_t key) const { return {grad_value_ + (key - base_) * value_width_, value_width_}; }

 private:
  static constexpr int64_t key_slack = 256; // so that the buffer is moved seldom

  void write_until(int64_t key) {
    for (; first_ < std::min(key, end_); ++first_) {
      Acc* const grad_key = key_rows(first_).data;
      Acc* const grad_value = value_rows(first_).data;
      if (shares_.left().contains(first_)) {
        const Acc* const share = shares_.of(first_);
        for (int64_t d = 0; d < params_.key_dim; ++d) grad_key[d] += share[d];
        for (int64_t d = 0; d < params_.value_dim; ++d) grad_value[d] += share[params_.key_dim + d];
      }
      if (shares_.complete().contains(first_)) {
        store_key_gradients<T>(params_, batch_kv_head_, first_, grad_key, grad_value);
      } else {
        Acc* const share = shares_.of(first_);
        std::copy_n(grad_key, params_.key_dim, share);
        std::copy_n(grad_value, params_.value_dim, share + params_.key_dim);
      }
    }
    if (key > end_) base_ = first_ = end_ = key;
  }

  const AttentionParams& params_;
  const BackwardSchedule& schedule_;
  KeyShares<Acc> shares_;
  const int64_t key_width_;
  const int64_t value_width_;
  const int64_t capacity_; // keys
  Buffer<Acc> grad_key_;   // [capacity + tile_rows][key_width]
  Buffer<Acc> grad_value_; // [capacity + tile_rows][value_width]
  int64_t batch_kv_head_ = 0;
  int64_t base_ = 0; // the key of the buffer's first row
  int64_t first_ = 0;
  int64_t end_ = 0;
};

} // namespace wmha::cpu::CPU_CAPABILITY

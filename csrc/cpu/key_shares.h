// Where a chunk's sums of grad_key and grad_value go if other chunks see the key, too. See BackwardSchedule.
#pragma once

#include <cstdint>

#include "rows.h"
#include "schedule.h"

namespace wmha::cpu::CPU_CAPABILITY {

template <typename Acc>
class KeyShares {
 public:
  KeyShares(const BackwardSchedule& schedule, Acc* workspace)
      : schedule_(schedule), workspace_(workspace), left_(schedule.most_left * schedule.row) {}

  /// Chunks of a task come one after another.
  void start(int64_t batch_kv_head, int64_t chunk) {
    batch_kv_head_ = batch_kv_head;
    chunk_ = chunk;
    const Range own = schedule_.private_keys_of(chunk);
    left_keys_ = {schedule_.follows(chunk) ? schedule_.keys_of(chunk).begin : own.begin, own.begin};
    complete_ = {left_keys_.begin, own.end};
  }

  /// The keys whose gradients the chunk writes.
  Range complete() const { return complete_; }
  /// Those of them of which the chunk before has left shares, to be added.
  Range left() const { return left_keys_; }

  /// What the chunk before has left, or where the chunk's own share of a key that isn't complete goes: Dk of grad_key,
  /// then Dv of grad_value. Keys follow one another: what is left for the next chunk replaces what was added.
  Acc* of(int64_t key) const {
    if (left_keys_.contains(key)) return left_ + (key - left_keys_.begin) * schedule_.row;
    if (key >= complete_.end && schedule_.follows(chunk_ + 1)) return left_ + (key - complete_.end) * schedule_.row;
    return workspace_ + schedule_.share_offset(batch_kv_head_, chunk_, key);
  }

 private:
  const BackwardSchedule& schedule_;
  Acc* workspace_;
  Buffer<Acc> left_; // [most_left][row], by the chunk before or for the next one
  int64_t batch_kv_head_ = 0;
  int64_t chunk_ = 0;
  Range left_keys_{0, 0};
  Range complete_{0, 0};
};

} // namespace wmha::cpu::CPU_CAPABILITY

// The second step of the backward pass: shares of chunks become gradients. See BackwardSchedule.
#include "key_gradients.h"
#include "passes.h"
#include "rows.h"

namespace wmha::cpu::CPU_CAPABILITY {
namespace {

/// grad_key and grad_value of those of the keys that no task has written: the sum of their shares in chunk order, or
/// zero.
template <typename T>
void merge_shares(
    const AttentionParams& params,
    const BackwardSchedule& schedule,
    const acc_type<T>* workspace,
    int64_t batch_kv_head,
    Range keys) {
  using Acc = acc_type<T>;
  const Buffer<Acc> sum(schedule.row);
  int64_t first_chunk = 0; // no earlier chunk sees this key or a later one
  for (int64_t key = keys.begin; key < keys.end; ++key) {
    while (first_chunk < schedule.chunks && schedule.keys_of(first_chunk).end <= key) ++first_chunk;
    Range written{key, key};
    if (first_chunk < schedule.chunks) {
      const bool shares_left = schedule.follows(first_chunk + 1);
      written = shares_left ? schedule.keys_of(first_chunk) : schedule.private_keys_of(first_chunk);
    }
    if (written.contains(key)) {
      key = written.end - 1;
      continue;
    }
    std::fill_n(sum.data(), schedule.row, Acc(0));
    for (int64_t c = first_chunk; c < schedule.chunks && schedule.keys_of(c).begin <= key; ++c) {
      const Acc* share = workspace + schedule.share_offset(batch_kv_head, c, key);
      for (int64_t d = 0; d < schedule.row; ++d) sum[d] += share[d];
    }
    store_key_gradients<T>(params, batch_kv_head, key, sum, sum + params.key_dim);
  }
}

} // namespace

void merge_backward(
    const AttentionParams& params,
    const BackwardSchedule& schedule,
    const void* workspace,
    Tasks& tasks) {
  with_scalar_type(params.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t pieces = schedule.merge_pieces();
    tasks.for_each([&](int64_t task) {
      merge_shares<T>(
          params, schedule, static_cast<const acc_type<T>*>(workspace), task / pieces,
          schedule.keys_of_piece(task % pieces));
    });
  });
}

} // namespace wmha::cpu::CPU_CAPABILITY

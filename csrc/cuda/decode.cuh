// What the kernels for few queries share: a block of threads has some rows of one key head and one split of its keys;
// each of its warps attends to other keys of the split, and leaves a state; the block makes one of them.
#pragma once

#include <limits>

#include "decode_schedule.h"
#include "scores.cuh"

namespace wmha::cuda {

constexpr int decode_warps = 4;
constexpr int decode_threads = 32 * decode_warps;
constexpr int decode_tile = 16; // keys of a warp at once
constexpr int decode_step = decode_warps * decode_tile;

/// What a block of threads is for.
struct DecodeTask {
  int batch_kv_head;
  int batch;
  int kv_head;
  int split;
  int first_row;
  int64_t first_key; // a multiple of 16; places of keys are relative to it
  int begin;         // the split's keys
  int end;
  int common_begin; // those that every query sees
  int common_end;

  /// Blocks that read the same keys are neighbours.
  __device__ DecodeTask(const DecodeSchedule& schedule, int block, int block_rows) {
    const int row_blocks = (schedule.rows + block_rows - 1) / block_rows;
    first_row = block % row_blocks * block_rows;
    split = block / row_blocks % schedule.splits;
    batch_kv_head = block / row_blocks / schedule.splits;
    batch = batch_kv_head / schedule.kv_heads;
    kv_head = batch_kv_head % schedule.kv_heads;
    first_key = schedule.first_key() + int64_t{split} * schedule.split_keys;
    begin = place(schedule.keys.begin, schedule);
    end = place(schedule.keys.end, schedule);
    common_begin = place(schedule.common.begin, schedule);
    common_end = place(schedule.common.end, schedule);
  }

  /// Relative to first_key, held within the split.
  __device__ int place(int64_t key, const DecodeSchedule& schedule) const {
    return static_cast<int>(min(max(key - first_key, int64_t{0}), int64_t{schedule.split_keys}));
  }
};

/// One query of one head.
struct DecodeRow {
  bool there; // rows beyond the last one are computed as the first and see no key
  int head;
  int query;
  int begin; // the keys that it sees
  int end;

  __device__ DecodeRow(
      const AttentionParams& params,
      const DecodeSchedule& schedule,
      const DecodeTask& task,
      int row_of_block) {
    const int row = task.first_row + row_of_block;
    there = row < schedule.rows;
    head = task.kv_head * schedule.group + (there ? row / schedule.queries : 0);
    query = there ? row % schedule.queries : 0;
    const Range seen = params.window.keys_of(query);
    begin = there ? task.place(seen.begin, schedule) : 0;
    end = there ? task.place(seen.end, schedule) : 0;
  }

  __device__ bool sees(int key) const { return begin <= key && key < end; }
};

/// A softmax's reference and sum of weights 2^(score - reference), of what was seen so far. The reference is below all
/// scores at first, then moved to the largest score whenever that is larger by 2^8, which leaves the weights far from
/// overflow.
template <typename Acc>
struct RunningSoftmax {
  Acc reference = std::numeric_limits<Acc>::lowest(); // finite: 2^(-inf - reference) is 0, not NaN
  Acc sum = 0;

  __device__ bool moves(Acc largest) const { return largest > reference + 8; }

  /// Moves the reference if need be. Returns the factor on sums so far.
  __device__ Acc move(Acc largest) {
    if (!moves(largest)) return 1;
    const Acc rescale = exp2_of(reference - largest);
    reference = largest;
    sum *= rescale;
    return rescale;
  }
};

/// Reference and sum of a state. The sum is 0 where no key was seen; the reference means nothing then.
template <typename Acc>
struct alignas(2 * sizeof(Acc)) SoftmaxState {
  Acc reference;
  Acc sum;

  __device__ bool empty() const { return sum == 0; } // a NaN is something
  /// The factor on sums, for a common reference.
  __device__ Acc factor(Acc common) const { return empty() ? Acc(0) : exp2_of(reference - common); }
};

/// 16 bytes.
template <typename Acc>
struct alignas(16) Vector {
  static constexpr int size = 16 / sizeof(Acc);
  Acc x[size];
};

/// Where the states are: first their values, then reference and sum.
template <typename Acc>
struct DecodeStates {
  Acc* values;
  SoftmaxState<Acc>* softmax;
  int width;

  __device__ DecodeStates(const DecodeSchedule& schedule, Acc* workspace)
      : values(workspace),
        softmax(reinterpret_cast<SoftmaxState<Acc>*>(workspace + schedule.states() * schedule.state_width)),
        width(schedule.state_width) {}

  __device__ Vector<Acc>& vector(int64_t state, int64_t feature) const {
    return reinterpret_cast<Vector<Acc>&>(values[state * width + feature]);
  }
};

/// The states of a block's warps, in shared memory.
template <typename Acc, int rows, int width>
struct WarpStates {
  Vector<Acc> values[decode_warps][rows][width / Vector<Acc>::size];
  SoftmaxState<Acc> softmax[decode_warps][rows];

  /// Makes one state of them, in the order of the warps, and stores its features [first, first + width). Vector v of
  /// row r is at values[...][r][place(r, v)]. To be called by all threads, after a barrier.
  template <typename Place>
  __device__ void store(
      const DecodeSchedule& schedule,
      const DecodeTask& task,
      Acc* workspace,
      int first,
      const Place& place) const {
    const DecodeStates<Acc> states(schedule, workspace);
    const int vectors = min(width, schedule.state_width - first) / Vector<Acc>::size;
    for (int row = threadIdx.x / 32; row < rows && task.first_row + row < schedule.rows; row += decode_warps) {
      const int64_t state = schedule.state(task.batch_kv_head, task.first_row + row, task.split);
      Acc reference = -infinity<Acc>();
#pragma unroll
      for (int warp = 0; warp < decode_warps; ++warp) {
        if (!softmax[warp][row].empty()) reference = max(reference, softmax[warp][row].reference);
      }
      Acc factor[decode_warps];
      Acc sum = 0;
#pragma unroll
      for (int warp = 0; warp < decode_warps; ++warp) {
        factor[warp] = softmax[warp][row].factor(reference);
        sum += factor[warp] * softmax[warp][row].sum;
      }
      for (int v = threadIdx.x % 32; v < vectors; v += 32) {
        Vector<Acc> total{};
#pragma unroll
        for (int warp = 0; warp < decode_warps; ++warp) {
          const Vector<Acc> part = values[warp][row][place(row, v)];
#pragma unroll
          for (int i = 0; i < Vector<Acc>::size; ++i) total.x[i] += factor[warp] * part.x[i];
        }
        states.vector(state, first + v * Vector<Acc>::size) = total;
      }
      if (threadIdx.x % 32 == 0 && first == 0) states.softmax[state] = {reference, sum};
    }
  }
};

} // namespace wmha::cuda

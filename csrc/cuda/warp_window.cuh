// Who sees whom, for the rows of a warp's fragments.
#pragma once

#include <type_traits>

#include "../params.h"
#include "tensor_core.cuh"

namespace wmha::cuda {

/// The half-open range [begin, end) of positions, relative to some first one.
struct Places {
  int begin;
  int end;

  __device__ Places() : begin(0), end(0) {}
  __device__ Places(int begin, int end) : begin(begin), end(end) {}
  __device__ Places(const Range& range, int64_t first)
      : Places(static_cast<int>(range.begin - first), static_cast<int>(range.end - first)) {}

  __device__ bool covers(int first, int last) const { return begin <= first && last <= end; }
  __device__ bool holds(int place) const {
    return static_cast<unsigned>(place - begin) < static_cast<unsigned>(end - begin); // one comparison instead of two
  }
  /// Those of another lane.
  __device__ Places of_lane(int lane) const {
    return {__shfl_sync(all_lanes, begin, lane), __shfl_sync(all_lanes, end, lane)};
  }
};

constexpr int group = 16; // positions that are taken at once at the window's edges

/// What a block of threads is for, where it has up to `rows` queries of one head.
template <int rows>
struct QueryBlock {
  int64_t first; // query
  int queries;
  unsigned batch_head;
  unsigned batch;
  unsigned head;
  int64_t kv_head;
  int64_t first_key; // to which places of keys are relative; dropout's counters begin at multiples of 8
  Places keys;       // that at least one of the queries sees

  __device__ explicit QueryBlock(const AttentionParams& params) {
    const auto blocks = static_cast<unsigned>(ceil_div(params.queries, rows));
    first = int64_t{blockIdx.x % blocks} * rows;
    queries = static_cast<int>(min(params.queries - first, int64_t{rows}));
    batch_head = blockIdx.x / blocks;
    batch = batch_head / static_cast<unsigned>(params.heads);
    head = batch_head % static_cast<unsigned>(params.heads);
    kv_head = params.kv_head(head);
    const Range seen = params.window.keys_of(Range{first, first + queries});
    first_key = seen.begin / group * group;
    keys = Places(seen, first_key);
  }
};

/// What up to 32 rows see, whose ranges move in one direction.
template <int lane_rows>
struct RowsSeen {
  Places any; // seen by at least one of the rows
  Places all; // seen by all of them
  Places row[lane_rows];

  /// seen_by(r) is what row r sees, of `rows` rows; the others see nothing. The lane's own rows are first_row + i *
  /// step.
  template <typename SeenBy>
  __device__ RowsSeen(int rows, int first_row, int step, const SeenBy& seen_by) {
    const int lane = threadIdx.x % 32;
    Places own;
    if (lane < rows) own = seen_by(lane);
    const Places first = own.of_lane(0);
    const Places last = own.of_lane(max(rows, 1) - 1);
    any = {first.begin, last.end};
    all = {last.begin, first.end};
#pragma unroll
    for (int i = 0; i < lane_rows; ++i) row[i] = own.of_lane(first_row + i * step);
  }
};

/// Calls attend(place, groups, tests) for what the rows see of the positions [first, first + tile): for all of them at
/// once, without tests, if every row sees every one, else for each group of 16 of which some row sees one.
template <int tile, int lane_rows, typename Attend>
__device__ void for_each_group(const RowsSeen<lane_rows>& seen, int first, const Attend& attend) {
  if (seen.all.covers(first, first + tile)) {
    attend(0, std::integral_constant<int, tile / group>(), std::false_type());
    return;
  }
  const int last = min(seen.any.end - first, tile);
  for (int place = max(seen.any.begin - first, 0) / group * group; place < last; place += group) {
    attend(place, std::integral_constant<int, 1>(), std::true_type());
  }
}

} // namespace wmha::cuda

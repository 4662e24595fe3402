// What the backward and the forward pass sum up for each query of a block: sum[query] = sum over the keys it sees of
// left[key][query] * right[key], outputs of weights and values, grad_query of grad_scores and keys.
#pragma once

#include <algorithm>
#include <cstdint>

#include "packed_keys.h"
#include "rows.h"
#include "schedule.h"
#include "scores.h"
#include "tiles.h"

namespace wmha::cpu::CPU_CAPABILITY {

/// A left operand that lies in columns: element (r, t) at data[t * stride + r].
template <typename M>
struct LeftColumns {
  const M* data;
  int64_t stride;

  M operator()(int r, int64_t t) const { return data[t * stride + r]; }
};

/// A target: sum[r] = factors[r] * sum[r] + product.
template <typename Acc>
struct ScaleAndAddTo {
  RowMajor<Acc> sum;
  const Acc* factors;

  template <int R, int C>
  void start(int64_t vector, Tile<Acc, R, C>& tile) const {
    load_tile<Acc>({sum.data, sum.row_stride}, vector, tile);
    WMHA_UNROLL
    for (int r = 0; r < R; ++r) {
      WMHA_UNROLL
      for (int c = 0; c < C; ++c) tile[r][c] = tile[r][c] * Vec<Acc>(factors[r]);
    }
  }
  template <int R, int C>
  void finish(int64_t vector, Tile<Acc, R, C>& tile) const {
    store_tile<Acc>(tile, sum, vector);
  }
};

template <typename T>
class QuerySums {
  using M = multiplicand_type<T>;
  using Acc = acc_type<T>;

 public:
  QuerySums(int64_t dim, int64_t most_lanes)
      : dim_(dim), width_(whole_columns<M>(dim)), sums_((most_lanes + tile_rows) * width_) {}

  /// All sums are 0. The columns of `left` are `lanes`.
  void start(int64_t lanes) {
    lanes_ = lanes;
    is_empty_ = true;
  }

  /// sum = factors * sum + left^T right, where factors are one for each query, if any. left: [steps(tile)][lanes],
  /// right: the tile's keys in RightForm. Of left and factors, up to tile_rows elements behind the last are read, too.
  template <typename LookAhead>
  void add(
      const Visibility& visibility,
      Range tile,
      const M* left,
      RowMajor<const M> right,
      LookAhead& ahead,
      const Acc* factors = nullptr) {
    const int64_t vectors = width_ / Vec<Acc>::size();
    const int64_t rows = sum_rows(vectors);
    for (int64_t lane = 0; lane < lanes_; lane += rows) {
      ahead.fetch();
      const Range seen = visibility.of_queries(lane, lane + rows, tile);
      const Range depth = steps<M>(Range{seen.begin - tile.begin, seen.end - tile.begin});
      const LeftColumns<M> columns{left + depth.begin * lanes_ + lane, lanes_};
      const RowMajor<const M> seen_right{right.row(depth.begin), right.row_stride};
      const RowMajor<Acc> sums{sums_ + lane * width_, width_};
      if (is_empty_) {
        multiply_sums<M>(vectors, depth.size(), columns, seen_right, StoreTo<Acc>{sums});
      } else if (factors != nullptr) {
        multiply_sums<M>(vectors, depth.size(), columns, seen_right, ScaleAndAddTo<Acc>{sums, factors + lane});
      } else {
        multiply_sums<M>(vectors, depth.size(), columns, seen_right, AddTo<Acc>{sums});
      }
    }
    is_empty_ = false;
  }

  /// Rows of `target` become the sums of `count` queries, times their factors, if any.
  void store(int64_t count, T* target, int64_t stride, const Acc* factors = nullptr) const {
    if (is_empty_) std::fill_n(sums_.data(), count * width_, Acc(0));
    for (int64_t i = 0; i < count; ++i) {
      store_row(sums_ + i * width_, dim_, factors == nullptr ? Acc(1) : factors[i], target + i * stride);
    }
  }

 private:
  const int64_t dim_;
  const int64_t width_;
  Buffer<Acc> sums_; // [lanes + tile_rows][width]
  int64_t lanes_ = 0;
  bool is_empty_ = true; // no sum has been stored yet
};

} // namespace wmha::cpu::CPU_CAPABILITY

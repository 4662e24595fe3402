// What the backward and the forward pass sum up for each query of a block: sum[query] = sum over the keys it sees of
// left[key][query] * right[key], outputs of weights and values, grad_query of grad_scores and keys.
#pragma once

#include <algorithm>
#include <cstdint>

#include "rows.h"
#include "schedule.h"
#include "scores.h"
#include "tiles.h"

namespace wmha::cpu::CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AMX)

/// The sums lie as right^T left, queries in columns, since the left operand of a register has neighbouring terms, here
/// keys, in a row.
template <typename T>
class QuerySums {
  using M = multiplicand_type<T>;

 public:
  explicit QuerySums(int64_t dim)
      : dim_(dim),
        width_(whole_columns<M>(dim)),
        sums_(width_ * query_block),
        rows_(query_block * width_),
        right_columns_(width_ * steps<M>(key_block)) {}

  /// All sums become 0. The columns of `left` are `lanes`, whole tiles.
  void start(int64_t lanes) {
    lanes_ = lanes;
    empty_ = true;
    std::fill_n(sums_.data(), width_ * lanes_, 0.0f);
  }

  /// sum = factors * sum + left^T right, where factors are one for each query, if any. left: [steps(tile)][lanes].
  void add(
      const Visibility& visibility,
      Range tile,
      const M* left,
      RowMajor<const M> right,
      const float* factors = nullptr) {
    if (factors != nullptr && !empty_) scale(factors);
    empty_ = false;
    const int64_t stride = steps<M>(tile.size());
    pack_columns(right, stride, dim_, stride, 1.0f, right_columns_);
    for (int64_t lane = 0; lane < lanes_; lane += Multiplicand<M>::columns) {
      const Range columns{lane / Vec<float>::size(), (lane + Multiplicand<M>::columns) / Vec<float>::size()};
      const Range seen = visibility.of_queries(lane, lane + Multiplicand<M>::columns, tile);
      const Range depth = steps<M>(Range{seen.begin - tile.begin, seen.end - tile.begin});
      for (int64_t d = 0; d < dim_; d += tile_rows) {
        const LeftRows<M> features({right_columns_ + d * stride + depth.begin, stride}, tile_rows);
        const AddTo<float> target{{sums_ + d * lanes_, lanes_}};
        multiply<M>(columns.begin, columns.end, depth.size(), features, {left + depth.begin * lanes_, lanes_}, target);
      }
    }
  }

  /// The sums, a row for each query.
  RowMajor<const float> rows() {
    at::vec::transpose_mxn<float>(sums_, lanes_, rows_, width_, static_cast<int>(dim_), static_cast<int>(lanes_));
    return {rows_, width_};
  }

 private:
  void scale(const float* factors) {
    for (int64_t d = 0; d < dim_; ++d) {
      for (int64_t lane = 0; lane < lanes_; lane += Vec<float>::size()) {
        float* place = sums_ + d * lanes_ + lane;
        (Vec<float>::loadu(place) * Vec<float>::loadu(factors + lane)).store(place);
      }
    }
  }

  const int64_t dim_;
  const int64_t width_;
  Buffer<float> sums_;      // [width][lanes]
  Buffer<float> rows_;      // [query_block][width]
  Buffer<M> right_columns_; // [width][steps(tile)]
  int64_t lanes_ = 0;
  bool empty_ = true;
};

#else

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

  template <int C>
  void start(int64_t vector, Tile<Acc, C>& tile) const {
    load_tile<Acc>({sum.data, sum.row_stride}, vector, tile);
    WMHA_UNROLL
    for (int r = 0; r < tile_rows; ++r) {
      WMHA_UNROLL
      for (int c = 0; c < C; ++c) tile[r][c] = tile[r][c] * Vec<Acc>(factors[r]);
    }
  }
  template <int C>
  void finish(int64_t vector, Tile<Acc, C>& tile) const {
    store_tile<Acc>(tile, sum, vector);
  }
};

template <typename T>
class QuerySums {
  using M = multiplicand_type<T>;
  using Acc = acc_type<T>;

 public:
  explicit QuerySums(int64_t dim) : width_(whole_columns<M>(dim)), sums_(query_block * width_) {}

  /// All sums become 0. The columns of `left` are `lanes`, whole tiles.
  void start(int64_t lanes) {
    lanes_ = lanes;
    std::fill_n(sums_.data(), lanes * width_, Acc(0));
  }

  /// sum = factors * sum + left^T right, where factors are one for each query, if any. left: [steps(tile)][lanes].
  void add(
      const Visibility& visibility,
      Range tile,
      const M* left,
      RowMajor<const M> right,
      const Acc* factors = nullptr) {
    for (int64_t lane = 0; lane < lanes_; lane += tile_rows) {
      const Range seen = visibility.of_queries(lane, lane + tile_rows, tile);
      const Range depth = steps<M>(Range{seen.begin - tile.begin, seen.end - tile.begin});
      const LeftColumns<M> columns{left + depth.begin * lanes_ + lane, lanes_};
      const RowMajor<const M> rows{right.row(depth.begin), right.row_stride};
      const RowMajor<Acc> sums{sums_ + lane * width_, width_};
      if (factors != nullptr) {
        multiply<M>(
            0, width_ / Vec<Acc>::size(), depth.size(), columns, rows, ScaleAndAddTo<Acc>{sums, factors + lane});
      } else {
        multiply<M>(0, width_ / Vec<Acc>::size(), depth.size(), columns, rows, AddTo<Acc>{sums});
      }
    }
  }

  /// The sums, a row for each query.
  RowMajor<const Acc> rows() const { return {sums_, width_}; }

 private:
  const int64_t width_;
  Buffer<Acc> sums_; // [query_block][width]
  int64_t lanes_ = 0;
};

#endif

} // namespace wmha::cpu::CPU_CAPABILITY

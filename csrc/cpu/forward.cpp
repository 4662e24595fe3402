// The forward pass: softmax over the window, tile by tile (Milakov, Gimelshein: Online normalizer calculation for
// softmax, 2018), for a block of queries at a time.
//
//            a block of queries (lanes)
//          +------------------+
//          |  S^T = K Q^T     |   a tile of keys at a time:
//   keys   |  P^T = 2^(S - r) |   exponentials and their sum run down the columns;
//          +------------------+   then output[query] += P[query][key] * value[key]
//
// The reference r of a query need not be the largest of its scores, only near enough that nothing over- or underflows.
// It is a guess that a tile's sum of weights confirms; else it moves to the tile's largest score, rounded to a whole
// number, so that what is rescaled stays exact, and the tile's weights are made again.
//
// At the window's edges a tile is cut to the queries and keys that see each other: S in steps of tile_rows keys and one
// vector of queries, P V in steps of tile_rows queries and single keys.
#include "passes.h"

#include <cmath>

#include "columns.h"
#include "dropout.h"
#include "look_ahead.h"
#include "query_sums.h"
#include "rows.h"
#include "scores.h"
#include "tiles.h"

namespace wmha::cpu::CPU_CAPABILITY {
namespace {

template <typename T>
class ForwardBlock {
  using M = multiplicand_type<T>;
  using Acc = acc_type<T>;
  static constexpr int64_t terms = Multiplicand<M>::terms;
  static constexpr int64_t vector = Vec<Acc>::size();
  static constexpr Acc infinity = std::numeric_limits<Acc>::infinity();
  // A reference is near enough while no tile's sum of weights is larger than this, and the first one's isn't smaller
  // than its inverse: fp32 reaches from 2^-126 to 2^128, which leaves room for many keys and large values.
  static constexpr Acc largest_sum = 1 << 20;
  static constexpr Acc smallest_first_sum = 1 / largest_sum;

 public:
  explicit ForwardBlock(const AttentionParams& params)
      : params_(params),
        most_lanes_(whole_columns<M>(std::min(query_block, params.queries))),
        most_keys_(most_keys_of_block(params)),
        packed_query_(steps<M>(params.key_dim) * most_lanes_),
        output_(params.value_dim, most_lanes_),
        products_(round_up(std::min(key_block, most_keys_), tile_rows) * most_lanes_),
        weights_((steps<M>(std::min(key_block, most_keys_)) + 1) * most_lanes_),
        query_rows_(most_lanes_ * left_width<M>(params.key_dim)),
        keys_(params.key_dim, most_keys_, params.keys()),
        values_(params.value_dim, most_keys_, params.keys()) {}

  void run(int64_t batch, int64_t head, Range block) {
    lanes_ = whole_columns<M>(block.size());
    const ScoreTransform<M> transform(params_, head);
    const Visibility visibility(params_.window, block, lanes_);
    const auto queries = left_rows<M>(rows_of<T>(params_.query, batch, head, block, params_.key_dim), query_rows_);
    pack_columns(queries, block.size(), steps<M>(params_.key_dim), lanes_, transform.factor, packed_query_);
    output_.start(lanes_);
    std::fill_n(reference_, lanes_, Acc(0));
    std::fill_n(sum_, lanes_, Acc(0));

    DropoutLanes<Acc> dropout(params_, batch * params_.heads + head);
    const Range keys = params_.window.keys_of(block);
    const int64_t calls =
        ceil_div(keys.size(), tile_rows) + ceil_div(keys.size(), key_block) * ceil_div(lanes_, tile_rows);
    LookAhead<T, 4> ahead(params_, batch, head, block, keys, calls);
    for (int64_t begin = keys.begin; begin < keys.end; begin += key_block) {
      const Range tile{begin, std::min(begin + key_block, keys.end)};
      const auto key_rows = keys_.of(params_.key, batch, params_.kv_head(head), tile, keys);
      const TileMask<Acc> mask(visibility, tile);
      multiply_tile(key_rows, visibility, tile, ahead);
      std::fill(rescale_, std::end(rescale_), Acc(1));
      rescales_ = false;
      with_flags(
          [&](auto drops, auto capped) {
            compute_weights<drops, capped>(transform, visibility, mask, tile, block.begin, dropout);
          },
          params_.dropout.enabled(), transform.cap > 0);
      const auto values = values_.of(params_.value, batch, params_.kv_head(head), tile, keys);
      output_.add(visibility, tile, weights_, values, ahead, rescales_ ? rescale_ : nullptr);
    }
    store(batch, head, visibility, block);
  }

 private:
  /// products_ become those of the tile's keys and the queries that see them, in whole groups and vectors.
  void multiply_tile(RowMajor<const M> keys, const Visibility& visibility, Range tile, LookAhead<T, 4>& ahead) {
    Range seeing{0, 0};
    for (int64_t key = tile.begin; key < tile.end; key += tile_rows) {
      const Range group{key, std::min(key + tile_rows, tile.end)};
      seeing = visibility.of_keys(group, seeing);
      const Range lanes = whole_columns<M>(seeing);
      const int64_t row = key - tile.begin;
      const LeftRows<M> left({keys.row(row), keys.row_stride}, group.size());
      const StoreTo<Acc> target{{products_ + row * lanes_, lanes_}};
      multiply<M>(
          lanes.begin / vector, lanes.end / vector, steps<M>(params_.key_dim), left, {packed_query_, lanes_}, target);
      ahead.fetch();
    }
  }

  /// From the tile's products to weights 2^(score - reference), and to their sums.
  template <bool drops, bool capped>
  void compute_weights(
      const ScoreTransform<M>& transform,
      const Visibility& visibility,
      const TileMask<Acc>& mask,
      Range tile,
      int64_t first_query,
      DropoutLanes<Acc>& dropout) {
    const Vec<Acc> last_row(static_cast<Acc>(tile.size() - 1));
    const bool all_see = visibility.all_see({tile.begin, tile.begin + whole_terms<M>(tile.size())}, {0, lanes_});
    const int64_t row_stride = lanes_; // the compiler can't know that no store changes the member
    for (int64_t lane = 0; lane < lanes_; lane += vector) {
      const auto product = [&](int64_t row) { return Vec<Acc>::loadu(products_ + row * row_stride + lane); };
      Range range = steps<M>(Range{0, tile.size()}); // at least one query sees these
      Range whole = range;                           // and all queries these
      if (!all_see) {
        const Range by_one = visibility.of_queries(lane, lane + vector, tile);
        range = steps<M>(Range{by_one.begin - tile.begin, by_one.end - tile.begin});
        clear_outside(range, steps<M>(tile.size()), lane);
        if (range.size() == 0) continue;
        const Range by_all = visibility.of_all_queries(lane, lane + vector, tile);
        whole.begin = std::clamp(ceil_div(by_all.begin - tile.begin, terms), range.begin, range.end);
        whole.end = std::clamp((by_all.end - tile.begin) / terms, whole.begin, range.end);
      }
      Vec<Acc> sum;
      for (;;) {
        const Vec<Acc> reference = Vec<Acc>::loadu(reference_ + lane);
        sum = Vec<Acc>(Acc(0));
        const auto weigh = [&](auto masked, int64_t begin, int64_t end) {
          Vec<Acc> place(static_cast<Acc>(begin * terms)); // the row, in all lanes
          for (int64_t step = begin; step < end; ++step) {
            Vec<Acc> weights[terms];
            WMHA_UNROLL
            for (int64_t term = 0; term < terms; ++term) {
              const int64_t row = step * terms + term;
              Vec<Acc> score = transform.template score<capped>(product(row));
              if constexpr (masked) {
                score = mask.seen(place, lane).select(score, Vec<Acc>(-infinity));
                place = place + Vec<Acc>(Acc(1));
              }
              weights[term] = exp2(score - reference);
              sum = sum + weights[term];
              if constexpr (drops) {
                const int64_t key = tile.begin + row;
                if (row == range.begin * terms || key % Dropout::group == 0) dropout.draw(key, first_query + lane);
                weights[term] = dropout.keep(weights[term], key);
              }
            }
            Multiplicand<M>::store(weights, weights_ + step * row_stride + lane);
          }
        };
        weigh(std::true_type(), range.begin, whole.begin);
        weigh(std::false_type(), whole.begin, whole.end);
        weigh(std::true_type(), whole.end, range.end);
        const Vec<Acc> one(Acc(1));
        const Vec<Acc> seen_sum = all_see ? sum : mask.any_seen(Vec<Acc>(Acc(0)), last_row, lane).select(sum, one);
        const Vec<Acc> far = far_from_reference(seen_sum, lane);
        if (!any(far)) break;
        Vec<Acc> largest(-infinity);
        for (int64_t row = range.begin * terms; row < range.end * terms; ++row) {
          const Vec<Acc> score = transform.template score<capped>(product(row));
          const Vec<Acc> place(static_cast<Acc>(row));
          largest = larger(mask.seen(place, lane).select(score, Vec<Acc>(-infinity)), largest);
        }
        const Vec<Acc> moves = far & (largest > Vec<Acc>(-infinity));
        if (!any(moves)) break;
        move_references(lane, Vec<Acc>::blendv(reference, largest.ceil(), moves));
      }
      (Vec<Acc>::loadu(sum_ + lane) + sum).store(sum_ + lane);
    }
  }

  /// Of all `steps`, a vector of queries sees no keys but in `range`.
  void clear_outside(Range range, int64_t steps, int64_t lane) {
    const int64_t row_stride = lanes_;
    const auto clear = [&](int64_t step) { std::fill_n(weights_ + step * row_stride + lane, vector, M{}); };
    for (int64_t step = 0; step < range.begin; ++step) clear(step);
    for (int64_t step = range.end; step < steps; ++step) clear(step);
  }

  /// Of a vector of queries, those for which a tile's sum of weights is too large, or is the first and too small.
  Vec<Acc> far_from_reference(Vec<Acc> sum, int64_t lane) const {
    const Vec<Acc> is_first = Vec<Acc>::loadu(sum_ + lane) == Vec<Acc>(Acc(0));
    return (sum > Vec<Acc>(largest_sum)) | (is_first & (sum < Vec<Acc>(smallest_first_sum)));
  }

  /// Moves the references of a vector of queries, and with them what was summed up under the old ones.
  void move_references(int64_t lane, Vec<Acc> next) {
    const Vec<Acc> sum = Vec<Acc>::loadu(sum_ + lane);
    const Vec<Acc> moved = exp2(Vec<Acc>::loadu(reference_ + lane) - next);
    const Vec<Acc> factor = Vec<Acc>::blendv(moved, Vec<Acc>(Acc(1)), sum == Vec<Acc>(Acc(0))); // not infinity times 0
    next.store(reference_ + lane);
    (sum * factor).store(sum_ + lane);
    (Vec<Acc>::loadu(rescale_ + lane) * factor).store(rescale_ + lane);
    rescales_ = true;
  }

  void store(int64_t batch, int64_t head, const Visibility& visibility, Range block) {
    const auto inverse_keep = static_cast<Acc>(params_.dropout.inverse_keep);
    Acc* logsumexp =
        static_cast<Acc*>(params_.logsumexp) + (batch * params_.heads + head) * params_.queries + block.begin;
    for (int64_t lane = 0; lane < lanes_; lane += vector) {
      const Vec<Acc> reference = Vec<Acc>::loadu(reference_ + lane);
      logsumexp_of(Vec<Acc>::loadu(sum_ + lane), reference).store(logsumexp_ + lane);
    }
    for (int64_t i = 0; i < block.size(); ++i) {
      const bool sees_none = visibility.keys[i].size() == 0;
      logsumexp[i] = sees_none ? -infinity : logsumexp_[i];
      sum_[i] = sees_none ? Acc(0) : inverse_keep / sum_[i];
    }
    output_.store(block.size(), at<T>(params_.output, batch, head, block.begin), params_.output.position_stride, sum_);
  }

  const AttentionParams& params_;
  const int64_t most_lanes_; // of a block
  const int64_t most_keys_;
  Buffer<M> packed_query_; // [steps(key_dim)][lanes]
  QuerySums<T> output_;
  Buffer<Acc> products_; // [tile][lanes]
  Buffer<M> weights_;    // [steps(tile) + 1][lanes]
  Buffer<M> query_rows_; // [lanes][left_width(key_dim)]
  PackedKeys<T, LeftForm<T>> keys_;
  PackedKeys<T, RightForm<T>> values_;
  int64_t lanes_ = 0; // queries of this block, in whole vectors
  alignas(64) Acc reference_[query_block];
  Acc sum_[query_block];
  Acc rescale_[query_block + tile_rows]; // factors for the outputs, before the tile's share is added
  bool rescales_ = false;                // one of them isn't 1
  Acc logsumexp_[query_block];
};

} // namespace

void forward(const AttentionParams& params, Tasks& tasks) {
  with_scalar_type(params.dtype, [&](auto type) {
    ForwardBlock<decltype(type)> block(params);
    for_blocks(params, tasks, query_block, /*most_blocks=*/1, [&](int64_t batch, int64_t head, Range queries) {
      block.run(batch, head, queries);
    });
  });
}

} // namespace wmha::cpu::CPU_CAPABILITY

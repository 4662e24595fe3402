// The forward pass: softmax over the window, tile by tile (Milakov, Gimelshein: Online normalizer calculation for
// softmax, 2018), for a block of queries at a time.
//
//            a block of queries (lanes)
//          +------------------+
//          |  S^T = K Q^T     |   the row maximum is taken while the products are still in registers; then
//   keys   |  P^T = 2^S^T     |   exponentials and their sum run down the columns;
//          +------------------+   then output[query] += P[query][key] * value[key]
//
// At the window's edges a tile is cut to the queries and keys that see each other: S in steps of tile_rows keys and one
// vector of queries, P V in steps of tile_rows queries and single keys.
#include "passes.h"

#include <cmath>

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
  static constexpr bool weights_in_place = std::is_same_v<M, Acc>; // each one takes the place of its score

 public:
  explicit ForwardBlock(const AttentionParams& params)
      : params_(params),
        packed_query_(steps<M>(params.key_dim) * query_block),
        output_(params.value_dim),
        scores_(key_block * query_block),
        own_weights_(weights_in_place ? 0 : key_block * query_block),
        weights_(weights_in_place ? reinterpret_cast<M*>(static_cast<Acc*>(scores_)) : own_weights_),
        query_rows_(query_block * left_width<M>(params.key_dim)),
        most_keys_(most_keys_of_block(params)),
        keys_(params.key_dim, most_keys_, params.keys()),
        values_(params.value_dim, most_keys_, params.keys()) {}

  void run(int64_t batch, int64_t head, Range block) {
    lanes_ = whole_columns<M>(block.size());
    const ScoreTransform<M> transform(params_, head);
    const Visibility visibility(params_.window, block);
    const auto queries = left_rows<M>(rows_of<T>(params_.query, batch, head, block, params_.key_dim), query_rows_);
    pack_columns(queries, block.size(), steps<M>(params_.key_dim), lanes_, transform.factor, packed_query_);
    output_.start(lanes_);
    std::fill_n(maximum_, lanes_, -infinity);
    std::fill_n(reference_, lanes_, -infinity);
    std::fill_n(sum_, lanes_, Acc(0));

    DropoutLanes<Acc> dropout(params_, batch * params_.heads + head);
    const Range keys = params_.window.keys_of(block);
    LookAhead<T> ahead(params_, batch, head, block, keys);
    for (int64_t begin = keys.begin; begin < keys.end; begin += key_block) {
      const Range tile{begin, std::min(begin + key_block, keys.end)};
      compute_scores(batch, head, transform, visibility, tile, ahead);
      with_flags(
          [&](auto drops) { compute_weights<drops>(visibility, tile, block.begin, dropout); },
          params_.dropout.enabled());
      add_values(batch, head, visibility, tile);
    }
    store(batch, head, visibility, block);
  }

 private:
  /// scores_ of the keys and queries of the tile that see each other, in whole groups and vectors; maximum_.
  void compute_scores(
      int64_t batch,
      int64_t head,
      const ScoreTransform<M>& transform,
      const Visibility& visibility,
      Range tile,
      LookAhead<T>& ahead) {
    const auto keys = keys_.of(params_.key, batch, params_.kv_head(head), tile, visibility.keys[0].begin);
    const TileMask<Acc> mask(visibility, tile);
    const int64_t depth = steps<M>(params_.key_dim);
    Range seeing{0, 0};
    for (int64_t key = tile.begin; key < tile.end; key += tile_rows) {
      const Range group{key, std::min(key + tile_rows, tile.end)};
      ahead.fetch();
      seeing = visibility.of_keys(group, seeing);
      const Range lanes = whole_columns<M>(seeing);
      const LeftRows<M> left({keys.row(key - tile.begin), keys.row_stride}, group.size());
      const RowMajor<Acc> scores{scores_ + (key - tile.begin) * lanes_, lanes_};
      const Range whole{key, key + whole_terms<M>(group.size())};
      if (transform.cap > 0 || !visibility.all_see(whole, lanes)) {
        const StoreTo<Acc> target{scores};
        multiply<M>(lanes.begin / vector, lanes.end / vector, depth, left, {packed_query_, lanes_}, target);
        with_mask<Acc>(visibility, whole, lanes, [&](auto masked, Range lanes) {
          with_flags(
              [&](auto capped) {
                finish_scores<masked, capped>(transform, mask, scores, key - tile.begin, whole.size(), lanes);
              },
              transform.cap > 0);
        });
      } else {
        const StoreScores<M> target{scores, maximum_, transform.factor};
        multiply<M>(lanes.begin / vector, lanes.end / vector, depth, left, {packed_query_, lanes_}, target);
      }
    }
  }

  /// From products to scores, the unseen ones -inf, and to maximum_. `first` is relative to the tile.
  template <bool masked, bool capped>
  void finish_scores(
      const ScoreTransform<M>& transform,
      const TileMask<Acc>& mask,
      RowMajor<Acc> scores,
      int64_t first,
      int64_t keys,
      Range lanes) {
    for (int64_t lane = lanes.begin; lane < lanes.end; lane += vector) {
      Vec<Acc> largest = Vec<Acc>::loadu(maximum_ + lane);
      for (int64_t key = 0; key < keys; ++key) {
        Acc* place = scores.row(key) + lane;
        Vec<Acc> score = transform.template score<capped>(Vec<Acc>::loadu(place));
        if constexpr (masked) score = mask.seen(first + key, lane).select(score, Vec<Acc>(-infinity));
        largest = larger(score, largest);
        score.store(place);
      }
      largest.store(maximum_ + lane);
    }
  }

  /// From scores to weights 2^(score - reference), and to their sums. The reference is the largest score so far;
  /// rescale_ becomes the factor for what was summed up under the one before.
  template <bool drops>
  void compute_weights(const Visibility& visibility, Range tile, int64_t first_query, DropoutLanes<Acc>& dropout) {
    for (int64_t lane = 0; lane < lanes_; lane += vector) {
      const Range columns = whole_columns<M>(Range{lane, lane + 1});
      const Range seen = visibility.of_queries(columns.begin, columns.end, tile);
      const Vec<Acc> maximum = Vec<Acc>::loadu(maximum_ + lane);
      // A query that has seen no key yet: any finite reference keeps 2^(-inf - reference) = 0.
      const Vec<Acc> reference = Vec<Acc>::blendv(maximum, Vec<Acc>(Acc(0)), maximum == Vec<Acc>(-infinity));
      const Vec<Acc> rescale = exp2(Vec<Acc>::loadu(reference_ + lane) - reference);
      Vec<Acc> sum = Vec<Acc>::loadu(sum_ + lane) * rescale;
      const Range range = steps<M>(Range{seen.begin - tile.begin, seen.end - tile.begin});
      for (int64_t step = range.begin; step < range.end; ++step) {
        Vec<Acc> weights[terms];
        WMHA_UNROLL
        for (int64_t term = 0; term < terms; ++term) {
          const int64_t row = step * terms + term;
          weights[term] = exp2(Vec<Acc>::loadu(scores_ + row * lanes_ + lane) - reference);
          sum = sum + weights[term];
          if constexpr (drops) {
            const int64_t key = tile.begin + row;
            if (row == range.begin * terms || key % Dropout::group == 0) dropout.draw(key, first_query + lane);
            weights[term] = dropout.keep(weights[term], key);
          }
        }
        Multiplicand<M>::store(weights, weights_ + step * lanes_ + lane);
      }
      reference.store(reference_ + lane);
      sum.store(sum_ + lane);
      rescale.store(rescale_ + lane);
    }
  }

  /// output = rescale * output + sum over keys of weight * value
  void add_values(int64_t batch, int64_t head, const Visibility& visibility, Range tile) {
    const auto values = values_.of(params_.value, batch, params_.kv_head(head), tile, visibility.keys[0].begin);
    output_.add(visibility, tile, weights_, values, rescale_);
  }

  void store(int64_t batch, int64_t head, const Visibility& visibility, Range block) {
    const auto inverse_keep = static_cast<Acc>(params_.dropout.inverse_keep);
    Acc* logsumexp =
        static_cast<Acc*>(params_.logsumexp) + (batch * params_.heads + head) * params_.queries + block.begin;
    for (int64_t lane = 0; lane < lanes_; lane += vector) {
      const Vec<Acc> log = Vec<Acc>::loadu(sum_ + lane).log2() + Vec<Acc>::loadu(reference_ + lane);
      const Vec<Acc> natural = log * Vec<Acc>(static_cast<Acc>(ln_of_2));
      natural.store(logsumexp_ + lane);
    }
    for (int64_t i = 0; i < block.size(); ++i) {
      const bool sees_none = visibility.keys[i].size() == 0;
      logsumexp[i] = sees_none ? -infinity : logsumexp_[i];
      sum_[i] = sees_none ? Acc(0) : inverse_keep / sum_[i];
    }
    output_.store(sum_, block.size(), at<T>(params_.output, batch, head, block.begin), params_.output.position_stride);
  }

  const AttentionParams& params_;
  [[no_unique_address]] TileRegisters tile_registers_;
  Buffer<M> packed_query_; // [steps(key_dim)][lanes]
  QuerySums<T> output_;
  Buffer<Acc> scores_;      // [key_block][lanes]
  Buffer<M> own_weights_;   // unless they are in place
  M* const weights_;        // [steps(key_block)][lanes]
  Buffer<M> query_rows_;    // [query_block][left_width(key_dim)]
  const int64_t most_keys_; // of a block
  PackedKeys<T, LeftForm<T>> keys_;
  PackedKeys<T, RightForm<T>> values_;
  int64_t lanes_ = 0; // queries of this block, in whole vectors
  alignas(64) Acc maximum_[query_block];
  Acc reference_[query_block];
  Acc sum_[query_block];
  Acc rescale_[query_block];
  Acc logsumexp_[query_block];
};

} // namespace

void forward(const AttentionParams& params, Tasks& tasks) {
  with_scalar_type(params.dtype, [&](auto type) {
    ForwardBlock<decltype(type)> block(params);
    const int64_t tasks_of_head = ceil_div(params.queries, task_queries);
    for (Range run = tasks.take(); run.size() > 0; run = tasks.take()) {
      for (int64_t task = run.begin; task < run.end; ++task) {
        const int64_t batch_head = task / tasks_of_head;
        const int64_t begin = task % tasks_of_head * task_queries;
        const int64_t end = std::min(begin + task_queries, params.queries);
        for (int64_t first = begin; first < end; first += query_block) {
          const Range queries{first, std::min(first + query_block, end)};
          block.run(batch_head / params.heads, batch_head % params.heads, queries);
        }
      }
    }
  });
}

} // namespace wmha::cpu::CPU_CAPABILITY

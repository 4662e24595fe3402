// The forward pass: softmax over the window, tile by tile (Milakov, Gimelshein: Online normalizer
// calculation for softmax, 2018), for a block of queries at a time.
//
//            48 queries (lanes)
//          +------------------+
//    64    |  S^T = K Q^T     |   row maximum, exp and sum run down the columns;
//   keys   |  P^T = exp(S^T)  |   then output[query] += P[query][key] * value[key]
//          +------------------+
#include "passes.h"

#include <cmath>

#include "rows.h"
#include "scores.h"
#include "tiles.h"

namespace wmha::cpu::CPU_CAPABILITY {
namespace {

template <typename T>
class ForwardBlock {
  using Acc = acc_type<T>;
  using Vec = at::vec::Vectorized<Acc>;
  static constexpr Acc infinity = std::numeric_limits<Acc>::infinity();

 public:
  explicit ForwardBlock(const AttentionParams& params)
      : params_(params),
        key_width_(padded<Acc>(params.key_dim)),
        value_width_(padded<Acc>(params.value_dim)),
        scratch_(
            Scratch<Acc>::rounded(params.key_dim * query_block) + Scratch<Acc>::rounded(query_block * value_width_) +
            2 * Scratch<Acc>::rounded(key_block * query_block) + Scratch<Acc>::rounded(query_block * key_width_) +
            Scratch<Acc>::rounded(key_block * key_width_) + Scratch<Acc>::rounded(key_block * value_width_)),
        packed_query_(scratch_.take(params.key_dim * query_block)),
        output_(scratch_.take(query_block * value_width_)),
        scores_(scratch_.take(key_block * query_block)),
        factors_(scratch_.take(key_block * query_block)),
        query_rows_(scratch_.take(query_block * key_width_)),
        key_rows_(scratch_.take(key_block * key_width_)),
        value_rows_(scratch_.take(key_block * value_width_)) {}

  void run(int64_t batch, int64_t head, Range block) {
    lanes_ = padded<Acc>(block.size());
    const ScoreTransform<Acc> transform(params_, head);
    const Visibility visibility(params_.window, block);
    const auto queries = load_rows(
        at<T>(params_.query, batch, head, block.begin), params_.query.position_stride, block.size(), params_.key_dim,
        query_rows_);
    pack_columns(queries, block.size(), params_.key_dim, lanes_, packed_query_);
    std::fill_n(output_, lanes_ * value_width_, Acc(0));
    std::fill_n(maximum_, lanes_, -infinity);
    std::fill_n(sum_, lanes_, Acc(0));

    const Range keys = params_.window.keys_of(block);
    for (int64_t begin = keys.begin; begin < keys.end; begin += key_block) {
      const Range tile{begin, std::min(begin + key_block, keys.end)};
      multiply_queries(batch, head, tile);
      update_softmax(transform, TileMask<Acc>(visibility, tile), tile.size());
      if (params_.dropout.enabled()) drop(batch * params_.heads + head, block.begin, tile);
      add_values(batch, head, visibility, tile);
    }
    store(batch, head, block);
  }

 private:
  /// scores_[key][lane] = <k, q>
  void multiply_queries(int64_t batch, int64_t head, Range tile) {
    const auto key = at<T>(params_.key, batch, params_.kv_head(head), tile.begin);
    const auto rows = load_rows(key, params_.key.position_stride, tile.size(), params_.key_dim, key_rows_);
    multiply<Acc>(
        tile.size(), lanes_, params_.key_dim, {rows.data, rows.row_stride, 1}, {packed_query_, lanes_},
        {scores_, lanes_}, false);
  }

  /// From products to weights exp(z - maximum); moves maximum_ and sum_, and leaves in rescale_ the factor for what was
  /// summed up under the old maximum.
  void update_softmax(const ScoreTransform<Acc>& transform, const TileMask<Acc>& mask, int64_t keys) {
    for (int64_t lane = 0; lane < lanes_; lane += Vec::size()) {
      const Vec old_maximum = Vec::loadu(maximum_ + lane);
      Vec maximum = old_maximum;
      for (int64_t key = 0; key < keys; ++key) {
        Acc* score = scores_ + key * lanes_ + lane;
        const Vec z = mask.select(transform(Vec::loadu(score)), Vec(-infinity), key, lane);
        maximum = at::vec::maximum(maximum, z);
        z.store(score);
      }
      // A query that has seen no key yet: any finite reference keeps exp(-inf - reference) = 0.
      const Vec reference = Vec::blendv(maximum, Vec(Acc(0)), maximum == Vec(-infinity));
      const Vec rescale = exponential(old_maximum - reference);
      Vec sum = Vec::loadu(sum_ + lane) * rescale;
      for (int64_t key = 0; key < keys; ++key) {
        Acc* score = scores_ + key * lanes_ + lane;
        const Vec weight = exponential(Vec::loadu(score) - reference);
        sum = sum + weight;
        weight.store(score);
      }
      maximum.store(maximum_ + lane);
      sum.store(sum_ + lane);
      rescale.store(rescale_ + lane);
    }
  }

  void drop(int64_t batch_head, int64_t first_query, Range tile) {
    dropout_factors(params_, batch_head, first_query, tile, lanes_, factors_);
    for (int64_t i = 0; i < tile.size() * lanes_; i += Vec::size()) {
      (Vec::loadu(scores_ + i) * Vec::loadu(factors_ + i)).store(scores_ + i);
    }
  }

  /// output_[lane] = rescale_[lane] * output_[lane] + sum over keys of weight * value
  void add_values(int64_t batch, int64_t head, const Visibility& visibility, Range tile) {
    const auto value = at<T>(params_.value, batch, params_.kv_head(head), tile.begin);
    const auto rows = load_rows(value, params_.value.position_stride, tile.size(), params_.value_dim, value_rows_);
    for (int64_t lane = 0; lane < lanes_; ++lane) {
      if (rescale_[lane] == Acc(1)) continue;
      Acc* output = output_ + lane * value_width_;
      for (int64_t d = 0; d < value_width_; d += Vec::size()) {
        (Vec::loadu(output + d) * Vec(rescale_[lane])).store(output + d);
      }
    }
    for (int64_t lane = 0; lane < lanes_; lane += tile_rows) {
      const Range seen = visibility.of_queries(lane, lane + tile_rows, tile);
      const int64_t skipped = seen.begin - tile.begin;
      multiply<Acc>(
          std::min<int64_t>(tile_rows, lanes_ - lane), value_width_, seen.size(),
          {scores_ + skipped * lanes_ + lane, 1, lanes_}, {rows.row(skipped), rows.row_stride},
          {output_ + lane * value_width_, value_width_}, true);
    }
  }

  void store(int64_t batch, int64_t head, Range block) {
    const auto output = at<T>(params_.output, batch, head, block.begin);
    Acc* logsumexp =
        static_cast<Acc*>(params_.logsumexp) + (batch * params_.heads + head) * params_.queries + block.begin;
    for (int64_t i = 0; i < block.size(); ++i) {
      // maximum_ is -inf for a query without keys, and NaN as soon as one of its scores is.
      const Acc normalizer = maximum_[i] == -infinity ? Acc(0) : Acc(1) / sum_[i] + (maximum_[i] - maximum_[i]);
      logsumexp[i] = maximum_[i] == -infinity ? -infinity : maximum_[i] + std::log(sum_[i]);
      store_row(output_ + i * value_width_, params_.value_dim, normalizer, output + i * params_.output.position_stride);
    }
  }

  const AttentionParams& params_;
  const int64_t key_width_;
  const int64_t value_width_;
  Scratch<Acc> scratch_;
  Acc* packed_query_; // [key_dim][lanes]
  Acc* output_;       // [lanes][value_width]
  Acc* scores_;       // [key_block][lanes]
  Acc* factors_;      // [key_block][lanes]
  Acc* query_rows_;   // [query_block][key_width]
  Acc* key_rows_;     // [key_block][key_width]
  Acc* value_rows_;   // [key_block][value_width]
  int64_t lanes_ = 0; // queries of this block, in whole vectors
  Acc maximum_[query_block];
  Acc sum_[query_block];
  Acc rescale_[query_block];
};

} // namespace

void forward(const AttentionParams& params, int64_t begin, int64_t end) {
  with_scalar_type(params.dtype, [&](auto type) {
    ForwardBlock<decltype(type)> block(params);
    const int64_t blocks = ceil_div(params.queries, query_block);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t batch_head = task / blocks;
      const int64_t first = task % blocks * query_block;
      block.run(
          batch_head / params.heads, batch_head % params.heads, {first, std::min(first + query_block, params.queries)});
    }
  });
}

} // namespace wmha::cpu::CPU_CAPABILITY

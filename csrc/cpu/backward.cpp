// The backward pass: weights are made again from logsumexp, a block of queries at a time.
//
//   P_ij  = exp(z_ij - lse_i)              dV_j = sum_i keep_ij / (1 - p) * P_ij * dO_i
//   dP_ij = keep_ij / (1 - p) * <dO_i, v_j>
//   dz_ij = P_ij * (dP_ij - delta_i)       delta_i = <dO_i, O_i> - dlse_i
//   dS_ij = dz_ij * d z_ij / d <q_i, k_j>  dQ_i = sum_j dS_ij * k_j      dK_j = sum_i dS_ij * q_i
//
// Score tiles lie as in the forward pass, keys in rows and queries in lanes. dK and dV of the keys in sight are summed
// in a buffer that follows the window.
#include <cmath>

#include "columns.h"
#include "dropout.h"
#include "key_gradients.h"
#include "look_ahead.h"
#include "passes.h"
#include "query_sums.h"
#include "rows.h"
#include "scores.h"
#include "statistics.h"
#include "tiles.h"

namespace wmha::cpu::CPU_CAPABILITY {
namespace {

template <typename T>
class BackwardBlock {
  using M = multiplicand_type<T>;
  using Acc = acc_type<T>;
  static constexpr int64_t terms = Multiplicand<M>::terms;
  static constexpr int64_t vector = Vec<Acc>::size();
  static constexpr Acc infinity = std::numeric_limits<Acc>::infinity();

 public:
  explicit BackwardBlock(const AttentionParams& params)
      : params_(params),
        key_width_(whole_columns<M>(params.key_dim)),
        value_width_(whole_columns<M>(params.value_dim)),
        grad_query_(params.key_dim, query_block),
        packed_query_(steps<M>(params.key_dim) * query_block),
        packed_grad_output_(steps<M>(params.value_dim) * query_block),
        scores_(tile_rows * query_block),
        grad_weights_(tile_rows * query_block),
        weights_((key_block + tile_rows) * steps<M>(query_block)),
        grad_scores_((key_block + tile_rows) * steps<M>(query_block)),
        grad_scores_by_query_(terms == 1 ? 0 : (key_block + tile_rows) * query_block),
        query_left_(query_block * key_width_),
        query_right_(query_block * key_width_),
        grad_output_left_(query_block * value_width_),
        grad_output_right_(query_block * value_width_),
        most_keys_(most_keys_of_block(params)),
        left_keys_(params.key_dim, most_keys_, params.keys()),
        right_keys_(params.key_dim, terms == 1 ? 0 : most_keys_, params.keys()),
        left_values_(params.value_dim, most_keys_, params.keys()) {}

  /// Adds to the key gradients, writes grad_query, and returns the head's share of the temperature's gradient.
  double run(int64_t batch, int64_t head, Range block, KeyGradients<T>& key_gradients) {
    lanes_ = whole_columns<M>(block.size());
    const ScoreTransform<M> transform(params_, head);
    const Visibility visibility(params_.window, block, lanes_);
    const Rows<T> queries = rows_of<T>(params_.query, batch, head, block, params_.key_dim);
    const Rows<T> grad_outputs = rows_of<T>(params_.grad_output, batch, head, block, params_.value_dim);
    const auto left_queries = left_rows<M>(queries, query_left_);
    const auto left_grad_outputs = left_rows<M>(grad_outputs, grad_output_left_);
    pack_columns(left_queries, block.size(), steps<M>(params_.key_dim), lanes_, transform.factor, packed_query_);
    pack_columns(left_grad_outputs, block.size(), steps<M>(params_.value_dim), lanes_, Acc(1), packed_grad_output_);
    const Range used = visibility.seeing();
    const auto right_queries = terms == 1 ? left_queries : right_rows<M>(queries, used, query_right_);
    const auto right_grad_outputs =
        terms == 1 ? left_grad_outputs : right_rows<M>(grad_outputs, used, grad_output_right_);
    load_statistics<T>(params_, batch, head, block, logsumexp_, delta_);
    std::fill(logsumexp_ + block.size(), logsumexp_ + lanes_, infinity); // hence weight 0
    std::fill(delta_ + block.size(), delta_ + lanes_, Acc(0));
    grad_query_.start(lanes_);
    std::fill_n(temperature_, lanes_, Acc(0));

    DropoutLanes<Acc> dropout(params_, batch * params_.heads + head);
    const int64_t kv_head = params_.kv_head(head);
    const Range keys = params_.window.keys_of(block);
    const int64_t calls =
        3 * ceil_div(keys.size(), tile_rows) + ceil_div(keys.size(), key_block) * ceil_div(lanes_, tile_rows);
    LookAhead<T, 8> ahead(params_, batch, head, block, keys, calls);
    for (int64_t begin = keys.begin; begin < keys.end; begin += key_block) {
      const Range tile{begin, std::min(begin + key_block, keys.end)};
      const auto left_keys = left_keys_.of(params_.key, batch, kv_head, tile, keys);
      const auto right_keys = terms == 1 ? left_keys : right_keys_.of(params_.key, batch, kv_head, tile, keys);
      const auto left_values = left_values_.of(params_.value, batch, kv_head, tile, keys);
      const TileMask<Acc> mask(visibility, tile);
      Range seeing{0, 0};
      for (int64_t first = tile.begin; first < tile.end; first += tile_rows) {
        const Range group{first, std::min(first + tile_rows, tile.end)};
        const int64_t row = first - tile.begin;
        ahead.fetch();
        seeing = visibility.of_keys(group, seeing);
        const Range lanes = whole_columns<M>(seeing);
        const Range whole{first, first + whole_terms<M>(group.size())};
        clear_outside(row, group.size(), lanes);
        multiply_group(left_keys, row, group.size(), params_.key_dim, packed_query_, lanes, scores_);
        multiply_group(left_values, row, group.size(), params_.value_dim, packed_grad_output_, lanes, grad_weights_);
        with_mask<Acc>(visibility, whole, lanes, [&](auto masked, Range lanes) {
          with_flags(
              [&](auto drops, auto capped) {
                differentiate_scores<masked, drops, capped>(transform, mask, row, group, lanes, block.begin, dropout);
              },
              params_.dropout.enabled(), transform.cap > 0);
        });
      }
      add_to_keys(
          visibility, tile, weights_, right_grad_outputs, key_gradients.value_rows(tile.begin), value_width_, ahead);
      add_to_keys(visibility, tile, grad_scores_, right_queries, key_gradients.key_rows(tile.begin), key_width_, ahead);
      grad_query_.add(visibility, tile, terms == 1 ? grad_scores_ : grad_scores_by_query_, right_keys, ahead);
    }
    grad_query_.store(
        block.size(), at<T>(params_.grad_query, batch, head, block.begin), params_.grad_query.position_stride);
    double temperature_sum = 0;
    for (int64_t i = 0; i < block.size(); ++i) temperature_sum += temperature_[i];
    return -temperature_sum * ln_of_2 * transform.inverse_temperature; // z is proportional to 1 / temperature
  }

 private:
  /// products[key][lane] = <row, packed column> for a group of keys and the lanes given.
  void multiply_group(
      RowMajor<const M> rows,
      int64_t row,
      int64_t keys,
      int64_t dim,
      const M* packed,
      Range lanes,
      Acc* products) {
    multiply<M>(
        lanes.begin / vector, lanes.end / vector, steps<M>(dim), LeftRows<M>({rows.row(row), rows.row_stride}, keys),
        {packed, lanes_}, StoreTo<Acc>{{products, query_block}});
  }

  /// From products to gradients, for a group of keys: weights_ (of the values, dropout applied), grad_scores_ in both
  /// forms, and the sums of dz * z. `first_row` is the group's place in the tile.
  template <bool masked, bool drops, bool capped>
  void differentiate_scores(
      const ScoreTransform<M>& transform,
      const TileMask<Acc>& mask,
      int64_t first_row,
      Range group,
      Range lanes,
      int64_t first_query,
      DropoutLanes<Acc>& dropout) {
    const Vec<Acc> zero(Acc(0));
    const Vec<Acc> inverse_keep(static_cast<Acc>(params_.dropout.inverse_keep));
    const int64_t count = lanes_; // the compiler can't know that no store changes the member
    for (int64_t lane = lanes.begin; lane < lanes.end; lane += vector) {
      const Acc* const scores = scores_ + lane;
      const Acc* const grad_weights = grad_weights_ + lane;
      M* const weights = weights_ + (first_row * count + lane) / terms;
      M* const grad_scores_by_key = grad_scores_ + (first_row * count + lane) / terms;
      M* const grad_scores_by_query = grad_scores_by_query_ + first_row / terms * count + lane;
      const Vec<Acc> logsumexp = Vec<Acc>::loadu(logsumexp_ + lane);
      const Vec<Acc> delta = Vec<Acc>::loadu(delta_ + lane);
      Vec<Acc> temperature = Vec<Acc>::loadu(temperature_ + lane);
      Vec<Acc> place(static_cast<Acc>(first_row)); // in the tile, in all lanes
      for (int64_t step = 0; step < steps<M>(group.size()); ++step) {
        Vec<Acc> value_weights[terms];
        Vec<Acc> grad_scores[terms];
        WMHA_UNROLL
        for (int64_t term = 0; term < terms; ++term) {
          const int64_t row = step * terms + term;
          const int64_t key = group.begin + row;
          const Seen<Acc> lanes_seen = mask.seen(place, lane);
          place = place + Vec<Acc>(Acc(1));
          const auto seen = [&](Vec<Acc> x) { return masked ? lanes_seen.select(x, zero) : x; };
          const Vec<Acc> z = transform.template score<capped>(Vec<Acc>::loadu(scores + row * query_block));
          const Vec<Acc> weight = exp2(z - logsumexp);
          Vec<Acc> grad_weight = Vec<Acc>::loadu(grad_weights + row * query_block);
          value_weights[term] = seen(weight);
          if constexpr (drops) {
            if (row == 0 || key % Dropout::group == 0) dropout.draw(key, first_query + lane);
            grad_weight = dropout.keep(grad_weight * inverse_keep, key);
            value_weights[term] = dropout.keep(value_weights[term], key);
          }
          const Vec<Acc> grad_z = seen(weight * (grad_weight - delta));
          temperature = at::vec::fmadd(grad_z, seen(z), temperature);
          grad_scores[term] = grad_z * seen(transform.template derivative<capped>(z));
        }
        // Rows of count / terms multiplicands.
        Multiplicand<M>::store_rows(value_weights, weights + step * count, count / terms);
        Multiplicand<M>::store_rows(grad_scores, grad_scores_by_key + step * count, count / terms);
        if constexpr (terms > 1) Multiplicand<M>::store(grad_scores, grad_scores_by_query + step * count);
      }
      temperature.store(temperature_ + lane);
    }
  }

  /// What belongs to a group of keys becomes 0 for the queries outside `lanes`, none of which sees any of them.
  void clear_outside(int64_t first_row, int64_t keys, Range lanes) {
    for (int64_t lane = 0; lane < lanes_; lane += vector) {
      if (lanes.contains(lane)) continue;
      for (int64_t row = first_row; row < first_row + whole_terms<M>(keys); ++row) {
        std::fill_n(weights_ + row * lane_steps() + lane / terms, vector / terms, M{});
        std::fill_n(grad_scores_ + row * lane_steps() + lane / terms, vector / terms, M{});
        if (terms > 1) std::fill_n(grad_scores_by_query_ + row / terms * lanes_ + lane, vector, M{});
      }
    }
  }

  /// sums[key] += sum over the queries of left[key][query] * right[query], for the tile's keys. Rows of `sums` beyond
  /// the last key are overwritten with anything.
  void add_to_keys(
      const Visibility& visibility,
      Range tile,
      const M* left,
      RowMajor<const M> right,
      RowMajor<Acc> sums,
      int64_t width,
      LookAhead<T, 8>& ahead) {
    const int64_t rows = sum_rows(width / vector);
    Range seeing{0, 0};
    for (int64_t first = tile.begin; first < tile.end; first += rows) {
      ahead.fetch();
      seeing = visibility.of_keys({first, std::min(first + rows, tile.end)}, seeing);
      const Range depth = steps<M>(seeing);
      const int64_t row = first - tile.begin;
      multiply_sums<M>(
          width / vector, depth.size(),
          LeftRows<M>({left + row * lane_steps() + depth.begin, lane_steps()}, tile.end - first),
          {right.row(depth.begin), right.row_stride}, AddTo<Acc>{{sums.row(row), sums.row_stride}});
    }
  }

  int64_t lane_steps() const { return lanes_ / terms; }

  const AttentionParams& params_;
  const int64_t key_width_;
  const int64_t value_width_;
  // Of a block of queries:
  QuerySums<T> grad_query_;
  Buffer<M> packed_query_;       // [steps(key_dim)][lanes]
  Buffer<M> packed_grad_output_; // [steps(value_dim)][lanes]
  // Of a group of keys:
  Buffer<Acc> scores_;       // [tile_rows][query_block], products
  Buffer<Acc> grad_weights_; // [tile_rows][query_block]
  // Of a tile of keys, and as many as a product reads behind it:
  Buffer<M> weights_;              // [key_block + tile_rows][steps(lanes)]
  Buffer<M> grad_scores_;          // [key_block + tile_rows][steps(lanes)]
  Buffer<M> grad_scores_by_query_; // [steps(key_block + tile_rows)][lanes], unless it is the same
  // Rows of tensors, where they can't be read in place:
  Buffer<M> query_left_;        // [query_block][key_width]
  Buffer<M> query_right_;       // [query_block][key_width]
  Buffer<M> grad_output_left_;  // [query_block][value_width]
  Buffer<M> grad_output_right_; // [query_block][value_width]
  const int64_t most_keys_;     // of a block
  PackedKeys<T, LeftForm<T>> left_keys_;
  PackedKeys<T, RightForm<T>> right_keys_; // unless they are the same
  PackedKeys<T, LeftForm<T>> left_values_;
  int64_t lanes_ = 0;          // queries of this block, in whole vectors
  Acc logsumexp_[query_block]; // times log2 e
  Acc delta_[query_block];
  Acc temperature_[query_block]; // sums of dz * z * log2 e
};

/// One chunk of queries, of all heads that share a key head.
template <typename T>
void run_chunk(
    const AttentionParams& params,
    const BackwardSchedule& schedule,
    int64_t batch_kv_head,
    int64_t chunk,
    BackwardBlock<T>& block,
    KeyGradients<T>& key_gradients) {
  const int64_t group = params.group();
  const int64_t batch = batch_kv_head / params.kv_heads;
  const int64_t first_head = batch_kv_head % params.kv_heads * group;
  const auto temperature_share = [&](int64_t head) -> double& {
    return params.grad_temperature[(batch * params.heads + head) * schedule.chunks + chunk];
  };
  if (params.grad_temperature != nullptr) {
    for (int64_t head = first_head; head < first_head + group; ++head) temperature_share(head) = 0;
  }
  key_gradients.start(batch_kv_head, chunk);
  const Range queries = schedule.queries_of(chunk);
  for (int64_t first = queries.begin; first < queries.end; first += query_block) {
    const Range rows{first, std::min(first + query_block, queries.end)};
    key_gradients.advance_to(params.window.keys_of(rows));
    for (int64_t head = first_head; head < first_head + group; ++head) {
      const double share = block.run(batch, head, rows, key_gradients);
      if (params.grad_temperature != nullptr) temperature_share(head) += share;
    }
  }
  key_gradients.finish();
}

} // namespace

void backward(const AttentionParams& params, const BackwardSchedule& schedule, void* workspace, Tasks& tasks) {
  with_scalar_type(params.dtype, [&](auto type) {
    using T = decltype(type);
    BackwardBlock<T> block(params);
    KeyGradients<T> key_gradients(params, schedule, static_cast<acc_type<T>*>(workspace));
    schedule.for_chunks(tasks, [&](int64_t batch_kv_head, int64_t chunk) {
      run_chunk(params, schedule, batch_kv_head, chunk, block, key_gradients);
    });
  });
}

} // namespace wmha::cpu::CPU_CAPABILITY

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

#include "key_gradients.h"
#include "passes.h"
#include "rows.h"
#include "scores.h"
#include "tiles.h"

namespace wmha::cpu::CPU_CAPABILITY {
namespace {

template <typename T>
class BackwardBlock {
  using Acc = acc_type<T>;
  using Vec = at::vec::Vectorized<Acc>;
  static constexpr Acc infinity = std::numeric_limits<Acc>::infinity();

 public:
  explicit BackwardBlock(const AttentionParams& params)
      : params_(params),
        key_width_(padded<Acc>(params.key_dim)),
        value_width_(padded<Acc>(params.value_dim)),
        scratch_(
            Scratch<Acc>::rounded(query_block * params.key_dim) +
            Scratch<Acc>::rounded(query_block * params.value_dim) + 3 * Scratch<Acc>::rounded(key_block * query_block) +
            2 * Scratch<Acc>::rounded(query_block * key_width_) +
            2 * Scratch<Acc>::rounded(query_block * value_width_) + Scratch<Acc>::rounded(key_block * key_width_) +
            Scratch<Acc>::rounded(key_block * value_width_)),
        packed_query_(scratch_.take(query_block * params.key_dim)),
        packed_grad_output_(scratch_.take(query_block * params.value_dim)),
        weights_(scratch_.take(key_block * query_block)),
        grad_scores_(scratch_.take(key_block * query_block)),
        factors_(scratch_.take(key_block * query_block)),
        query_rows_(scratch_.take(query_block * key_width_)),
        grad_query_(scratch_.take(query_block * key_width_)),
        grad_output_rows_(scratch_.take(query_block * value_width_)),
        output_rows_(scratch_.take(query_block * value_width_)),
        key_rows_(scratch_.take(key_block * key_width_)),
        value_rows_(scratch_.take(key_block * value_width_)) {}

  /// Adds to the key gradients, writes grad_query, and returns the head's share of the temperature's gradient.
  double run(int64_t batch, int64_t head, Range block, KeyGradients<T>& key_gradients) {
    lanes_ = padded<Acc>(block.size());
    const ScoreTransform<Acc> transform(params_, head);
    const Visibility visibility(params_.window, block);
    const auto queries = load_rows(
        at<T>(params_.query, batch, head, block.begin), params_.query.position_stride, block.size(), params_.key_dim,
        query_rows_);
    const auto grad_outputs = load_rows(
        at<T>(params_.grad_output, batch, head, block.begin), params_.grad_output.position_stride, block.size(),
        params_.value_dim, grad_output_rows_);
    pack_columns(queries, block.size(), params_.key_dim, lanes_, packed_query_);
    pack_columns(grad_outputs, block.size(), params_.value_dim, lanes_, packed_grad_output_);
    load_statistics(batch, head, block, grad_outputs);
    std::fill_n(grad_query_, lanes_ * key_width_, Acc(0));

    double temperature_sum = 0;
    const Range keys = params_.window.keys_of(block);
    for (int64_t begin = keys.begin; begin < keys.end; begin += key_block) {
      const Range tile{begin, std::min(begin + key_block, keys.end)};
      const auto key = at<T>(params_.key, batch, params_.kv_head(head), tile.begin);
      const auto value = at<T>(params_.value, batch, params_.kv_head(head), tile.begin);
      const auto key_rows = load_rows(key, params_.key.position_stride, tile.size(), params_.key_dim, key_rows_);
      const auto value_rows =
          load_rows(value, params_.value.position_stride, tile.size(), params_.value_dim, value_rows_);
      multiply<Acc>(
          tile.size(), lanes_, params_.key_dim, {key_rows.data, key_rows.row_stride, 1}, {packed_query_, lanes_},
          {weights_, lanes_}, false);
      multiply<Acc>(
          tile.size(), lanes_, params_.value_dim, {value_rows.data, value_rows.row_stride, 1},
          {packed_grad_output_, lanes_}, {grad_scores_, lanes_}, false);
      if (params_.dropout.enabled()) {
        dropout_factors(params_, batch * params_.heads + head, block.begin, tile, lanes_, factors_);
      }
      temperature_sum += differentiate_scores(transform, TileMask<Acc>(visibility, tile), tile.size());
      add_to_keys(visibility, tile, queries, grad_outputs, key_gradients);
      add_to_queries(visibility, tile, key_rows);
    }
    auto grad_query = at<T>(params_.grad_query, batch, head, block.begin);
    for (int64_t i = 0; i < block.size(); ++i) {
      store_row(
          grad_query_ + i * key_width_, params_.key_dim, Acc(1), grad_query + i * params_.grad_query.position_stride);
    }
    return -temperature_sum * transform.inverse_temperature; // z is proportional to 1 / temperature
  }

 private:
  /// logsumexp_ and delta_ of the block. Lanes beyond the last query get lse = inf, hence weight 0.
  void load_statistics(int64_t batch, int64_t head, Range block, RowMajor<const Acc> grad_outputs) {
    const int64_t first = (batch * params_.heads + head) * params_.queries + block.begin;
    const auto logsumexp = static_cast<const Acc*>(params_.logsumexp) + first;
    const auto grad_logsumexp = static_cast<const Acc*>(params_.grad_logsumexp);
    const InputView output_view{
        params_.output.data, params_.output.batch_stride, params_.output.head_stride, params_.output.position_stride};
    const auto output = load_rows(
        at<T>(output_view, batch, head, block.begin), output_view.position_stride, block.size(), params_.value_dim,
        output_rows_);
    for (int64_t i = 0; i < block.size(); ++i) {
      Vec product(Acc(0));
      for (int64_t d = 0; d < value_width_; d += Vec::size()) {
        product = at::vec::fmadd(Vec::loadu(grad_outputs.row(i) + d), Vec::loadu(output.row(i) + d), product);
      }
      Acc parts[Vec::size()];
      product.store(parts);
      Acc delta = 0;
      for (const Acc part : parts) delta += part;
      delta_[i] = grad_logsumexp == nullptr ? delta : delta - grad_logsumexp[first + i];
      logsumexp_[i] = logsumexp[i];
    }
    std::fill(logsumexp_ + block.size(), logsumexp_ + lanes_, infinity);
    std::fill(delta_ + block.size(), delta_ + lanes_, Acc(0));
  }

  /// From products to gradients: weights_ (of the values, dropout applied) and grad_scores_. Returns sum dz * z.
  double differentiate_scores(const ScoreTransform<Acc>& transform, const TileMask<Acc>& mask, int64_t keys) {
    const bool dropout = params_.dropout.enabled();
    const Vec zero(Acc(0));
    double temperature_sum = 0;
    for (int64_t lane = 0; lane < lanes_; lane += Vec::size()) {
      const Vec logsumexp = Vec::loadu(logsumexp_ + lane);
      const Vec delta = Vec::loadu(delta_ + lane);
      Vec temperature_lanes = zero;
      for (int64_t key = 0; key < keys; ++key) {
        const int64_t place = key * lanes_ + lane;
        const Vec z = transform(Vec::loadu(weights_ + place));
        const Vec weight = exponential(z - logsumexp);
        Vec grad_weight = Vec::loadu(grad_scores_ + place);
        Vec value_weight = weight;
        if (dropout) {
          const Vec factor = Vec::loadu(factors_ + place);
          grad_weight = grad_weight * factor;
          value_weight = value_weight * factor;
        }
        const Vec grad_z = weight * (grad_weight - delta);
        temperature_lanes = temperature_lanes + mask.select(grad_z * z, zero, key, lane);
        mask.select(value_weight, zero, key, lane).store(weights_ + place);
        mask.select(grad_z * transform.derivative(z), zero, key, lane).store(grad_scores_ + place);
      }
      Acc parts[Vec::size()];
      temperature_lanes.store(parts);
      for (const Acc part : parts) temperature_sum += part;
    }
    return temperature_sum;
  }

  void add_to_keys(
      const Visibility& visibility,
      Range tile,
      RowMajor<const Acc> queries,
      RowMajor<const Acc> grad_outputs,
      KeyGradients<T>& key_gradients) {
    for (int64_t key = tile.begin; key < tile.end; key += tile_rows) {
      const Range rows{key, std::min(key + tile_rows, tile.end)};
      const Range seeing = visibility.of_keys(rows);
      const int64_t first = (key - tile.begin) * lanes_ + seeing.begin;
      multiply<Acc>(
          rows.size(), value_width_, seeing.size(), {weights_ + first, lanes_, 1},
          {grad_outputs.row(seeing.begin), grad_outputs.row_stride}, key_gradients.value_rows(key), true);
      multiply<Acc>(
          rows.size(), key_width_, seeing.size(), {grad_scores_ + first, lanes_, 1},
          {queries.row(seeing.begin), queries.row_stride}, key_gradients.key_rows(key), true);
    }
  }

  void add_to_queries(const Visibility& visibility, Range tile, RowMajor<const Acc> key_rows) {
    for (int64_t lane = 0; lane < lanes_; lane += tile_rows) {
      const Range seen = visibility.of_queries(lane, lane + tile_rows, tile);
      const int64_t skipped = seen.begin - tile.begin;
      multiply<Acc>(
          std::min<int64_t>(tile_rows, lanes_ - lane), key_width_, seen.size(),
          {grad_scores_ + skipped * lanes_ + lane, 1, lanes_}, {key_rows.row(skipped), key_rows.row_stride},
          {grad_query_ + lane * key_width_, key_width_}, true);
    }
  }

  const AttentionParams& params_;
  const int64_t key_width_;
  const int64_t value_width_;
  Scratch<Acc> scratch_;
  Acc* packed_query_;       // [key_dim][lanes]
  Acc* packed_grad_output_; // [value_dim][lanes]
  Acc* weights_;            // [key_block][lanes]: products, then weights
  Acc* grad_scores_;        // [key_block][lanes]
  Acc* factors_;            // [key_block][lanes]
  Acc* query_rows_;         // [query_block][key_width]
  Acc* grad_query_;         // [query_block][key_width]
  Acc* grad_output_rows_;   // [query_block][value_width]
  Acc* output_rows_;        // [query_block][value_width]
  Acc* key_rows_;           // [key_block][key_width]
  Acc* value_rows_;         // [key_block][value_width]
  int64_t lanes_ = 0;       // queries of this block, in whole vectors
  Acc logsumexp_[query_block];
  Acc delta_[query_block];
};

} // namespace

void backward(
    const AttentionParams& params,
    const BackwardSchedule& schedule,
    void* workspace,
    int64_t begin,
    int64_t end) {
  const int64_t group = params.heads / params.kv_heads;
  with_scalar_type(params.dtype, [&](auto type) {
    using T = decltype(type);
    BackwardBlock<T> block(params);
    KeyGradients<T> key_gradients(params, schedule, static_cast<acc_type<T>*>(workspace));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t batch_kv_head = task / schedule.chunks;
      const int64_t chunk = task % schedule.chunks;
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
  });
}

void merge(
    const AttentionParams& params,
    const BackwardSchedule& schedule,
    const void* workspace,
    int64_t begin,
    int64_t end) {
  with_scalar_type(params.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t task = begin; task < end; ++task) {
      merge_shares<T>(params, schedule, static_cast<const acc_type<T>*>(workspace), task);
    }
  });
}

} // namespace wmha::cpu::CPU_CAPABILITY

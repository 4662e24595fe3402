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

#include "dropout.h"
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
  static constexpr int64_t vector = Vec<Acc>::size();
  static constexpr Acc infinity = std::numeric_limits<Acc>::infinity();

 public:
  explicit BackwardBlock(const AttentionParams& params)
      : params_(params),
        key_width_(padded<Acc>(params.key_dim)),
        value_width_(padded<Acc>(params.value_dim)),
        scratch_(
            Scratch<Acc>::rounded(query_block * params.key_dim) +
            Scratch<Acc>::rounded(query_block * params.value_dim) + 2 * Scratch<Acc>::rounded(key_block * query_block) +
            2 * Scratch<Acc>::rounded(query_block * key_width_) +
            2 * Scratch<Acc>::rounded(query_block * value_width_) + Scratch<Acc>::rounded(key_block * key_width_) +
            Scratch<Acc>::rounded(key_block * value_width_)),
        packed_query_(scratch_.take(query_block * params.key_dim)),
        packed_grad_output_(scratch_.take(query_block * params.value_dim)),
        weights_(scratch_.take(key_block * query_block)),
        grad_scores_(scratch_.take(key_block * query_block)),
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
    pack_columns(queries, block.size(), params_.key_dim, lanes_, transform.query_factor, packed_query_);
    pack_columns(
        grad_outputs, block.size(), params_.value_dim, lanes_, static_cast<Acc>(params_.dropout.inverse_keep),
        packed_grad_output_);
    load_statistics(batch, head, block, grad_outputs);
    std::fill_n(grad_query_, lanes_ * key_width_, Acc(0));
    std::fill_n(temperature_, lanes_, Acc(0));

    DropoutLanes<Acc> dropout(params_, batch * params_.heads + head);
    const Range keys = params_.window.keys_of(block);
    next_query_ = block.end;
    next_key_ = keys.end;
    for (int64_t begin = keys.begin; begin < keys.end; begin += key_block) {
      const Range tile{begin, std::min(begin + key_block, keys.end)};
      const auto key = at<T>(params_.key, batch, params_.kv_head(head), tile.begin);
      const auto value = at<T>(params_.value, batch, params_.kv_head(head), tile.begin);
      const auto key_rows = load_rows(key, params_.key.position_stride, tile.size(), params_.key_dim, key_rows_);
      const auto value_rows =
          load_rows(value, params_.value.position_stride, tile.size(), params_.value_dim, value_rows_);
      const TileMask<Acc> mask(visibility, tile);
      Range seeing{0, 0};
      for (int64_t first = tile.begin; first < tile.end; first += tile_rows) {
        const Range group{first, std::min(first + tile_rows, tile.end)};
        const int64_t row = first - tile.begin;
        prefetch_next(batch, head);
        seeing = visibility.of_keys(group, seeing);
        const Range lanes{seeing.begin / vector * vector, padded<Acc>(seeing.end)};
        multiply_group(packed_query_, params_.key_dim, key_rows, row, group.size(), lanes, weights_);
        multiply_group(packed_grad_output_, params_.value_dim, value_rows, row, group.size(), lanes, grad_scores_);
        const bool masked = !visibility.all_see(group, lanes);
        differentiate_scores(transform, masked ? &mask : nullptr, tile.begin, group, lanes, block.begin, dropout);
        add_to_keys(row, seeing, grad_outputs, weights_, key_gradients.value_rows(first), value_width_);
        add_to_keys(row, seeing, queries, grad_scores_, key_gradients.key_rows(first), key_width_);
      }
      add_to_queries(visibility, tile, key_rows);
    }
    auto grad_query = at<T>(params_.grad_query, batch, head, block.begin);
    for (int64_t i = 0; i < block.size(); ++i) {
      store_row(
          grad_query_ + i * key_width_, params_.key_dim, Acc(1), grad_query + i * params_.grad_query.position_stride);
    }
    double temperature_sum = 0;
    for (int64_t i = 0; i < block.size(); ++i) temperature_sum += temperature_[i];
    return -temperature_sum * ln_of_2 * transform.inverse_temperature; // z is proportional to 1 / temperature
  }

 private:
  /// Brings two rows more of what the next block of queries will need into the cache, as in the forward pass.
  void prefetch_next(int64_t batch, int64_t head) {
    for (int i = 0; i < 2; ++i, ++next_query_, ++next_key_) {
      if (next_query_ < params_.queries) {
        prefetch(at<T>(params_.query, batch, head, next_query_), params_.key_dim);
        prefetch(at<T>(params_.grad_output, batch, head, next_query_), params_.value_dim);
        prefetch(at<T>(params_.output, batch, head, next_query_), params_.value_dim);
      }
      if (next_key_ < params_.keys()) {
        prefetch(at<T>(params_.key, batch, params_.kv_head(head), next_key_), params_.key_dim);
        prefetch(at<T>(params_.value, batch, params_.kv_head(head), next_key_), params_.value_dim);
      }
    }
  }

  /// logsumexp_ (times log2 e) and delta_ of the block. Lanes beyond the last query get lse = inf, hence weight 0.
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
      Vec<Acc> product(Acc(0));
      for (int64_t d = 0; d < value_width_; d += vector) {
        product = at::vec::fmadd(Vec<Acc>::loadu(grad_outputs.row(i) + d), Vec<Acc>::loadu(output.row(i) + d), product);
      }
      Acc parts[vector];
      product.store(parts);
      Acc delta = 0;
      for (const Acc part : parts) delta += part;
      delta_[i] = grad_logsumexp == nullptr ? delta : delta - grad_logsumexp[first + i];
      logsumexp_[i] = logsumexp[i] * static_cast<Acc>(log2_of_e);
    }
    std::fill(logsumexp_ + block.size(), logsumexp_ + lanes_, infinity);
    std::fill(delta_ + block.size(), delta_ + lanes_, Acc(0));
  }

  /// products[key][lane] = <row, packed column> for a group of keys and the lanes given.
  void multiply_group(
      const Acc* packed,
      int64_t depth,
      RowMajor<const Acc> rows,
      int64_t row,
      int64_t keys,
      Range lanes,
      Acc* products) {
    StoreTo<Acc> target{{products + row * lanes_, lanes_}};
    multiply<Acc>(
        lanes.begin / vector, lanes.end / vector, depth, LeftRows<Acc>({rows.row(row), rows.row_stride}, keys),
        {packed, lanes_}, target);
  }

  /// From products to gradients: weights_ (of the values, dropout applied), grad_scores_, and sums of dz * z.
  void differentiate_scores(
      const ScoreTransform<Acc>& transform,
      const TileMask<Acc>* mask,
      int64_t tile_begin,
      Range group,
      Range lanes,
      int64_t first_query,
      DropoutLanes<Acc>& dropout) {
    const bool drops = params_.dropout.enabled();
    const Vec<Acc> zero(Acc(0));
    const Vec<Acc> inverse_keep(static_cast<Acc>(params_.dropout.inverse_keep));
    for (int64_t lane = lanes.begin; lane < lanes.end; lane += vector) {
      const Vec<Acc> logsumexp = Vec<Acc>::loadu(logsumexp_ + lane);
      const Vec<Acc> delta = Vec<Acc>::loadu(delta_ + lane);
      Vec<Acc> temperature = Vec<Acc>::loadu(temperature_ + lane);
      for (int64_t key = group.begin; key < group.end; ++key) {
        if (drops && (key == group.begin || key % Dropout::group == 0)) dropout.draw(key, first_query + lane);
        const int64_t row = key - tile_begin;
        Acc* const weight_place = weights_ + row * lanes_ + lane;
        Acc* const grad_place = grad_scores_ + row * lanes_ + lane;
        const Vec<Acc> z = transform(Vec<Acc>::loadu(weight_place));
        const Vec<Acc> weight = exp2(z - logsumexp);
        Vec<Acc> grad_weight = Vec<Acc>::loadu(grad_place);
        Vec<Acc> value_weight = weight;
        if (drops) {
          grad_weight = dropout.keep(grad_weight, key);
          value_weight = dropout.keep(weight * inverse_keep, key);
        }
        const Vec<Acc> grad_z = weight * (grad_weight - delta);
        Vec<Acc> share = grad_z * z;
        Vec<Acc> grad_score = grad_z * transform.derivative(z);
        if (mask != nullptr) {
          share = mask->select(share, zero, row, lane);
          value_weight = mask->select(value_weight, zero, row, lane);
          grad_score = mask->select(grad_score, zero, row, lane);
        }
        temperature = temperature + share;
        value_weight.store(weight_place);
        grad_score.store(grad_place);
      }
      temperature.store(temperature_ + lane);
    }
  }

  /// sums[key] += sum over the queries of scores[key][query] * rows[query]. Rows of `sums` beyond the last key are
  /// overwritten with anything.
  void add_to_keys(
      int64_t row,
      Range queries,
      RowMajor<const Acc> rows,
      const Acc* scores,
      RowMajor<Acc> sums,
      int64_t width) {
    AddTo<Acc> target{sums};
    multiply<Acc>(
        0, width / vector, queries.size(), LeftRows<Acc>({scores + row * lanes_ + queries.begin, lanes_}, tile_rows),
        {rows.row(queries.begin), rows.row_stride}, target);
  }

  void add_to_queries(const Visibility& visibility, Range tile, RowMajor<const Acc> key_rows) {
    for (int64_t lane = 0; lane < lanes_; lane += tile_rows) {
      const Range seen = visibility.of_queries(lane, lane + tile_rows, tile);
      const int64_t skipped = seen.begin - tile.begin;
      AddTo<Acc> target{{grad_query_ + lane * key_width_, key_width_}};
      multiply<Acc>(
          0, key_width_ / vector, seen.size(), LeftColumns<Acc>{grad_scores_ + skipped * lanes_ + lane, lanes_},
          {key_rows.row(skipped), key_rows.row_stride}, target);
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
  Acc* query_rows_;         // [query_block][key_width]
  Acc* grad_query_;         // [query_block][key_width]
  Acc* grad_output_rows_;   // [query_block][value_width]
  Acc* output_rows_;        // [query_block][value_width]
  Acc* key_rows_;           // [key_block][key_width]
  Acc* value_rows_;         // [key_block][value_width]
  int64_t next_query_ = 0;  // to prefetch
  int64_t next_key_ = 0;
  int64_t lanes_ = 0; // queries of this block, in whole vectors
  Acc logsumexp_[query_block];
  Acc delta_[query_block];
  Acc temperature_[query_block]; // sums of dz * z * log2 e
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

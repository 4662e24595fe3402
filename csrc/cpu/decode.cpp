// The forward pass of few queries against many keys, as in decoding with a cache. What takes the time is reading keys
// and values, so each is read once for all queries of the heads that share it. Vectors run along features, and along
// keys in the softmax. The keys are cut into splits, for many cores; the splits' softmaxes are merged by their
// references and sums.
#include <ATen/cpu/vec/functional.h>

#include <cmath>

#include "lanes.h"
#include "passes.h"
#include "rows.h"
#include "scores.h"
#include "tiles.h"

namespace wmha::cpu::CPU_CAPABILITY {
namespace {

template <typename T>
class DecodeBlock {
  using Acc = acc_type<T>;
  static constexpr int64_t vector = Vec<Acc>::size();
  static constexpr int64_t tile_keys = 64;  // whose scores and values stay in the first cache
  static constexpr int64_t keys_ahead = 16; // on their way from memory
  static constexpr Acc infinity = std::numeric_limits<Acc>::infinity();

 public:
  DecodeBlock(const AttentionParams& params, const DecodeSchedule& schedule, Acc* workspace)
      : params_(params),
        schedule_(schedule),
        workspace_(workspace),
        key_width_(padded<Acc>(params.key_dim)),
        value_width_(padded<Acc>(params.value_dim)),
        query_(schedule.rows * key_width_),
        output_(schedule.rows * value_width_),
        scores_(schedule.rows * tile_keys),
        key_rows_(vector * key_width_),
        value_rows_(tile_keys * value_width_) {}

  void run(int64_t batch, int64_t kv_head, int64_t split) {
    const int64_t group = params_.heads / params_.kv_heads;
    for (int64_t row = 0; row < schedule_.rows; ++row) {
      const int64_t head = kv_head * group + row / params_.queries;
      load_query(row, batch, head);
      reference_[row] = -infinity;
      sum_[row] = 0;
    }
    // In vectors: of std::fill_n g++ makes rep stos, which is slow to start.
    for (int64_t i = 0; i < schedule_.rows * value_width_; i += vector) Vec<Acc>(Acc(0)).store(output_ + i);
    const Range all{0, params_.keys()};
    const Rows<T> all_keys = rows_of<T>(params_.key, batch, kv_head, all, params_.key_dim);
    const Rows<T> all_values = rows_of<T>(params_.value, batch, kv_head, all, params_.value_dim);
    const Range keys = schedule_.keys_of(split);
    for (int64_t begin = keys.begin; begin < keys.end; begin += tile_keys) {
      const Range tile{begin, std::min(begin + tile_keys, keys.end)};
      compute_scores(all_keys, all_values, tile);
      with_rows(all_values.part(tile), value_rows_, 1, [&](auto values) {
        for (int64_t row = 0; row < schedule_.rows; ++row) {
          const int64_t head = kv_head * group + row / params_.queries;
          const Range seen = seen_by(row, tile);
          compute_weights(row, batch * params_.heads + head, seen, tile);
          add_values(row, values, {seen.begin - tile.begin, seen.end - tile.begin});
        }
      });
    }
    for (int64_t row = 0; row < schedule_.rows; ++row) {
      const int64_t head = kv_head * group + row / params_.queries;
      Acc* state = workspace_ + schedule_.state_offset(batch * params_.heads + head, row % params_.queries, split);
      state[0] = reference_[row];
      state[1] = sum_[row];
      std::copy_n(output_ + row * value_width_, params_.value_dim, state + 2);
    }
  }

 private:
  void load_query(int64_t row, int64_t batch, int64_t head) {
    const ScoreTransform<Acc> transform(params_, head);
    const T* query = at<T>(params_.query, batch, head, row % params_.queries);
    Acc* to = query_ + row * key_width_;
    for (int64_t d = 0; d < key_width_; ++d) {
      to[d] = d < params_.key_dim ? transform.factor * static_cast<Acc>(query[d]) : Acc(0);
    }
    cap_[row] = transform.cap;
  }

  /// The keys of the tile that the row's query sees.
  Range seen_by(int64_t row, Range tile) const {
    const Range seen = params_.window.keys_of(row % params_.queries);
    const int64_t begin = std::clamp(seen.begin, tile.begin, tile.end);
    return {begin, std::clamp(seen.end, begin, tile.end)};
  }

  /// scores_[row][key], a vector of keys at a time. Meanwhile the next keys and the tile's values come from memory.
  void compute_scores(Rows<T> all_keys, Rows<T> all_values, Range tile) {
    for (int64_t first = tile.begin; first < tile.end; first += vector) {
      const Range positions{first, std::min(first + vector, tile.end)};
      with_rows(all_keys.part(positions), key_rows_, vector, [&](auto keys) {
        for (int64_t row = 0; row < schedule_.rows; ++row) {
          const auto fetch = [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
            if (row > 0) return;
            prefetch_first(all_keys.part({first + keys_ahead + begin, first + keys_ahead + end}));
            prefetch_first(all_values.part({first + begin, first + end}));
          };
          Vec<Acc> score = multiply(query_ + row * key_width_, keys, fetch);
          if (cap_[row] > 0) score = Vec<Acc>(cap_[row]) * score.tanh();
          score.store(scores_ + row * tile_keys + (first - tile.begin));
        }
      });
    }
  }

  /// function(rows) with the rows themselves if there are `least` of them; else, or if it's worth it since they are
  /// read often, with a copy in the type of the arithmetic, where zeros stand for those that are missing.
  template <typename Function>
  void with_rows(Rows<T> rows, Acc* scratch, int64_t least, const Function& function) {
    constexpr int64_t often = 3;
    if (rows.count >= least && (std::is_same_v<T, Acc> || schedule_.rows < often)) {
      function(rows);
    } else {
      const RowMajor<const Acc> copy = copy_rows(rows, scratch);
      for (int64_t r = rows.count; r < least; ++r) std::fill_n(scratch + r * copy.row_stride, copy.row_stride, Acc(0));
      function(Rows<Acc>{copy.data, copy.row_stride, rows.count, copy.row_stride});
    }
  }

  /// Products of the query with a vector of keys, in one lane each. fetch(begin, end), meanwhile, for some keys after
  /// others: a burst of prefetches would hold up all else.
  template <typename Key, typename Fetch>
  Vec<Acc> multiply(const Acc* query, Rows<Key> keys, const Fetch& fetch) {
    constexpr int64_t at_once = 4;
    Vec<Acc> sums[vector];
    WMHA_UNROLL
    for (int64_t first = 0; first < vector; first += at_once) {
      fetch(first, first + at_once);
      WMHA_UNROLL
      for (int64_t k = 0; k < at_once; ++k) sums[first + k] = Vec<Acc>(Acc(0));
      for_vectors<Acc>({0, keys.dim}, [&](int64_t d, const auto& load) __attribute__((always_inline)) {
        const Vec<Acc> features = Vec<Acc>::loadu(query + d);
        WMHA_UNROLL
        for (int64_t k = first; k < first + at_once; ++k) {
          sums[k] = at::vec::fmadd(features, load(keys.row(k) + d), sums[k]);
        }
      });
    }
    return sum_each(sums);
  }

  /// From scores to weights 2^(score - reference); moves the row's reference, sum and output along.
  void compute_weights(int64_t row, int64_t batch_head, Range seen, Range tile) {
    if (seen.size() == 0) return;
    Acc* const scores = scores_ + row * tile_keys;
    std::fill(scores, scores + (seen.begin - tile.begin), -infinity);
    std::fill(scores + (seen.end - tile.begin), scores + tile_keys, -infinity);
    Vec<Acc> largest(reference_[row]);
    for (int64_t i = 0; i < tile_keys; i += vector) largest = larger(Vec<Acc>::loadu(scores + i), largest);
    const Acc maximum = at::vec::vec_reduce_all<Acc>([](Vec<Acc> x, Vec<Acc> y) { return larger(x, y); }, largest);
    const Acc reference = maximum == -infinity ? Acc(0) : maximum; // any finite one, while there are only -inf and NaN
    const Acc rescale = std::exp2(reference_[row] - reference);
    Vec<Acc> sum(Acc(0));
    for (int64_t i = 0; i < tile_keys; i += vector) {
      const Vec<Acc> weight = exp2(Vec<Acc>::loadu(scores + i) - Vec<Acc>(reference));
      sum = sum + weight;
      weight.store(scores + i);
    }
    sum_[row] = sum_[row] * rescale + at::vec::vec_reduce_all<Acc>([](Vec<Acc> x, Vec<Acc> y) { return x + y; }, sum);
    reference_[row] = reference;
    Acc* const output = output_ + row * value_width_;
    for (int64_t d = 0; d < value_width_; d += vector)
      (Vec<Acc>::loadu(output + d) * Vec<Acc>(rescale)).store(output + d);
    if (params_.dropout.enabled()) drop(row, batch_head, seen, tile);
  }

  void drop(int64_t row, int64_t batch_head, Range seen, Range tile) {
    const auto seed = static_cast<uint64_t>(params_.rng_state[0]);
    for (int64_t key = seen.begin; key < seen.end;) {
      const PhiloxWords counter = Dropout::counter(key, row % params_.queries, batch_head, params_.rng_state[1]);
      const PhiloxWords words =
          philox<Dropout::rounds>(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
      const int64_t end = std::min((key / Dropout::group + 1) * Dropout::group, seen.end);
      for (; key < end; ++key) {
        if (!params_.dropout.keeps(words, key)) scores_[row * tile_keys + key - tile.begin] = 0;
      }
    }
  }

  /// output_[row] += sum over keys of weight * value
  template <typename Value>
  void add_values(int64_t row, Rows<Value> values, Range keys) {
    const auto load = [](const Value* source) { return load_as_acc(source); };
    int64_t d = 0;
    for (; d + 4 * vector <= values.dim; d += 4 * vector) add_columns<4>(row, values, keys, d, load);
    for_vectors<Acc>({d, values.dim}, [&](int64_t first, const auto& load_vector) {
      add_columns<1>(row, values, keys, first, load_vector);
    });
  }

  /// The same for C vectors of features. Even and odd keys have sums of their own, so that the next addition needn't
  /// wait for the last.
  template <int C, typename Value, typename Load>
  void add_columns(int64_t row, Rows<Value> values, Range keys, int64_t first, const Load& load) {
    const Acc* const weights = scores_ + row * tile_keys;
    Acc* const output = output_ + row * value_width_ + first;
    Vec<Acc> even[C];
    Vec<Acc> odd[C];
    WMHA_UNROLL
    for (int c = 0; c < C; ++c) {
      even[c] = Vec<Acc>::loadu(output + c * vector);
      odd[c] = Vec<Acc>(Acc(0));
    }
    const auto add = [&](int64_t key, Vec<Acc>(&sums)[C]) {
      const Vec<Acc> weight(weights[key]);
      const Value* value = values.row(key) + first;
      WMHA_UNROLL
      for (int c = 0; c < C; ++c) sums[c] = at::vec::fmadd(weight, load(value + c * vector), sums[c]);
    };
    int64_t key = keys.begin;
    for (; key + 1 < keys.end; key += 2) {
      add(key, even);
      add(key + 1, odd);
    }
    if (key < keys.end) add(key, even);
    WMHA_UNROLL
    for (int c = 0; c < C; ++c) (even[c] + odd[c]).store(output + c * vector);
  }

  const AttentionParams& params_;
  const DecodeSchedule& schedule_;
  Acc* workspace_;
  const int64_t key_width_;
  const int64_t value_width_;
  Buffer<Acc> query_;      // [rows][key_width], scaled
  Buffer<Acc> output_;     // [rows][value_width]
  Buffer<Acc> scores_;     // [rows][tile_keys]
  Buffer<Acc> key_rows_;   // [vector][key_width]
  Buffer<Acc> value_rows_; // [tile_keys][value_width]
  Acc cap_[DecodeSchedule::most_rows];
  Acc reference_[DecodeSchedule::most_rows];
  Acc sum_[DecodeSchedule::most_rows];
};

/// output and logsumexp of one query, from the states of its splits.
template <typename T>
void merge_splits(
    const AttentionParams& params,
    const DecodeSchedule& schedule,
    const acc_type<T>* workspace,
    int64_t batch_head,
    int64_t query,
    acc_type<T>* sum) { // [value_dim], scratch
  using Acc = acc_type<T>;
  constexpr Acc infinity = std::numeric_limits<Acc>::infinity();
  const int64_t batch = batch_head / params.heads;
  const int64_t head = batch_head % params.heads;
  T* const output = at<T>(params.output, batch, head, query);
  Acc& logsumexp = static_cast<Acc*>(params.logsumexp)[batch_head * params.queries + query];
  if (params.window.keys_of(query).size() == 0) {
    std::fill_n(output, params.value_dim, T(0));
    logsumexp = -infinity;
    return;
  }
  const auto state = [&](int64_t split) { return workspace + schedule.state_offset(batch_head, query, split); };
  Acc reference = -infinity;
  for (int64_t split = 0; split < schedule.splits; ++split) reference = std::max(reference, state(split)[0]);
  Acc total = 0;
  std::fill_n(sum, params.value_dim, Acc(0));
  for (int64_t split = 0; split < schedule.splits; ++split) {
    if (state(split)[0] == -infinity) continue; // sees none of the query's keys
    const Acc factor = std::exp2(state(split)[0] - reference);
    total += factor * state(split)[1];
    for (int64_t d = 0; d < params.value_dim; ++d) sum[d] += factor * state(split)[2 + d];
  }
  store_row(sum, params.value_dim, static_cast<Acc>(params.dropout.inverse_keep) / total, output);
  logsumexp = (reference + std::log2(total)) * static_cast<Acc>(ln_of_2);
}

} // namespace

void decode(const AttentionParams& params, const DecodeSchedule& schedule, void* workspace, Tasks& tasks) {
  with_scalar_type(params.dtype, [&](auto type) {
    using T = decltype(type);
    DecodeBlock<T> block(params, schedule, static_cast<acc_type<T>*>(workspace));
    tasks.for_each([&](int64_t task) {
      const int64_t batch_kv_head = task / schedule.splits;
      block.run(batch_kv_head / params.kv_heads, batch_kv_head % params.kv_heads, task % schedule.splits);
    });
  });
}

void merge_decode(const AttentionParams& params, const DecodeSchedule& schedule, const void* workspace, Tasks& tasks) {
  with_scalar_type(params.dtype, [&](auto type) {
    using T = decltype(type);
    using Acc = acc_type<T>;
    const Buffer<Acc> sum(params.value_dim);
    tasks.for_each([&](int64_t task) {
      merge_splits<T>(
          params, schedule, static_cast<const Acc*>(workspace), task / params.queries, task % params.queries, sum);
    });
  });
}

} // namespace wmha::cpu::CPU_CAPABILITY

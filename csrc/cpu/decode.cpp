// The forward pass of few queries against many keys, as in decoding with a cache. What takes the time is reading keys
// and values, so each is read once for all queries of the heads that share it (rows). The keys are cut into splits, for
// many cores; the splits' softmaxes are merged by their references and sums.
//
//   K q: the lanes of a vector are R rows times F neighbouring features; those of a key are repeated for each row. In
//        the end, vectors of F keys become one, whose lanes are F keys times R rows.
//
//          q      | row 0: d d+1 | row 1: d d+1 | . . .        F = 2
//        x key    |        d d+1 |        d d+1 | . . .
//          sum    |        . .   |        . .   | . . .   ->   scores   | key 0: row 0 1 . . | key 1: row 0 1 . . |
//
//   P V: the lanes are features, in a tile of R rows and some vectors.
#include <cmath>

#include "lanes.h"
#include "passes.h"
#include "rows.h"
#include "scores.h"
#include "tiles.h"

namespace wmha::cpu::CPU_CAPABILITY {
namespace {

/// output and logsumexp of one query, from the states of its splits. sum: [value_dim], scratch.
template <typename T>
void merge_splits(
    const AttentionParams& params,
    const DecodeSchedule& schedule,
    const acc_type<T>* states,
    int64_t batch_head,
    int64_t query,
    acc_type<T>* sum) {
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
  const auto state = [&](int64_t split) { return states + split * schedule.state; };
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

// Vectors of sums, about half the registers.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t most_sums = 16;
#else
constexpr int64_t most_sums = 8;
#endif

/// R: rows handled together, of which a vector holds a whole number.
template <typename T, int64_t R>
class DecodeBlock {
  using Acc = acc_type<T>;
  static constexpr int64_t vector = Vec<Acc>::size();
  static constexpr int64_t F = vector / R;
  static constexpr int64_t tile_keys = 64;  // whose scores and values stay in the first cache
  static constexpr int64_t keys_ahead = 16; // on their way from memory
  static constexpr int64_t keys_at_once = R == 1 ? 4 : 8;
  static constexpr int64_t group = std::max(F, keys_at_once); // of keys
  static constexpr Acc infinity = std::numeric_limits<Acc>::infinity();

 public:
  DecodeBlock(const AttentionParams& params, const DecodeSchedule& schedule, Acc* workspace)
      : params_(params),
        schedule_(schedule),
        workspace_(workspace),
        rows_(round_up(schedule.rows, R)),
        key_width_(padded<Acc>(params.key_dim)),
        value_width_(padded<Acc>(params.value_dim)),
        queries_(rows_ * key_width_),
        caps_(rows_ * F),
        output_(rows_ * value_width_),
        scores_(rows_ * tile_keys),
        references_(rows_ * F),
        sums_(rows_ * F),
        key_rows_(group * key_width_),
        state_(schedule.state),
        merged_(params.value_dim) {}

  void run(int64_t batch, int64_t kv_head, int64_t split) {
    first_head_ = batch * params_.heads + kv_head * params_.group();
    for (int64_t row = 0; row < rows_; ++row) load_query(row, batch);
    for (int64_t i = 0; i < rows_ * F; i += vector) {
      Vec<Acc>(-infinity).store(references_ + i);
      Vec<Acc>(Acc(0)).store(sums_ + i);
    }
    for (int64_t i = 0; i < rows_ * value_width_; i += vector) Vec<Acc>(Acc(0)).store(output_ + i);
    const Range all{0, params_.keys()};
    const Rows<T> all_keys = rows_of<T>(params_.key, batch, kv_head, all, params_.key_dim);
    const Rows<T> all_values = rows_of<T>(params_.value, batch, kv_head, all, params_.value_dim);
    const Range keys = schedule_.keys_of(split);
    for (int64_t begin = keys.begin; begin < keys.end; begin += tile_keys) {
      const Range tile{begin, std::min(begin + tile_keys, keys.end)};
      compute_scores(all_keys, all_values, tile);
      for (int64_t row = 0; row < rows_; row += R) {
        const Vec<Acc> rescale = compute_weights(row, tile);
        if (params_.dropout.enabled()) drop(row, tile);
        add_values(row, all_values.part(tile), rescale);
      }
    }
    store(split);
  }

 private:
  /// Packs the query of a row.
  void load_query(int64_t row, int64_t batch) {
    const int64_t head = head_of(row) % params_.heads;
    const ScoreTransform<Acc> transform(params_, head);
    const T* const query = at<T>(params_.query, batch, head, query_of(row));
    Acc* const features = key_rows_;
    for_vectors<Acc>({0, params_.key_dim}, [&](int64_t d, const auto& load) {
      (Vec<Acc>(transform.factor) * load(query + d)).store(features + d);
    });
    Acc* const packed = queries_ + row / R * R * key_width_ + row % R * F;
    for (int64_t d = 0; d < key_width_; d += F) std::copy_n(features + d, F, packed + d * R);
    for (int64_t f = 0; f < F; ++f) caps_[row / R * vector + f * R + row % R] = transform.cap;
  }

  /// batch * Hq + head. Rows beyond the last repeat it.
  int64_t head_of(int64_t row) const { return first_head_ + std::min(row, schedule_.rows - 1) / params_.queries; }
  int64_t query_of(int64_t row) const { return std::min(row, schedule_.rows - 1) % params_.queries; }

  /// The keys of the tile that the row's query sees, relative to the tile.
  Range seen_by(int64_t row, Range tile) const {
    const Range seen = params_.window.keys_of(query_of(row));
    const int64_t begin = std::clamp(seen.begin, tile.begin, tile.end);
    return {begin - tile.begin, std::clamp(seen.end, begin, tile.end) - tile.begin};
  }

  /// scores_[row / R][key][row % R], a group of keys at a time. Meanwhile the next keys and the tile's values come from
  /// memory.
  void compute_scores(Rows<T> all_keys, Rows<T> all_values, Range tile) {
    for (int64_t first = tile.begin; first < tile.end; first += group) {
      const Range positions{first, std::min(first + group, tile.end)};
      with_rows(all_keys.part(positions), [&](auto keys) {
        for (int64_t row = 0; row < rows_; row += R) {
          const auto fetch = [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
            if (row > 0) return;
            prefetch_first(all_keys.part({first + keys_ahead + begin, first + keys_ahead + end}));
            prefetch_first(all_values.part({first + begin, first + end}));
          };
          multiply(queries_ + row * key_width_, keys, scores_ + row * tile_keys + (first - tile.begin) * R, fetch);
        }
      });
    }
  }

  /// function(rows) with the rows themselves or, if they aren't whole parts of F features or are converted more than
  /// once, a copy of them in the type of the arithmetic, with zeros at its end.
  template <typename Function>
  void with_rows(Rows<T> rows, const Function& function) {
    if constexpr (R == 1) {
      function(rows);
    } else {
      if constexpr (std::is_same_v<T, Acc>) {
        if (rows.dim % F == 0) return function(rows);
      }
      const RowMajor<const Acc> copy = copy_rows(rows, key_rows_.data());
      function(Rows<Acc>{copy.data, copy.row_stride, rows.count, round_up(rows.dim, F)});
    }
  }

  /// Products of R queries and a group of keys. Keys beyond the last repeat it. fetch(begin, end), meanwhile, for some
  /// keys after others: a burst of prefetches would hold up all else.
  template <typename Key, typename Fetch>
  void multiply(const Acc* queries, Rows<Key> keys, Acc* scores, const Fetch& fetch) {
    Vec<Acc> sums[group];
    WMHA_UNROLL
    for (int64_t first = 0; first < group; first += keys_at_once) {
      fetch(first, first + keys_at_once);
      const Key* row[keys_at_once];
      WMHA_UNROLL
      for (int64_t k = 0; k < keys_at_once; ++k) {
        row[k] = keys.row(std::min(first + k, keys.count - 1));
        sums[first + k] = Vec<Acc>(Acc(0));
      }
      for_parts(keys.dim, [&](int64_t d, const auto& load) __attribute__((always_inline)) {
        const Vec<Acc> features = Vec<Acc>::loadu(queries + d * R);
        WMHA_UNROLL
        for (int64_t k = 0; k < keys_at_once; ++k)
          sums[first + k] = at::vec::fmadd(features, load(row[k] + d), sums[first + k]);
      });
    }
    WMHA_UNROLL
    for (int64_t first = 0; first < group; first += F) { sum_features<F>(sums + first).store(scores + first * R); }
  }

  /// function(first, load) for each part of F features; load(row + first) repeats them for R rows.
  template <typename Function>
  [[gnu::always_inline]] static void for_parts(int64_t dim, const Function& function) {
    if constexpr (R == 1) {
      for_vectors<Acc>({0, dim}, function);
    } else {
      for (int64_t d = 0; d < dim; d += F) function(d, [](const Acc* source) { return load_repeated<F>(source); });
    }
  }

  /// From scores to weights 2^(score - reference); moves the rows' references and sums along. Returns the factors of
  /// their outputs.
  Vec<Acc> compute_weights(int64_t row, Range tile) {
    Acc* const scores = scores_ + row * tile_keys;
    const int64_t count = round_up(tile.size() * R, vector);
    if (params_.softcap > 0) cap(row, count);
    hide_unseen(row, tile);
    const Vec<Acc> before = Vec<Acc>::loadu(references_ + row * F);
    Vec<Acc> largest = before;
    for (int64_t i = 0; i < count; i += vector) largest = larger(Vec<Acc>::loadu(scores + i), largest);
    largest = combine_lanes<R>(largest, larger<Acc>);
    largest.store(references_ + row * F);
    // Any finite one, while there are only -inf.
    const Vec<Acc> reference = Vec<Acc>::blendv(largest, Vec<Acc>(Acc(0)), largest == Vec<Acc>(-infinity));
    const Vec<Acc> rescale = exp2(before - reference);
    Vec<Acc> sum = Vec<Acc>::loadu(sums_ + row * F) * rescale;
    for (int64_t i = 0; i < count; i += vector) {
      const Vec<Acc> weight = exp2(Vec<Acc>::loadu(scores + i) - reference);
      sum = sum + weight;
      weight.store(scores + i);
    }
    sum.store(sums_ + row * F);
    return rescale;
  }

  void cap(int64_t row, int64_t count) {
    const Vec<Acc> caps = Vec<Acc>::loadu(caps_ + row * F);
    Acc* const scores = scores_ + row * tile_keys;
    for (int64_t i = 0; i < count; i += vector) (caps * Vec<Acc>::loadu(scores + i).tanh()).store(scores + i);
  }

  /// Scores of keys that a row doesn't see, and of those beyond the last, become -infinity.
  void hide_unseen(int64_t row, Range tile) {
    const bool all_see = schedule_.common.begin <= tile.begin && tile.end <= schedule_.common.end;
    if (all_see && tile.size() % F == 0) return;
    Acc* const scores = scores_ + row * tile_keys;
    const int64_t keys = round_up(tile.size(), F);
    for (int64_t r = 0; r < R; ++r) {
      const Range seen = seen_by(row + r, tile);
      for (int64_t key = 0; key < seen.begin; ++key) scores[key * R + r] = -infinity;
      for (int64_t key = seen.end; key < keys; ++key) scores[key * R + r] = -infinity;
    }
  }

  void drop(int64_t row, Range tile) {
    const auto seed = static_cast<uint64_t>(params_.rng_state[0]);
    for (int64_t r = 0; r < R && row + r < schedule_.rows; ++r) {
      Acc* const weights = scores_ + row * tile_keys + r;
      for (int64_t key = tile.begin; key < tile.end;) {
        const PhiloxWords counter = Dropout::counter(key, query_of(row + r), head_of(row + r), params_.rng_state[1]);
        const PhiloxWords words =
            philox<Dropout::rounds>(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
        const int64_t end = std::min((key / Dropout::group + 1) * Dropout::group, tile.end);
        for (; key < end; ++key) {
          if (!params_.dropout.keeps(words, key)) weights[(key - tile.begin) * R] = 0;
        }
      }
    }
  }

  /// output_[row] = rescale * output_[row] + sum over keys of weight * value, for R rows.
  void add_values(int64_t row, Rows<T> values, Vec<Acc> rescale) {
    constexpr int64_t columns = std::clamp<int64_t>(most_sums / R, 1, 4);
    Acc factors[vector];
    rescale.store(factors);
    const auto load = [](const T* source) { return load_as_acc(source); };
    int64_t d = 0;
    for (; d + columns * vector <= values.dim; d += columns * vector)
      add_columns<columns>(row, values, factors, d, load);
    for_vectors<Acc>({d, values.dim}, [&](int64_t first, const auto& load_vector) {
      add_columns<1>(row, values, factors, first, load_vector);
    });
  }

  /// The same for C vectors of features. Of a single row, even and odd keys have sums of their own, so that the next
  /// addition needn't wait for the last.
  template <int64_t C, typename Load>
  [[gnu::noinline]] void add_columns(int64_t row, Rows<T> values, const Acc* factors, int64_t first, const Load& load) {
    constexpr int64_t chains = R == 1 ? 2 : 1;
    const Acc* weights = scores_ + row * tile_keys;
    Acc* const output = output_ + row * value_width_ + first;
    Vec<Acc> sums[chains][R][C];
    WMHA_UNROLL
    for (int64_t r = 0; r < R; ++r) {
      WMHA_UNROLL
      for (int64_t c = 0; c < C; ++c) {
        sums[0][r][c] = Vec<Acc>::loadu(output + r * value_width_ + c * vector) * Vec<Acc>(factors[r]);
        if (chains > 1) sums[chains - 1][r][c] = Vec<Acc>(Acc(0));
      }
    }
    const T* value = values.data + first;
    const auto add = [&](Vec<Acc>(&sums_of)[R][C]) {
      Vec<Acc> column[C];
      WMHA_UNROLL
      for (int64_t c = 0; c < C; ++c) column[c] = load(value + c * vector);
      WMHA_UNROLL
      for (int64_t r = 0; r < R; ++r) {
        WMHA_UNROLL
        for (int64_t c = 0; c < C; ++c) sums_of[r][c] = at::vec::fmadd(Vec<Acc>(weights[r]), column[c], sums_of[r][c]);
      }
      value += values.stride;
      weights += R;
    };
    int64_t key = 0;
    for (; key + chains <= values.count; key += chains) {
      WMHA_UNROLL
      for (int64_t i = 0; i < chains; ++i) add(sums[i]);
    }
    if (key < values.count) add(sums[0]);
    WMHA_UNROLL
    for (int64_t r = 0; r < R; ++r) {
      WMHA_UNROLL
      for (int64_t c = 0; c < C; ++c) {
        const Vec<Acc> sum = chains > 1 ? sums[0][r][c] + sums[chains - 1][r][c] : sums[0][r][c];
        sum.store(output + r * value_width_ + c * vector);
      }
    }
  }

  /// Leaves the states of the rows or, where there is one split, their outputs.
  void store(int64_t split) {
    for (int64_t row = 0; row < rows_; row += R) {
      const Vec<Acc> sum = Vec<Acc>::loadu(sums_ + row * F);
      combine_lanes<R>(sum, [](Vec<Acc> x, Vec<Acc> y) { return x + y; }).store(sums_ + row * F);
      for (int64_t r = 0; r < R && row + r < schedule_.rows; ++r) {
        const int64_t head = head_of(row + r);
        const int64_t query = query_of(row + r);
        const bool is_only = schedule_.splits == 1;
        Acc* const state = is_only ? state_.data() : workspace_ + schedule_.state_offset(head, query, split);
        state[0] = references_[row * F + r];
        state[1] = sums_[row * F + r];
        std::copy_n(output_ + (row + r) * value_width_, params_.value_dim, state + 2);
        if (is_only) merge_splits<T>(params_, schedule_, state, head, query, merged_);
      }
    }
  }

  const AttentionParams& params_;
  const DecodeSchedule& schedule_;
  Acc* workspace_;
  const int64_t rows_; // whole blocks of R of them
  const int64_t key_width_;
  const int64_t value_width_;
  Buffer<Acc> queries_;    // [rows / R][key_width / F][R][F], scaled
  Buffer<Acc> caps_;       // [rows / R][F][R], each F times
  Buffer<Acc> output_;     // [rows][value_width]
  Buffer<Acc> scores_;     // [rows / R][tile_keys][R]
  Buffer<Acc> references_; // [rows / R][F][R], each F times
  Buffer<Acc> sums_;       // [rows / R][F][R], to be added up
  Buffer<Acc> key_rows_;   // [group][key_width]
  Buffer<Acc> state_;      // of a row
  Buffer<Acc> merged_;     // [value_dim], scratch
  int64_t first_head_ = 0; // batch * Hq + head
};

/// function(R) with the number of rows to handle together, a constant.
template <typename Acc, typename Function>
void with_rows_at_once(int64_t rows, const Function& function) {
  const auto with = [&](auto rows) {
    function(std::integral_constant<int64_t, std::min<int64_t>(rows(), Vec<Acc>::size())>());
  };
  if (rows == 1) return with(std::integral_constant<int64_t, 1>());
  if (rows == 2) return with(std::integral_constant<int64_t, 2>());
  if (rows <= 4) return with(std::integral_constant<int64_t, 4>());
  with(std::integral_constant<int64_t, 8>());
}

} // namespace

void decode(const AttentionParams& params, const DecodeSchedule& schedule, void* workspace, Tasks& tasks) {
  with_scalar_type(params.dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto rows) {
      DecodeBlock<T, rows> block(params, schedule, static_cast<acc_type<T>*>(workspace));
      tasks.for_each([&](int64_t task) {
        const int64_t batch_kv_head = task / schedule.splits;
        block.run(batch_kv_head / params.kv_heads, batch_kv_head % params.kv_heads, task % schedule.splits);
      });
    };
    with_rows_at_once<acc_type<T>>(schedule.rows, run);
  });
}

void merge_decode(const AttentionParams& params, const DecodeSchedule& schedule, const void* workspace, Tasks& tasks) {
  with_scalar_type(params.dtype, [&](auto type) {
    using T = decltype(type);
    using Acc = acc_type<T>;
    const Buffer<Acc> sum(params.value_dim);
    tasks.for_each([&](int64_t task) {
      const int64_t batch_head = task / params.queries;
      const int64_t query = task % params.queries;
      const Acc* const states = static_cast<const Acc*>(workspace) + schedule.state_offset(batch_head, query, 0);
      merge_splits<T>(params, schedule, states, batch_head, query, sum);
    });
  });
}

} // namespace wmha::cpu::CPU_CAPABILITY

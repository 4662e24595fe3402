// The forward pass of bf16 in the tile registers of AMX. As forward.cpp, but queries lie in rows, as the left operand
// of a register does: they are read where they are, and outputs come as they are written.
//
//                   a strip of keys
//                  +---------------+
//   a block of     |  S = Q K^T    |   made in the registers while the strip before it is turned into weights;
//   queries (rows) |  P = 2^(S - r)|
//                  +---------------+   then, for all strips of the tile, output += P V
//
// The reference r of a query is the largest score of the strip where its window begins, rounded up to a whole number.
// Where a query's sum of weights turns out too small or too large, the block is done again, with the largest of all.
#include "passes.h"

#include <array>
#include <cmath>

#include "dropout.h"
#include "lanes.h"
#include "look_ahead.h"
#include "packed_keys.h"
#include "rows.h"
#include "scores.h"
#include "tiles.h"

namespace wmha::cpu::CPU_CAPABILITY {
namespace {

using T = c10::BFloat16;
using M = multiplicand_type<T>;

constexpr int64_t vector = Vec<float>::size();
constexpr int64_t block_queries = tile_rows;
constexpr int64_t strip_keys = Multiplicand<M>::columns;
static_assert(strip_keys == 2 * vector && task_queries % block_queries == 0);

/// What is kept from one block to the next.
struct Buffers {
  static constexpr int64_t weights_stride = steps<M>(key_block); // of tiles

  const int64_t output_width;
  const int64_t most_keys; // of a block, in whole strips
  Buffer<M> queries;       // [block_queries][left_width(key_dim)], where they can't be read in place
  Buffer<float> products;  // [block_queries][strip_keys]
  Buffer<M> weights;       // [block_queries][weights_stride]
  Buffer<float> output;    // [block_queries][output_width]
  PackedKeys<T, RightTransposedForm<T>> keys;
  PackedKeys<T, RightRowsForm<T>> values;

  explicit Buffers(const AttentionParams& params)
      : output_width(whole_columns<M>(params.value_dim)),
        most_keys(most_keys_of_block(params) + strip_keys),
        queries(block_queries * left_width<M>(params.key_dim)),
        products(block_queries * strip_keys),
        weights(block_queries * weights_stride),
        output(block_queries * output_width),
        keys(params.key_dim, most_keys, params.keys()),
        values(params.value_dim, most_keys, params.keys()) {}
};

class ForwardBlock {
  static constexpr float infinity = std::numeric_limits<float>::infinity();
  // A sum with the weight of the reference's score is larger than 1/2. The largest one leaves room for large values:
  // fp32 reaches to 2^128.
  static constexpr float smallest_sum = 0.25f;
  static constexpr float largest_sum = 1 << 30;

 public:
  ForwardBlock(const AttentionParams& params, Buffers& buffers, int64_t batch, int64_t head, Range block)
      : params_(params),
        buffers_(buffers),
        batch_(batch),
        head_(head),
        kv_head_(params.kv_head(head)),
        block_(block),
        keys_(params.window.keys_of(block)),
        first_strip_(begin_of_strip(params.window, keys_.begin)),
        visibility_(params.window, block, block_queries),
        transform_(params, head),
        dropout_(params, batch * params.heads + head),
        ahead_(params, batch, head, block, keys_, (keys_.end - first_strip_) / 2),
        queries_(left_rows<M>(rows_of<T>(params.query, batch, head, block, params.key_dim), buffers.queries)) {}

  void run() {
    std::fill_n(largest_, block_queries, -infinity);
    std::fill_n(reference_, block_queries, 0.0f);
    attend(/*guesses=*/true);
    if (any_is_far()) attend_again();
    store();
  }

 private:
  /// Weights and their sums, and outputs, which are sums of weights and values. guesses: references are yet to be
  /// found.
  void attend(bool guesses) {
    std::fill_n(sums_, block_queries, Vec<float>(0.0f));
    for_tiles([&](Range tile) {
      for_strips(tile, [&](Range strip) {
        if (guesses && visibility_.keys[block_.size() - 1].begin >= strip.begin) { // a window begins here
          find_largest(strip);
          set_references([&](int64_t row) { return visibility_.keys[row].begin >= strip.begin; });
        }
        const auto weights = reinterpret_cast<T*>(buffers_.weights.data()) + (strip.begin - tile.begin);
        with_flags(
            [&](auto masked, auto drops, auto capped) { weigh<masked, drops, capped>(strip, weights); },
            !visibility_.all_see(strip, {0, block_queries}), params_.dropout.enabled(), transform_.cap > 0);
      });
      add_to_outputs(tile);
    });
    for (int64_t row = 0; row < block_queries; row += vector) {
      Vec<float> sums[vector];
      std::copy_n(sums_ + row, vector, sums);
      sum_each(sums).store(sum_ + row);
    }
  }

  template <typename Function>
  void for_tiles(const Function& function) {
    for (int64_t begin = first_strip_; begin < keys_.end; begin += key_block) {
      function(Range{begin, std::min(begin + key_block, keys_.end)});
    }
  }

  /// function(strip) for each strip of a tile, with its products in the buffer. Meanwhile those of the next one are
  /// made.
  template <typename Function>
  void for_strips(Range tile, const Function& function) {
    const auto keys = buffers_.keys.of(params_.key, batch_, kv_head_, tile, keys_);
    const int64_t group_size = RightTransposedForm<T>::group_size(params_.key_dim);
    const LeftRows<M> queries(queries_, block_queries);
    const StoreLater<float> products{{buffers_.products, strip_keys}};
    for (int64_t next = tile.begin; next < tile.end + strip_keys; next += strip_keys) {
      if (next < tile.end) {
        const RowMajor<const M> group{keys.data + (next - tile.begin) / strip_keys * group_size, keys.row_stride};
        multiply<M>(0, strip_keys / vector, steps<M>(params_.key_dim), queries, group, products);
      }
      if (next > tile.begin) function(Range{next - strip_keys, next});
      if (next < tile.end) products.store();
    }
  }

  /// The scores of a query and the two halves of a strip's keys, -infinity where it doesn't see them.
  template <bool masked, bool capped>
  std::array<Vec<float>, 2> scores_of(int64_t row, Range strip) const {
    std::array<Vec<float>, 2> scores;
    for (int64_t half = 0; half < 2; ++half) {
      const Vec<float> product = Vec<float>::loadu(buffers_.products + row * strip_keys + half * vector);
      scores[half] = transform_.template score<capped>(product);
    }
    if constexpr (masked) {
      const auto place = [&](int64_t key) { return std::clamp<int64_t>(key - strip.begin, 0, strip_keys); };
      const Range keys = visibility_.keys[row];
      const uint64_t seen = (uint64_t{1} << place(keys.end)) - (uint64_t{1} << place(keys.begin));
      for (int64_t half = 0; half < 2; ++half) {
        const Seen<float> seen_half{static_cast<__mmask16>(seen >> half * vector)};
        scores[half] = seen_half.select(scores[half], Vec<float>(-infinity));
      }
    }
    return scores;
  }

  void find_largest(Range strip) {
    with_flags(
        [&](auto capped) {
          for (int64_t first = 0; first < block_queries; first += vector) {
            Vec<float> of_row[vector];
            for (int64_t i = 0; i < vector; ++i) {
              const auto [low, high] = scores_of<true, capped>(first + i, strip);
              of_row[i] = larger(low, high);
            }
            const Vec<float> largest = combine_each(of_row, larger<float>);
            larger(largest, Vec<float>::loadu(largest_ + first)).store(largest_ + first);
          }
        },
        transform_.cap > 0);
  }

  /// The references of the queries that are to move become the largest scores found so far.
  template <typename Moves>
  void set_references(const Moves& moves) {
    for (int64_t row = 0; row < block_queries; ++row) {
      if (moves(row)) reference_[row] = largest_[row] > -infinity ? std::ceil(largest_[row]) : 0;
    }
  }

  /// From a strip's products to weights 2^(score - reference), and to their sums.
  template <bool masked, bool drops, bool capped>
  void weigh(Range strip, T* weights) {
    if constexpr (drops) dropout_.draw(strip.begin, block_.begin);
    for (int64_t pair = 0; pair < block_queries; pair += 2) {
      ahead_.fetch();
      WMHA_UNROLL
      for (int64_t row = pair; row < pair + 2; ++row) {
        const auto [low, high] = scores_of<masked, capped>(row, strip);
        const Vec<float> reference(reference_[row]);
        const Vec<float> low_weights = exp2(low - reference);
        const Vec<float> high_weights = exp2(high - reference);
        sums_[row] = sums_[row] + (low_weights + high_weights);
        auto rounded = round_to<T>(low_weights, high_weights);
        if constexpr (drops) rounded = dropout_.keep(rounded, row);
        rounded.store(weights + row * Buffers::weights_stride * Multiplicand<M>::terms);
      }
    }
  }

  void add_to_outputs(Range tile) {
    const auto values = buffers_.values.of(params_.value, batch_, kv_head_, tile, keys_);
    const LeftRows<M> weights({buffers_.weights, Buffers::weights_stride}, block_queries);
    const RowMajor<float> output{buffers_.output, buffers_.output_width};
    const int64_t vectors = buffers_.output_width / vector;
    const int64_t depth = steps<M>(tile.size());
    if (tile.begin == first_strip_) {
      multiply<M>(0, vectors, depth, weights, values, StoreTo<float>{output});
    } else {
      multiply<M>(0, vectors, depth, weights, values, AddTo<float>{output});
    }
  }

  /// Does the sum fit its reference?
  static bool is_near(float sum) { return smallest_sum <= sum && sum <= largest_sum; }
  bool is_far(int64_t row) const { return visibility_.keys[row].size() > 0 && !is_near(sum_[row]); }

  bool any_is_far() const {
    bool all_are_near = true; // without a look at who sees whom
    for (int64_t row = 0; row < block_queries; ++row) all_are_near &= is_near(sum_[row]);
    bool any = false;
    for (int64_t row = 0; row < block_.size() && !all_are_near; ++row) any |= is_far(row);
    return any;
  }

  /// With the largest scores as references where others were too far; of queries with near ones, nothing may change.
  [[gnu::noinline]] void attend_again() {
    for_tiles([&](Range tile) { for_strips(tile, [&](Range strip) { find_largest(strip); }); });
    set_references([&](int64_t row) { return is_far(row); });
    attend(/*guesses=*/false);
  }

  void store() const {
    const auto inverse_keep = static_cast<float>(params_.dropout.inverse_keep);
    float* const logsumexp =
        static_cast<float*>(params_.logsumexp) + (batch_ * params_.heads + head_) * params_.queries + block_.begin;
    float logsumexps[block_queries];
    for (int64_t row = 0; row < block_queries; row += vector) {
      const Vec<float> reference = Vec<float>::loadu(reference_ + row);
      logsumexp_of(Vec<float>::loadu(sum_ + row), reference).store(logsumexps + row);
    }
    std::copy_n(logsumexps, block_.size(), logsumexp); // of queries that see no key, log 0
    for (int64_t row = 0; row < block_.size(); ++row) {
      T* const target = at<T>(params_.output, batch_, head_, block_.begin + row);
      if (visibility_.keys[row].size() == 0) {
        std::fill_n(target, params_.value_dim, T(0));
      } else {
        const float* const output = buffers_.output + row * buffers_.output_width;
        store_row(output, params_.value_dim, inverse_keep / sum_[row], target);
      }
    }
  }

  const AttentionParams& params_;
  Buffers& buffers_;
  const int64_t batch_;
  const int64_t head_;
  const int64_t kv_head_;
  const Range block_;
  const Range keys_; // that at least one query of the block sees
  const int64_t first_strip_;
  const Visibility visibility_;
  const ScoreTransform<M> transform_;
  DropoutRows dropout_;
  LookAhead<T> ahead_;
  const RowMajor<const M> queries_;
  // Of each query:
  alignas(64) float largest_[block_queries]; // score
  float reference_[block_queries];
  Vec<float> sums_[block_queries]; // of the weights, in each lane
  float sum_[block_queries];       // of the lanes
};

} // namespace

void forward(const AttentionParams& params, Tasks& tasks) {
  const TileRegisters registers;
  Buffers buffers(params);
  for_blocks(params, tasks, block_queries, [&](int64_t batch, int64_t head, Range block) {
    ForwardBlock(params, buffers, batch, head, block).run();
  });
}

} // namespace wmha::cpu::CPU_CAPABILITY

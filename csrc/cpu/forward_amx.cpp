// The forward pass of bf16 in the tile registers of AMX. As forward.cpp, but queries lie in rows, as the left operand
// of a register does: they are read where they are, and outputs come as they are written.
//
//                   a tile of keys
//                  +---------------+
//   a block of     |  S = Q K^T    |   made in the registers while the tile before it is turned into weights;
//   queries (rows) |  P = 2^(S - r)|
//                  +---------------+   then, for a group of tiles, output += P V
//
// Where not all keys that a query sees fit the second cache, each part of them that does serves several blocks.
//
// The reference r of a query is the score of the first key in its window, rounded up to a whole number, so that results
// don't depend on it. Where a sum of weights turns out too small or too large, the block is done again, with the
// largest score of all.
#include "passes.h"

#include <array>
#include <cmath>
#include <vector>

#include "dropout.h"
#include "key_tiles.h"
#include "lanes.h"
#include "look_ahead.h"
#include "rows.h"
#include "scores.h"
#include "tiles.h"

namespace wmha::cpu::CPU_CAPABILITY {
namespace {

using T = c10::BFloat16;
using M = multiplicand_type<T>;

constexpr int64_t vector = Vec<float>::size();
constexpr int64_t tiles_at_once = 12; // a group: their weights, 2 KiB each, stay in the first cache
constexpr int64_t most_blocks = 12;   // that share a part of the keys
static_assert(square == tile_rows && square == query_block && square == 2 * vector);

/// What is kept from one task to the next.
struct Buffers {
  PackedTiles keys;
  const int64_t blocks; // that share a part of the keys
  const int64_t query_width;
  const int64_t output_width;
  Buffer<M> queries;      // [blocks][square][query_width], where they can't be read in place
  Buffer<float> products; // [square][square]
  Buffer<M> weights;      // [tiles_at_once][square][square_pairs]
  Buffer<float> output;   // [blocks][square][output_width]

  explicit Buffers(const AttentionParams& params)
      : keys(params, tiles_at_once),
        blocks(keys.holds_all() ? 1 : most_blocks),
        query_width(left_width<M>(params.key_dim)),
        output_width(whole_columns<M>(params.value_dim)),
        queries(blocks * square * query_width),
        products(square * square),
        weights(tiles_at_once * square_size),
        output(blocks * square * output_width) {}
};

class ForwardBlock {
  static constexpr float infinity = std::numeric_limits<float>::infinity();
  // A sum with the weight of the reference's score is larger than 1/2. The largest one leaves room for large values:
  // fp32 reaches to 2^128.
  static constexpr float smallest_sum = 0.25f;
  static constexpr float largest_sum = int64_t{1} << 40;

 public:
  /// place: of the block among those that share the buffers.
  ForwardBlock(const AttentionParams& params, Buffers& buffers, int64_t batch, int64_t head, Range block, int64_t place)
      : params_(params),
        buffers_(buffers),
        batch_(batch),
        head_(head),
        block_(block),
        key_tiles_(params.window),
        keys_(params.window.keys_of(block)),
        tiles_(key_tiles_.of(keys_)),
        visibility_(params.window, block, square),
        transform_(params, head),
        dropout_(params, batch * params.heads + head),
        ahead_(params, batch, head, block, keys_, tiles_.size() * square_pairs),
        queries_(
            left_rows<M>(
                rows_of<T>(params.query, batch, head, block, params.key_dim),
                buffers.queries + place * square * buffers.query_width)),
        output_{buffers.output + place * square * buffers.output_width, buffers.output_width} {
    std::fill_n(reference_, square, 0.0f);
    std::fill_n(sums_, square, Vec<float>(0.0f));
  }

  /// Weights and their sums, and outputs, which are sums of weights and values, of those of the tiles that the block
  /// sees. guesses: references are yet to be found.
  void attend(Range tiles, bool guesses = true) {
    for_groups(tiles, [&](Range group) {
      for_tiles(group, [&](int64_t tile, Range keys) {
        if (guesses && visibility_.keys[block_.size() - 1].begin >= keys.begin) guess_references(keys);
        const auto weights = reinterpret_cast<T*>(buffers_.weights + (tile - group.begin) * square_size);
        with_flags(
            [&](auto masked, auto drops, auto capped) { weigh<masked, drops, capped>(keys, weights); },
            !visibility_.all_see(keys, {0, square}), params_.dropout.enabled(), transform_.cap > 0);
      });
      add_to_outputs(group);
    });
  }

  /// After all tiles.
  void finish() {
    add_up_sums();
    if (any_is_far()) attend_again();
    store();
  }

 private:
  void add_up_sums() {
    for (int64_t row = 0; row < square; row += vector) {
      Vec<float> sums[vector];
      std::copy_n(sums_ + row, vector, sums);
      sum_each(sums).store(sum_ + row);
    }
  }

  template <typename Function>
  void for_groups(Range tiles, const Function& function) {
    const int64_t end = std::min(tiles.end, tiles_.end);
    for (int64_t begin = std::max(tiles.begin, tiles_.begin); begin < end; begin += tiles_at_once) {
      const Range group{begin, std::min(begin + tiles_at_once, end)};
      buffers_.keys.pack(batch_, head_, group, keys_);
      function(group);
    }
  }

  /// function(tile, keys) for each tile, with its products in the buffer. Meanwhile those of the next one are made.
  template <typename Function>
  void for_tiles(Range tiles, const Function& function) {
    for (int64_t next = tiles.begin; next <= tiles.end; ++next) {
      if (next < tiles.end) {
        clear_sums();
        multiply_add(queries_, buffers_.keys.keys_of(next), steps<M>(params_.key_dim));
      }
      if (next > tiles.begin) function(next - 1, key_tiles_.keys_of(next - 1));
      if (next < tiles.end) store_sums({buffers_.products, square}, 0);
    }
  }

  /// The scores of a query and the two halves of a tile's keys, -infinity where it doesn't see them.
  template <bool masked, bool capped>
  std::array<Vec<float>, 2> scores_of(int64_t row, Range keys) const {
    std::array<Vec<float>, 2> scores;
    for (int64_t half = 0; half < 2; ++half) {
      const Vec<float> product = Vec<float>::loadu(buffers_.products + row * square + half * vector);
      scores[half] = transform_.template score<capped>(product);
    }
    if constexpr (masked) {
      const auto place = [&](int64_t key) { return std::clamp<int64_t>(key - keys.begin, 0, square); };
      const Range in_sight = visibility_.keys[row];
      const uint64_t seen = (uint64_t{1} << place(in_sight.end)) - (uint64_t{1} << place(in_sight.begin));
      for (int64_t half = 0; half < 2; ++half) {
        const Seen<float> seen_half{static_cast<__mmask16>(seen >> half * vector)};
        scores[half] = seen_half.select(scores[half], Vec<float>(-infinity));
      }
    }
    return scores;
  }

  /// Of the queries whose windows begin in a tile, references become the scores of the first keys there.
  void guess_references(Range keys) {
    alignas(64) float first_products[square] = {};
    uint64_t begins = 0;
    for (int64_t row = 0; row < square; ++row) {
      const Range in_sight = visibility_.keys[row];
      if (in_sight.size() == 0 || !keys.contains(in_sight.begin)) continue;
      begins |= uint64_t{1} << row;
      first_products[row] = buffers_.products[row * square + in_sight.begin - keys.begin];
    }
    with_flags(
        [&](auto capped) {
          for (int64_t row = 0; row < square; row += vector) {
            const Vec<float> scores = transform_.template score<capped>(Vec<float>::loadu(first_products + row));
            const Seen<float> begin{static_cast<__mmask16>(begins >> row)};
            begin.select(scores.ceil(), Vec<float>::loadu(reference_ + row)).store(reference_ + row);
          }
        },
        transform_.cap > 0);
  }

  void find_largest(Range keys, float* largest) const {
    with_flags(
        [&](auto capped) {
          for (int64_t first = 0; first < square; first += vector) {
            Vec<float> of_row[vector];
            for (int64_t i = 0; i < vector; ++i) {
              const auto [low, high] = scores_of<true, capped>(first + i, keys);
              of_row[i] = larger(low, high);
            }
            const Vec<float> of_rows = combine_each(of_row, larger<float>);
            larger(of_rows, Vec<float>::loadu(largest + first)).store(largest + first);
          }
        },
        transform_.cap > 0);
  }

  /// Does a query see any of a vector of keys?
  bool sees_any(int64_t row, int64_t first_key) const {
    const Range keys = visibility_.keys[row];
    return keys.begin < first_key + vector && first_key < keys.end;
  }

  /// From a tile's products to weights 2^(score - reference), and to their sums.
  template <bool masked, bool drops, bool capped>
  void weigh(Range keys, T* weights) {
    if constexpr (drops) dropout_.draw(keys.begin, block_.begin);
    for (int64_t pair = 0; pair < square; pair += 2) {
      ahead_.fetch();
      WMHA_UNROLL
      for (int64_t row = pair; row < pair + 2; ++row) {
        const auto scores = scores_of<masked, capped>(row, keys);
        const auto weights_of = [&](int64_t half) {
          if (masked && !sees_any(row, keys.begin + half * vector)) return Vec<float>(0.0f);
          return exp2(scores[half] - Vec<float>(reference_[row]));
        };
        const Vec<float> low = weights_of(0);
        const Vec<float> high = weights_of(1);
        sums_[row] = sums_[row] + (low + high);
        auto rounded = round_to<T>(low, high);
        if constexpr (drops) rounded = dropout_.keep(rounded, row);
        rounded.store(weights + row * square);
      }
    }
  }

  void add_to_outputs(Range tiles) {
    for (int64_t d = 0; d < buffers_.output_width; d += square) {
      tiles.begin == tiles_.begin ? clear_sums() : load_sums(output_, d);
      for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
        const M* const weights = buffers_.weights + (tile - tiles.begin) * square_size;
        const M* const values = buffers_.keys.values_of(tile) + d * square_pairs;
        multiply_add({weights, square_pairs}, values);
      }
      store_sums(output_, d);
    }
  }

  /// Does the sum fit its reference?
  static bool is_near(float sum) { return smallest_sum <= sum && sum <= largest_sum; }
  bool is_far(int64_t row) const { return visibility_.keys[row].size() > 0 && !is_near(sum_[row]); }

  bool any_is_far() const {
    bool all_are_near = true; // without a look at who sees whom
    for (int64_t row = 0; row < square; ++row) all_are_near &= is_near(sum_[row]);
    bool any = false;
    for (int64_t row = 0; row < block_.size() && !all_are_near; ++row) any |= is_far(row);
    return any;
  }

  /// With the largest scores as references where others were too far; of queries with near ones, nothing may change.
  [[gnu::noinline]] void attend_again() {
    alignas(64) float largest[square];
    std::fill_n(largest, square, -infinity);
    buffers_.keys.forget(); // later blocks have cleared what they don't see
    for_groups(
        tiles_, [&](Range group) { for_tiles(group, [&](int64_t, Range keys) { find_largest(keys, largest); }); });
    for (int64_t row = 0; row < square; ++row) {
      if (is_far(row)) reference_[row] = largest[row] > -infinity ? std::ceil(largest[row]) : 0;
    }
    std::fill_n(sums_, square, Vec<float>(0.0f));
    attend(tiles_, /*guesses=*/false);
    add_up_sums();
  }

  void store() const {
    const auto inverse_keep = static_cast<float>(params_.dropout.inverse_keep);
    float* const logsumexp =
        static_cast<float*>(params_.logsumexp) + (batch_ * params_.heads + head_) * params_.queries + block_.begin;
    float logsumexps[square];
    float factors[square];
    for (int64_t row = 0; row < square; row += vector) {
      const Vec<float> sum = Vec<float>::loadu(sum_ + row);
      logsumexp_of(sum, Vec<float>::loadu(reference_ + row)).store(logsumexps + row);
      (Vec<float>(inverse_keep) / sum).store(factors + row);
    }
    std::copy_n(logsumexps, block_.size(), logsumexp); // of queries that see no key, log 0
    for (int64_t row = 0; row < block_.size(); ++row) {
      T* const target = at<T>(params_.output, batch_, head_, block_.begin + row);
      if (visibility_.keys[row].size() == 0) {
        std::fill_n(target, params_.value_dim, T(0));
      } else {
        store_row(output_.row(row), params_.value_dim, factors[row], target);
      }
    }
  }

  const AttentionParams& params_;
  Buffers& buffers_;
  const int64_t batch_;
  const int64_t head_;
  const Range block_;
  const KeyTiles key_tiles_;
  const Range keys_;  // that at least one query of the block sees
  const Range tiles_; // that they lie in
  const Visibility visibility_;
  const ScoreTransform<M> transform_;
  DropoutRows dropout_;
  LookAhead<T, 4> ahead_;
  const RowMajor<const M> queries_;
  const RowMajor<float> output_;
  // Of each query:
  alignas(64) float reference_[square];
  Vec<float> sums_[square]; // of the weights, in each lane
  float sum_[square];       // of the lanes
};

} // namespace

void forward(const AttentionParams& params, Tasks& tasks) {
  const TileRegisters registers;
  Buffers buffers(params);
  const KeyTiles key_tiles(params.window);
  std::vector<ForwardBlock> blocks;
  blocks.reserve(buffers.blocks);
  for_blocks(params, tasks, square, buffers.blocks, [&](int64_t batch, int64_t head, Range queries) {
    blocks.clear();
    for (int64_t first = queries.begin; first < queries.end; first += square) {
      const Range block{first, std::min(first + square, queries.end)};
      blocks.emplace_back(params, buffers, batch, head, block, static_cast<int64_t>(blocks.size()));
    }
    const Range tiles = key_tiles.of(params.window.keys_of(queries));
    for (int64_t begin = tiles.begin; begin < tiles.end; begin += buffers.keys.size()) {
      for (ForwardBlock& block : blocks) block.attend({begin, begin + buffers.keys.size()});
    }
    for (ForwardBlock& block : blocks) block.finish();
  });
}

} // namespace wmha::cpu::CPU_CAPABILITY

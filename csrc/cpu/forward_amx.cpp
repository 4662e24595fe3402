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

#include <cmath>
#include <optional>
#include <vector>

#include "dropout.h"
#include "key_tiles.h"
#include "lanes.h"
#include "look_ahead.h"
#include "rows.h"
#include "scores.h"
#include "seen_keys.h"
#include "tiles.h"

namespace wmha::cpu::CPU_CAPABILITY {
namespace {

using T = c10::BFloat16;
using M = multiplicand_type<T>;

constexpr int64_t vector = Vec<float>::size();
constexpr int64_t tiles_at_once = 12; // a group: their weights, 2 KiB each, stay in the first cache
constexpr int64_t most_blocks = 12;   // that share a part of the keys
constexpr int64_t quarters = 4; // of a tile's rows: beside each, a step of the next tile's products and a fetch ahead
static_assert(square == tile_rows && square == query_block && square == 2 * vector && square == 8 * quarters);

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
        keys_(params.window.keys_of(block)),
        tiles_(buffers.keys.tiles().of(keys_)),
        visibility_(params.window, block, square),
        transform_(params, head),
        dropout_(params, batch * params.heads + head),
        ahead_(params, batch, head, block, keys_, tiles_.size() * quarters),
        queries_(
            left_rows<M>(
                rows_of<T>(params.query, batch, head, block, params.key_dim),
                buffers.queries + place * square * buffers.query_width)),
        output_{buffers.output + place * square * buffers.output_width, buffers.output_width} {
    std::fill_n(reference_, square, 0.0f);
    std::fill_n(sums_, square, Vec<float>(0.0f));
  }

  /// Weights and their sums, and outputs, which are sums of weights and values, of those of the tiles that the block
  /// sees.
  void attend(Range tiles) {
    for_groups(tiles, [&](Range group) {
      for_tiles(group, [&](int64_t tile, Range keys, StepwiseProduct& next) {
        if (far_ == 0) guess_references(keys);
        const auto weights = reinterpret_cast<T*>(buffers_.weights + (tile - group.begin) * square_size);
        with_flags(
            [&](auto masked, auto drops, auto careful) { weigh<masked, drops, careful>(keys, weights, next); },
            !visibility_.all_see(keys, {0, square}), params_.dropout.enabled(), far_ != 0 || transform_.cap > 0);
      });
      add_to_outputs(group);
    });
  }

  /// After all tiles.
  void finish() {
    add_up_sums();
    far_ = far_queries();
    if (far_ != 0) attend_again();
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

  /// function(tile, keys, next) for each tile, with its products in the buffer. Meanwhile those of the next one may be
  /// made.
  template <typename Function>
  void for_tiles(Range tiles, const Function& function) {
    for (int64_t next_tile = tiles.begin; next_tile <= tiles.end; ++next_tile) {
      const bool is_one = next_tile < tiles.end;
      StepwiseProduct next(queries_, buffers_.keys.keys_of(next_tile), is_one ? steps<M>(params_.key_dim) : 0);
      if (is_one) clear_sums();
      if (next_tile > tiles.begin) function(next_tile - 1, buffers_.keys.tiles().keys_of(next_tile - 1), next);
      next.finish();
      if (is_one) store_sums({buffers_.products, square}, 0);
    }
  }

  Vec<float> score(Vec<float> product) const {
    return transform_.cap > 0 ? transform_.template score<true>(product) : transform_.template score<false>(product);
  }

  /// Of the queries whose windows begin in a tile, references become the scores of the first keys there.
  void guess_references(Range keys) {
    if (visibility_.keys[block_.size() - 1].begin < keys.begin) return; // all begin before
    alignas(64) float first_products[square];
    uint64_t begin_here = 0; // a bit for each query
    for (int64_t row = 0; row < square; row += EightRanges::count) {
      const EightRanges seen(visibility_.keys + row);
      const __m512i place = _mm512_sub_epi64(seen.begins, _mm512_set1_epi64(keys.begin));
      const __mmask8 here = _mm512_mask_cmplt_epu64_mask(
          _mm512_cmplt_epi64_mask(seen.begins, seen.ends), place, _mm512_set1_epi64(square));
      const __m512i index = _mm512_add_epi64(
          place, _mm512_mullo_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(square)));
      const float* const products = buffers_.products + row * square;
      _mm256_store_ps(
          first_products + row, _mm512_mask_i64gather_ps(_mm256_setzero_ps(), here, index, products, sizeof(float)));
      begin_here |= uint64_t{here} << row;
    }
    for (int64_t row = 0; row < square; row += vector) {
      const Seen<float> begin{static_cast<__mmask16>(begin_here >> row)};
      const Vec<float> scores = score(Vec<float>::loadu(first_products + row));
      begin.select(scores.ceil(), Vec<float>::loadu(reference_ + row)).store(reference_ + row);
    }
  }

  void find_largest(Range keys, float* largest) const {
    const SeenKeys seen(visibility_, keys);
    for (int64_t first = 0; first < square; first += vector) {
      Vec<float> of_row[vector];
      for (int64_t i = 0; i < vector; ++i) {
        const auto score_of = [&](int64_t half) {
          const Vec<float> product = Vec<float>::loadu(buffers_.products + (first + i) * square + half * vector);
          return seen.of(first + i, half).select(score(product), Vec<float>(-infinity));
        };
        of_row[i] = larger(score_of(0), score_of(1));
      }
      const Vec<float> of_rows = combine_each(of_row, larger<float>);
      larger(of_rows, Vec<float>::loadu(largest + first)).store(largest + first);
    }
  }

  bool is_far(int64_t row) const { return far_ >> row & 1; }

  /// Score less reference, in one operation, which doesn't round the score. careful: there may be a softcap and queries
  /// that are far. Scores of these are rounded, as their references were: beyond 2^31 that alone is more than an
  /// exponent holds.
  template <bool careful>
  Vec<float> exponents(Vec<float> products, int64_t row) const {
    const Vec<float> reference(reference_[row]);
    if (careful && (transform_.cap > 0 || is_far(row))) return score(products) - reference;
    return at::vec::fmsub(products, Vec<float>(transform_.factor), reference);
  }

  /// Of two queries. seen: those of a tile's keys, if not all are.
  template <bool drops, bool careful>
  [[gnu::always_inline]] void weigh_pair(int64_t pair, const float* products, const SeenKeys* seen, T* weights) {
    Vec<float> halves[4];
    WMHA_UNROLL
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t row = pair + i / 2;
      halves[i] = exp2(exponents<careful>(Vec<float>::loadu(products + pair * square + i * vector), row));
      if (seen != nullptr) halves[i] = seen->of(row, i % 2).select(halves[i], Vec<float>(0.0f));
    }
    WMHA_UNROLL
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t row = pair + i;
      sums_[row] = sums_[row] + (halves[2 * i] + halves[2 * i + 1]);
      auto rounded = round_to<T>(halves[2 * i], halves[2 * i + 1]);
      if constexpr (drops) rounded = dropout_.keep(rounded, row);
      rounded.store(weights + row * square);
    }
  }

  /// From a tile's products to weights, 2^exponent, and to their sums. Meanwhile the next tile's products are made.
  /// (One after the other takes up to 9 % longer where windows are wide.)
  template <bool masked, bool drops, bool careful>
  void weigh(Range keys, T* weights, StepwiseProduct& next) {
    if constexpr (drops) dropout_.draw(keys.begin, block_.begin);
    std::optional<SeenKeys> some;
    if constexpr (masked) some.emplace(visibility_, keys);
    const float* const products = buffers_.products;
    const SeenKeys* const seen = masked ? &*some : nullptr;
    for (int64_t row = 0; row < square; row += square / quarters) { // four pairs of rows, four parts of a step
      ahead_.fetch();
      next.add<0>();
      weigh_pair<drops, careful>(row, products, seen, weights);
      next.add<1>();
      weigh_pair<drops, careful>(row + 2, products, seen, weights);
      next.add<2>();
      weigh_pair<drops, careful>(row + 4, products, seen, weights);
      next.add<3>();
      weigh_pair<drops, careful>(row + 6, products, seen, weights);
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

  uint64_t far_queries() const {
    uint64_t far = 0;
    for (int64_t row = 0; row < square; row += vector) {
      const Vec<float> sums = Vec<float>::loadu(sum_ + row);
      const auto near = Seen<float>::between(Vec<float>(smallest_sum), sums, sums, Vec<float>(largest_sum));
      far |= uint64_t{_knot_mask16(near.lanes)} << row;
    }
    for (int64_t row = 0; row < square && far != 0; ++row) {
      if (visibility_.keys[row].size() == 0) far &= ~(uint64_t{1} << row);
    }
    return far;
  }

  /// With the largest scores as references where others were too far; of queries with near ones, nothing may change.
  [[gnu::noinline]] void attend_again() {
    alignas(64) float largest[square];
    std::fill_n(largest, square, -infinity);
    buffers_.keys.forget(); // later blocks have cleared what they don't see
    for_groups(tiles_, [&](Range group) {
      for_tiles(group, [&](int64_t, Range keys, StepwiseProduct&) { find_largest(keys, largest); });
    });
    for (int64_t row = 0; row < square; ++row) {
      if (is_far(row)) reference_[row] = largest[row] > -infinity ? std::ceil(largest[row]) : 0;
    }
    std::fill_n(sums_, square, Vec<float>(0.0f));
    attend(tiles_);
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
  const Range keys_;  // that at least one query of the block sees
  const Range tiles_; // that they lie in
  const Visibility visibility_;
  const ScoreTransform<M> transform_;
  DropoutRows dropout_;
  LookAhead<T, 4> ahead_;
  const RowMajor<const M> queries_;
  const RowMajor<float> output_;
  uint64_t far_ = 0; // queries whose sums didn't fit their references, a bit for each
  // Of each query:
  alignas(64) float reference_[square];
  Vec<float> sums_[square]; // of the weights, in each lane
  float sum_[square];       // of the lanes
};

} // namespace

void forward(const AttentionParams& params, Tasks& tasks) {
  const TileRegisters registers;
  Buffers buffers(params);
  std::vector<ForwardBlock> blocks;
  blocks.reserve(buffers.blocks);
  for_blocks(params, tasks, square, buffers.blocks, [&](int64_t batch, int64_t head, Range queries) {
    blocks.clear();
    for (int64_t first = queries.begin; first < queries.end; first += square) {
      const Range block{first, std::min(first + square, queries.end)};
      blocks.emplace_back(params, buffers, batch, head, block, static_cast<int64_t>(blocks.size()));
    }
    const Range tiles = buffers.keys.tiles().of(params.window.keys_of(queries));
    for (int64_t begin = tiles.begin; begin < tiles.end; begin += buffers.keys.size()) {
      for (ForwardBlock& block : blocks) block.attend({begin, begin + buffers.keys.size()});
    }
    for (ForwardBlock& block : blocks) block.finish();
  });
}

} // namespace wmha::cpu::CPU_CAPABILITY

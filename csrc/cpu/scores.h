// Between the product and the softmax: what happens to a tile of scores, keys in rows and queries in columns ("lanes"),
// so that all of it is vertical. Scores are in units of log 2: exp(z) = 2^(z * log2 e).
#pragma once

#include <cstdint>
#include <limits>

#include "../params.h"
#include "exp2.h"
#include "schedule.h"
#include "tiles.h"

namespace wmha::cpu::CPU_CAPABILITY {

/// Queries handled together: those of a score tile. With 96, fp32 loses 2 % (with AVX2 5 %) and pairs of bf16 gain 3 %.
#if defined(CPU_CAPABILITY_AMX)
constexpr Blocking blocking{.query_block = tile_rows, .least_chunk = 256, .product_rate = 5};
#elif defined(CPU_CAPABILITY_AVX512_BF16)
constexpr Blocking blocking{.query_block = 96, .least_chunk = 128, .product_rate = 1};
#else
constexpr Blocking blocking{.query_block = 48, .least_chunk = 128, .product_rate = 1};
#endif
constexpr int64_t query_block = blocking.query_block;

/// The keys that a block of queries sees, at most.
inline int64_t most_keys_of_block(const AttentionParams& params) {
  int64_t most = 0;
  for (int64_t first = 0; first < params.queries; first += query_block) {
    const Range block{first, std::min(first + query_block, params.queries)};
    most = std::max(most, params.window.keys_of(block).size());
  }
  return most;
}

/// Keys of a score tile: the rows of key and value and the weights stay in the first two caches. It makes no
/// difference from 64 to 320 where windows are wide; 96 holds what 48 queries see through a narrow one.
constexpr int64_t key_block = 96;

/// From products of keys and queries to z * log2 e, z = softcap(scale * <q, k>) / temperature, and back. Queries are
/// scaled before the product where that doesn't round them, else the products are.
template <typename M>
struct ScoreTransform {
  using Acc = typename Multiplicand<M>::Sum;
  Acc factor;          // of queries or products, so that a product is z * log2 e or the argument of tanh
  Acc cap;             // softcap / temperature * log2 e; 0: off
  Acc gradient_factor; // d z / d <q, k>, the derivative of tanh left out
  double inverse_temperature;

  ScoreTransform(const AttentionParams& params, int64_t head) {
    double temperature = params.temperature;
    if (params.temperature_data != nullptr) {
      temperature = static_cast<const Acc*>(params.temperature_data)[head * params.temperature_stride];
    }
    inverse_temperature = 1 / temperature;
    gradient_factor = static_cast<Acc>(params.scale / temperature);
    cap = static_cast<Acc>(params.softcap / temperature * log2_of_e);
    factor =
        static_cast<Acc>(params.softcap > 0 ? params.scale / params.softcap : params.scale / temperature * log2_of_e);
  }

  /// z * log2 e. capped: cap > 0
  template <bool capped>
  Vec<Acc> score(Vec<Acc> product) const {
    if constexpr (scales_products<M>) product = product * Vec<Acc>(factor);
    return capped ? Vec<Acc>(cap) * product.tanh() : product;
  }

  /// d z / d <q, k> at a score z * log2 e.
  template <bool capped>
  Vec<Acc> derivative(Vec<Acc> score) const {
    return capped ? Vec<Acc>(gradient_factor) * tanh_derivative(score) : Vec<Acc>(gradient_factor);
  }

  /// The derivative of the softcap's tanh at a score z * log2 e. Precondition: there is one.
  Vec<Acc> tanh_derivative(Vec<Acc> score) const {
    const Vec<Acc> tanh = score / Vec<Acc>(cap);
    return Vec<Acc>(Acc(1)) - tanh * tanh;
  }
};

/// log sum exp(z) of scores z * log2 e, given the sum of 2^(z * log2 e - reference).
template <typename Acc>
Vec<Acc> logsumexp_of(Vec<Acc> sum, Vec<Acc> reference) {
  return (sum.log2() + reference) * Vec<Acc>(static_cast<Acc>(ln_of_2));
}

/// The keys that each query of a block sees. Queries beyond the last see none.
struct Visibility {
  Range keys[query_block];
  int64_t queries;
  int64_t lanes; // queries, in whole vectors

  Visibility(const Window& window, Range block, int64_t lanes) : queries(block.size()), lanes(lanes) {
    window.keys_of_each(block, keys);
    std::fill(keys + queries, keys + lanes, Range{0, 0});
  }

  /// The keys of `tile` that at least one of the queries in [begin, end) sees.
  Range of_queries(int64_t begin, int64_t end, Range tile) const {
    const int64_t last = std::min(end, queries) - 1;
    if (last < begin) return {tile.begin, tile.begin};
    const int64_t from = std::clamp(keys[begin].begin, tile.begin, tile.end);
    return {from, std::clamp(keys[last].end, from, tile.end)};
  }

  /// The keys of `tile` that all of the queries in [begin, end) see.
  Range of_all_queries(int64_t begin, int64_t end, Range tile) const {
    const int64_t last = std::min(end, queries) - 1;
    if (last < begin) return {tile.begin, tile.begin};
    const int64_t from = std::clamp(keys[last].begin, tile.begin, tile.end);
    return {from, std::clamp(keys[begin].end, from, tile.end)};
  }

  /// The queries that see at least one of the keys, given those of earlier keys.
  Range of_keys(Range tile, Range earlier) const {
    while (earlier.begin < queries && keys[earlier.begin].end <= tile.begin) ++earlier.begin;
    while (earlier.end < queries && keys[earlier.end].begin < tile.end) ++earlier.end;
    return {std::min(earlier.begin, earlier.end), earlier.end};
  }

  /// The queries that see at least one key.
  Range seeing() const {
    Range range{0, queries};
    while (range.begin < range.end && keys[range.begin].size() == 0) ++range.begin;
    while (range.end > range.begin && keys[range.end - 1].size() == 0) --range.end;
    return range;
  }

  /// Do all queries among the lanes see all of the keys?
  bool all_see(Range tile, Range lanes) const {
    return of_all_queries(lanes.begin, lanes.end, tile).size() == tile.size();
  }
};

/// Which lanes see a key, or at least one of some neighbours.
template <typename Acc>
struct Seen {
  Vec<Acc> lanes;

  /// At least one of the places from `low` to `high` lies in [first, end).
  static Seen between(Vec<Acc> first, Vec<Acc> low, Vec<Acc> high, Vec<Acc> end) {
    return {(first <= high) & (low < end)};
  }
  Vec<Acc> select(Vec<Acc> x, Vec<Acc> otherwise) const { return Vec<Acc>::blendv(otherwise, x, lanes); }
};

#if defined(CPU_CAPABILITY_AVX512)
template <>
struct Seen<float> {
  __mmask16 lanes;

  static Seen between(Vec<float> first, Vec<float> low, Vec<float> high, Vec<float> end) {
    return {_mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(first, high, _CMP_LE_OQ), low, end, _CMP_LT_OQ)};
  }
  Vec<float> select(Vec<float> x, Vec<float> otherwise) const { return _mm512_mask_mov_ps(otherwise, lanes, x); }
};
#endif

/// Masks for the lanes of one tile.
template <typename Acc>
class TileMask {
 public:
  TileMask(const Visibility& visibility, Range tile) {
    for (int64_t i = 0; i < visibility.lanes; ++i) { // relative to the tile: small numbers, exact in any floating type
      first_[i] = static_cast<Acc>(std::max(visibility.keys[i].begin, tile.begin) - tile.begin);
      end_[i] = static_cast<Acc>(std::min(visibility.keys[i].end, tile.end) - tile.begin);
    }
  }

  /// `key`, in all lanes, is relative to the tile; `lane` is the vector's first query.
  Seen<Acc> seen(Vec<Acc> key, int64_t lane) const { return any_seen(key, key, lane); }

  /// At least one of the keys from `first` to `last`.
  Seen<Acc> any_seen(Vec<Acc> first, Vec<Acc> last, int64_t lane) const {
    return Seen<Acc>::between(Vec<Acc>::loadu(first_ + lane), first, last, Vec<Acc>::loadu(end_ + lane));
  }

 private:
  Acc first_[query_block];
  Acc end_[query_block];
};

/// function(masked, lanes) for vectors of the lanes that see all of the keys (masked: std::false_type), and for those
/// at either side that don't.
template <typename Acc, typename Function>
void with_mask(const Visibility& visibility, Range keys, Range lanes, const Function& function) {
  constexpr int64_t vector = Vec<Acc>::size();
  const auto all_see = [&](int64_t lane) { return visibility.all_see(keys, {lane, lane + vector}); };
  int64_t begin = lanes.begin;
  while (begin < lanes.end && !all_see(begin)) begin += vector;
  int64_t end = begin;
  while (end < lanes.end && all_see(end)) end += vector;
  if (lanes.begin < begin) function(std::true_type(), Range{lanes.begin, begin});
  if (begin < end) function(std::false_type(), Range{begin, end});
  if (end < lanes.end) function(std::true_type(), Range{end, lanes.end});
}

} // namespace wmha::cpu::CPU_CAPABILITY

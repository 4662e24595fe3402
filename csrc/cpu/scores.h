// What happens to a tile of scores: keys in rows, queries in columns ("lanes"), so that all of it is vertical.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <limits>

#include "../params.h"
#include "schedule.h"

namespace wmha::cpu::CPU_CAPABILITY {

/// Keys of a score tile: 64 x 48 scores and 64 rows of key and value stay in the first two caches.
constexpr int64_t key_block = 64;

template <typename Acc>
at::vec::Vectorized<Acc> exponential(at::vec::Vectorized<Acc> x) {
  if constexpr (std::is_same_v<Acc, float>) return x.exp_u20(); // within 20 ulp, which fp32 sums hide
  return x.exp();
}

/// From the products of keys and queries to z = softcap(scale * <q, k>) / temperature, and back.
template <typename Acc>
struct ScoreTransform {
  using Vec = at::vec::Vectorized<Acc>;

  Acc product_factor;  // from the product to z, or to the argument of tanh
  Acc cap;             // softcap / temperature; 0: off
  Acc gradient_factor; // d z / d <q, k>, the derivative of tanh left out
  double inverse_temperature;

  ScoreTransform(const AttentionParams& params, int64_t head) {
    double temperature = params.temperature;
    if (params.temperature_data != nullptr) {
      temperature = static_cast<const Acc*>(params.temperature_data)[head * params.temperature_stride];
    }
    inverse_temperature = 1 / temperature;
    gradient_factor = static_cast<Acc>(params.scale / temperature);
    cap = static_cast<Acc>(params.softcap / temperature);
    product_factor = params.softcap > 0 ? static_cast<Acc>(params.scale / params.softcap) : gradient_factor;
  }

  Vec operator()(Vec product) const {
    const Vec scaled = Vec(product_factor) * product;
    return cap > 0 ? Vec(cap) * scaled.tanh() : scaled;
  }

  /// d z / d <q, k> at a score z.
  Vec derivative(Vec z) const {
    if (cap == 0) return Vec(gradient_factor);
    const Vec tanh = z / Vec(cap);
    return Vec(gradient_factor) * (Vec(Acc(1)) - tanh * tanh);
  }
};

/// The keys that each query of a block sees. Queries beyond the last see none.
struct Visibility {
  Range keys[query_block];
  int64_t queries;

  Visibility(const Window& window, Range block) : queries(block.size()) {
    for (int64_t i = 0; i < query_block; ++i) keys[i] = i < queries ? window.keys_of(block.begin + i) : Range{0, 0};
  }

  /// The keys of `tile` that at least one of the queries in [begin, end) sees.
  Range of_queries(int64_t begin, int64_t end, Range tile) const {
    const int64_t last = std::min(end, queries) - 1;
    if (last < begin) return {tile.begin, tile.begin};
    const int64_t from = std::max(keys[begin].begin, tile.begin);
    const int64_t to = std::min(keys[last].end, tile.end);
    return {std::min(from, to), to};
  }

  /// The queries that see at least one of the keys.
  Range of_keys(Range tile) const {
    Range seeing{0, queries};
    while (seeing.begin < queries && keys[seeing.begin].end <= tile.begin) ++seeing.begin;
    while (seeing.end > seeing.begin && keys[seeing.end - 1].begin >= tile.end) --seeing.end;
    return seeing;
  }

  /// Does every query see all of the keys? Then no element needs a mask.
  bool all_see(Range tile) const { return keys[queries - 1].begin <= tile.begin && tile.end <= keys[0].end; }
};

/// Masks for the lanes of one tile.
template <typename Acc>
class TileMask {
 public:
  using Vec = at::vec::Vectorized<Acc>;

  TileMask(const Visibility& visibility, Range tile) : needed_(!visibility.all_see(tile)) {
    if (!needed_) return;
    for (int64_t i = 0; i < query_block; ++i) { // relative to the tile: small numbers, exact in any floating type
      first_[i] = static_cast<Acc>(std::max(visibility.keys[i].begin, tile.begin) - tile.begin);
      end_[i] = static_cast<Acc>(std::min(visibility.keys[i].end, tile.end) - tile.begin);
    }
  }

  /// x where the query sees the key, else `otherwise`. `key` is relative to the tile, `lane` the vector's first query.
  Vec select(Vec x, Vec otherwise, int64_t key, int64_t lane) const {
    if (!needed_) return x;
    const Vec place(static_cast<Acc>(key));
    const Vec seen = (Vec::loadu(first_ + lane) <= place) & (place < Vec::loadu(end_ + lane));
    return Vec::blendv(otherwise, x, seen);
  }

 private:
  bool needed_;
  Acc first_[query_block];
  Acc end_[query_block];
};

/// factors[key][lane] = inverse_keep where dropout keeps the weight, else 0.
template <typename Acc>
void dropout_factors(
    const AttentionParams& params,
    int64_t batch_head,
    int64_t first_query,
    Range keys,
    int64_t lanes,
    Acc* factors) {
  constexpr int width = 16; // queries at a time
  const auto seed = static_cast<uint64_t>(params.rng_state[0]);
  const auto kept = static_cast<Acc>(params.dropout.inverse_keep);
  for (int64_t group = keys.begin / Dropout::group * Dropout::group; group < keys.end; group += Dropout::group) {
    const Range wanted{std::max(group, keys.begin), std::min(group + Dropout::group, keys.end)};
    for (int64_t lane = 0; lane < lanes; lane += width) {
      PhiloxLanes<width> words;
      for (int i = 0; i < width; ++i) {
        const PhiloxWords counter = Dropout::counter(group, first_query + lane + i, batch_head, params.rng_state[1]);
        for (int w = 0; w < 4; ++w) words.word[w][i] = counter.word[w];
      }
      philox<Dropout::rounds>(words, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
      const int64_t count = std::min<int64_t>(width, lanes - lane);
      for (int64_t key = wanted.begin; key < wanted.end; ++key) {
        const auto& word = words.word[key % Dropout::group / 2];
        Acc* row = factors + (key - keys.begin) * lanes + lane;
        for (int64_t i = 0; i < count; ++i) row[i] = params.dropout.keeps(word[i], key) ? kept : Acc(0);
      }
    }
  }
}

} // namespace wmha::cpu::CPU_CAPABILITY

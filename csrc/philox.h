// Dropout bits: the one definition, for host and device.
//
// Philox4x32 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3, SC'11), a counter-based
// generator: the same counter and key give the same four words anywhere. Seven rounds are the fewest that pass
// BigCrush.
#pragma once

#include <cstdint>

#include "window.h"

namespace wmha {

struct PhiloxWords {
  uint32_t word[4];
};

/// The generator's constants.
struct Philox {
  static constexpr uint32_t multiplier0 = 0xD2511F53u;
  static constexpr uint32_t multiplier1 = 0xCD9E8D57u;
  static constexpr uint32_t key_step_low = 0x9E3779B9u;
  static constexpr uint32_t key_step_high = 0xBB67AE85u;
};

/// The upper half of a product.
WMHA_HOST_DEVICE constexpr uint32_t multiply_high(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return __umulhi(a, b); // one instruction, where the shift takes three
#else
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
#endif
}

/// The words of `width` counters side by side, so that a compiler makes vectors of them.
template <int width>
struct PhiloxLanes {
  uint32_t word[4][width];
};

/// Four random words of each counter under the 64-bit key (key_low, key_high).
template <int rounds, int width>
WMHA_HOST_DEVICE constexpr void philox(PhiloxLanes<width>& lanes, uint32_t key_low, uint32_t key_high) {
  auto& word = lanes.word;
  for (int round = 0; round < rounds; ++round) {
    for (int i = 0; i < width; ++i) {
      const uint32_t high0 = multiply_high(Philox::multiplier0, word[0][i]);
      const uint32_t high1 = multiply_high(Philox::multiplier1, word[2][i]);
      const uint32_t low0 = Philox::multiplier0 * word[0][i];
      const uint32_t low1 = Philox::multiplier1 * word[2][i];
      word[0][i] = high1 ^ word[1][i] ^ key_low;
      word[1][i] = low1;
      word[2][i] = high0 ^ word[3][i] ^ key_high;
      word[3][i] = low0;
    }
    key_low += Philox::key_step_low;
    key_high += Philox::key_step_high;
  }
}

/// The same for one counter.
template <int rounds>
WMHA_HOST_DEVICE constexpr PhiloxWords philox(PhiloxWords c, uint32_t key_low, uint32_t key_high) {
  PhiloxLanes<1> lanes{{{c.word[0]}, {c.word[1]}, {c.word[2]}, {c.word[3]}}};
  philox<rounds>(lanes, key_low, key_high);
  return {lanes.word[0][0], lanes.word[1][0], lanes.word[2][0], lanes.word[3][0]};
}

/// Which attention weights survive: a function of seed, offset and place alone.
struct Dropout {
  static constexpr int rounds = 7;
  static constexpr int group = 8; // neighbouring keys that share one counter, 16 bits each
  static constexpr uint32_t resolution = 65536;

  uint32_t threshold;  // an element is kept iff its 16-bit number >= threshold; 0: no dropout
  double inverse_keep; // factor on the survivors

  /// Precondition: 0 <= p <= 1. p is quantised to multiples of 1 / resolution.
  static constexpr Dropout with_probability(double p) {
    const auto threshold = static_cast<uint32_t>(p * resolution + 0.5);
    return {threshold, threshold < resolution ? double(resolution) / (resolution - threshold) : 0.0};
  }

  WMHA_HOST_DEVICE constexpr bool enabled() const { return threshold > 0; }

  /// The counter of the `group` keys around `key`, for query row `row` of head `batch * Hq + head`.
  WMHA_HOST_DEVICE static constexpr PhiloxWords counter(int64_t key, int64_t row, int64_t head, int64_t offset) {
    return {
        static_cast<uint32_t>(static_cast<uint64_t>(key) / group), static_cast<uint32_t>(row),
        static_cast<uint32_t>(head), static_cast<uint32_t>(static_cast<uint64_t>(offset) / 4)};
  }

  /// Is `key` kept, given the words of its counter?
  WMHA_HOST_DEVICE constexpr bool keeps(const PhiloxWords& words, int64_t key) const {
    return keeps(words.word[key % group / 2], key);
  }

  /// The same, given only the word that holds the key's number.
  WMHA_HOST_DEVICE constexpr bool keeps(uint32_t word, int64_t key) const {
    return (word >> (key % 2 * 16) & 0xFFFFu) >= threshold;
  }
};

} // namespace wmha

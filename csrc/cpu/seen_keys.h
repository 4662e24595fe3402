// Which keys of a tile each query of a block sees, found for eight queries at a time.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "scores.h"
#include "squares.h"

namespace wmha::cpu::CPU_CAPABILITY {

/// The keys in sight of eight queries.
struct EightRanges {
  static constexpr int64_t count = 8;
  __m512i begins;
  __m512i ends;

  explicit EightRanges(const Range* keys) {
    const __m512i low = _mm512_loadu_si512(keys);
    const __m512i high = _mm512_loadu_si512(keys + count / 2);
    begins = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), high);
    ends = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15), high);
  }
};

class SeenKeys {
 public:
  /// keys: of the tile.
  SeenKeys(const Visibility& visibility, Range keys) {
    const auto bit = [&](__m512i key) { // beyond the tile's last where key is
      const __m512i place = _mm512_sub_epi64(key, _mm512_set1_epi64(keys.begin));
      const __m512i held = _mm512_min_epi64(_mm512_max_epi64(place, _mm512_setzero_si512()), _mm512_set1_epi64(square));
      return _mm512_sllv_epi64(_mm512_set1_epi64(1), held);
    };
    for (int64_t row = 0; row < square; row += EightRanges::count) {
      const EightRanges seen(visibility.keys + row);
      _mm512_storeu_si512(bits_ + row, _mm512_sub_epi64(bit(seen.ends), bit(seen.begins)));
    }
  }

  /// By a query, in the first or the second half of the tile.
  Seen<float> of(int64_t row, int64_t half) const {
    return {static_cast<__mmask16>(bits_[row] >> half * square_pairs)};
  }

 private:
  uint64_t bits_[square]; // of each query, one for each key
};

} // namespace wmha::cpu::CPU_CAPABILITY

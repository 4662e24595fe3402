// Dropout bits for the lanes of a score tile: philox.h's, drawn for a vector of queries and eight keys at a time.
#pragma once

#include <cstdint>

#include "../params.h"
#include "tiles.h"

namespace wmha::cpu::CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#define WMHA_SIMD_WORDS

// A register of 32-bit words, or of 64-bit ones that hold 32 bits each.
#if defined(CPU_CAPABILITY_AVX512)
using Words = __m512i;
inline Words all_words(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline Words count_words() { return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }
inline Words add(Words a, Words b) { return _mm512_add_epi32(a, b); }
inline Words multiply_even(Words a, Words b) { return _mm512_mul_epu32(a, b); }
inline Words high(Words x) { return _mm512_srli_epi64(x, 32); }
inline Words zip(Words even, Words odd) { return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32)); }
inline Words low_halves_up(Words x) { return _mm512_slli_epi32(x, 16); }
inline Vec<float> zero_unless_above(Vec<float> x, Words words, Words limit) {
  return _mm512_maskz_mov_ps(_mm512_cmpgt_epu32_mask(words, limit), x);
}
#else
using Words = __m256i;
inline Words all_words(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline Words count_words() { return _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0); }
inline Words add(Words a, Words b) { return _mm256_add_epi32(a, b); }
inline Words multiply_even(Words a, Words b) { return _mm256_mul_epu32(a, b); }
inline Words high(Words x) { return _mm256_srli_epi64(x, 32); }
inline Words zip(Words even, Words odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }
inline Words low_halves_up(Words x) { return _mm256_slli_epi32(x, 16); }
inline Vec<float> zero_unless_above(Vec<float> x, Words words, Words limit) {
  const Words sign = all_words(0x80000000u); // AVX2 compares signed numbers only
  return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_cmpgt_epi32(words ^ sign, limit ^ sign)));
}
#endif

/// philox() for the even 32-bit words of each register; the odd ones are garbage, before and after.
inline void philox_even(Words (&word)[4], uint32_t key_low, uint32_t key_high) {
  for (int round = 0; round < Dropout::rounds; ++round) {
    const Words product0 = multiply_even(all_words(Philox::multiplier0), word[0]);
    const Words product1 = multiply_even(all_words(Philox::multiplier1), word[2]);
    word[0] = high(product1) ^ word[1] ^ all_words(key_low);
    word[1] = product1;
    word[2] = high(product0) ^ word[3] ^ all_words(key_high);
    word[3] = product0;
    key_low += Philox::key_step_low;
    key_high += Philox::key_step_high;
  }
}
#endif

/// Draws for eight keys at a time, and a vector of queries.
template <typename Acc>
class DropoutLanes {
 public:
  DropoutLanes(const AttentionParams& params, int64_t batch_head)
      : dropout_(params.dropout),
        head_(batch_head),
        seed_(static_cast<uint64_t>(params.dropout.enabled() ? params.rng_state[0] : 0)),
        offset_(params.dropout.enabled() ? params.rng_state[1] : 0) {}

  /// For the eight keys around `key` and the queries from `row` on.
  void draw(int64_t key, int64_t row) {
    const PhiloxWords first = Dropout::counter(key, row, head_, offset_);
    const auto key_low = static_cast<uint32_t>(seed_);
    const auto key_high = static_cast<uint32_t>(seed_ >> 32);
#ifdef WMHA_SIMD_WORDS
    if constexpr (std::is_same_v<Acc, float>) {
      const Words rows = add(all_words(first.word[1]), count_words());
      const Words rest[] = {all_words(first.word[0]), all_words(first.word[2]), all_words(first.word[3])};
      Words even[4] = {rest[0], rows, rest[1], rest[2]};
      Words odd[4] = {rest[0], high(rows), rest[1], rest[2]};
      philox_even(even, key_low, key_high);
      philox_even(odd, key_low, key_high);
      for (int w = 0; w < 4; ++w) words_.word[w] = zip(even[w], odd[w]);
      return;
    }
#endif
    for (int i = 0; i < lanes; ++i) {
      for (int w = 0; w < 4; ++w) drawn_.word[w][i] = first.word[w] + (w == 1 ? static_cast<uint32_t>(i) : 0);
    }
    philox<Dropout::rounds>(drawn_, key_low, key_high);
  }

  /// The weights of one of the keys drawn for, 0 where they are dropped.
  Vec<Acc> keep(Vec<Acc> weights, int64_t key) const {
#ifdef WMHA_SIMD_WORDS
    if constexpr (std::is_same_v<Acc, float>) {
      const Words word = words_.word[key % Dropout::group / 2];
      // The key's 16 bits lie in the upper half, above others that don't matter: it is at least the threshold iff the
      // whole is above limit.
      const Words limit = all_words((dropout_.threshold << 16) - 1);
      return zero_unless_above(weights, key % 2 == 0 ? low_halves_up(word) : word, limit);
    }
#endif
    Acc factor[lanes];
    for (int i = 0; i < lanes; ++i) factor[i] = dropout_.keeps(drawn_.word[key % Dropout::group / 2][i], key);
    return Vec<Acc>::blendv(Vec<Acc>(Acc(0)), weights, Vec<Acc>::loadu(factor) > Vec<Acc>(Acc(0)));
  }

 private:
  static constexpr int lanes = Vec<Acc>::size();

  Dropout dropout_;
  int64_t head_;
  uint64_t seed_;
  int64_t offset_;
  PhiloxLanes<lanes> drawn_;
#ifdef WMHA_SIMD_WORDS
  struct {
    Words word[4];
  } words_;
#endif
};

} // namespace wmha::cpu::CPU_CAPABILITY

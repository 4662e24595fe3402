// Dropout bits for a score tile: philox.h's.
#pragma once

#include <algorithm>
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
inline Words count_words() { return lane_numbers(); }
inline Words add(Words a, Words b) { return _mm512_add_epi32(a, b); }
inline Words multiply_even(Words a, Words b) { return _mm512_mul_epu32(a, b); }
inline Words high(Words x) { return _mm512_srli_epi64(x, 32); }
inline Words zip(Words even, Words odd) {
  return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA); // the even words of both
}
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
inline void philox_even(Words (&word)[4], uint64_t seed) {
  auto key_low = static_cast<uint32_t>(seed);
  auto key_high = static_cast<uint32_t>(seed >> 32);
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

/// What the numbers of one head depend on.
class DropoutOfHead {
 public:
  DropoutOfHead(const AttentionParams& params, int64_t batch_head)
      : dropout_(params.dropout),
        head_(batch_head),
        seed_(static_cast<uint64_t>(params.dropout.enabled() ? params.rng_state[0] : 0)),
        offset_(params.dropout.enabled() ? params.rng_state[1] : 0) {}

 protected:
  PhiloxWords counter(int64_t key, int64_t row) const { return Dropout::counter(key, row, head_, offset_); }

  Dropout dropout_;
  int64_t head_;
  uint64_t seed_;
  int64_t offset_;
};

/// Draws for eight keys at a time, and a vector of queries.
template <typename Acc>
class DropoutLanes : DropoutOfHead {
 public:
  using DropoutOfHead::DropoutOfHead;

  /// For the eight keys around `key` and the queries from `row` on.
  void draw(int64_t key, int64_t row) {
    const PhiloxWords first = counter(key, row);
#ifdef WMHA_SIMD_WORDS
    if constexpr (std::is_same_v<Acc, float>) {
      const Words rows = add(all_words(first.word[1]), count_words());
      const Words rest[] = {all_words(first.word[0]), all_words(first.word[2]), all_words(first.word[3])};
      Words even[4] = {rest[0], rows, rest[1], rest[2]};
      Words odd[4] = {rest[0], high(rows), rest[1], rest[2]};
      philox_even(even, seed_);
      philox_even(odd, seed_);
      for (int w = 0; w < 4; ++w) words_.word[w] = zip(even[w], odd[w]);
      return;
    }
#endif
    for (int i = 0; i < lanes; ++i) {
      for (int w = 0; w < 4; ++w) drawn_.word[w][i] = first.word[w] + (w == 1 ? static_cast<uint32_t>(i) : 0);
    }
    philox<Dropout::rounds>(drawn_, static_cast<uint32_t>(seed_), static_cast<uint32_t>(seed_ >> 32));
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

  PhiloxLanes<lanes> drawn_;
#ifdef WMHA_SIMD_WORDS
  struct {
    Words word[4];
  } words_;
#endif
};

#if defined(CPU_CAPABILITY_AMX)
/// Draws for 32 keys of each of 32 queries.
class DropoutRows : DropoutOfHead {
 public:
  using DropoutOfHead::DropoutOfHead;

  /// For the keys from `key` on, which may be before the first, and the queries from `row` on.
  void draw(int64_t key, int64_t row) {
    const int64_t before = modulo(key, Dropout::group); // keys of its group
    WMHA_UNROLL
    for (int64_t i = 0; i < rows; i += 2) {
      draw_two(key - before, row + i, kept_ + i);
      if (before > 0) {
        uint32_t next[2];
        draw_two(key - before + keys, row + i, next);
        for (int64_t j = 0; j < 2; ++j) kept_[i + j] = kept_[i + j] >> before | next[j] << (keys - before);
      }
    }
  }

  /// The weights of the keys and of one of the queries drawn for, 0 where they are dropped.
  at::vec::Vectorized<c10::BFloat16> keep(at::vec::Vectorized<c10::BFloat16> weights, int64_t row) const {
    return _mm512_maskz_mov_epi16(kept_[row], weights);
  }

 private:
  static constexpr int64_t keys = 32;
  static constexpr int64_t rows = tile_rows;

  /// kept[i], bit k: is key + k kept for query row + i? `key` is the first of a group.
  void draw_two(int64_t key, int64_t row, uint32_t* kept) const {
    // Each quarter of a register is for a group of keys, and in it each half for a query.
    const Words groups = _mm512_srli_epi32(count_words(), 2);
    const Words queries = _mm512_and_si512(_mm512_srli_epi32(count_words(), 1), all_words(1));
    const PhiloxWords first = counter(key, row);
    Words word[4] = {
        add(all_words(first.word[0]), groups), add(all_words(first.word[1]), queries), all_words(first.word[2]),
        all_words(first.word[3])};
    philox_even(word, seed_);
    const Words low = zip(word[0], word[1]); // 16 bits for each of the group's first four keys
    const Words high = zip(word[2], word[3]);
    const Words limit = _mm512_set1_epi16(static_cast<int16_t>(dropout_.threshold - 1)); // kept are those above it
    kept[0] = _mm512_cmpgt_epu16_mask(_mm512_unpacklo_epi64(low, high), limit);
    kept[1] = _mm512_cmpgt_epu16_mask(_mm512_unpackhi_epi64(low, high), limit);
  }

  uint32_t kept_[rows];
};
#endif

} // namespace wmha::cpu::CPU_CAPABILITY

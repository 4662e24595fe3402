// Dropout's random bits: Random123's known answers, and which of the bits decides over which weight.
#include <gtest/gtest.h>

#include <array>
#include <cmath>

#include "../../csrc/philox.h"

namespace {

using wmha::Dropout;
using wmha::philox;
using wmha::PhiloxWords;

// ---- The published vectors (Random123, file kat_vectors, philox4x32) ----

struct KnownAnswer {
  PhiloxWords counter;
  uint32_t key[2];
  PhiloxWords after_7_rounds;
  PhiloxWords after_10_rounds;
};

constexpr uint32_t ones = 0xffffffff;
constexpr KnownAnswer known_answers[] = {
    {{0, 0, 0, 0},
     {0, 0},
     {0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48},
     {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{ones, ones, ones, ones},
     {ones, ones},
     {0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662},
     {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
     {0xa4093822, 0x299f31d0},
     {0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a},
     {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
};

constexpr bool equal(const PhiloxWords& a, const PhiloxWords& b) {
  return a.word[0] == b.word[0] && a.word[1] == b.word[1] && a.word[2] == b.word[2] && a.word[3] == b.word[3];
}

TEST(Philox, GivesThePublishedAnswers) {
  for (const KnownAnswer& known : known_answers) {
    EXPECT_TRUE(equal(philox<7>(known.counter, known.key[0], known.key[1]), known.after_7_rounds));
    EXPECT_TRUE(equal(philox<10>(known.counter, known.key[0], known.key[1]), known.after_10_rounds));
  }
}

TEST(Philox, GivesTheSameInLanesAsOneByOne) {
  constexpr int width = 5;
  wmha::PhiloxLanes<width> lanes;
  for (uint32_t i = 0; i < width; ++i) {
    for (uint32_t w = 0; w < 4; ++w) lanes.word[w][i] = 1000003 * i + 10007 * w;
  }
  const wmha::PhiloxLanes<width> counters = lanes;
  philox<7>(lanes, 12, 34);
  for (int i = 0; i < width; ++i) {
    const auto one = [i](const wmha::PhiloxLanes<width>& all) {
      return PhiloxWords{{all.word[0][i], all.word[1][i], all.word[2][i], all.word[3][i]}};
    };
    EXPECT_TRUE(equal(one(lanes), philox<7>(one(counters), 12, 34))) << "lane " << i;
  }
}

static_assert(equal(philox<7>({0, 0, 0, 0}, 0, 0), known_answers[0].after_7_rounds), "at compile time too");
static_assert(Dropout::rounds == 7);

// ---- From probability to threshold ----

constexpr uint32_t threshold(double p) { return Dropout::with_probability(p).threshold; }

static_assert(!Dropout::with_probability(0).enabled());
static_assert(Dropout::with_probability(0).inverse_keep == 1);
static_assert(!Dropout::with_probability(7e-6).enabled(), "below half a step: no dropout");
static_assert(threshold(8e-6) == 1, "above half a step: one step");
static_assert(threshold(1e-3) == 66, "65.536 rounds up");
static_assert(threshold(0.1) == 6554, "6553.6 rounds up");
static_assert(threshold(0.5) == 32768);
static_assert(Dropout::with_probability(0.5).inverse_keep == 2);
static_assert(threshold(0.99999) == 65535, "65535.34 rounds down");
static_assert(Dropout::with_probability(0.99999).inverse_keep == 65536, "the inverse of the rate as quantised");
static_assert(threshold(0.999995) == 65536, "rounds to all of them");
static_assert(Dropout::with_probability(0.999995).inverse_keep == 0, "zeros, not infinities");
static_assert(threshold(1) == 65536);
static_assert(Dropout::with_probability(1).inverse_keep == 0);

TEST(Dropout, IsUnbiasedAtEveryThreshold) {
  for (uint32_t t = 0; t < Dropout::resolution; ++t) {
    const Dropout dropout = Dropout::with_probability(double(t) / Dropout::resolution);
    ASSERT_EQ(dropout.threshold, t);
    ASSERT_DOUBLE_EQ(dropout.inverse_keep * (Dropout::resolution - t) / Dropout::resolution, 1.0);
  }
}

// ---- From place to bits ----

TEST(Dropout, ReadsEightNumbersLowHalfFirst) {
  // The numbers are 10, 20, ... 80 for the keys 0 to 7.
  const PhiloxWords words{{20 << 16 | 10, 40 << 16 | 30, 60 << 16 | 50, 80 << 16 | 70}};
  for (uint32_t place = 0; place < 8; ++place) {
    const uint32_t number = 10 * (place + 1);
    for (const int64_t key : {int64_t{place}, int64_t{8000} + place, (int64_t{1} << 40) + place}) {
      EXPECT_TRUE((Dropout{number, 1.0}.keeps(words, key))) << "kept at its own number, key " << key;
      EXPECT_FALSE((Dropout{number + 1, 1.0}.keeps(words, key))) << "dropped above it, key " << key;
    }
  }
}

TEST(Dropout, KeepsAllAtThresholdZeroAndNoneAtTheLast) {
  const PhiloxWords lowest{{0, 0, 0, 0}};
  const PhiloxWords highest{{ones, ones, ones, ones}};
  for (int64_t key = 0; key < 8; ++key) {
    EXPECT_TRUE(Dropout::with_probability(0).keeps(lowest, key));
    EXPECT_FALSE(Dropout::with_probability(8e-6).keeps(lowest, key));
    EXPECT_TRUE(Dropout::with_probability(0.99999).keeps(highest, key));
    EXPECT_FALSE(Dropout::with_probability(1).keeps(highest, key));
  }
}

TEST(Dropout, CountsKeysByEightThenRowThenHeadThenOffset) {
  const auto counter = [](int64_t key, int64_t row, int64_t head, int64_t offset) {
    const PhiloxWords words = Dropout::counter(key, row, head, offset);
    return std::array<uint32_t, 4>{words.word[0], words.word[1], words.word[2], words.word[3]};
  };
  using Words = std::array<uint32_t, 4>;
  EXPECT_EQ(counter(0, 0, 0, 0), (Words{0, 0, 0, 0}));
  EXPECT_EQ(counter(7, 3, 5, 0), (Words{0, 3, 5, 0}));
  EXPECT_EQ(counter(8, 3, 5, 4), (Words{1, 3, 5, 1}));
  EXPECT_EQ(counter(1000, 3, 5, 4000), (Words{125, 3, 5, 1000}));
  EXPECT_EQ(counter(int64_t{8} << 30, 1, 1, 0), (Words{1u << 30, 1, 1, 0})) << "more keys than fit an int";
  EXPECT_EQ(counter(0, 0, 0, 4 * (int64_t{1} << 32) + 8), (Words{0, 0, 0, 2})) << "the low 32 bits of offset / 4";
}

TEST(Dropout, DropsAtItsRateWithoutCorrelation) {
  constexpr int64_t rows = 64, heads = 8, keys = 256;
  for (const double p : {1e-3, 0.1, 0.5, 0.9}) {
    const Dropout dropout = Dropout::with_probability(p);
    const auto dropped = [&](int64_t head, int64_t row, int64_t key) {
      const PhiloxWords words = philox<Dropout::rounds>(Dropout::counter(key, row, head, 0), 12345, 678);
      return dropout.keeps(words, key) ? -p : 1 - p; // of mean 0
    };
    double sum = 0, next_row = 0, next_head = 0, next_key = 0;
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t key = 0; key < keys; ++key) {
          const double here = dropped(head, row, key);
          sum += here;
          next_key += here * dropped(head, row, key + 1);
          next_row += here * dropped(head, row + 1, key);
          next_head += here * dropped(head + 1, row, key);
        }
      }
    }
    const double n = heads * rows * keys;
    const double variance = p * (1 - p);
    EXPECT_LT(std::abs(sum), 4.5 * std::sqrt(n * variance)) << "rate " << p;
    for (const double product : {next_key, next_row, next_head}) {
      EXPECT_LT(std::abs(product), 4.5 * std::sqrt(n) * variance + 1) << "rate " << p;
    }
  }
}

} // namespace

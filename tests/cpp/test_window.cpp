// Who sees whom, against the contract's definition by brute force; and how the backward pass cuts up its keys.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <vector>

#include "../../csrc/cpu/schedule.h"
#include "../../csrc/window.h"
#include "reference.h"

namespace {

using wmha::Range;
using wmha::Window;
using wmha::cpu::BackwardSchedule;

constexpr int64_t smallest = std::numeric_limits<int64_t>::min();
constexpr int64_t largest = std::numeric_limits<int64_t>::max();
constexpr int64_t many_threads = 1000;

// ---- The sum that saturates ----

static_assert(wmha::saturating_add(2, -5) == -3);
static_assert(wmha::saturating_add(largest, 1) == largest);
static_assert(wmha::saturating_add(largest, largest) == largest);
static_assert(wmha::saturating_add(1, largest) == largest);
static_assert(wmha::saturating_add(smallest, -1) == smallest);
static_assert(wmha::saturating_add(smallest, smallest) == smallest);
static_assert(wmha::saturating_add(-1, smallest) == smallest);
static_assert(wmha::saturating_add(largest, smallest) == -1);
static_assert(wmha::saturating_add(smallest, largest) == -1);
static_assert(wmha::saturating_add(largest, 0) == largest);
static_assert(wmha::saturating_add(smallest, 0) == smallest);

// ---- Windows, known at compile time ----

constexpr bool equal(Range a, Range b) { return a.begin == b.begin && a.end == b.end; }

static_assert(equal(Window{2, 1, 0, 10}.keys_of(5), {3, 7}), "left + 1 + right keys");
static_assert(equal(Window{-1, 0, 0, 10}.keys_of(5), {0, 6}), "causal");
static_assert(equal(Window{0, 0, 0, 10}.keys_of(5), {5, 6}), "itself alone");
static_assert(equal(Window{-1, -1, 3, 10}.keys_of(5), {0, 10}), "dense");
static_assert(equal(Window{2, -1, 0, 10}.keys_of(5), {3, 10}), "a left bound alone sees the future");
static_assert(equal(Window{largest, largest, 0, 10}.keys_of(5), {0, 10}), "wider than any sequence");
static_assert(Window{2, 1, 20, 10}.keys_of(5).size() == 0, "past the end");
static_assert(Window{2, 1, -20, 10}.keys_of(5).size() == 0, "before the beginning");
static_assert(Window{-1, -1, 0, 0}.keys_of(5).size() == 0, "no keys at all");
static_assert(equal(Window{2, 1, 0, 10}.keys_of(Range{4, 7}), {2, 8}), "the keys of several queries");

/// The keys that query i sees, by asking each of them.
std::vector<int64_t> seen_keys(const Window& window, int64_t i) {
  std::vector<int64_t> seen;
  for (int64_t j = 0; j < window.keys; ++j) {
    if (reference::sees(window, i, j)) seen.push_back(j);
  }
  return seen;
}

void expect_as_defined(const Window& window, int64_t queries) {
  Range previous = window.keys_of(0);
  std::vector<Range> each(queries);
  window.keys_of_each({0, queries}, each.data());
  for (int64_t i = 0; i < queries; ++i) {
    SCOPED_TRACE(
        testing::Message() << "query " << i << ", window (" << window.left << ", " << window.right << "), offset "
                           << window.offset << ", keys " << window.keys);
    const Range range = window.keys_of(i);
    ASSERT_TRUE(equal(each[i], range));
    ASSERT_LE(0, range.begin);
    ASSERT_LE(range.begin, range.end);
    ASSERT_LE(range.end, window.keys);
    std::vector<int64_t> keys;
    for (int64_t j = range.begin; j < range.end; ++j) keys.push_back(j);
    ASSERT_EQ(keys, seen_keys(window, i));
    ASSERT_LE(previous.begin, range.begin);
    ASSERT_LE(previous.end, range.end);
    ASSERT_LE(window.keys_of(Range{i, queries}).size(), window.most_keys(queries - i));
    previous = range;
  }
}

TEST(Window, SeesTheKeysOfTheDefinitionInAllSmallProblems) {
  for (int64_t keys = 0; keys <= 6; ++keys) {
    for (int64_t queries = 1; queries <= 6; ++queries) {
      for (int64_t left = -1; left <= 7; ++left) {
        for (int64_t right = -1; right <= 7; ++right) {
          for (int64_t offset = -9; offset <= 9; ++offset) expect_as_defined({left, right, offset, keys}, queries);
        }
      }
    }
  }
}

TEST(Window, SaturatesAtBothEndsOfInt64) {
  const int64_t bounds[] = {-1, 0, 1, 3, largest - 1, largest};
  const int64_t offsets[] = {smallest, smallest + 1, smallest + 3, -1, 0, largest - 3, largest - 1, largest};
  for (const int64_t left : bounds) {
    for (const int64_t right : bounds) {
      for (const int64_t offset : offsets) expect_as_defined({left, right, offset, 5}, 8);
    }
  }
}

TEST(Window, KeepsItsOrderForAstronomicallyManyKeysAndQueries) {
  const Window window{100, 7, -(largest / 2), largest};
  EXPECT_TRUE(equal(window.keys_of(largest / 2), {0, 8}));
  EXPECT_TRUE(equal(window.keys_of(largest), {largest / 2 + 1 - 100, largest / 2 + 1 + 8}));
  EXPECT_EQ(window.keys_of(largest / 2 - 8).size(), 0);
  Range each[3];
  window.keys_of_each({largest / 2 - 2, largest / 2 + 1}, each);
  EXPECT_TRUE(equal(each[2], {0, 8}));
}

TEST(Window, FindsTheQueriesThatSeeAnyOfSomeKeys) {
  constexpr int64_t queries = 7, keys = 6;
  for (int64_t left = -1; left < 4; ++left) {
    for (int64_t right = -1; right < 4; ++right) {
      for (int64_t offset = -9; offset < 10; ++offset) {
        const Window window{left, right, offset, keys};
        for (int64_t begin = 0; begin < keys; ++begin) {
          for (int64_t end = begin + 1; end <= keys; ++end) {
            const Range found = window.queries_of({begin, end}, queries);
            for (int64_t i = 0; i < queries; ++i) {
              bool sees = false;
              for (int64_t j = begin; j < end; ++j) sees = sees || reference::sees(window, i, j);
              ASSERT_EQ(found.begin <= i && i < found.end, sees)
                  << "query " << i << ", keys " << begin << " to " << end << ", window (" << left << ", " << right
                  << "), offset " << offset;
            }
          }
        }
      }
    }
  }
  for (const int64_t offset : {smallest, largest}) {
    EXPECT_EQ((Window{2, 1, offset, keys}.queries_of({0, keys}, queries).size()), 0);
    EXPECT_EQ((Window{-1, -1, offset, keys}.queries_of({0, keys}, queries).size()), queries);
  }
}

TEST(Window, OfSeveralQueriesIsTheUnionOfTheirs) {
  for (int64_t left = -1; left <= 4; ++left) {
    for (int64_t right = -1; right <= 4; ++right) {
      for (int64_t offset = -8; offset <= 8; ++offset) {
        const Window window{left, right, offset, 5};
        for (int64_t begin = 0; begin < 6; ++begin) {
          for (int64_t end = begin + 1; end <= 6; ++end) {
            std::set<int64_t> expected;
            for (int64_t i = begin; i < end; ++i) {
              for (const int64_t j : seen_keys(window, i)) expected.insert(j);
            }
            std::set<int64_t> actual;
            const Range range = window.keys_of(Range{begin, end});
            for (int64_t j = range.begin; j < range.end; ++j) actual.insert(j);
            ASSERT_EQ(actual, expected);
          }
        }
      }
    }
  }
}

// ---- The backward pass: which chunk of queries adds up which keys ----

BackwardSchedule schedule_of(
    int64_t batch_kv_heads,
    int64_t queries,
    const Window& window,
    int64_t threads = many_threads,
    int64_t group = 1) {
  wmha::AttentionParams params{};
  params.batch = 1;
  params.heads = batch_kv_heads * group;
  params.kv_heads = batch_kv_heads;
  params.queries = queries;
  params.key_dim = 3;
  params.value_dim = 2;
  params.window = window;
  return {params, {.query_block = 48, .least_chunk = 128, .product_rate = 1}, threads};
}

void expect_sound(const BackwardSchedule& schedule) {
  const Window& window = schedule.window;
  SCOPED_TRACE(
      testing::Message() << schedule.queries << " queries in " << schedule.chunks << " chunks, window (" << window.left
                         << ", " << window.right << "), offset " << window.offset << ", keys " << window.keys);
  int64_t next_query = 0;
  std::vector<int> seen(window.keys, 0); // by so many chunks
  std::vector<int> owned(window.keys, 0);
  std::vector<int> shared(window.keys, 0); // in the workspace
  std::vector<int> left(window.keys, 0);   // to the next chunk
  std::vector<int> added(window.keys, 0);  // by it
  std::vector<int> written(window.keys, 0);
  std::vector<bool> used(schedule.workspace_size(), false);
  for (int64_t c = 0; c < schedule.chunks; ++c) {
    const Range queries = schedule.queries_of(c);
    ASSERT_EQ(queries.begin, next_query) << "chunks follow one another";
    ASSERT_LT(queries.begin, queries.end);
    next_query = queries.end;
    const Range keys = schedule.keys_of(c);
    const Range own = schedule.private_keys_of(c);
    const Range complete{schedule.follows(c) ? keys.begin : own.begin, own.end};
    ASSERT_LE(keys.begin, own.begin);
    ASSERT_LE(own.begin, own.end);
    ASSERT_LE(own.end, keys.end);
    for (int64_t key = keys.begin; key < keys.end; ++key) {
      ++seen[key];
      if (own.contains(key)) ++owned[key];
      if (complete.contains(key)) {
        ++written[key];
        if (!own.contains(key)) ++added[key];
        continue;
      }
      if (key >= own.end && schedule.follows(c + 1)) {
        ++left[key];
        continue;
      }
      ++shared[key];
      for (int64_t head = 0; head < schedule.batch_kv_heads; ++head) {
        const int64_t share = schedule.share_offset(head, c, key);
        ASSERT_LE(0, share);
        ASSERT_LE(share + schedule.row, schedule.workspace_size());
        for (int64_t i = share; i < share + schedule.row; ++i) {
          ASSERT_FALSE(used[i]) << "two shares in one place";
          used[i] = true;
        }
      }
    }
  }
  ASSERT_EQ(next_query, schedule.queries) << "each query is in one chunk";
  for (int64_t key = 0; key < window.keys; ++key) {
    ASSERT_EQ(owned[key], seen[key] == 1 ? 1 : 0) << "key " << key << " is seen by " << seen[key] << " chunks";
    const bool is_written = seen[key] == 1 || left[key] > 0;
    ASSERT_EQ(written[key], is_written ? 1 : 0) << "key " << key;
    ASSERT_EQ(shared[key], is_written ? 0 : seen[key]) << "key " << key;
    ASSERT_EQ(left[key], added[key]) << "key " << key;
    ASSERT_LE(left[key], 1) << "key " << key;
  }
}

TEST(BackwardSchedule, SplitsQueriesAndKeysWithoutGapsOrOverlap) {
  for (const int64_t queries : {0, 1, 47, 48, 49, 480, 481, 1000, 2500}) {
    for (const int64_t keys : {0, 1, 300, 1000, 2500, 3000}) {
      for (const int64_t left : {int64_t{-1}, int64_t{0}, int64_t{5}, int64_t{300}, int64_t{2000}, largest}) {
        for (const int64_t right : {int64_t{-1}, int64_t{0}, int64_t{70}, largest}) {
          for (const int64_t offset : {keys - queries, int64_t{0}, int64_t{-700}, int64_t{900}, smallest, largest}) {
            for (const int64_t heads : {1, 20}) {
              if (heads > 1 && (left == 0 || right > 0)) continue; // fewer, for speed
              for (const int64_t threads : {int64_t{1}, int64_t{2}, many_threads}) {
                if (heads > 1 && threads == 2) continue;
                expect_sound(schedule_of(heads, queries, {left, right, offset, keys}, threads));
                if (testing::Test::HasFatalFailure()) return;
              }
            }
          }
        }
      }
    }
  }
}

TEST(BackwardSchedule, TakesNoQueriesNoHeadsAndNoKeys) {
  EXPECT_EQ(schedule_of(3, 0, {-1, -1, 5, 5}).tasks(), 0);
  EXPECT_EQ(schedule_of(0, 5, {-1, -1, 0, 5}).tasks(), 0);
  EXPECT_EQ(schedule_of(3, 0, {-1, -1, 5, 5}).workspace_size(), 0);
  EXPECT_EQ(schedule_of(0, 5, {-1, -1, 0, 5}).workspace_size(), 0);
  EXPECT_EQ(schedule_of(3, 5, {-1, -1, -5, 0}).workspace_size(), 0);
}

TEST(BackwardSchedule, HasEnoughTasksForManyCoresWhenTheWindowIsNarrow) {
  EXPECT_GE(schedule_of(1, 131072, {128, 0, 0, 131072}).tasks(), 60);
  EXPECT_GE(schedule_of(8, 8192, {256, 0, 0, 8192}).tasks(), 60);
}

TEST(BackwardSchedule, HasTasksForSomeCoresWhereHeadsAreFewAndTheWindowIsWide) {
  EXPECT_EQ(schedule_of(1, 4096, {-1, -1, 0, 4096}).tasks(), 8);
  EXPECT_EQ(schedule_of(2, 4096, {-1, 0, 0, 4096}).tasks(), 8);
  EXPECT_EQ(schedule_of(1, 300, {-1, -1, 0, 300}).tasks(), 2);
  EXPECT_EQ(schedule_of(1, 128, {-1, -1, 0, 128}, many_threads, /*group=*/8).tasks(), 3) << "blocks of 48 queries";
  EXPECT_EQ(schedule_of(1, 128, {-1, -1, 0, 128}).tasks(), 1) << "too few queries";
}

TEST(BackwardSchedule, KeepsItsMemoryLinear) {
  const auto tensors = [](int64_t heads, int64_t n, int64_t left, int64_t right) {
    const BackwardSchedule schedule = schedule_of(heads, n, {left, right, 0, n});
    return double(schedule.workspace_size()) / double(heads * n * schedule.row); // key and value: one
  };
  for (const int64_t n : {1000, 4096, 100000, 1000000}) {
    for (const int64_t left : {int64_t{-1}, int64_t{0}, int64_t{128}, n / 16, n / 4, n}) {
      for (const int64_t right : {int64_t{-1}, int64_t{0}, int64_t{128}, n}) {
        for (const int64_t heads : {1, 2, 8, 64}) {
          EXPECT_LE(tensors(heads, n, left, right), heads < 8 ? 8 : 1.5)
              << heads << " heads of " << n << ", window (" << left << ", " << right << ")";
        }
      }
    }
  }
  EXPECT_LE(tensors(1, 131072, 128, 0), 0.5);
}

} // namespace

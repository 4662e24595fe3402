// Who sees whom: the one definition, for host and device.
#pragma once

#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define WMHA_HOST_DEVICE __host__ __device__
#else
#define WMHA_HOST_DEVICE
#endif

namespace wmha {

/// a + b, held at the ends of int64 where it would overflow.
WMHA_HOST_DEVICE constexpr int64_t saturating_add(int64_t a, int64_t b) {
  using Limits = std::numeric_limits<int64_t>;
  if (b > 0 && a > Limits::max() - b) return Limits::max();
  if (b < 0 && a < Limits::min() - b) return Limits::min();
  return a + b;
}

/// The half-open range [begin, end); empty iff begin == end.
struct Range {
  int64_t begin;
  int64_t end;

  WMHA_HOST_DEVICE constexpr int64_t size() const { return end - begin; }
  WMHA_HOST_DEVICE constexpr bool contains(int64_t i) const { return begin <= i && i < end; }
};

/// Query i sits at key position i + offset and sees `left` keys before it, itself, and `right` after it.
struct Window {
  int64_t left;   // >= 0, or -1: no bound
  int64_t right;  // >= 0, or -1: no bound
  int64_t offset; // any
  int64_t keys;   // >= 0

  /// The keys that query i >= 0 sees. Both ends never decrease as i grows.
  WMHA_HOST_DEVICE constexpr Range keys_of(int64_t i) const {
    const int64_t position = saturating_add(i, offset);
    const int64_t first = left < 0 ? 0 : clip(saturating_add(position, -left), keys);
    const int64_t last = right < 0 ? keys : clip(saturating_add(saturating_add(position, right), 1), keys);
    return {first < last ? first : last, last};
  }

  /// The keys that at least one of the queries sees. Precondition: queries is not empty.
  WMHA_HOST_DEVICE constexpr Range keys_of(Range queries) const {
    return {keys_of(queries.begin).begin, keys_of(queries.end - 1).end};
  }

  /// No more keys are seen by so many neighbouring queries.
  constexpr int64_t most_keys(int64_t queries) const {
    if (left < 0 || right < 0) return keys;
    const int64_t most = saturating_add(saturating_add(left, right), queries);
    return most < keys ? most : keys;
  }

  /// keys_of_query[i] = keys_of(queries.begin + i), in a few instructions each.
  constexpr void keys_of_each(Range queries, Range* keys_of_query) const {
    if (is_far(offset) || is_far(keys)) {
      for (int64_t i = 0; i < queries.size(); ++i) keys_of_query[i] = keys_of(queries.begin + i);
      return;
    }
    const int64_t position = queries.begin + offset;
    const int64_t first = left < 0 ? -far : hold(saturating_add(position, -left));
    const int64_t last = right < 0 ? far : hold(saturating_add(position, right)) + 1;
    for (int64_t i = 0; i < queries.size(); ++i) {
      const int64_t end = clip(last + i, keys);
      const int64_t begin = clip(first + i, keys);
      keys_of_query[i] = {begin < end ? begin : end, end};
    }
  }

  /// Those of the queries [0, count) that see at least one of the keys. Precondition: keys is not empty.
  WMHA_HOST_DEVICE constexpr Range queries_of(Range wanted, int64_t count) const {
    int64_t first = 0;
    int64_t last = count;
    if (!is_far(offset)) { // no position saturates: keys_of() solved for the query
      if (right >= 0) first = clip(saturating_add(wanted.begin - right, -offset), count);
      if (left >= 0) last = clip(saturating_add(saturating_add(wanted.end, left), -offset), count);
    } else {
      first = first_query(count, [&](Range seen) { return seen.end > wanted.begin; });
      last = first_query(count, [&](Range seen) { return seen.begin >= wanted.end; });
    }
    return {first < last ? first : last, last};
  }

 private:
  /// The first of the queries [0, count) whose keys pass a test that all after it pass, too; else count.
  template <typename Test>
  WMHA_HOST_DEVICE constexpr int64_t first_query(int64_t count, const Test& test) const {
    int64_t begin = 0;
    for (int64_t end = count; begin < end;) {
      const int64_t middle = begin + (end - begin) / 2;
      if (test(keys_of(middle))) {
        end = middle;
      } else {
        begin = middle + 1;
      }
    }
    return begin;
  }

  // Beyond any key, and far enough from the ends of int64 to count on.
  static constexpr int64_t far = int64_t{1} << 62;
  WMHA_HOST_DEVICE static constexpr bool is_far(int64_t x) { return x <= -far || far <= x; }
  WMHA_HOST_DEVICE static constexpr int64_t hold(int64_t x) { return x < -far ? -far : x > far ? far : x; }
  WMHA_HOST_DEVICE static constexpr int64_t clip(int64_t x, int64_t end) { return x < 0 ? 0 : x > end ? end : x; }
};

} // namespace wmha

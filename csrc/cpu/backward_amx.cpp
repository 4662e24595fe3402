// The backward pass of bf16 in the tile registers of AMX: backward.cpp's formulas, and as there, scores have keys in
// rows and queries in columns.
//
//                    tiles of 32 queries
//                +-------+-------+-------+
//   tiles of     |  S^T  |       |       |   A row at a time, of all the tiles of queries that see its keys: from
//   32 keys      |  dP^T |       |       |   S^T = K Q^T and dP^T = V dO^T to the weights P^T and to dS^T. Then, each
//                +-------+-------+-------+   in one product, dV = P^T dO and dK = dS^T Q of the row's keys.
//                |       |       |       |
//                |       |       |       |   When a column is done: dQ^T = K^T dS^T of its queries, in one product. For
//                +-------+-------+-------+   that, its dS^T wait.
//
// So sums stay in registers, and what is packed for a tile of queries serves the whole column. Only where windows are
// too wide for the second cache, columns are done in parts, and rows too: the queries are cut into blocks.
#include <vector>

#include "dropout.h"
#include "key_shares.h"
#include "key_tiles.h"
#include "look_ahead.h"
#include "passes.h"
#include "rows.h"
#include "scores.h"
#include "squares.h"
#include "statistics.h"
#include "tiles.h"

namespace wmha::cpu::CPU_CAPABILITY {
namespace {

using T = c10::BFloat16;
using M = multiplicand_type<T>;

constexpr int64_t vector = Vec<float>::size();
static_assert(square == tile_rows && square == query_block && square == Multiplicand<M>::columns);

// With 16 to 36 and 6 to 13 of them, times differ by 3 %, but that 8 and 12 are up to 10 % slower with wide windows.
constexpr int64_t most_query_tiles = 24; // of a row, of all heads that share its keys
constexpr int64_t most_waiting = 9;      // of a column: what a window of 256 keys needs

/// What there is to keep, in tiles.
struct Extent {
  int64_t heads;      // that share keys
  int64_t block;      // of queries
  int64_t slots;      // for queries of one head that are in sight
  int64_t key_sums;   // of keys whose gradients are not yet complete when a block ends, or 1
  int64_t query_sums; // of queries whose gradients are not made at once, or 1

  Extent(const AttentionParams& params, const BackwardSchedule& schedule) : heads(params.group()) {
    const Window& window = params.window;
    const bool is_bounded = window.left >= 0 && window.right >= 0;
    const int64_t reach = is_bounded ? saturating_add(window.left, window.right) : params.queries;
    const int64_t chunk = schedule.chunk / square;
    const int64_t in_sight = std::min(chunk, std::min(reach, params.queries) / square + 3);
    const bool all_fit = heads * in_sight <= most_query_tiles;
    block = all_fit ? chunk : std::max<int64_t>(most_query_tiles / heads, 1);
    slots = all_fit ? in_sight : block;
    key_sums = all_fit ? 1 : most_key_tiles(params, block);
    query_sums = most_key_tiles(params, 1) <= most_waiting ? 1 : heads * slots;
  }
};

/// A tile of queries of one head.
struct QueryTile {
  int64_t head; // of those that share keys
  int64_t slot;
  Range queries;
  Range seeing;                          // of them, counted from the first, those that see a key
  Range keys;                            // query i of those sees the keys [keys.begin + i, keys.end + i) that exist
  Range key_tiles;                       // that they see
  Range waiting;                         // of these, those whose dS^T wait
  alignas(64) float logsumexp[square];   // times log2 e
  alignas(64) float delta[square];       // times the factor of dS
  alignas(64) float temperature[square]; // sums of dz * z * log2 e, times the factor of dS

  /// One bit for each query that sees a key, which exists.
  uint64_t seeing_key(int64_t key) const {
    const auto place = [&](int64_t query) { return std::clamp(query, seeing.begin, seeing.end); };
    return (uint64_t{1} << place(key - keys.begin + 1)) - (uint64_t{1} << place(key - keys.end + 1));
  }
};

/// Rows of the queries in sight as right operands.
struct PackedRows {
  int64_t dim;
  int64_t width;
  Buffer<M> interleaved; // [slots][squares of dim][square_size]
  Buffer<M> transposed;  // the same

  PackedRows(int64_t dim, int64_t slots)
      : dim(dim),
        width(whole_columns<M>(dim)),
        interleaved(slots * square_pairs * width),
        transposed(slots * square_pairs * width) {}

  M* interleaved_of(int64_t slot) const { return interleaved + slot * square_pairs * width; }
  M* transposed_of(int64_t slot) const { return transposed + slot * square_pairs * width; }

  /// Rows that aren't used become zeros.
  void pack(int64_t slot, Rows<T> rows, Range used) {
    for_squares(rows, used, [&](const Square& part, int64_t d) {
      pack_interleaved(part, interleaved_of(slot) + d * square_pairs);
      pack_transposed(part, transposed_of(slot) + d * square_pairs);
    });
  }
};

/// grad_key or grad_value, sums over queries of left[key][query] * right[query].
struct KeyGradient {
  OutputView view;
  float factor;  // on the sums
  int64_t share; // its place among a key's shares
  const PackedRows& right;
  Buffer<M> left;     // [query tiles in sight][square][square_pairs]
  Buffer<float> sums; // [extent.key_sums][square][width], where they are incomplete

  KeyGradient(const OutputView& view, float factor, int64_t share, const PackedRows& right, const Extent& extent)
      : view(view),
        factor(factor),
        share(share),
        right(right),
        left(extent.heads * extent.slots * square_size),
        sums(extent.key_sums * square * right.width) {}
};

class Backward {
 public:
  Backward(const AttentionParams& params, const BackwardSchedule& schedule, float* workspace)
      : params_(params),
        schedule_(schedule),
        shares_(schedule, workspace),
        key_tiles_(params.window),
        extent_(params, schedule),
        temperature_(extent_.heads),
        query_tiles_(extent_.heads * extent_.slots),
        queries_(params.key_dim, query_tiles_.size()),
        grad_outputs_(params.value_dim, query_tiles_.size()),
        grad_key_(params.grad_key, 1.0f, 0, queries_, extent_),
        grad_value_(
            params.grad_value,
            static_cast<float>(params.dropout.inverse_keep),
            params.key_dim,
            grad_outputs_,
            extent_),
        scores_(square * square),
        grad_weights_(square * square),
        waiting_(query_tiles_.size() * most_waiting * square_size),
        grad_query_(extent_.query_sums * queries_.width * square),
        left_keys_(square * left_width<M>(params.key_dim)),
        left_values_(square * left_width<M>(params.value_dim)),
        key_columns_(most_waiting * queries_.width * square_pairs) {}

  /// One chunk of queries, of all heads that share a key head.
  void run(int64_t batch_kv_head, int64_t chunk) {
    batch_ = batch_kv_head / params_.kv_heads;
    kv_head_ = batch_kv_head % params_.kv_heads;
    chunk_ = chunk;
    keys_ = schedule_.keys_of(chunk);
    shares_.start(batch_kv_head, chunk);
    transforms_.clear();
    for (int64_t head = 0; head < extent_.heads; ++head) transforms_.emplace_back(params_, head_of(head));
    std::fill_n(temperature_.data(), extent_.heads, 0.0);
    summed_ = 0;
    const Range queries = schedule_.queries_of(chunk);
    for (int64_t begin = queries.begin; begin < queries.end; begin += extent_.block * square) {
      const Range block{begin, std::min(begin + extent_.block * square, queries.end)};
      const Range later = block.end < queries.end ? params_.window.keys_of(Range{block.end, queries.end}) : Range{0, 0};
      const Range key_tiles = key_tiles_.of(params_.window.keys_of(block));
      run_block(block, key_tiles, later.size() > 0 ? key_tiles_.of(later.begin) : key_tiles.end);
      summed_ = key_tiles.end;
    }
    if (params_.grad_temperature != nullptr) store_temperature();
  }

 private:
  /// A tile of keys, and who sees it.
  struct KeyTile {
    int64_t number;
    int64_t first;     // key, which may not exist
    Range keys;        // that the chunk sees
    Range query_tiles; // of the block that see at least one
    bool is_new;       // no earlier block has added to its gradients
    bool is_last;      // no later block will
  };

  int64_t head_of(int64_t head) const { return kv_head_ * extent_.heads + head; }
  int64_t slot_of(int64_t head, int64_t query_tile) const { return head * extent_.slots + query_tile % extent_.slots; }

  /// function(query_tile) for all of a row, heads one after another.
  template <typename Function>
  void for_row(const KeyTile& row, const Function& function) {
    for (int64_t head = 0; head < extent_.heads; ++head) {
      for (int64_t t = row.query_tiles.begin; t < row.query_tiles.end; ++t) function(query_tiles_[slot_of(head, t)]);
    }
  }

  /// Keys from tile `kept` on are seen by later blocks, too.
  void run_block(Range block, Range key_tiles, int64_t kept) {
    int64_t next = block.begin / square; // query tile
    const auto open_while = [&](const auto& test) {
      for (; next < ceil_div(block.end, square) && test(key_tiles_of(next)); ++next) {
        for (int64_t head = 0; head < extent_.heads; ++head) open(head, next);
      }
    };
    open_while([](Range seen) { return seen.size() == 0; });
    int64_t oldest = next;
    for (int64_t number = key_tiles.begin; number < key_tiles.end; ++number) {
      open_while([&](Range seen) { return seen.size() > 0 && seen.begin <= number; });
      while (key_tiles_of(oldest).end <= number) ++oldest;
      const Range all = key_tiles_.keys_of(number);
      const Range keys{std::max(all.begin, keys_.begin), std::min(all.end, keys_.end)};
      run_row({number, all.begin, keys, {oldest, next}, number >= summed_, number < kept});
    }
    open_while([](Range) { return true; }); // the rest sees nothing
  }

  Range queries_of(int64_t query_tile) const {
    return {query_tile * square, std::min((query_tile + 1) * square, params_.queries)};
  }
  Range key_tiles_of(int64_t query_tile) const { return key_tiles_.of(params_.window.keys_of(queries_of(query_tile))); }

  /// Packs what belongs to a tile of queries.
  void open(int64_t head, int64_t number) {
    QueryTile& tile = query_tiles_[slot_of(head, number)];
    const Range queries = queries_of(number);
    tile.head = head;
    tile.slot = slot_of(head, number);
    tile.queries = queries;
    tile.key_tiles = key_tiles_of(number);
    tile.waiting = {tile.key_tiles.begin, tile.key_tiles.begin};
    std::fill_n(tile.temperature, square, 0.0f);
    if (tile.key_tiles.size() == 0) { // they see nothing
      for (int64_t i = queries.begin; i < queries.end; ++i) {
        std::fill_n(at<T>(params_.grad_query, batch_, head_of(head), i), params_.key_dim, T(0));
      }
      return;
    }
    const auto keys_of = [&](int64_t i) { return params_.window.keys_of(queries.begin + i); };
    tile.seeing = {0, queries.size()};
    while (keys_of(tile.seeing.begin).size() == 0) ++tile.seeing.begin;
    while (keys_of(tile.seeing.end - 1).size() == 0) --tile.seeing.end;
    const int64_t last = tile.seeing.end - 1;
    tile.keys = {keys_of(last).begin - last, keys_of(tile.seeing.begin).end - tile.seeing.begin};
    const auto rows = [&](const auto& view, int64_t dim) {
      return rows_of<T>(view, batch_, head_of(head), queries, dim);
    };
    queries_.pack(tile.slot, rows(params_.query, params_.key_dim), tile.seeing);
    grad_outputs_.pack(tile.slot, rows(params_.grad_output, params_.value_dim), tile.seeing);
    load_statistics<T>(params_, batch_, head_of(head), queries, tile.logsumexp, tile.delta);
    for (int64_t i = 0; i < queries.size(); ++i) tile.delta[i] *= transforms_[head].gradient_factor;
  }

  void run_row(const KeyTile& row) {
    const RowMajor<const M> keys = pack_left(params_.key, params_.key_dim, row, left_keys_);
    const RowMajor<const M> values = pack_left(params_.value, params_.value_dim, row, left_values_);
    pack_key_columns(row);
    int64_t place = 0; // in the row
    for (int64_t head = 0; head < extent_.heads; ++head) {
      const Range newest = query_tiles_[slot_of(head, row.query_tiles.end - 1)].queries;
      LookAhead<T, 8> ahead(params_, batch_, head_of(head), newest, row.keys, row.query_tiles.size() * square_pairs);
      for (int64_t t = row.query_tiles.begin; t < row.query_tiles.end; ++t, ++place) {
        QueryTile& tile = query_tiles_[slot_of(head, t)];
        multiply_square(keys, queries_, tile.slot, scores_);
        multiply_square(values, grad_outputs_, tile.slot, grad_weights_);
        constexpr uint64_t all = (uint64_t{1} << square) - 1;
        const bool all_see = seeing_row(tile, row, 0) == all && seeing_row(tile, row, square - 1) == all;
        with_flags(
            [&](auto masked, auto drops, auto capped, auto tempered) {
              differentiate_scores<masked, drops, capped, tempered>(row, place, tile, ahead);
            },
            !all_see, params_.dropout.enabled(), transforms_[head].cap > 0, params_.grad_temperature != nullptr);
      }
    }
    sum_up(row, grad_value_);
    sum_up(row, grad_key_);
    for_row(row, [&](QueryTile& tile) {
      tile.waiting.end = row.number + 1;
      if (tile.waiting.end == tile.key_tiles.end || tile.waiting.size() == most_waiting) sum_up(tile);
    });
  }

  /// Keys or values as a left operand. Of those that don't exist, rows hold anything.
  RowMajor<const M> pack_left(const InputView& view, int64_t dim, const KeyTile& row, M* scratch) const {
    const Rows<T> rows = rows_of<T>(view, batch_, kv_head_, row.keys, dim);
    const int64_t before = row.keys.begin - row.first;
    const RowMajor<const M> left = left_rows<M>(rows, scratch + before * left_width<M>(dim));
    return {left.row(-before), left.row_stride};
  }

  M* key_columns_of(int64_t key_tile) const {
    return key_columns_ + key_tile % most_waiting * queries_.width * square_pairs;
  }

  void pack_key_columns(const KeyTile& row) {
    const Rows<T> rows = rows_of<T>(params_.key, batch_, kv_head_, {row.first, row.first + square}, params_.key_dim);
    const Range used{row.keys.begin - row.first, row.keys.end - row.first};
    for_squares(rows, used, [&](const Square& part, int64_t d) {
      pack_left_columns(part, key_columns_of(row.number) + d * square_pairs);
    });
  }

  /// products[key][query], a tile of them.
  static void multiply_square(RowMajor<const M> left, const PackedRows& right, int64_t slot, float* products) {
    clear_sums();
    multiply_add(left, right.transposed_of(slot), steps<M>(right.dim));
    store_sums({products, square}, 0);
  }

  M* waiting_of(const QueryTile& tile, int64_t key_tile) const {
    return waiting_ + (tile.slot * most_waiting + key_tile % most_waiting) * square_size;
  }

  /// From products to gradients: weights, dropout applied but for its factor, and grad_scores, as left operands at
  /// `place` in the row; grad_scores as a right one; the sums of dz * z.
  template <bool masked, bool drops, bool capped, bool tempered>
  void differentiate_scores(const KeyTile& row, int64_t place, QueryTile& tile, LookAhead<T, 8>& ahead) {
    const ScoreTransform<M>& transform = transforms_[tile.head];
    const Vec<float> factor(transform.gradient_factor * static_cast<float>(params_.dropout.inverse_keep));
    DropoutLanes<float> dropout[] = {dropout_of(tile), dropout_of(tile)};
    Vec<float> logsumexp[2];
    Vec<float> delta[2];
    Vec<float> temperature[2];
    for (int64_t half = 0; half < 2; ++half) {
      logsumexp[half] = Vec<float>::loadu(tile.logsumexp + half * vector);
      delta[half] = Vec<float>::loadu(tile.delta + half * vector);
      temperature[half] = Vec<float>::loadu(tile.temperature + half * vector);
    }
    const auto to_weights = reinterpret_cast<T*>(grad_value_.left + place * square_size);
    const auto to_grad_scores = reinterpret_cast<T*>(grad_key_.left + place * square_size);
    M* const waiting = waiting_of(tile, row.number);
    for (int64_t pair = 0; pair < square; pair += 2) {
      ahead.fetch();
      __m512i grad_scores_of[2];
      WMHA_UNROLL
      for (int64_t r = pair; r < pair + 2; ++r) {
        const uint64_t seeing = masked ? seeing_row(tile, row, r) : 0;
        Vec<float> weights[2];
        Vec<float> grad_scores[2];
        WMHA_UNROLL
        for (int64_t half = 0; half < 2; ++half) {
          const int64_t i = r * square + half * vector;
          const Seen<float> lanes{static_cast<__mmask16>(seeing >> half * vector)};
          const auto if_seen = [&](Vec<float> x) { return masked ? lanes.select(x, Vec<float>(0.0f)) : x; };
          const Vec<float> z = transform.template score<capped>(Vec<float>::loadu(scores_ + i));
          const Vec<float> weight = if_seen(exp2(z - logsumexp[half]));
          Vec<float> grad_weight = Vec<float>::loadu(grad_weights_ + i);
          weights[half] = weight;
          if constexpr (drops) {
            const int64_t key = row.first + r;
            if (r == 0 || key % Dropout::group == 0) dropout[half].draw(key, tile.queries.begin + half * vector);
            grad_weight = dropout[half].keep(grad_weight, key);
            weights[half] = dropout[half].keep(weight, key);
          }
          const Vec<float> grad_z = if_seen(weight * at::vec::fmsub(grad_weight, factor, delta[half])); // times factor
          if constexpr (tempered) temperature[half] = at::vec::fmadd(grad_z, if_seen(z), temperature[half]);
          grad_scores[half] = capped ? grad_z * if_seen(transform.tanh_derivative(z)) : grad_z;
        }
        round_to<T>(weights[0], weights[1]).store(to_weights + r * square);
        const at::vec::Vectorized<T> rounded = round_to<T>(grad_scores[0], grad_scores[1]);
        rounded.store(to_grad_scores + r * square);
        grad_scores_of[r - pair] = rounded;
      }
      const auto [low, high] = interleave(grad_scores_of[0], grad_scores_of[1]);
      _mm512_storeu_si512(waiting + pair / 2 * square_pairs, low);
      _mm512_storeu_si512(waiting + (16 + pair / 2) * square_pairs, high);
    }
    for (int64_t half = 0; tempered && half < 2; ++half) temperature[half].store(tile.temperature + half * vector);
  }

  DropoutLanes<float> dropout_of(const QueryTile& tile) const {
    return {params_, batch_ * params_.heads + head_of(tile.head)};
  }

  /// One bit for each query that sees a row's key, which may not exist.
  static uint64_t seeing_row(const QueryTile& tile, const KeyTile& row, int64_t r) {
    const int64_t key = row.first + r;
    return row.keys.contains(key) ? tile.seeing_key(key) : 0;
  }

  /// The share of a row in a gradient of its keys.
  void sum_up(const KeyTile& row, const KeyGradient& gradient) {
    const PackedRows& right = gradient.right;
    float* const sums = gradient.sums + row.number % extent_.key_sums * square * right.width;
    for (int64_t d = 0; d < right.width; d += square) {
      row.is_new ? clear_sums() : load_sums({sums + d, right.width}, 0);
      const M* left = gradient.left;
      for_row(row, [&](const QueryTile& tile) {
        multiply_add({left, square_pairs}, right.interleaved_of(tile.slot) + d * square_pairs);
        left += square_size;
      });
      if (row.is_last) {
        store_sums({scores_, square}, 0);
        store(row, gradient, d);
      } else {
        store_sums({sums + d, right.width}, 0);
      }
    }
  }

  /// Features of a gradient from `first_feature` on, whose sums are in scores_: complete ones to the tensor, others to
  /// where their shares are kept.
  void store(const KeyTile& row, const KeyGradient& gradient, int64_t first_feature) {
    const int64_t features = std::min(gradient.right.dim - first_feature, square);
    const auto of_row = [&](Range keys) {
      const auto clip = [&](int64_t key) { return std::clamp(key, row.keys.begin, row.keys.end); };
      return Range{clip(keys.begin), clip(keys.end)};
    };
    const auto for_shares = [&](Range keys, const auto& function) {
      if (keys.size() == 0) return;
      float* share = shares_.of(keys.begin) + gradient.share + first_feature;
      float* sums = scores_ + (keys.begin - row.first) * square;
      for (int64_t i = 0; i < keys.size(); ++i) function(sums + i * square, share + i * schedule_.row);
    };
    for_shares(of_row(shares_.left()), [&](float* sums, const float* share) {
      for (int64_t d = 0; d < features; ++d) sums[d] += share[d];
    });
    const Range complete = of_row(shares_.complete());
    store_rows(
        scores_ + (complete.begin - row.first) * square, complete.size(), features, gradient.factor,
        at<T>(gradient.view, batch_, kv_head_, complete.begin) + first_feature, gradient.view.position_stride);
    for (const Range shared : {Range{row.keys.begin, complete.begin}, Range{complete.end, row.keys.end}}) {
      for_shares(shared, [&](const float* sums, float* share) { std::copy_n(sums, features, share); });
    }
  }

  /// The share of what waits in grad_query of a tile of queries.
  void sum_up(QueryTile& tile) {
    const bool is_new = tile.waiting.begin == tile.key_tiles.begin;
    const bool is_last = tile.waiting.end == tile.key_tiles.end;
    float* const sums = grad_query_ + tile.slot % extent_.query_sums * queries_.width * square;
    for (int64_t d = 0; d < queries_.width; d += square) {
      const RowMajor<float> part{sums + d * square, square}; // features in rows
      is_new ? clear_sums() : load_sums({part.data, square}, 0);
      for (int64_t t = tile.waiting.begin; t < tile.waiting.end; ++t) {
        multiply_add({key_columns_of(t) + d * square_pairs, square_pairs}, waiting_of(tile, t));
      }
      if (is_last) {
        store_sums({scores_, square}, 0);
        store_columns(
            scores_, tile.queries.size(), std::min(params_.key_dim - d, square),
            at<T>(params_.grad_query, batch_, head_of(tile.head), tile.queries.begin) + d,
            params_.grad_query.position_stride);
      } else {
        store_sums(part, 0);
      }
    }
    tile.waiting.begin = tile.waiting.end;
    for (int64_t i = 0; is_last && i < tile.queries.size(); ++i) temperature_[tile.head] += tile.temperature[i];
  }

  void store_temperature() const {
    for (int64_t head = 0; head < extent_.heads; ++head) {
      const ScoreTransform<M>& transform = transforms_[head];
      const double sum = transform.gradient_factor == 0 ? 0 : temperature_[head] / transform.gradient_factor;
      params_.grad_temperature[(batch_ * params_.heads + head_of(head)) * schedule_.chunks + chunk_] =
          -sum * ln_of_2 * transform.inverse_temperature; // z is proportional to 1 / temperature
    }
  }

  const AttentionParams& params_;
  const BackwardSchedule& schedule_;
  KeyShares<float> shares_;
  const KeyTiles key_tiles_;
  const Extent extent_;
  const TileRegisters registers_;
  // Of a chunk:
  int64_t batch_ = 0;
  int64_t kv_head_ = 0;
  int64_t chunk_ = 0;
  Range keys_{0, 0};                          // that it sees
  std::vector<ScoreTransform<M>> transforms_; // of each head
  Buffer<double> temperature_;                // sums of dz * z * log2 e, times the factor of dS, of each head
  int64_t summed_ = 0;                        // tiles of keys before it have been seen by an earlier block
  // Of the queries in sight:
  std::vector<QueryTile> query_tiles_; // slots
  PackedRows queries_;
  PackedRows grad_outputs_;
  KeyGradient grad_key_;   // left: dS^T
  KeyGradient grad_value_; // left: P^T
  // Of a tile of scores:
  Buffer<float> scores_;       // [square][square], and products of other tiles
  Buffer<float> grad_weights_; // [square][square]
  // Of columns:
  Buffer<M> waiting_;        // [slots][most_waiting][square_size], dS^T as right operands
  Buffer<float> grad_query_; // [extent.query_sums][width][square]
  // Of tiles of keys:
  Buffer<M> left_keys_;   // [square][left_width(key_dim)], where they can't be read in place
  Buffer<M> left_values_; // [square][left_width(value_dim)]
  Buffer<M> key_columns_; // [most_waiting][width][square_pairs]
};

} // namespace

void backward(const AttentionParams& params, const BackwardSchedule& schedule, void* workspace, Tasks& tasks) {
  if (schedule.tasks() == 0) return; // there may be no head to divide by
  Backward pass(params, schedule, static_cast<float*>(workspace));
  schedule.for_chunks(tasks, [&](int64_t batch_kv_head, int64_t chunk) { pass.run(batch_kv_head, chunk); });
}

} // namespace wmha::cpu::CPU_CAPABILITY

// The forward pass of half types on tensor cores, after FlashAttention-2 (Dao, 2023): a block of threads has 128
// queries of one head (64 of the widest), a warp 32 of them (16). Keys and values pass by in tiles; the next one is
// copied while one is used. A warp takes a tile that all of its queries see at once, others in groups of 16 keys: of
// those the ones that at least one of its queries sees, and tests each score.
#include <type_traits>

#include "half_tiles.cuh"
#include "kernels.h"
#include "scores.cuh"
#include "tensor_core.cuh"
#include "warp_window.cuh"

namespace wmha::cuda {
namespace {

constexpr int warps = 4;
constexpr int threads = 32 * warps;

/// How a block of threads and its shared memory are divided.
template <int dim>
struct Blocking {
  static constexpr bool keeps_query = dim <= 64;       // in registers
  static constexpr int row_tiles = dim <= 128 ? 2 : 1; // of 16 queries, of a warp
  static constexpr int lane_rows = 2 * row_tiles;      // of which a lane has sums
  static constexpr int warp_rows = 16 * row_tiles;
  static constexpr int query_rows = warps * warp_rows;
  static constexpr int key_rows = dim <= 64 ? 64 : 32; // of a tile; two tiles are in shared memory at a time
};

/// The softmax of a lane's rows so far. Weights are relative to a reference, which moves to the largest score whenever
/// that is larger by 2^8: far from overflow, and seldom.
template <int rows>
struct Softmax {
  float factor;      // of scores
  float limit[rows]; // the score beyond which the reference moves
  float minus_reference[rows];
  float sum[rows];

  __device__ explicit Softmax(float factor) : factor(factor) {
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      limit[i] = -infinity<float>();
      minus_reference[i] = 0;
      sum[i] = 0;
    }
  }

  /// Moves references to where the scores want them; rescale(row, factor) then is for sums of weights so far.
  template <int row_tiles, int tiles, typename Rescale>
  __device__ void follow(const Sums (&score)[row_tiles][tiles], const Rescale& rescale) {
    float largest[rows];
    bool moves = false;
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      largest[i] = fmaxf(score[i / 2][0].x[i % 2][0], score[i / 2][0].x[i % 2][1]);
#pragma unroll
      for (int n = 1; n < tiles; ++n) {
        largest[i] = fmaxf(largest[i], fmaxf(score[i / 2][n].x[i % 2][0], score[i / 2][n].x[i % 2][1]));
      }
      moves |= largest[i] > limit[i];
    }
    if (!__any_sync(all_lanes, moves)) return;
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      largest[i] = fmaxf(largest[i], __shfl_xor_sync(all_lanes, largest[i], 1));
      largest[i] = fmaxf(largest[i], __shfl_xor_sync(all_lanes, largest[i], 2));
      if (!(largest[i] > limit[i])) continue;
      const float next = -largest[i] * factor;
      const float by = limit[i] == -infinity<float>() ? 0 : fast_exp2(next - minus_reference[i]);
      minus_reference[i] = next;
      limit[i] = largest[i] + 8 / factor;
      sum[i] *= by;
      rescale(i, by);
    }
  }

  /// From scores to weights.
  template <int row_tiles, int tiles>
  __device__ void weigh(Sums (&score)[row_tiles][tiles]) {
#pragma unroll
    for (int n = 0; n < tiles; ++n) {
#pragma unroll
      for (int i = 0; i < rows; ++i) {
#pragma unroll
        for (float& x : score[i / 2][n].x[i % 2]) {
          x = fast_exp2(fmaf(x, factor, minus_reference[i]));
          sum[i] += x;
        }
      }
    }
  }
};

template <typename T, int dim>
__global__ __launch_bounds__(threads) void forward_kernel(const __grid_constant__ AttentionParams params) {
  using B = Blocking<dim>;
  extern __shared__ __align__(128) unsigned char memory[];
  T* const shared = reinterpret_cast<T*>(memory);
  const HalfTile<T, dim> query_tile{shared};
  const HalfTile<T, dim> key_tile{shared + B::query_rows * dim};
  const HalfTile<T, dim> value_tile{shared + (B::query_rows + 2 * B::key_rows) * dim};
  const int lane = threadIdx.x % 32;
  const int warp_row = threadIdx.x / 32 * B::warp_rows;

  const QueryBlock<B::query_rows> block(params);
  const RowCopy<T, dim, threads> copy_keys(
      key_tile, params.key, block.batch, block.kv_head, block.first_key, params.key_dim);
  const RowCopy<T, dim, threads> copy_values(
      value_tile, params.value, block.batch, block.kv_head, block.first_key, params.value_dim);
  const auto copy = [&](int first, int to) {
    copy_keys.template start<B::key_rows>(first, to, block.keys.begin, block.keys.end);
    copy_values.template start<B::key_rows>(first, to, block.keys.begin, block.keys.end);
  };
  RowCopy<T, dim, threads>(query_tile, params.query, block.batch, block.head, block.first, params.key_dim)
      .template start<B::query_rows>(0, 0, 0, block.queries);
  copy(0, 0);

  const int64_t first_query = block.first + warp_row; // the warp's
  const int queries = max(min(block.queries - warp_row, B::warp_rows), 0);
  const LanePlace<T, dim> query_place = by_row(query_tile).after(warp_row);
  const LanePlace<T, dim> key_place = by_column(key_tile);
  const LanePlace<T, dim> value_place = by_row(value_tile);
  const RowsSeen<B::lane_rows> seen(
      queries, lane / 4, 8, [&](int row) { return Places(params.window.keys_of(first_query + row), block.first_key); });

  const ScoreTransform<float> transform(params, block.head);
  const bool scales_first = transform.capped() || !(transform.factor > 0); // else with the exponential
  Softmax<B::lane_rows> softmax(scales_first ? 1 : transform.factor);
  Sums output[B::row_tiles][dim / 8] = {};
  LeftFragment query[B::row_tiles][B::keeps_query ? dim / 16 : 1];

  // `count` groups of 16 keys, from key `first` on, which begin at row `place` of the tiles.
  const auto attend = [&](int first, int place, auto count, auto tests) {
    constexpr int tiles = 2 * decltype(count)::value; // of 8 keys
    const LanePlace<T, dim> keys_at = key_place.after(place);
    const LanePlace<T, dim> values_at = value_place.after(place);
    Sums score[B::row_tiles][tiles];
    unrolled<dim / 16>([&](auto d) {
      LeftFragment left[B::row_tiles];
      unrolled<B::row_tiles>([&](auto m) {
        left[m] =
            B::keeps_query ? query[m][B::keeps_query ? d : 0] : load_left(query_place.template at<16 * m, 16 * d>());
      });
      unrolled<tiles / 2>([&](auto n) {
        const RightFragments key = load_right(keys_at.template at<16 * n, 16 * d>());
#pragma unroll
        for (int i = 0; i < 2 * B::row_tiles; ++i) {
          Sums& sums = score[i / 2][2 * n + i % 2];
          sums = multiply_add<T>(left[i / 2], key.x[i % 2], d == 0 ? Sums{} : sums);
        }
      });
    });
    const auto for_each_score = [&](const auto& function) {
#pragma unroll
      for (int i = 0; i < B::row_tiles * tiles * 4; ++i) {
        float& x = score[i / 4 / tiles][i / 4 % tiles].x[i / 2 % 2][i % 2];
        x = function(x);
      }
    };
    if (transform.capped()) {
      for_each_score([&](float product) { return transform.cap * fast_tanh(product * transform.factor); });
    } else if (scales_first) {
      for_each_score([&](float product) { return product * transform.factor; });
    }
    if (tests) {
#pragma unroll
      for (int n = 0; n < tiles; ++n) {
#pragma unroll
        for (int i = 0; i < B::lane_rows; ++i) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float& x = score[i / 2][n].x[i % 2][j];
            x = seen.row[i].holds(first + 8 * n + lane % 4 * 2 + j) ? x : -infinity<float>();
          }
        }
      }
    }
    softmax.follow(score, [&](int row, float by) {
#pragma unroll
      for (Sums& part : output[row / 2]) {
        part.x[row % 2][0] *= by;
        part.x[row % 2][1] *= by;
      }
    });
    softmax.weigh(score);
    LeftFragment weight[B::row_tiles][tiles / 2];
    const auto round = [&] {
#pragma unroll
      for (int i = 0; i < B::row_tiles * tiles / 2; ++i) {
        const int m = i / (tiles / 2), n = i % (tiles / 2);
        weight[m][n] = round_sums<T>(score[m][2 * n], score[m][2 * n + 1]);
      }
    };
    if (params.dropout.enabled()) {
      const HeadDropout dropout(params, block.batch_head);
      // A counter's four words are for eight keys, of which each of four neighbouring lanes has two: each of them makes
      // the words of another tile or row.
#pragma unroll
      for (int n = 0; n < tiles; n += 2) {
#pragma unroll
        for (int m = 0; m < B::row_tiles; ++m) {
          PhiloxWords words = dropout.words(
              block.first_key + first + 8 * (n + lane % 4 / 2), first_query + 16 * m + lane / 4 + lane % 2 * 8);
          transpose_in_fours<1>(words.word);
#pragma unroll
          for (int t = 0; t < 4; ++t) {
            const HeadDropout::Keeps keeps = dropout.keeps(words.word[t]);
            float (&x)[2] = score[m][n + t / 2].x[t % 2];
            x[0] = keeps.key[0] ? x[0] : 0;
            x[1] = keeps.key[1] ? x[1] : 0;
          }
        }
      }
      round();
    } else {
      round();
    }
    unrolled<tiles / 2>([&](auto n) {
      unrolled<dim / 16>([&](auto d) {
        const RightFragments value = load_right_transposed(values_at.template at<16 * n, 16 * d>());
#pragma unroll
        for (int i = 0; i < 2 * B::row_tiles; ++i) {
          Sums& sums = output[i / 2][2 * d + i % 2];
          sums = multiply_add<T>(weight[i / 2][n], value.x[i % 2], sums);
        }
      });
    });
  };

  for (int first = 0, stage = 0; first < block.keys.end; first += B::key_rows, stage ^= B::key_rows) {
    wait_for_copies();
    __syncthreads();
    if (B::keeps_query && first == 0) {
      unrolled<B::row_tiles>([&](auto m) {
        unrolled<B::keeps_query ? dim / 16 : 0>(
            [&](auto d) { query[m][d] = load_left(query_place.template at<16 * m, 16 * d>()); });
      });
    }
    if (first + B::key_rows < block.keys.end) copy(first + B::key_rows, stage ^ B::key_rows);
    for_each_group<B::key_rows>(
        seen, first, [&](int place, auto count, auto tests) { attend(first + place, stage + place, count, tests); });
  }

  // Outputs go through the warp's rows of the query tile, so that whole chunks are written.
  wait_for_copies();
  __syncthreads();
  float normalizer[B::lane_rows];
#pragma unroll
  for (int i = 0; i < B::lane_rows; ++i) {
    float sum = softmax.sum[i];
    sum += __shfl_xor_sync(all_lanes, sum, 1);
    sum += __shfl_xor_sync(all_lanes, sum, 2);
    const bool sees_none = seen.row[i].end == seen.row[i].begin;
    normalizer[i] = sees_none ? 0 : static_cast<float>(params.dropout.inverse_keep) / sum;
    const int row = lane / 4 + 8 * i;
    if (lane % 4 == 0 && row < queries) {
      static_cast<float*>(params.logsumexp)[block.batch_head * params.queries + first_query + row] =
          sees_none ? -infinity<float>() : (log2f(sum) - softmax.minus_reference[i]) * static_cast<float>(ln_of_2);
    }
  }
#pragma unroll
  for (int m = 0; m < B::row_tiles; ++m) {
    round_rows(output[m], normalizer[2 * m], normalizer[2 * m + 1], query_tile, warp_row + 16 * m);
  }
  __syncwarp();
  store_rows<Order::plain, B::warp_rows>(
      query_tile, warp_row, params.output, block.batch, block.head, first_query, queries, params.value_dim);
}

template <typename T, int dim>
void launch(const AttentionParams& params, cudaStream_t stream) {
  using B = Blocking<dim>;
  constexpr int bytes = (B::query_rows + 4 * B::key_rows) * dim * sizeof(T);
  const int64_t tasks = params.batch * params.heads * ceil_div(params.queries, B::query_rows);
  if (tasks == 0) return;
  cudaFuncSetAttribute(forward_kernel<T, dim>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  forward_kernel<T, dim><<<static_cast<unsigned>(tasks), threads, bytes, stream>>>(params);
}

} // namespace

void tensor_core_forward(const AttentionParams& params, cudaStream_t stream) {
  with_tile(params, [&](auto type, auto dim) { launch<decltype(type), decltype(dim)::value>(params, stream); });
}

} // namespace wmha::cuda

// The forward pass of half types on tensor cores, after FlashAttention-2 (Dao, 2023): a block of threads has 64 queries
// of one head, a warp 16 of them. Keys and values pass by in tiles; the next one is copied while one is used. A warp
// takes a tile that all of its queries see at once, others in groups of 16 keys: of those the ones that at least one of
// its queries sees, and tests each score.
#include <type_traits>

#include "kernels.h"
#include "scores.cuh"
#include "tensor_core.cuh"

namespace wmha::cuda {
namespace {

constexpr int warps = 4;
constexpr int threads = 32 * warps;
constexpr int warp_rows = 16;
constexpr int query_rows = warps * warp_rows;
constexpr int group_keys = 16;
constexpr uint32_t all_lanes = 0xFFFFFFFFu;

/// Keys of a tile, of which two are in shared memory at a time.
constexpr int key_rows_of(int dim) { return dim <= 128 ? 64 : 32; }

/// The keys, relative to some first one, that are seen by one row or by several.
struct Keys {
  int begin;
  int end;
};

__device__ Keys relative(Range keys, int64_t first) {
  return {static_cast<int>(keys.begin - first), static_cast<int>(keys.end - first)};
}

template <typename T, int dim>
__global__ __launch_bounds__(threads) void forward_kernel(AttentionParams params) {
  constexpr bool keeps_query = dim <= 128; // in registers
  constexpr int key_rows = key_rows_of(dim);
  extern __shared__ __align__(16) unsigned char memory[];
  T* const shared = reinterpret_cast<T*>(memory);
  const HalfTile<T, dim> query_tile{shared};
  const HalfTile<T, dim> key_tile{shared + query_rows * dim};
  const HalfTile<T, dim> value_tile{shared + (query_rows + 2 * key_rows) * dim};
  const int lane = threadIdx.x % 32;
  const int warp_row = threadIdx.x / 32 * warp_rows;

  const int64_t blocks = ceil_div(params.queries, query_rows);
  const int64_t first_query = blockIdx.x % blocks * query_rows;
  const int64_t batch_head = blockIdx.x / blocks;
  const int64_t batch = batch_head / params.heads;
  const int64_t head = batch_head % params.heads;
  const int64_t kv_head = params.kv_head(head);
  const Range queries{first_query, min(first_query + query_rows, params.queries)};
  const Range keys = params.window.keys_of(queries);
  const int64_t first_key = keys.begin / group_keys * group_keys; // dropout's counters begin at multiples of 8
  const int end = static_cast<int>(keys.end - first_key);
  const int begin = static_cast<int>(keys.begin - first_key);
  const RowCopy<T, dim, threads> copy_keys(
      key_tile, at<T>(params.key, batch, kv_head, first_key), params.key.position_stride,
      static_cast<int>(params.key_dim));
  const RowCopy<T, dim, threads> copy_values(
      value_tile, at<T>(params.value, batch, kv_head, first_key), params.value.position_stride,
      static_cast<int>(params.value_dim));
  const LaneAddresses<T, dim> query_places = by_row(query_tile);
  const LaneAddresses<T, dim> key_places = by_column(key_tile);
  const LaneAddresses<T, dim> value_places = by_row(value_tile);

  RowCopy<T, dim, threads>(
      query_tile, at<T>(params.query, batch, head, first_query), params.query.position_stride,
      static_cast<int>(params.key_dim))
      .template start<query_rows>(0, 0, 0, static_cast<int>(queries.size()));
  copy_keys.template start<key_rows>(0, 0, begin, end);
  copy_values.template start<key_rows>(0, 0, begin, end);

  // Of the warp's queries: keys that any of them sees, that all of them see, and that each of the lane's two rows sees.
  Keys any{0, 0};
  Keys all{0, 0};
  Keys seen[2];
  const int64_t warp_query = first_query + warp_row;
  if (warp_query < queries.end) {
    const Keys first = relative(params.window.keys_of(warp_query), first_key);
    const Keys last = relative(params.window.keys_of(min(warp_query + warp_rows, queries.end) - 1), first_key);
    any = {first.begin, last.end};
    all = {last.begin, first.end};
  }
  for (int i = 0; i < 2; ++i) {
    const int64_t query = warp_query + lane / 4 + 8 * i;
    seen[i] = query < queries.end ? relative(params.window.keys_of(query), first_key) : Keys{0, 0};
  }

  const ScoreTransform<float> transform(params, head);
  const bool scales_first = transform.cap > 0 || !(transform.factor > 0); // else with the exponential
  const float factor = scales_first ? 1 : transform.factor;
  // The softmax's reference, of each row: 0 at first, then moved to the largest score so far whenever that is larger by
  // 2^8, which leaves the weights far from overflow.
  float reference[2] = {0, 0};
  bool referenced[2] = {false, false};
  float sum[2] = {0, 0};
  Sums output[dim / 8] = {};
  LeftFragment query[keeps_query ? dim / 16 : 1];

  const auto move_references = [&](const auto& score) {
    float largest[2] = {-infinity<float>(), -infinity<float>()};
#pragma unroll
    for (const Sums& sums : score) {
#pragma unroll
      for (int i = 0; i < 2; ++i) largest[i] = fmaxf(largest[i], fmaxf(sums.x[i][0], sums.x[i][1]));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      largest[i] = fmaxf(largest[i], __shfl_xor_sync(all_lanes, largest[i], 1));
      largest[i] = fmaxf(largest[i], __shfl_xor_sync(all_lanes, largest[i], 2)) * factor;
    }
    const auto moves = [&](int i) {
      return largest[i] > -infinity<float>() && (!referenced[i] || largest[i] > reference[i] + 8);
    };
    if (!__any_sync(all_lanes, moves(0) || moves(1))) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!moves(i)) continue;
      const float rescale = referenced[i] ? fast_exp2(reference[i] - largest[i]) : 0;
      reference[i] = largest[i];
      referenced[i] = true;
      sum[i] *= rescale;
#pragma unroll
      for (Sums& part : output) {
        part.x[i][0] *= rescale;
        part.x[i][1] *= rescale;
      }
    }
  };
  // A counter's four words are for eight keys, of which each of four neighbouring lanes has two: each of them makes the
  // words of another tile or row.
  const DropoutBits dropout_bits(params.dropout, params.rng_state);
  const auto drop = [&](auto& score, int first) {
    constexpr int tiles = sizeof(score) / sizeof(Sums);
#pragma unroll
    for (int n = 0; n < tiles; n += 2) {
      const int64_t key = first_key + first + 8 * (n + lane % 4 / 2);
      const int64_t row = warp_query + lane / 4 + lane % 2 * 8;
      PhiloxWords words = dropout_bits(key, row, batch_head);
      transpose_in_fours(words.word);
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        float (&x)[2] = score[n + t / 2].x[t % 2];
        x[0] = params.dropout.keeps(words.word[t], 0) ? x[0] : 0;
        x[1] = params.dropout.keeps(words.word[t], 1) ? x[1] : 0;
      }
    }
  };

  // `count` groups of 16 keys, from key `first` on, whose places begin at the given ones.
  const auto attend = [&](int first, const LaneAddresses<T, dim>& keys_at, const LaneAddresses<T, dim>& values_at,
                          auto count, auto tests) {
    constexpr int tiles = 2 * decltype(count)::value; // of 8 keys
    Sums score[tiles];
#pragma unroll
    for (int n = 0; n < tiles; n += 2) {
#pragma unroll
      for (int d = 0; d < dim / 16; ++d) {
        if (!keeps_query) query[0] = load_left(query_places.at(warp_row, 16 * d));
        const LeftFragment& left = query[keeps_query ? d : 0];
        const RightFragments key = load_right(keys_at.at(8 * n, 16 * d));
        if (d == 0) {
          score[n] = multiply<T>(left, key.x[0]);
          score[n + 1] = multiply<T>(left, key.x[1]);
        } else {
          multiply_add<T>(score[n], left, key.x[0]);
          multiply_add<T>(score[n + 1], left, key.x[1]);
        }
      }
    }
    if (scales_first) {
#pragma unroll
      for (Sums& sums : score) {
#pragma unroll
        for (float (&row)[2] : sums.x) {
          row[0] = transform(row[0]);
          row[1] = transform(row[1]);
        }
      }
    }
    if (tests) {
#pragma unroll
      for (int n = 0; n < tiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int key = first + 8 * n + lane % 4 * 2 + j;
            if (key < seen[i].begin || seen[i].end <= key) score[n].x[i][j] = -infinity<float>();
          }
        }
      }
    }
    move_references(score);
#pragma unroll
    for (Sums& sums : score) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (float& x : sums.x[i]) {
          x = fast_exp2(fmaf(x, factor, -reference[i]));
          sum[i] += x;
        }
      }
    }
    if (params.dropout.enabled()) drop(score, first);
#pragma unroll
    for (int n = 0; n < tiles; n += 2) {
      LeftFragment weight;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) weight.x[2 * m + i] = round_pair<T>(score[n + m].x[i][0], score[n + m].x[i][1]);
      }
#pragma unroll
      for (int d = 0; d < dim / 16; ++d) {
        const RightFragments value = load_right_transposed(values_at.at(8 * n, 16 * d));
        multiply_add<T>(output[2 * d], weight, value.x[0]);
        multiply_add<T>(output[2 * d + 1], weight, value.x[1]);
      }
    }
  };

  for (int first = 0, stage = 0; first < end; first += key_rows, stage ^= 1) {
    wait_for_copies<0>();
    __syncthreads();
    if (keeps_query && first == 0) {
#pragma unroll
      for (int d = 0; d < dim / 16; ++d) query[keeps_query ? d : 0] = load_left(query_places.at(warp_row, 16 * d));
    }
    if (first + key_rows < end) {
      copy_keys.template start<key_rows>(first + key_rows, (stage ^ 1) * key_rows, begin, end);
      copy_values.template start<key_rows>(first + key_rows, (stage ^ 1) * key_rows, begin, end);
    }
    const LaneAddresses<T, dim> keys_at = key_places.after(stage * key_rows);
    const LaneAddresses<T, dim> values_at = value_places.after(stage * key_rows);
    if (all.begin <= first && first + key_rows <= all.end) {
      attend(first, keys_at, values_at, std::integral_constant<int, key_rows / group_keys>(), std::false_type());
    } else {
      const int last = min(any.end - first, key_rows);
      for (int row = max(any.begin - first, 0) / group_keys * group_keys; row < last; row += group_keys) {
        attend(
            first + row, keys_at.after(row), values_at.after(row), std::integral_constant<int, 1>(), std::true_type());
      }
    }
  }

  // Outputs go through the warp's rows of the query tile, so that whole chunks are written.
  wait_for_copies<0>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sum[i] += __shfl_xor_sync(all_lanes, sum[i], 1);
    sum[i] += __shfl_xor_sync(all_lanes, sum[i], 2);
    const bool sees_none = seen[i].end == seen[i].begin;
    const float normalizer = sees_none ? 0 : static_cast<float>(params.dropout.inverse_keep) / sum[i];
    const int row = warp_row + lane / 4 + 8 * i;
#pragma unroll
    for (int n = 0; n < dim / 8; ++n) {
      const uint32_t pair = round_pair<T>(output[n].x[i][0] * normalizer, output[n].x[i][1] * normalizer);
      *reinterpret_cast<uint32_t*>(query_tile.data + HalfTile<T, dim>::offset(row, n) + lane % 4 * 2) = pair;
    }
    if (lane % 4 == 0 && first_query + row < queries.end) {
      static_cast<float*>(params.logsumexp)[batch_head * params.queries + first_query + row] =
          sees_none ? -infinity<float>() : (reference[i] + log2f(sum[i])) * static_cast<float>(ln_of_2);
    }
  }
  __syncwarp();
  for (int i = lane; i < warp_rows * (dim / chunk); i += 32) {
    const int row = warp_row + i / (dim / chunk);
    const int part = i % (dim / chunk);
    if (first_query + row >= queries.end || part * chunk >= params.value_dim) continue;
    T* const target = at<T>(params.output, batch, head, first_query + row) + part * chunk;
    *reinterpret_cast<uint4*>(target) =
        *reinterpret_cast<const uint4*>(query_tile.data + HalfTile<T, dim>::offset(row, part));
  }
}

template <typename T, int dim>
void launch(const AttentionParams& params, cudaStream_t stream) {
  constexpr int bytes = (query_rows + 4 * key_rows_of(dim)) * dim * sizeof(T);
  const int64_t tasks = params.batch * params.heads * ceil_div(params.queries, query_rows);
  if (tasks == 0) return;
  cudaFuncSetAttribute(forward_kernel<T, dim>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  forward_kernel<T, dim><<<static_cast<unsigned>(tasks), threads, bytes, stream>>>(params);
}

} // namespace

void tensor_core_forward(const AttentionParams& params, cudaStream_t stream) {
  const auto with_type = [&](auto type) {
    using T = decltype(type);
    const int64_t dim = params.key_dim > params.value_dim ? params.key_dim : params.value_dim;
    if (dim <= 32) return launch<T, 32>(params, stream);
    if (dim <= 64) return launch<T, 64>(params, stream);
    if (dim <= 96) return launch<T, 96>(params, stream);
    if (dim <= 128) return launch<T, 128>(params, stream);
    if (dim <= 192) return launch<T, 192>(params, stream);
    launch<T, 256>(params, stream);
  };
  params.dtype == ScalarType::Half ? with_type(__half()) : with_type(__nv_bfloat16());
}

} // namespace wmha::cuda

// Few queries of any type and any head dimension: a block of threads has up to 8 rows of a key head, a split of its
// keys, and 32 lanes' share of the values' features. Eight lanes multiply a key with all rows, so that a warp has four
// keys at once, and four times four in a tile; then each lane has some features of all values of the tile.
//
//   lane (team, part) = (lane / 8, lane % 8): the scores of row `part` with the keys 4 k + team, k = 0 to 3
#include "decode.cuh"
#include "kernels.h"

namespace wmha::cuda {
namespace {

constexpr int team_lanes = 8;
constexpr int teams = 32 / team_lanes;
constexpr int team_keys = decode_tile / teams;
constexpr int query_piece = 256; // features of the queries that are in shared memory at once

/// Neighbouring elements that a lane reads at once: 16 bytes or a single one.
template <typename T, int size>
struct alignas(size * sizeof(T)) Elements {
  T x[size];
};

template <typename T, int size>
__device__ Elements<T, size> load_elements(const T* from) {
  return *reinterpret_cast<const Elements<T, size>*>(from);
}

/// A lane's features of the output.
template <typename Acc>
constexpr int lane_features = 32 / sizeof(Acc);

template <typename Acc, int rows>
struct GeneralDecodeShared {
  union {
    Acc query[rows][query_piece];
    WarpStates<Acc, rows, 32 * lane_features<Acc>> states;
  };
  Acc weights[decode_warps][decode_tile][rows];
};

/// Of the sums over eight lanes of x[0 to 7], lane n gets that of x[n].
template <typename Acc>
__device__ Acc sum_over_team(Acc (&x)[8]) {
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = threadIdx.x & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const Acc sent = upper ? x[i] : x[i + half];
      x[i] = (upper ? x[i + half] : x[i]) + __shfl_xor_sync(all_lanes, sent, half);
    }
  }
  return x[0];
}
/// All lanes get the only sum.
template <typename Acc>
__device__ Acc sum_over_team(Acc (&x)[1]) {
#pragma unroll
  for (int lanes = team_lanes / 2; lanes > 0; lanes /= 2) x[0] += __shfl_xor_sync(all_lanes, x[0], lanes);
  return x[0];
}

template <typename T, bool chunked, int rows>
__global__ __launch_bounds__(
    decode_threads,
    rows == 1 ? 4 : 2) void decode_kernel(AttentionParams params, DecodeSchedule schedule, acc_type<T>* workspace) {
  using Acc = acc_type<T>;
  constexpr int size = chunked ? 16 / sizeof(T) : 1;
  constexpr int features = lane_features<Acc>;
  constexpr int width = 32 * features;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = reinterpret_cast<GeneralDecodeShared<Acc, rows>&>(memory);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int team = lane / team_lanes;
  const int part = lane % team_lanes;

  const int value_parts = (schedule.state_width + width - 1) / width;
  const int block = static_cast<int>(blockIdx.x);
  const int first_feature = block % value_parts * width;
  const DecodeTask task(schedule, block / value_parts, rows);
  const DecodeRow row(params, schedule, task, part % rows);
  const int64_t batch_head = task.batch * params.heads + row.head;
  const ScoreTransform<Acc> transform(params, row.head);
  const T* const keys = at<T>(params.key, task.batch, task.kv_head, task.first_key);
  const T* const values = at<T>(params.value, task.batch, task.kv_head, task.first_key) + first_feature;
  const int key_dim = static_cast<int>(params.key_dim);
  const int value_dim = static_cast<int>(params.value_dim) - first_feature;

  const auto load_queries = [&](int first) {
    for (int r = warp; r < rows; r += decode_warps) {
      const DecodeRow from(params, schedule, task, r);
      const T* const query = at<T>(params.query, task.batch, from.head, from.query) + first;
      for (int d = lane; d < min(query_piece, key_dim - first); d += 32) {
        shared.query[r][d] = from.there ? static_cast<Acc>(query[d]) : Acc(0);
      }
    }
  };
  if (key_dim <= query_piece) {
    load_queries(0);
    __syncthreads();
  }

  RunningSoftmax<Acc> softmax; // of the lane's row; the sum is that of the lane's keys
  Acc output[rows][features] = {};
  for (int block_first = 0; block_first < task.end; block_first += decode_step) {
    const int first = block_first + warp * decode_tile;

    const T* key_row[team_keys];
    Acc product[team_keys][rows] = {};
#pragma unroll
    for (int k = 0; k < team_keys; ++k) {
      const int key = min(max(first + teams * k + team, task.begin), task.end - 1); // those outside will weigh nothing
      key_row[k] = keys + key * params.key.position_stride;
    }
    for (int piece = 0; piece < key_dim; piece += query_piece) {
      if (key_dim > query_piece) {
        __syncthreads();
        load_queries(piece);
        __syncthreads();
      }
#pragma unroll 2
      for (int d = part * size; d < min(query_piece, key_dim - piece); d += team_lanes * size) {
        Elements<T, size> key[team_keys];
#pragma unroll
        for (int k = 0; k < team_keys; ++k) key[k] = load_elements<T, size>(key_row[k] + piece + d);
#pragma unroll
        for (int r = 0; r < rows; ++r) {
          const auto query = load_elements<Acc, size>(&shared.query[r][d]);
#pragma unroll
          for (int k = 0; k < team_keys; ++k) {
#pragma unroll
            for (int i = 0; i < size; ++i) product[k][r] += query.x[i] * static_cast<Acc>(key[k].x[i]);
          }
        }
      }
    }

    Acc weight[team_keys];
    Acc largest = -infinity<Acc>();
#pragma unroll
    for (int k = 0; k < team_keys; ++k) {
      const Acc score = transform(sum_over_team(product[k]));
      weight[k] = row.sees(first + teams * k + team) ? score : -infinity<Acc>();
      largest = max(largest, weight[k]);
    }
#pragma unroll
    for (int lanes = team_lanes; lanes < 32; lanes *= 2) {
      largest = max(largest, __shfl_xor_sync(all_lanes, largest, lanes));
    }
    if (__any_sync(all_lanes, softmax.moves(largest))) {
      const Acc rescale = softmax.move(largest);
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        const Acc of_row = __shfl_sync(all_lanes, rescale, r);
#pragma unroll
        for (Acc& x : output[r]) x *= of_row;
      }
    }
#pragma unroll
    for (int k = 0; k < team_keys; ++k) {
      weight[k] = exp2_of(weight[k] - softmax.reference);
      softmax.sum += weight[k];
    }
    if (params.dropout.enabled()) {
      const DropoutBits bits(params.dropout, params.rng_state); // not kept in registers: decoding hardly ever drops
#pragma unroll
      for (int k = 0; k < team_keys; k += 2) { // two times four keys share a counter
        const int64_t key = task.first_key + first + teams * k;
        const PhiloxWords words = bits(key, row.query, batch_head);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t word = team < 2 ? words.word[2 * i] : words.word[2 * i + 1];
          if (!params.dropout.keeps(word, team)) weight[k + i] = 0;
        }
      }
    }
    if (part < rows) {
#pragma unroll
      for (int k = 0; k < team_keys; ++k) shared.weights[warp][teams * k + team][part] = weight[k];
    }
    __syncwarp();

    const int end = min(decode_tile, task.end - first);
#pragma unroll 4
    for (int k = max(task.begin - first, 0); k < end; ++k) {
      const T* const value_row = values + (first + k) * params.value.position_stride;
      Acc of_row[rows];
#pragma unroll
      for (int r = 0; r < rows; ++r) of_row[r] = shared.weights[warp][k][r];
#pragma unroll
      for (int i = 0; i < features; i += size) {
        const int feature = lane * size + 32 * i;
        if (feature >= value_dim) continue;
        const auto value = load_elements<T, size>(value_row + feature);
#pragma unroll
        for (int r = 0; r < rows; ++r) {
#pragma unroll
          for (int j = 0; j < size; ++j) output[r][i + j] += of_row[r] * static_cast<Acc>(value.x[j]);
        }
      }
    }
    __syncwarp();
  }

  __syncthreads(); // the queries have been read
#pragma unroll
  for (int lanes = team_lanes; lanes < 32; lanes *= 2) softmax.sum += __shfl_xor_sync(all_lanes, softmax.sum, lanes);
  if (lane < rows) shared.states.softmax[warp][part] = {softmax.reference, softmax.sum};
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    Acc* const to = shared.states.values[warp][r][0].x;
#pragma unroll
    for (int i = 0; i < features; i += size) {
      Elements<Acc, size> elements;
#pragma unroll
      for (int j = 0; j < size; ++j) elements.x[j] = output[r][i + j];
      reinterpret_cast<Elements<Acc, size>&>(to[lane * size + 32 * i]) = elements;
    }
  }
  __syncthreads();
  shared.states.store(schedule, task, workspace, first_feature, [](int, int v) { return v; });
}

template <typename T, bool chunked, int rows>
void launch(const AttentionParams& params, const DecodeSchedule& schedule, void* workspace, cudaStream_t stream) {
  using Acc = acc_type<T>;
  constexpr int bytes = sizeof(GeneralDecodeShared<Acc, rows>);
  const int64_t tasks = int64_t{schedule.batch_kv_heads} * schedule.splits * ceil_div(schedule.rows, rows) *
                        ceil_div(schedule.state_width, 32 * lane_features<Acc>);
  const auto kernel = decode_kernel<T, chunked, rows>;
  if (bytes > 48 << 10) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  kernel<<<static_cast<unsigned>(tasks), decode_threads, bytes, stream>>>(
      params, schedule, static_cast<Acc*>(workspace));
}

} // namespace

void general_decode(
    const AttentionParams& params,
    const DecodeSchedule& schedule,
    void* workspace,
    cudaStream_t stream) {
  with_scalar_type(params.dtype, [&](auto type) {
    using T = decltype(type);
    const auto with_rows = [&](auto chunked) {
      if (schedule.rows == 1) return launch<T, chunked, 1>(params, schedule, workspace, stream);
      launch<T, chunked, 8>(params, schedule, workspace, stream);
    };
    if constexpr (sizeof(T) >= sizeof(float)) { // half types in chunks run on tensor cores, or are wider than most
      constexpr int64_t size = 16 / sizeof(T);
      if (in_chunks(params.key, params.key_dim, size) && in_chunks(params.value, params.value_dim, size)) {
        return with_rows(std::true_type());
      }
    }
    with_rows(std::false_type());
  });
}

} // namespace wmha::cuda

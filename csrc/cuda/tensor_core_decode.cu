// Few queries of half types on tensor cores. Keys and values go from global memory straight to the registers in which
// mma wants them, without shared memory: it doesn't matter which features of a product a lane has, so it takes eight
// neighbours, nor in which order the features of the output come.
//
//   lane (g, q) = (lane / 4, lane % 4) has of 16 rows x 16 keys
//   of the left operand of scores    rows g and g + 8,           features 32 c + 8 q + (0 to 7)
//   of the right one                 keys 8 t + g,               the same features
//   of scores                        rows g + 8 i, keys 8 t + 2 q + (0 and 1): also of the weights, as right operand
//   of values, as left operand       keys 8 t + 2 q + (0 and 1), features 64 c + 8 g + (0 to 7)
//   of outputs                       rows 2 q + (0 and 1) + 8 i, the same features
#include "decode.cuh"
#include "kernels.h"
#include "row_reader.cuh"

namespace wmha::cuda {
namespace {

/// Vector `v` of a state's row. Four rows are written at once, and of each every second vector of four: the order in
/// which they lie differs from row to row, so that they meet different banks.
__device__ int place_of_vector(int row, int v) { return v ^ ((row / 2 & 1) | (row / 2 & 2) << 1); }

/// Blocks that a multiprocessor should have room for: registers are kept that low.
template <int dim, int row_tiles>
constexpr int wanted_blocks = dim * row_tiles <= 64    ? 4
                              : dim * row_tiles <= 128 ? 3
                                                       : 2;

template <typename T, int dim, int row_tiles>
__global__ __launch_bounds__(decode_threads, wanted_blocks<dim, row_tiles>) void decode_kernel(
    AttentionParams params,
    DecodeSchedule schedule,
    float* workspace) {
  constexpr int rows = 8 * row_tiles;
  constexpr int key_chunks = dim / 32;
  constexpr int value_chunks = dim / 64;
  constexpr bool loads_ahead = dim <= 128; // while keys are used, values are on their way, and vice versa
  __shared__ Chunk shared_query[key_chunks][row_tiles][32];
  __shared__ WarpStates<float, rows, dim> states;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int g = lane / 4;
  const int q = lane % 4;

  const DecodeTask task(schedule, blockIdx.x, rows);
  const int first_tile = warp * decode_tile;
  RowReader<T, 4, key_chunks> key_reader(
      task, at<T>(params.key, task.batch, task.kv_head, task.first_key), params.key.position_stride, params.key_dim,
      first_tile, g, q);
  RowReader<T, 8, value_chunks> value_reader(
      task, at<T>(params.value, task.batch, task.kv_head, task.first_key), params.value.position_stride,
      params.value_dim, first_tile, 2 * q, g);
  Chunk key[2][key_chunks];
  const auto load_keys = [&] { key_reader.load(key, [](int t) { return 8 * t; }); };
  load_keys();

  const DecodeRow row_of_lane[2] = {{params, schedule, task, g}, {params, schedule, task, (row_tiles - 1) * 8 + g}};
  const ScoreTransform<float> transform[2] = {{params, row_of_lane[0].head}, {params, row_of_lane[1].head}};
  for (int c = warp; c < key_chunks; c += decode_warps) {
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) {
      const DecodeRow& row = row_of_lane[i];
      const int feature = 32 * c + 8 * q;
      const T* const from = at<T>(params.query, task.batch, row.head, row.query) + feature;
      shared_query[c][i][lane] = row.there && feature < params.key_dim ? load_chunk(from) : Chunk{};
    }
  }
  __syncthreads();

  RunningSoftmax<float> softmax[row_tiles];
  Sums output[row_tiles][value_chunks][4] = {};

  for (int first = first_tile; first < task.end; first += decode_step) {
    Chunk value[4][value_chunks];
    const auto load_values = [&] { value_reader.load(value, [](int i) { return i / 2 * 8 + i % 2; }); };
    const auto load_next_keys = [&] {
      if (first + decode_step < task.end) load_keys();
    };

    if (loads_ahead) load_values();
    Sums score[2] = {};
#pragma unroll
    for (int c = 0; c < key_chunks; ++c) {
      const Chunk low = shared_query[c][0][lane];
      const Chunk high = row_tiles > 1 ? shared_query[c][row_tiles - 1][lane] : Chunk{};
#pragma unroll
      for (int half = 0; half < 4; half += 2) {
        const LeftFragment left{{low.x[half], high.x[half], low.x[half + 1], high.x[half + 1]}};
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const uint32_t right[2] = {key[t][c].x[half], key[t][c].x[half + 1]};
          score[t] = multiply_add<T>(left, right, score[t]);
        }
      }
    }
    loads_ahead ? load_next_keys() : load_values();

    if (params.softcap > 0) {
#pragma unroll
      for (Sums& sums : score) {
#pragma unroll
        for (int i = 0; i < row_tiles; ++i) {
          for (float& x : sums.x[i]) x = transform[i](x);
        }
      }
    } else {
#pragma unroll
      for (Sums& sums : score) {
#pragma unroll
        for (int i = 0; i < row_tiles; ++i) {
          for (float& x : sums.x[i]) x *= transform[i].factor;
        }
      }
    }
    if (first < task.common_begin || task.common_end < first + decode_tile) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int i = 0; i < row_tiles; ++i) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            if (!row_of_lane[i].sees(first + 8 * t + 2 * q + j)) score[t].x[i][j] = -infinity<float>();
          }
        }
      }
    }
    float largest[row_tiles];
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) {
      largest[i] = fmaxf(fmaxf(score[0].x[i][0], score[0].x[i][1]), fmaxf(score[1].x[i][0], score[1].x[i][1]));
      largest[i] = fmaxf(largest[i], __shfl_xor_sync(all_lanes, largest[i], 1));
      largest[i] = fmaxf(largest[i], __shfl_xor_sync(all_lanes, largest[i], 2));
    }
    if (__any_sync(all_lanes, softmax[0].moves(largest[0]) || softmax[row_tiles - 1].moves(largest[row_tiles - 1]))) {
#pragma unroll
      for (int i = 0; i < row_tiles; ++i) {
        const float rescale = softmax[i].move(largest[i]);
        const float of_rows[2] = {
            __shfl_sync(all_lanes, rescale, 8 * q), __shfl_sync(all_lanes, rescale, 8 * q + 4)}; // 2 q and the next
#pragma unroll
        for (auto& chunk_of_row : output[i]) {
#pragma unroll
          for (Sums& sums : chunk_of_row) {
#pragma unroll
            for (float (&x)[2] : sums.x) {
              x[0] *= of_rows[0];
              x[1] *= of_rows[1];
            }
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) {
#pragma unroll
      for (Sums& sums : score) {
#pragma unroll
        for (float& x : sums.x[i]) {
          x = fast_exp2(x - softmax[i].reference);
          softmax[i].sum += x;
        }
      }
    }
    if (params.dropout.enabled()) {
      // A counter's four words are for eight keys, of which each of four neighbouring lanes has two: each of them makes
      // the words of another tile of keys or rows.
      const DropoutBits bits(params.dropout, params.rng_state); // not kept in registers: decoding hardly ever drops
      const int query = q % 2 == 0 ? row_of_lane[0].query : row_of_lane[1].query;
      const int head = q % 2 == 0 ? row_of_lane[0].head : row_of_lane[1].head;
      PhiloxWords words = bits(task.first_key + first + q / 2 * 8, query, task.batch * params.heads + head);
      transpose_in_fours<1>(words.word);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int i = 0; i < row_tiles; ++i) {
          float (&x)[2] = score[t].x[i];
          x[0] = params.dropout.keeps(words.word[2 * t + i], 0) ? x[0] : 0;
          x[1] = params.dropout.keeps(words.word[2 * t + i], 1) ? x[1] : 0;
        }
      }
    }
    uint32_t weight[row_tiles][2];
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) {
#pragma unroll
      for (int t = 0; t < 2; ++t) weight[i][t] = round_pair<T>(score[t].x[i][0], score[t].x[i][1]);
    }
#pragma unroll
    for (int c = 0; c < value_chunks; ++c) {
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        // Two neighbouring features of two keys each: of one feature a row g of the operand, of the next row g + 8.
        LeftFragment left;
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const uint32_t first_of_two = value[2 * t][c].x[pair];
          const uint32_t second_of_two = value[2 * t + 1][c].x[pair];
          left.x[2 * t] = __byte_perm(first_of_two, second_of_two, 0x5410);
          left.x[2 * t + 1] = __byte_perm(first_of_two, second_of_two, 0x7632);
        }
#pragma unroll
        for (int i = 0; i < row_tiles; ++i) {
          output[i][c][pair] = multiply_add<T>(left, weight[i], output[i][c][pair]);
        }
      }
    }
    if (!loads_ahead) load_next_keys();
  }

#pragma unroll
  for (int i = 0; i < row_tiles; ++i) {
    float sum = softmax[i].sum;
    sum += __shfl_xor_sync(all_lanes, sum, 1);
    sum += __shfl_xor_sync(all_lanes, sum, 2);
    if (q == 0) states.softmax[warp][8 * i + g] = {softmax[i].reference, sum};
#pragma unroll
    for (int c = 0; c < value_chunks; ++c) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = 8 * i + 2 * q + j;
#pragma unroll
        for (int half = 0; half < 2; ++half) { // four of the lane's eight features
          const Sums& low = output[i][c][2 * half];
          const Sums& high = output[i][c][2 * half + 1];
          states.values[warp][row][place_of_vector(row, 16 * c + 2 * g + half)] = {
              low.x[0][j], low.x[1][j], high.x[0][j], high.x[1][j]};
        }
      }
    }
  }
  __syncthreads();
  states.store(schedule, task, workspace, 0, place_of_vector);
}

template <typename T, int dim, int row_tiles>
void launch(const AttentionParams& params, const DecodeSchedule& schedule, float* workspace, cudaStream_t stream) {
  const int64_t tasks = int64_t{schedule.batch_kv_heads} * schedule.splits * ceil_div(schedule.rows, 8 * row_tiles);
  decode_kernel<T, dim, row_tiles>
      <<<static_cast<unsigned>(tasks), decode_threads, 0, stream>>>(params, schedule, workspace);
}

} // namespace

void tensor_core_decode(
    const AttentionParams& params,
    const DecodeSchedule& schedule,
    void* workspace,
    cudaStream_t stream) {
  const auto with_rows = [&](auto type, auto dim) {
    using T = decltype(type);
    const auto states = static_cast<float*>(workspace);
    // 16 rows of 256 features would spill registers.
    if (dim > 128 || schedule.rows <= 8) return launch<T, dim, 1>(params, schedule, states, stream);
    if constexpr (dim <= 128) launch<T, dim, 2>(params, schedule, states, stream);
  };
  const auto with_type = [&](auto type) {
    const int64_t dim = std::max(params.key_dim, params.value_dim);
    if (dim <= 64) return with_rows(type, std::integral_constant<int, 64>());
    if (dim <= 128) return with_rows(type, std::integral_constant<int, 128>());
    with_rows(type, std::integral_constant<int, 256>());
  };
  params.dtype == ScalarType::Half ? with_type(__half()) : with_type(__nv_bfloat16());
}

} // namespace wmha::cuda

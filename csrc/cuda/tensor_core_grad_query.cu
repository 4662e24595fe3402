// The gradient of query, and of the temperature, for half types on tensor cores: a block of threads has 64 queries of
// one head, a warp 16 of them. It also computes each query's delta, and leaves it to the kernel of grad_key and
// grad_value.
#include "gradient_tiles.cuh"
#include "kernels.h"

namespace wmha::cuda {
namespace {

using namespace gradients;

/// <dO, O> of 16 rows, of which the first `rows` are there: of the lane's rows, lane / 4 and lane / 4 + 8. The rows of
/// dO are those of a tile from `first_row` on. It is the diagonal of dO x O^T, for which a row's features may come in
/// any order: one in which whole chunks are loaded, from different banks.
template <typename T, int dim>
__device__ float2 row_products(
    const HalfTile<T, dim>& grad_output,
    int first_row,
    const T* output,
    int64_t stride,
    int rows,
    int features) {
  const int lane = threadIdx.x % 32;
  const int row = lane / 4;
  const bool there[2] = {row < rows, row + 8 < rows};
  Sums product[2] = {}; // with O's rows 0 to 7 and 8 to 15
#pragma unroll
  for (int step = 0; step < dim / chunk; step += 4) {
    const int part = HalfTile<T, dim>::ordered == 8 ? lane % 4 + (step ^ row % 2 * 4) : lane % 4 + step;
    uint4 left[2], right[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int from = HalfTile<T, dim>::offset(first_row + row + 8 * i, part);
      left[i] = *reinterpret_cast<const uint4*>(grad_output.data + from);
      right[i] = there[i] && part * chunk < features
                     ? *reinterpret_cast<const uint4*>(output + (row + 8 * i) * stride + part * chunk)
                     : uint4{0, 0, 0, 0};
    }
    const LeftFragment low{{left[0].x, left[1].x, left[0].y, left[1].y}};
    const LeftFragment high{{left[0].z, left[1].z, left[0].w, left[1].w}};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      product[i] = multiply_add<T>(low, {right[i].x, right[i].y}, product[i]);
      product[i] = multiply_add<T>(high, {right[i].z, right[i].w}, product[i]);
    }
  }
  const int owner = (lane & ~3) + row / 2; // has column `row` of the tiles
  return {
      __shfl_sync(all_lanes, row % 2 == 0 ? product[0].x[0][0] : product[0].x[0][1], owner),
      __shfl_sync(all_lanes, row % 2 == 0 ? product[1].x[1][0] : product[1].x[1][1], owner)};
}

template <typename T, int dim>
__global__ __launch_bounds__(
    threads) void grad_query_kernel(const __grid_constant__ AttentionParams params, QueryConstants* query_constants) {
  constexpr bool kept = dim <= 128; // own rows in registers
  constexpr int columns = tile_columns(dim);
  extern __shared__ __align__(128) unsigned char memory[];
  T* const shared = reinterpret_cast<T*>(memory);
  const HalfTile<T, dim> query_tile{shared};
  const HalfTile<T, dim> grad_output_tile{shared + block_rows * dim};
  const HalfTile<T, dim> key_tile{shared + 2 * block_rows * dim};
  const HalfTile<T, dim> value_tile{shared + (2 * block_rows + 2 * columns) * dim};
  const int lane = threadIdx.x % 32;
  const int warp_row = threadIdx.x / 32 * warp_rows;
  const QueryBlock<block_rows> block(params);
  const RowCopy<T, dim, threads> copy_keys(
      key_tile, params.key, block.batch, block.kv_head, block.first_key, params.key_dim);
  const RowCopy<T, dim, threads> copy_values(
      value_tile, params.value, block.batch, block.kv_head, block.first_key, params.value_dim);
  const auto copy = [&](int first, int to) {
    copy_keys.template start<columns>(first, to, block.keys.begin, block.keys.end);
    copy_values.template start<columns>(first, to, block.keys.begin, block.keys.end);
  };
  RowCopy<T, dim, threads>(query_tile, params.query, block.batch, block.head, block.first, params.key_dim)
      .template start<block_rows>(0, 0, 0, block.queries);
  RowCopy<T, dim, threads>(grad_output_tile, params.grad_output, block.batch, block.head, block.first, params.value_dim)
      .template start<block_rows>(0, 0, 0, block.queries);
  copy(0, 0);

  const int64_t first_query = block.first + warp_row; // the warp's
  const int queries = max(min(block.queries - warp_row, warp_rows), 0);
  const RowsSeen<2> seen(
      queries, lane / 4, 8, [&](int row) { return Places(params.window.keys_of(first_query + row), block.first_key); });
  PairGradients<T, true> gradients(params, block.head, block.batch_head);
  OwnRows<T, dim, kept> query(by_row(query_tile).after(warp_row));
  OwnRows<T, dim, kept> grad_output(by_row(grad_output_tile).after(warp_row));
  const LanePlace<T, dim> key_place = by_column(key_tile);
  const LanePlace<T, dim> value_place = by_column(value_tile);
  const LanePlace<T, dim> key_row_place = by_row(key_tile);
  Sums grad_query[dim / 8] = {};

  wait_for_copies();
  __syncthreads();
  const float2 products = row_products(
      grad_output_tile, warp_row, at<const T>(params.output, block.batch, block.head, first_query),
      params.output.position_stride, queries, static_cast<int>(params.value_dim));
  QueryConstants constants[2] = {{0, 0}, {0, 0}};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane / 4 + 8 * i;
    if (row >= queries) continue;
    const int64_t index = block.batch_head * params.queries + first_query + row;
    const float logsumexp = static_cast<const float*>(params.logsumexp)[index];
    float delta = i == 0 ? products.x : products.y;
    if (params.grad_logsumexp != nullptr) delta -= static_cast<const float*>(params.grad_logsumexp)[index];
    if (logsumexp > -infinity<float>()) constants[i] = {-logsumexp * static_cast<float>(log2_of_e), -delta};
    if (lane % 4 == 0) query_constants[index] = constants[i];
  }
  query.load();
  grad_output.load();

  // `count` groups of 16 keys, from key `first` on, which begin at row `place` of the tiles.
  const auto attend = [&](int first, int place, auto count, auto tests) {
    constexpr int tiles = 2 * decltype(count)::value; // of 8 keys
    Sums score[tiles];
    Sums grad_weight[tiles];
    multiply(query, key_place.after(place), score);
    multiply(grad_output, value_place.after(place), grad_weight);
    LeftFragment value_weight[tiles / 2];
    LeftFragment grad_product[tiles / 2];
    gradients(
        score, grad_weight, [&](int, int i, int) { return constants[i]; }, tests,
        [&](int n, int i, int j) { return seen.row[i].holds(first + 8 * n + lane % 4 * 2 + j); },
        [&](const HeadDropout& dropout, int n) {
          // Each of four neighbouring lanes makes the words of another tile or row.
          PhiloxWords words =
              dropout.words(block.first_key + first + 8 * (n + lane % 4 / 2), first_query + lane / 4 + lane % 2 * 8);
          transpose_in_fours<1>(words.word);
          return words;
        },
        params.grad_temperature != nullptr, value_weight, grad_product);
    add_product(grad_product, key_row_place.after(place), grad_query);
  };

  for (int first = 0, stage = 0; first < block.keys.end; first += columns, stage ^= columns) {
    wait_for_copies();
    __syncthreads();
    if (first + columns < block.keys.end) copy(first + columns, stage ^ columns);
    for_each_group<columns>(
        seen, first, [&](int column, auto count, auto tests) { attend(first + column, stage + column, count, tests); });
  }

  wait_for_copies();
  __syncthreads();
  const float factor = gradients.transform.gradient_factor;
  round_rows(grad_query, factor, factor, query_tile, warp_row);
  __syncwarp();
  store_rows<Order::plain, warp_rows>(
      query_tile, warp_row, params.grad_query, block.batch, block.head, first_query, queries, params.key_dim);

  if (params.grad_temperature == nullptr) return;
  __shared__ double sums[warps];
  double sum = gradients.temperature;
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(all_lanes, sum, lanes);
  if (lane == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < warps; ++warp) sum += sums[warp];
  // z is proportional to 1 / temperature.
  params.grad_temperature[blockIdx.x] =
      -sum * gradients.temperature_factor() * ln_of_2 * gradients.transform.inverse_temperature;
}

template <typename T, int dim>
void launch(const AttentionParams& params, QueryConstants* constants, cudaStream_t stream) {
  constexpr int bytes = shared_bytes<T, dim>;
  const int64_t tasks = params.batch * params.heads * ceil_div(params.queries, block_rows);
  if (tasks == 0) return;
  cudaFuncSetAttribute(grad_query_kernel<T, dim>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  grad_query_kernel<T, dim><<<static_cast<unsigned>(tasks), threads, bytes, stream>>>(params, constants);
}

} // namespace

void tensor_core_grad_query(const AttentionParams& params, void* workspace, cudaStream_t stream) {
  with_tile(params, [&](auto type, auto dim) {
    launch<decltype(type), decltype(dim)::value>(params, static_cast<QueryConstants*>(workspace), stream);
  });
}

} // namespace wmha::cuda

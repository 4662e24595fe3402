// What the two backward kernels of half types have in common. A warp owns 16 rows, queries or keys; the others pass by
// in tiles, 16 or more columns at a time:
//
//   rows        own           columns       score             gradient of weights      sums of the rows
//   queries     query, dO     key, value    query x key^T     dO x value^T             dQ += dS x key
//   keys        key, value    query, dO     key x query^T     value x dO^T             dK += dS x query, dV += P x dO
//
// Both make the weights P again from logsumexp, so that nothing is added by atomics and the result is repeatable.
#pragma once

#include "half_tiles.cuh"
#include "scores.cuh"
#include "tensor_core.cuh"
#include "warp_window.cuh"

namespace wmha::cuda::gradients {

constexpr int warps = 4;
constexpr int threads = 32 * warps;
constexpr int warp_rows = 16;
constexpr int block_rows = warps * warp_rows;

/// Columns of a tile, of which two are in shared memory at a time, beside the block's own rows: less than the 99 KB
/// that every device has.
constexpr int tile_columns(int dim) { return dim <= 64 ? 64 : dim <= 192 ? 32 : 16; }
template <typename T, int dim>
constexpr int shared_bytes = (2 * block_rows + 4 * tile_columns(dim)) * dim * int{sizeof(T)};

/// Minus logsumexp, in units of log 2, and minus delta = <dO, O> - dlse of a query. Zeros if it sees no key.
struct alignas(8) QueryConstants {
  float minus_logsumexp;
  float minus_delta;
};

/// 16 rows of a tile as left operands, kept in registers or loaded whenever they are wanted.
template <typename T, int dim, bool kept>
class OwnRows {
 public:
  __device__ explicit OwnRows(const LanePlace<T, dim>& place) : place_(place) {}

  __device__ void load() {
    unrolled<kept ? dim / 16 : 0>([&](auto d) { fragment_[d] = load_left(place_.template at<0, 16 * d>()); });
  }
  template <int d>
  __device__ LeftFragment at() const {
    if constexpr (kept) return fragment_[d];
    return load_left(place_.template at<0, 16 * d>());
  }

 private:
  LanePlace<T, dim> place_;
  LeftFragment fragment_[kept ? dim / 16 : 1];
};

/// product = own rows x (rows of a tile)^T.
template <typename T, int dim, bool kept, int tiles>
__device__ void multiply(const OwnRows<T, dim, kept>& own, const LanePlace<T, dim>& columns, Sums (&product)[tiles]) {
  unrolled<dim / 16>([&](auto d) {
    const LeftFragment left = own.template at<d>();
    unrolled<tiles / 2>([&](auto n) {
      const RightFragments right = load_right(columns.template at<16 * n, 16 * d>());
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        product[2 * n + i] = multiply_add<T>(left, right.x[i], d == 0 ? Sums{} : product[2 * n + i]);
      }
    });
  });
}

/// sums += weights x (rows of a tile).
template <typename T, int dim, int groups>
__device__ void add_product(
    const LeftFragment (&weights)[groups],
    const LanePlace<T, dim>& rows,
    Sums (&sums)[dim / 8]) {
  unrolled<groups>([&](auto n) {
    unrolled<dim / 16>([&](auto d) {
      const RightFragments right = load_right_transposed(rows.template at<16 * n, 16 * d>());
#pragma unroll
      for (int i = 0; i < 2; ++i) sums[2 * d + i] = multiply_add<T>(weights[n], right.x[i], sums[2 * d + i]);
    });
  });
}

/// From products to gradients, for one head.
template <typename T, bool rows_are_queries>
class PairGradients {
 public:
  ScoreTransform<float> transform;

  __device__ PairGradients(const AttentionParams& params, int64_t head, unsigned batch_head)
      : transform(params, head), params_(params), batch_head_(batch_head) {}

  /// dz * z of all pairs so far, but for what temperature_factor() says.
  float temperature = 0;
  __device__ float temperature_factor() const { return transform.capped() ? 1 : transform.factor; }

  /// Of 16 rows and 8 * tiles columns: the weights with which values count (what dropout drops is 0, the others aren't
  /// scaled), and the gradients of the products but for transform.gradient_factor.
  ///   constants(tile, row, column)  of the query there
  ///   sees(tile, row, column)       does the query see the key? Not asked unless `tests`.
  ///   words(dropout, tile)          the random words of two tiles from `tile` on
  template <int tiles, typename Constants, typename Tests, typename Sees, typename Words>
  __device__ void operator()(
      Sums (&score)[tiles],
      Sums (&grad_weight)[tiles],
      const Constants& constants,
      Tests tests,
      const Sees& sees,
      const Words& words,
      bool wants_temperature,
      LeftFragment (&value_weight)[tiles / 2],
      LeftFragment (&grad_product)[tiles / 2]) {
    const auto for_each = [](const auto& function) {
#pragma unroll
      for (int i = 0; i < 4 * tiles; ++i) function(i / 4, i / 2 % 2, i % 2);
    };
    const bool capped = transform.capped();
    if (capped) {
      for_each([&](int n, int i, int j) {
        float& x = score[n].x[i][j];
        x = transform.cap * fast_tanh(x * transform.factor);
      });
    }
    const float factor = temperature_factor();
    const auto inverse_keep = static_cast<float>(params_.dropout.inverse_keep);
    Sums weight[tiles];
    for_each([&](int n, int i, int j) {
      weight[n].x[i][j] = fast_exp2(fmaf(score[n].x[i][j], factor, constants(n, i, j).minus_logsumexp));
      if (tests && !rows_are_queries) weight[n].x[i][j] = sees(n, i, j) ? weight[n].x[i][j] : 0;
    });
    const auto round = [](const Sums(&sums)[tiles], LeftFragment(&fragment)[tiles / 2]) {
#pragma unroll
      for (int n = 0; n < tiles; n += 2) fragment[n / 2] = round_sums<T>(sums[n], sums[n + 1]);
    };
    // What a query doesn't see may have made anything of a product, infinity too.
    const auto drop_unseen = [&] {
      if (!tests) return;
      for_each([&](int n, int i, int j) { grad_weight[n].x[i][j] = sees(n, i, j) ? grad_weight[n].x[i][j] : 0; });
    };
    const auto finish = [&] {
      for_each([&](int n, int i, int j) {
        float& x = grad_weight[n].x[i][j];
        x = weight[n].x[i][j] * fmaf(x, inverse_keep, constants(n, i, j).minus_delta);
      });
      if (wants_temperature) {
        for_each([&](int n, int i, int j) {
          if (!tests || sees(n, i, j)) temperature = fmaf(grad_weight[n].x[i][j], score[n].x[i][j], temperature);
        });
      }
      if (capped) {
        const float inverse_cap = 1 / transform.cap;
        for_each([&](int n, int i, int j) {
          const float tanh = score[n].x[i][j] * inverse_cap;
          grad_weight[n].x[i][j] *= 1 - tanh * tanh;
        });
        drop_unseen();
        round(grad_weight, grad_product);
      } else {
        drop_unseen();
        round(grad_weight, grad_product);
      }
    };
    if (params_.dropout.enabled()) {
      const HeadDropout dropout(params_, batch_head_);
      Sums kept[tiles];
#pragma unroll
      for (int n = 0; n < tiles; n += 2) {
        const PhiloxWords drawn = words(dropout, n);
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          const HeadDropout::Keeps keeps = dropout.keeps(drawn.word[t]);
#pragma unroll
          for (int key = 0; key < 2; ++key) {
            const int tile = n + t / 2, i = rows_are_queries ? t % 2 : key, j = rows_are_queries ? key : t % 2;
            kept[tile].x[i][j] = keeps.key[key] ? weight[tile].x[i][j] : 0;
            grad_weight[tile].x[i][j] = keeps.key[key] ? grad_weight[tile].x[i][j] : 0;
          }
        }
      }
      round(kept, value_weight);
      finish();
    } else {
      round(weight, value_weight);
      finish();
    }
  }

 private:
  const AttentionParams& params_;
  unsigned batch_head_;
};

} // namespace wmha::cuda::gradients

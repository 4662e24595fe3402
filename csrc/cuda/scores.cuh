// Element types, and what happens to a single score. As csrc/cpu/scores.h: scores are in units of log 2.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <type_traits>

#include "../params.h"

namespace wmha::cuda {

constexpr uint32_t all_lanes = 0xFFFFFFFFu; // of a warp, for its shuffles

/// The type of the arithmetic: fp64 for fp64, fp32 for all others.
template <typename T>
using acc_type = std::conditional_t<std::is_same_v<T, double>, double, float>;

/// Calls function(T()) with the element type of the tensors.
template <typename Function>
void with_scalar_type(ScalarType dtype, const Function& function) {
  switch (dtype) {
    case ScalarType::Double: return function(double());
    case ScalarType::Float: return function(float());
    case ScalarType::BFloat16: return function(__nv_bfloat16());
    case ScalarType::Half: return function(__half());
  }
}

template <typename Acc>
__device__ constexpr Acc infinity() {
  return static_cast<Acc>(INFINITY);
}

__device__ inline float exp2_of(float x) { return exp2f(x); }
__device__ inline double exp2_of(double x) { return exp2(x); }

/// The row of a tensor with elements T.
template <typename T, typename Pointer>
__device__ auto at(const TensorView<Pointer>& view, int64_t batch, int64_t head, int64_t position) {
  using Element = std::conditional_t<std::is_same_v<Pointer, void*>, T, const T>;
  return static_cast<Element*>(view.data) + view.offset(batch, head, position);
}

/// From a product of query and key to z * log2 e, z = softcap(scale * <q, k>) / temperature, and back.
template <typename Acc>
struct ScoreTransform {
  Acc factor;          // of products
  Acc cap;             // softcap / temperature * log2 e; 0: off
  Acc gradient_factor; // d z / d <q, k>, the derivative of tanh left out
  double inverse_temperature;

  __device__ ScoreTransform(const AttentionParams& params, int64_t head) {
    double temperature = params.temperature;
    if (params.temperature_data != nullptr) {
      temperature = static_cast<const Acc*>(params.temperature_data)[head * params.temperature_stride];
    }
    inverse_temperature = 1 / temperature;
    gradient_factor = static_cast<Acc>(params.scale / temperature);
    cap = static_cast<Acc>(params.softcap / temperature * log2_of_e);
    factor =
        static_cast<Acc>(params.softcap > 0 ? params.scale / params.softcap : params.scale / temperature * log2_of_e);
  }

  __device__ Acc operator()(Acc product) const {
    return cap > 0 ? cap * static_cast<Acc>(tanh(product * factor)) : product * factor;
  }

  __device__ bool capped() const { return cap > 0; }

  /// d z / d <q, k> at a score z * log2 e.
  __device__ Acc derivative(Acc score) const {
    if (cap == 0) return gradient_factor;
    const Acc tanh_of = score / cap;
    return gradient_factor * (1 - tanh_of * tanh_of);
  }
};

/// The dropout generator of one call.
struct DropoutBits {
  uint32_t key_low = 0;
  uint32_t key_high = 0;
  int64_t offset = 0;

  /// rng_state isn't read without dropout.
  __device__ DropoutBits(const Dropout& dropout, const int64_t* rng_state) {
    if (!dropout.enabled()) return;
    key_low = static_cast<uint32_t>(rng_state[0]);
    key_high = static_cast<uint32_t>(static_cast<uint64_t>(rng_state[0]) >> 32);
    offset = rng_state[1];
  }

  /// The random words of the eight keys around `key` for query `row` of head `batch * Hq + head`.
  __device__ PhiloxWords operator()(int64_t key, int64_t row, int64_t head) const {
    return philox<Dropout::rounds>(Dropout::counter(key, row, head, offset), key_low, key_high);
  }
};

/// The dropout of one head's weights, two at a time. To be made where it is used: kept through a loop, it would take
/// the registers of twenty weights, most of them for the generator's round keys.
class HeadDropout {
 public:
  __device__ HeadDropout(const AttentionParams& params, uint32_t batch_head)
      : threshold_(min(params.dropout.threshold, Dropout::resolution - 1) << 16), // inverse_keep is 0 beyond that
        bits_(params.dropout, params.rng_state),
        head_(batch_head) {}

  /// The random words of the eight keys around `key` for query `row`.
  __device__ PhiloxWords words(int64_t key, int64_t row) const { return bits_(key, row, head_); }

  /// Which of two neighbouring keys, the first of them an even one, are kept, given their word.
  struct Keeps {
    bool key[2];
  };
  __device__ Keeps keeps(uint32_t word) const { return {{word << 16 >= threshold_, word >= threshold_}}; }

 private:
  uint32_t threshold_; // of the upper half of a word
  DropoutBits bits_;
  uint32_t head_;
};

/// Is the weight kept?
__device__ inline bool keeps(const Dropout& dropout, const int64_t* rng_state, int64_t key, int64_t row, int64_t head) {
  return dropout.keeps(DropoutBits(dropout, rng_state)(key, row, head), key);
}

} // namespace wmha::cuda

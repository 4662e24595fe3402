// The problem as the kernels see it: sizes, options, pointers. Plain C++, no torch.
#pragma once

#include <cstdint>

#include "philox.h"
#include "window.h"

namespace wmha {

// Kernels keep scores in units of log 2: exp(z) = 2^(z * log2 e).
constexpr double log2_of_e = 1.4426950408889634;
constexpr double ln_of_2 = 0.6931471805599453;

WMHA_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// a - n * floor(a / n), n > 0: in [0, n) for a < 0 too.
WMHA_HOST_DEVICE constexpr int64_t modulo(int64_t a, int64_t n) { return (a % n + n) % n; }

enum class ScalarType { Double, Float, BFloat16, Half };

/// A (batch, head, position, feature) tensor; strides in elements, features are contiguous.
template <typename Pointer>
struct TensorView {
  Pointer data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t position_stride;

  WMHA_HOST_DEVICE int64_t offset(int64_t batch, int64_t head, int64_t position) const {
    return batch * batch_stride + head * head_stride + position * position_stride;
  }
};
using InputView = TensorView<const void*>;
using OutputView = TensorView<void*>;

/// One call, forward or backward. "acc" below is fp64 for fp64 tensors and fp32 for all others.
struct AttentionParams {
  ScalarType dtype;  // of the views
  int64_t batch;     // B
  int64_t heads;     // Hq
  int64_t kv_heads;  // Hkv
  int64_t queries;   // Nq
  int64_t key_dim;   // Dk
  int64_t value_dim; // Dv
  Window window;     // holds Nk

  double scale;
  double softcap;               // 0: off
  double temperature;           // unless temperature_data
  const void* temperature_data; // acc, one for each head at h * temperature_stride; or null
  int64_t temperature_stride;
  Dropout dropout;
  const int64_t* rng_state; // (seed, offset); null without dropout

  InputView query;   // (B, Hq, Nq, Dk)
  InputView key;     // (B, Hkv, Nk, Dk)
  InputView value;   // (B, Hkv, Nk, Dv)
  OutputView output; // (B, Hq, Nq, Dv); backward only reads it
  void* logsumexp;   // acc, (B, Hq, Nq) contiguous; backward only reads it

  // Backward only.
  InputView grad_output;      // as output
  const void* grad_logsumexp; // acc, (B, Hq, Nq) contiguous; or null
  OutputView grad_query;      // as query
  OutputView grad_key;        // as key
  OutputView grad_value;      // as value
  double* grad_temperature;   // shares of each (batch, head), as many as the kernel makes; or null

  WMHA_HOST_DEVICE int64_t keys() const { return window.keys; }
  /// Heads of queries that share a key head. Precondition: there is one.
  WMHA_HOST_DEVICE int64_t group() const { return heads / kv_heads; }
  WMHA_HOST_DEVICE int64_t kv_head(int64_t head) const { return head / group(); }
};

} // namespace wmha

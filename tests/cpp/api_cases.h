// What the tests of the C++ API call it with.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/randn.h>
#include <wmha/attention.h>

#include <limits>
#include <vector>

namespace testing_wmha {

using at::Tensor;
using wmha::AttentionOptions;
using Tensors = std::vector<Tensor>;

constexpr int64_t largest = std::numeric_limits<int64_t>::max();

inline Tensor random(at::IntArrayRef shape, uint64_t seed = 0) {
  return at::randn(shape, at::detail::createCPUGenerator(seed + shape.size()), at::kDouble);
}

struct Inputs {
  Tensor query = random({2, 4, 9, 5}, 1);
  Tensor key = random({2, 2, 11, 5}, 2);
  Tensor value = random({2, 2, 11, 3}, 3);
};

/// The largest difference of two tensors, in which infinities may agree.
inline double difference(const Tensor& a, const Tensor& b) {
  if (!a.sizes().equals(b.sizes())) return std::numeric_limits<double>::infinity();
  const Tensor same = a == b; // infinities among them
  return (a - b).abs().masked_fill(same, 0).max().item<double>();
}

struct NamedOptions {
  const char* name;
  AttentionOptions options;
};

inline std::vector<NamedOptions> all_options() {
  using O = AttentionOptions;
  return {
      {"defaults", O()},
      {"causal", O().causal()},
      {"window", O().window(3, 2)},
      {"left bound alone", O().window(3, -1)},
      {"right bound alone", O().window(-1, 2)},
      {"the widest window", O().window(largest, largest)},
      {"scale", O().scale(0.3)},
      {"scale 0", O().scale(0)},
      {"negative scale", O().scale(-0.3).window(3, 0)},
      {"temperature", O().temperature(0.7)},
      {"temperature of rank 0", O().window(4, 0).temperature(random({}, 4).abs() + 0.5)},
      {"temperature of shape (1,)", O().window(4, 0).temperature(random({1}, 4).abs() + 0.5)},
      {"temperature of each head", O().window(4, 0).temperature(random({4}, 4).abs() + 0.5)},
      {"softcap", O().softcap(0.8)},
      {"offset", O().window(3, 0).query_offset(0)},
      {"queries before all keys", O().window(3, 0).query_offset(-4)},
      {"queries after all keys", O().window(3, 0).query_offset(7)},
      {"all of them", O().window(5, 1).scale(0.5).temperature(random({4}, 4).abs() + 0.5).softcap(1.5).query_offset(1)},
  };
}

struct Projections {
  Tensor query = random({2, 9, 10}, 5), key = random({2, 11, 6}, 6), value = random({2, 11, 7}, 7);
  wmha::ProjectionWeights weights{
      .q_weight = random({4 * 5, 10}, 8) / 3,
      .k_weight = random({2 * 5, 6}, 9) / 3,
      .v_weight = random({2 * 3, 7}, 10) / 3,
      .out_weight = random({8, 4 * 3}, 11) / 3,
      .q_bias = random({4 * 5}, 12),
      .k_bias = random({2 * 5}, 13),
      .v_bias = random({2 * 3}, 14),
      .out_bias = random({8}, 15)};
};

} // namespace testing_wmha

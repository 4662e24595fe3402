// The CUDA kernels as the tests call them: on managed memory, which host and device see, and on a stream of their own.
#pragma once

#include "../../csrc/cuda/decode_schedule.h"
#include "../../csrc/cuda/kernels.h"
#include "problem.h"

namespace testing_wmha {

inline void* allocate(size_t bytes) {
  void* memory = nullptr;
  return cudaMallocManaged(&memory, std::max<size_t>(bytes, 1)) == cudaSuccess ? memory : nullptr;
}
inline void release(void* memory) { cudaFree(memory); }

struct KernelSet {
  const char* name;
  bool supported; // by this machine
  std::vector<ScalarType> dtypes = {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
};

inline std::vector<KernelSet> kernel_sets() {
  int devices = 0;
  const bool supported = cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
  return {{"CUDA", supported}};
}

inline cudaStream_t test_stream() {
  static const cudaStream_t stream = [] {
    cudaStream_t created = nullptr;
    EXPECT_EQ(cudaStreamCreateWithFlags(&created, cudaStreamNonBlocking), cudaSuccess);
    return created;
  }();
  return stream;
}

inline void expect_finished() {
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  EXPECT_EQ(cudaStreamSynchronize(test_stream()), cudaSuccess);
}

inline int64_t temperature_shares(const KernelSet&, const AttentionParams& params) {
  return wmha::cuda::temperature_shares(params);
}

/// Forward, without splits of the keys, and backward.
inline void run(const KernelSet& set, Problem& problem) {
  problem.expect_temperature_shares(temperature_shares(set, problem.params));
  Tensor workspace(problem.acc, 1, 1, 1, wmha::cuda::workspace_size(problem.params));
  wmha::cuda::forward_in_tiles(problem.params, test_stream());
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  wmha::cuda::backward(problem.params, workspace.data(), test_stream());
  expect_finished();
  EXPECT_TRUE(workspace.surroundings_untouched());
}

/// Is there a forward pass of its own for so few queries?
inline bool decodes(const AttentionParams& params) { return wmha::cuda::decodes(params); }

inline void decode(const KernelSet&, Problem& problem) {
  Tensor workspace(problem.acc, 1, 1, 1, wmha::cuda::DecodeSchedule(problem.params).workspace_size());
  wmha::cuda::decode(problem.params, workspace.data(), test_stream());
  expect_finished();
  EXPECT_TRUE(workspace.surroundings_untouched());
}

} // namespace testing_wmha

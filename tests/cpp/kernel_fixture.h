// The fixture of the kernels' tests: one instance for each dtype and instruction set or, with WMHA_TEST_CUDA, device.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <tuple>

#ifdef WMHA_TEST_CUDA
#include "cuda_kernels.h"
#else
#include "cpu_kernels.h"
#endif

namespace testing_wmha {

constexpr double infinity = std::numeric_limits<double>::infinity();

/// What a dtype and its arithmetic lose, relative to the largest number of a tensor (but at least to 1).
inline double tolerance(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return 1e-13;
    case ScalarType::Float: return 1e-5;
    case ScalarType::BFloat16: return 1.5e-2;
    default: return 2e-3;
  }
}

class Kernels : public testing::TestWithParam<std::tuple<KernelSet, ScalarType>> {
 protected:
  void SetUp() override {
    if (!set().supported) GTEST_SKIP() << "this machine has no " << set().name;
  }
  const KernelSet& set() const { return std::get<0>(GetParam()); }
  ScalarType dtype() const { return std::get<1>(GetParam()); }

  void expect_close(const char* name, const Tensor& actual, const Tensor& expected, double slack) {
    EXPECT_TRUE(actual.surroundings_untouched()) << name << " was written outside of its elements";
    double magnitude = 1;
    expected.for_each([&](int64_t b, int64_t h, int64_t n, int64_t d) {
      const double x = std::abs(expected.get(b, h, n, d));
      if (x < infinity) magnitude = std::max(magnitude, x);
    });
    const double bound = slack * magnitude * tolerance(dtype());
    int failures = 0;
    expected.for_each([&](int64_t b, int64_t h, int64_t n, int64_t d) {
      const double a = actual.get(b, h, n, d), e = expected.get(b, h, n, d);
      if (a == e || std::abs(a - e) <= bound || ++failures > 3) return;
      ADD_FAILURE() << name << "[" << b << ", " << h << ", " << n << ", " << d << "] is " << a << ", expected " << e
                    << " within " << bound;
    });
  }

  /// Forward and backward agree with the reference, and write where they should and nowhere else. prepare(problem) may
  /// change the inputs.
  void check(const Case& c, const std::function<void(Problem&)>& prepare = [](Problem&) {}) {
    SCOPED_TRACE(testing::Message() << c);
    Problem problem(dtype(), c);
    prepare(problem);
    run(set(), problem);
    const auto expected = solve(problem, c);
    expect_close("output", problem.output, expected->output, c.slack);
    expect_close("logsumexp", problem.logsumexp, expected->logsumexp, c.slack);
    if (decodes(problem.params)) {
      Problem decoded(dtype(), c);
      prepare(decoded);
      decode(set(), decoded);
      expect_close("decoded output", decoded.output, expected->output, c.slack);
      expect_close("decoded logsumexp", decoded.logsumexp, expected->logsumexp, c.slack);
    }
    expect_close("grad_query", problem.grad_query, expected->grad_query, c.slack);
    expect_close("grad_key", problem.grad_key, expected->grad_key, c.slack);
    expect_close("grad_value", problem.grad_value, expected->grad_value, c.slack);
    expect_exact_zeros(problem);
    if (c.grad_temperature && c.batch * c.heads * c.queries > 0) expect_temperature_gradient(problem, *expected, c);
  }

 private:
  /// What nobody sees has no gradient and no output: zero, not something small.
  void expect_exact_zeros(const Problem& problem) {
    const wmha::Window& window = problem.params.window;
    std::vector<bool> seen(window.keys, false);
    for (int64_t i = 0; i < problem.params.queries; ++i) {
      bool sees_any = false;
      for (int64_t j = 0; j < window.keys; ++j) {
        if (!reference::sees(window, i, j)) continue;
        sees_any = true;
        seen[j] = true;
      }
      if (sees_any) continue;
      expect_zero_row("output", problem.output, i);
      expect_zero_row("grad_query", problem.grad_query, i);
      for (int64_t h = 0; h < problem.params.heads; ++h) EXPECT_EQ(problem.logsumexp.get(0, h, i, 0), -infinity);
    }
    for (int64_t j = 0; j < window.keys; ++j) {
      if (seen[j]) continue;
      expect_zero_row("grad_key", problem.grad_key, j);
      expect_zero_row("grad_value", problem.grad_value, j);
    }
  }
  static void expect_zero_row(const char* name, const Tensor& tensor, int64_t row) {
    for (int64_t h = 0; h < tensor.heads && tensor.batch > 0; ++h) {
      for (int64_t d = 0; d < tensor.dim; ++d) EXPECT_EQ(tensor.get(0, h, row, d), 0) << name << " of row " << row;
    }
  }

  void expect_temperature_gradient(const Problem& problem, const Problem& expected, const Case& c) {
    const int64_t shares = static_cast<int64_t>(problem.grad_temperature.size()) / (c.batch * c.heads);
    for (int64_t row = 0; row < c.batch * c.heads; ++row) {
      double sum = 0;
      for (int64_t s = row * shares; s < (row + 1) * shares; ++s) sum += problem.grad_temperature[s];
      const double expected_sum = expected.grad_temperature[row];
      // A sum over all pairs of numbers that mostly cancel: the error grows with the number of queries.
      const double bound = c.slack * tolerance(dtype()) * (1 + std::abs(expected_sum) + double(c.queries));
      EXPECT_NEAR(sum, expected_sum, bound) << "temperature's gradient of head " << row;
    }
  }
};

inline std::string dtype_name(ScalarType dtype) {
  constexpr const char* names[] = {"Double", "Float", "BFloat16", "Half"};
  return names[static_cast<int>(dtype)];
}

inline auto every_kernel() {
  std::vector<std::tuple<KernelSet, ScalarType>> kernels;
  for (const KernelSet& set : kernel_sets()) {
    for (const ScalarType dtype : set.dtypes) kernels.emplace_back(set, dtype);
  }
  return testing::ValuesIn(kernels);
}

inline std::string kernel_name(const testing::TestParamInfo<Kernels::ParamType>& info) {
  return std::get<0>(info.param).name + dtype_name(std::get<1>(info.param));
}

} // namespace testing_wmha

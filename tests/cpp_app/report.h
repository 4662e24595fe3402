// How the programs here say whether a result is what it has to be.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>

#include <cstdio>

constexpr double tolerance = 1e-4; // of the largest expected number: what other orders of fp32 summation stay within

inline bool report(const char* what, const at::Tensor& actual, const at::Tensor& expected) {
  if (!actual.sizes().equals(expected.sizes())) {
    std::printf(
        "DIFFERS  %s: shape %s, expected %s\n", what, c10::str(actual.sizes()).c_str(),
        c10::str(expected.sizes()).c_str());
    return false;
  }
  const double difference = (actual.to(at::kDouble) - expected.to(at::kDouble)).abs().max().item<double>();
  const double largest = expected.abs().max().item<double>();
  const bool agrees = difference <= tolerance * largest; // false for NaN
  std::printf("%s  %s: largest difference %.2g of %.2g\n", agrees ? "agrees " : "DIFFERS", what, difference, largest);
  return agrees;
}

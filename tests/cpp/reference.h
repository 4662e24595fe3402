// What the operators promise, in plain fp64 loops over all pairs of query and key: slow, and short enough to be checked
// by reading. Takes the same AttentionParams as the kernels, with fp64 tensors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../../csrc/params.h"

namespace reference {

__extension__ typedef __int128 Wide; // holds any sum of two int64

/// i + offset - left <= j <= i + offset + right, where every sum saturates and -1 is no bound.
inline bool sees(const wmha::Window& window, int64_t i, int64_t j) {
  const auto saturated = [](Wide x) {
    using Limits = std::numeric_limits<int64_t>;
    return static_cast<int64_t>(std::clamp<Wide>(x, Limits::min(), Limits::max()));
  };
  const Wide position = saturated(Wide{i} + window.offset);
  const bool after_left = window.left < 0 || saturated(position - window.left) <= j;
  const bool before_right = window.right < 0 || j <= saturated(position + window.right);
  return after_left && before_right && 0 <= j && j < window.keys;
}

/// keep_ij / (1 - p): 0 where dropout drops the weight.
inline double dropout_factor(const wmha::AttentionParams& params, int64_t batch_head, int64_t i, int64_t j) {
  if (params.dropout.threshold == 0) return 1;
  const auto seed = static_cast<uint64_t>(params.rng_state[0]);
  const auto offset = static_cast<uint64_t>(params.rng_state[1]);
  const wmha::PhiloxWords counter{
      static_cast<uint32_t>(j >> 3), static_cast<uint32_t>(i), static_cast<uint32_t>(batch_head),
      static_cast<uint32_t>(offset / 4)};
  const wmha::PhiloxWords words =
      wmha::philox<7>(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  const uint32_t number = words.word[j % 8 / 2] >> (j % 2 == 0 ? 0 : 16) & 0xFFFF;
  return number >= params.dropout.threshold ? 65536.0 / (65536.0 - params.dropout.threshold) : 0.0;
}

/// One query row of one head: its scores, the softmax over what it sees, and the pointers into the tensors.
class Row {
 public:
  Row(const wmha::AttentionParams& params, int64_t batch, int64_t head, int64_t i)
      : params_(params), batch_(batch), head_(head), kv_head_(head / (params.heads / params.kv_heads)), i_(i) {
    if (params.temperature_data != nullptr) {
      temperature_ = static_cast<const double*>(params.temperature_data)[head * params.temperature_stride];
    } else {
      temperature_ = params.temperature;
    }
    double maximum = -std::numeric_limits<double>::infinity();
    for (int64_t j = 0; j < params.keys(); ++j) {
      if (!sees(params.window, i, j)) continue;
      keys_.push_back(j);
      scores_.push_back(score(j));
      maximum = std::max(maximum, scores_.back());
    }
    double sum = 0;
    for (const double z : scores_) sum += std::exp(z - maximum);
    logsumexp_ = keys_.empty() ? maximum : maximum + std::log(sum);
  }

  void forward() const {
    for (int64_t d = 0; d < params_.value_dim; ++d) {
      double sum = 0;
      for (size_t n = 0; n < keys_.size(); ++n) sum += factor(n) * probability(n) * value(keys_[n])[d];
      output()[d] = sum;
    }
    static_cast<double*>(params_.logsumexp)[index()] = logsumexp_;
  }

  void backward() const {
    const double grad_logsumexp =
        params_.grad_logsumexp ? static_cast<const double*>(params_.grad_logsumexp)[index()] : 0.0;
    std::vector<double> grad_weight; // of factor * P
    double delta = 0;
    for (size_t n = 0; n < keys_.size(); ++n) {
      grad_weight.push_back(factor(n) * dot(grad_output(), value(keys_[n]), params_.value_dim));
      delta += probability(n) * grad_weight[n];
    }
    for (size_t n = 0; n < keys_.size(); ++n) {
      const int64_t j = keys_[n];
      const double grad_score = probability(n) * (grad_weight[n] - delta + grad_logsumexp);
      const double tanh = params_.softcap > 0 ? scores_[n] * temperature_ / params_.softcap : 0;
      const double grad_product = grad_score / temperature_ * (1 - tanh * tanh) * params_.scale;
      for (int64_t d = 0; d < params_.key_dim; ++d) {
        at(params_.grad_query, head_, i_)[d] += grad_product * key(j)[d];
        at(params_.grad_key, kv_head_, j)[d] += grad_product * query()[d];
      }
      for (int64_t d = 0; d < params_.value_dim; ++d) {
        at(params_.grad_value, kv_head_, j)[d] += factor(n) * probability(n) * grad_output()[d];
      }
      if (params_.grad_temperature != nullptr) {
        params_.grad_temperature[batch_ * params_.heads + head_] -= grad_score * scores_[n] / temperature_;
      }
    }
  }

 private:
  template <typename View>
  double* at(const View& view, int64_t head, int64_t position) const {
    return static_cast<double*>(const_cast<void*>(static_cast<const void*>(view.data))) +
           view.offset(batch_, head, position);
  }
  const double* query() const { return at(params_.query, head_, i_); }
  const double* key(int64_t j) const { return at(params_.key, kv_head_, j); }
  const double* value(int64_t j) const { return at(params_.value, kv_head_, j); }
  double* output() const { return at(params_.output, head_, i_); }
  const double* grad_output() const { return at(params_.grad_output, head_, i_); }
  int64_t index() const { return (batch_ * params_.heads + head_) * params_.queries + i_; }

  static double dot(const double* a, const double* b, int64_t n) {
    double sum = 0;
    for (int64_t d = 0; d < n; ++d) sum += a[d] * b[d];
    return sum;
  }
  double score(int64_t j) const {
    const double x = params_.scale * dot(query(), key(j), params_.key_dim);
    return (params_.softcap > 0 ? params_.softcap * std::tanh(x / params_.softcap) : x) / temperature_;
  }
  double probability(size_t n) const { return std::exp(scores_[n] - logsumexp_); }
  double factor(size_t n) const { return dropout_factor(params_, batch_ * params_.heads + head_, i_, keys_[n]); }

  const wmha::AttentionParams& params_;
  int64_t batch_;
  int64_t head_;
  int64_t kv_head_;
  int64_t i_;
  double temperature_;
  std::vector<int64_t> keys_;  // those it sees
  std::vector<double> scores_; // z of each
  double logsumexp_;
};

template <typename Function>
void for_each_row(const wmha::AttentionParams& params, const Function& function) {
  for (int64_t batch = 0; batch < params.batch; ++batch) {
    for (int64_t head = 0; head < params.heads; ++head) {
      for (int64_t i = 0; i < params.queries; ++i) function(Row(params, batch, head, i));
    }
  }
}

/// output and logsumexp.
inline void forward(const wmha::AttentionParams& params) {
  for_each_row(params, [](const Row& row) { row.forward(); });
}

/// Adds to grad_query, grad_key, grad_value and, unless null, to grad_temperature: one number for each (batch, head).
inline void backward(const wmha::AttentionParams& params) {
  for_each_row(params, [](const Row& row) { row.backward(); });
}

} // namespace reference

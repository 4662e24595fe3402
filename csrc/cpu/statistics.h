// What the backward pass needs to know of each query.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lanes.h"
#include "rows.h"

namespace wmha::cpu::CPU_CAPABILITY {

/// Of each query: logsumexp times log2 e, and delta = <dO, O> - dlse. Of delta, whole vectors are written.
template <typename T>
void load_statistics(
    const AttentionParams& params,
    int64_t batch,
    int64_t head,
    Range queries,
    acc_type<T>* logsumexp,
    acc_type<T>* delta) {
  using Acc = acc_type<T>;
  constexpr int64_t vector = Vec<Acc>::size();
  const int64_t first = (batch * params.heads + head) * params.queries + queries.begin;
  const auto of_forward = static_cast<const Acc*>(params.logsumexp) + first;
  const auto grad_logsumexp = static_cast<const Acc*>(params.grad_logsumexp);
  const auto outputs = rows_of<T>(params.output, batch, head, queries, params.value_dim);
  const auto grad_outputs = rows_of<T>(params.grad_output, batch, head, queries, params.value_dim);
  for (int64_t lane = 0; lane < queries.size(); lane += vector) {
    Vec<Acc> products[vector];
    for (int64_t i = 0; i < vector; ++i) {
      const int64_t row = std::min(lane + i, queries.size() - 1);
      products[i] = multiply_rows(grad_outputs.row(row), outputs.row(row), params.value_dim);
    }
    sum_each(products).store(delta + lane);
  }
  for (int64_t i = 0; i < queries.size(); ++i) {
    if (grad_logsumexp != nullptr) delta[i] -= grad_logsumexp[first + i];
    logsumexp[i] = of_forward[i] * static_cast<Acc>(log2_of_e);
  }
}

} // namespace wmha::cpu::CPU_CAPABILITY

// The passes that make up Kernels, in the namespace of one instruction set. See kernels.h for what they promise.
#pragma once

#include "kernels.h"

namespace wmha::cpu::CPU_CAPABILITY {

void forward(const AttentionParams& params, int64_t begin, int64_t end);

void backward(
    const AttentionParams& params,
    const BackwardSchedule& schedule,
    void* workspace,
    int64_t begin,
    int64_t end);

void merge(
    const AttentionParams& params,
    const BackwardSchedule& schedule,
    const void* workspace,
    int64_t begin,
    int64_t end);

} // namespace wmha::cpu::CPU_CAPABILITY

// The passes that make up Kernels, in the namespace of one instruction set. See kernels.h for what they promise.
#pragma once

#include "kernels.h"

namespace wmha::cpu::CPU_CAPABILITY {

extern const Kernels kernels;

void forward(const AttentionParams& params, Tasks& tasks);
void decode(const AttentionParams& params, const DecodeSchedule& schedule, void* workspace, Tasks& tasks);
void merge_decode(const AttentionParams& params, const DecodeSchedule& schedule, const void* workspace, Tasks& tasks);
void backward(const AttentionParams& params, const BackwardSchedule& schedule, void* workspace, Tasks& tasks);
void merge_backward(
    const AttentionParams& params,
    const BackwardSchedule& schedule,
    const void* workspace,
    Tasks& tasks);

} // namespace wmha::cpu::CPU_CAPABILITY

// The CPU kernels, once per instruction set. Plain C++: they know no torch and no threads.
//
// Every function takes tasks until there are none; any number of threads may call it with the same Tasks. What the
// tasks are depends on the problem's shape alone. They are independent and write to disjoint memory, so any thread may
// run any of them and the result is bitwise the same.
#pragma once

#include "../params.h"
#include "schedule.h"

namespace wmha::cpu {

/// output and logsumexp. Tasks: forward_tasks(params).
using ForwardKernel = void (*)(const AttentionParams& params, Tasks& tasks);

/// grad_query, and grad_key and grad_value of the keys that are private to a chunk; the shares of all other keys go to
/// `workspace` (schedule.workspace_size() elements of acc, uninitialised). The temperature's gradient goes to
/// params.grad_temperature as one share for each (batch, head, chunk). Tasks: schedule.tasks().
using BackwardKernel =
    void (*)(const AttentionParams& params, const BackwardSchedule& schedule, void* workspace, Tasks& tasks);

/// After all of BackwardKernel: grad_key and grad_value of all other keys, from the shares in chunk order.
/// Tasks: schedule.merge_tasks().
using MergeKernel =
    void (*)(const AttentionParams& params, const BackwardSchedule& schedule, const void* workspace, Tasks& tasks);

struct Kernels {
  ForwardKernel forward;
  BackwardKernel backward;
  MergeKernel merge;
};

namespace DEFAULT {
extern const Kernels kernels;
}
#ifdef WMHA_X86
namespace AVX2 {
extern const Kernels kernels;
}
namespace AVX512 {
extern const Kernels kernels;
}
namespace AVX512_BF16 {
extern const Kernels kernels; // for bf16 tensors alone
}
#endif

} // namespace wmha::cpu

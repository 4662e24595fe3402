// The CPU kernels, once per instruction set. Plain C++: they know no torch and no threads.
//
// Every function takes tasks until there are none; any number of threads may call it with the same Tasks. What the
// tasks are depends on the problem's shape alone. They are independent and write to disjoint memory, so any thread may
// run any of them and the result is bitwise the same.
#pragma once

#include "../params.h"
#include "schedule.h"

namespace wmha::cpu {

struct Kernels {
  Blocking blocking;

  /// output and logsumexp. Tasks: forward_tasks(params, blocking).
  void (*forward)(const AttentionParams& params, Tasks& tasks);

  /// The same where DecodeSchedule::applies(params), in two steps: states of splits of the keys in `workspace`
  /// (schedule.workspace_size() elements of acc, uninitialised), tasks: schedule.tasks(); then output and logsumexp,
  /// tasks: schedule.merge_tasks().
  void (*decode)(const AttentionParams& params, const DecodeSchedule& schedule, void* workspace, Tasks& tasks);
  void (*merge_decode)(
      const AttentionParams& params,
      const DecodeSchedule& schedule,
      const void* workspace,
      Tasks& tasks);

  /// grad_query, and grad_key and grad_value of the keys that only one task sees; the shares of all others go to
  /// `workspace` (schedule.workspace_size() elements of acc, uninitialised). The temperature's gradient goes to
  /// params.grad_temperature as one share for each (batch, head, chunk). Tasks: schedule.tasks(). Then grad_key and
  /// grad_value of all other keys, from the shares in chunk order; tasks: schedule.merge_tasks().
  void (*backward)(const AttentionParams& params, const BackwardSchedule& schedule, void* workspace, Tasks& tasks);
  void (*merge_backward)(
      const AttentionParams& params,
      const BackwardSchedule& schedule,
      const void* workspace,
      Tasks& tasks);
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
namespace AMX {
extern const Kernels kernels; // for bf16 tensors alone
}
#endif

} // namespace wmha::cpu

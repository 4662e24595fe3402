// The table of one instruction set.
#include "kernels.h"

#include "passes.h"
#include "scores.h"

namespace wmha::cpu::CPU_CAPABILITY {

const Kernels kernels{blocking, forward, decode, merge_decode, backward, merge_backward};

} // namespace wmha::cpu::CPU_CAPABILITY

// The table of one instruction set.
#include "kernels.h"

#include "passes.h"

namespace wmha::cpu::CPU_CAPABILITY {

const Kernels kernels{forward, decode, merge_decode, backward, merge_backward};

} // namespace wmha::cpu::CPU_CAPABILITY

// The table of one instruction set.
#include "kernels.h"

#include "passes.h"

namespace wmha::cpu::CPU_CAPABILITY {

const Kernels kernels{forward, backward, merge};

} // namespace wmha::cpu::CPU_CAPABILITY

// Matrix products in tiles that stay in registers: AMX's tile registers where there are any, else vector registers.
#pragma once

#if defined(CPU_CAPABILITY_AMX)
#include "amx_tiles.h"
#else
#include "vector_tiles.h"
#endif

// Memory of results, used again.
//
// The C library gives large blocks back to the system when they are freed. The next result then takes fresh pages, and
// to map and clear these takes up to as long as the pass that writes them.
#pragma once

#include <ATen/core/Tensor.h>

namespace wmha::cpu {

/// As at::empty, on the CPU. Tensors of 1 MiB and more are given the memory of earlier ones of about their size that
/// are no longer used: up to 256 MiB of it are kept.
at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);

} // namespace wmha::cpu

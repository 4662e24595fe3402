// Large results in huge pages.
#pragma once

#include <ATen/core/Tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace wmha {

/// Asks the system to map a new tensor in huge pages, as PyTorch does if THP_MEM_ALLOC_ENABLE=1 is set. Results of 32
/// MiB and more are mapped afresh on each call, a page at its first write; with pages of 4 KiB that took a quarter of
/// the forward pass of 16,384 positions.
inline void map_in_huge_pages([[maybe_unused]] const at::Tensor& tensor) {
#ifdef __linux__
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t end = (begin + tensor.nbytes()) / page * page;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE); // a hint: it may be refused
#endif
}

} // namespace wmha

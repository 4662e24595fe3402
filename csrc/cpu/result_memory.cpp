#include "result_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <list>
#include <memory>
#include <mutex>

namespace wmha::cpu {
namespace {

constexpr size_t smallest = size_t{1} << 20;    // below, nothing is gained
constexpr size_t most_kept = size_t{256} << 20; // of all blocks together

/// Takes memory from PyTorch's allocator and keeps what is freed.
class ResultMemory final : public c10::Allocator {
 public:
  /// Lives longer than any tensor.
  static ResultMemory& instance() {
    static auto* const memory = new ResultMemory();
    return *memory;
  }

  c10::DataPtr allocate(size_t bytes) override {
    std::unique_ptr<Block> block = take(bytes);
    if (block == nullptr) block.reset(new Block{c10::GetCPUAllocator()->allocate(bytes), bytes});
    void* const data = block->data.get();
    return {data, block.release(), free, c10::kCPU};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  struct Block {
    c10::DataPtr data;
    size_t bytes;
  };

  static void free(void* block) { instance().keep(std::unique_ptr<Block>(static_cast<Block*>(block))); }

  // Nobody waits for another thread, not even a child process for one that its parent had.
  std::unique_lock<std::mutex> try_lock() { return std::unique_lock(mutex_, std::try_to_lock); }

  /// The smallest block that is large enough, but by at most an eighth; null if there is none.
  std::unique_ptr<Block> take(size_t bytes) {
    const auto lock = try_lock();
    if (!lock) return nullptr;
    auto best = kept_.end();
    for (auto block = kept_.begin(); block != kept_.end(); ++block) {
      const size_t size = (*block)->bytes;
      if (size < bytes || size > bytes + bytes / 8) continue;
      if (best == kept_.end() || size < (*best)->bytes) best = block;
    }
    if (best == kept_.end()) return nullptr;
    std::unique_ptr<Block> block = std::move(*best);
    kept_.erase(best);
    kept_bytes_ -= block->bytes;
    return block;
  }

  void keep(std::unique_ptr<Block> block) {
    std::list<std::unique_ptr<Block>> dropped; // freed without the lock
    const auto lock = try_lock();
    if (!lock || block->bytes < smallest) return;
    kept_bytes_ += block->bytes;
    kept_.push_back(std::move(block));
    while (kept_bytes_ > most_kept) {
      kept_bytes_ -= kept_.front()->bytes;
      dropped.splice(dropped.end(), kept_, kept_.begin());
    }
  }

  std::mutex mutex_;
  std::list<std::unique_ptr<Block>> kept_; // the oldest first
  size_t kept_bytes_ = 0;
};

} // namespace

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
  if (bytes < smallest) return at::empty(sizes, options);
  return at::detail::empty_generic(
      sizes, &ResultMemory::instance(), c10::DispatchKeySet(c10::DispatchKey::CPU),
      c10::typeMetaToScalarType(options.dtype()), std::nullopt);
}

} // namespace wmha::cpu

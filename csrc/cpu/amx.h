// The tile registers of AMX, eight of 16 rows of 64 bytes each, and the instructions on them (Intel 64 and IA-32
// Architectures Software Developer's Manual, volume 1, chapter 18). With WMHA_EMULATE_AMX, plain C++ does what they do,
// for tests on CPUs that have none.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace wmha::cpu::CPU_CAPABILITY {

constexpr int tile_registers = 8;
constexpr int64_t register_rows = 16;
constexpr int64_t register_bytes = 64; // of a row

#ifdef WMHA_EMULATE_AMX

struct EmulatedRegister {
  alignas(register_bytes) unsigned char row[register_rows][register_bytes];
};
inline thread_local EmulatedRegister emulated[tile_registers];
inline thread_local bool configured = false;

inline void configure_registers() { configured = true; }
inline void release_registers() { configured = false; }

template <int tile>
void clear_register() {
  emulated[tile] = {};
}
template <int tile>
void load_register(const void* from, int64_t stride) {
  for (int64_t r = 0; r < register_rows; ++r) {
    std::memcpy(emulated[tile].row[r], static_cast<const char*>(from) + r * stride, register_bytes);
  }
}
template <int tile>
void store_register(void* to, int64_t stride) {
  for (int64_t r = 0; r < register_rows; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, emulated[tile].row[r], register_bytes);
  }
}
template <int sum, int left, int right>
void multiply_add_registers() {
  if (!configured) __builtin_trap(); // as the instruction does
  for (int64_t r = 0; r < register_rows; ++r) {
    __m512 row = _mm512_load_ps(emulated[sum].row[r]);
    for (int64_t t = 0; t < register_rows; ++t) {
      int pair;
      std::memcpy(&pair, emulated[left].row[r] + t * sizeof(pair), sizeof(pair));
      row =
          _mm512_dpbf16_ps(row, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_load_si512(emulated[right].row[t]));
    }
    _mm512_store_ps(emulated[sum].row[r], row);
  }
}

#else
// In assembly, since the functions that g++ 12 has for them don't tell its optimiser which memory they read and write.

inline void configure_registers() {
  struct {
    uint8_t palette = 1;
    uint8_t unused[15] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } shapes;
  static_assert(sizeof(shapes) == 64);
  for (int tile = 0; tile < tile_registers; ++tile) {
    shapes.row_bytes[tile] = register_bytes;
    shapes.rows[tile] = register_rows;
  }
  asm volatile("ldtilecfg %0" ::"m"(shapes));
}
inline void release_registers() { asm volatile("tilerelease"); }

template <int tile>
void clear_register() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
/// Rows lie `stride` bytes apart.
template <int tile>
void load_register(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
void store_register(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}
/// sum[r][c] += left[r][t] . right[t][c], each t a pair of bf16, each sum fp32.
template <int sum, int left, int right>
void multiply_add_registers() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(left), "i"(right));
}

#endif

/// While one of these lives, its thread may use the registers.
class TileRegisters {
 public:
  TileRegisters() { configure_registers(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  ~TileRegisters() { release_registers(); }
};

} // namespace wmha::cpu::CPU_CAPABILITY

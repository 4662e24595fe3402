// 2^x for the softmax.
#pragma once

#include <ATen/cpu/vec/vec.h>

namespace wmha::cpu::CPU_CAPABILITY {

inline at::vec::Vectorized<double> exp2(at::vec::Vectorized<double> x) { return x.exp2(); }

/// Relative error below 1.5e-7, for bf16 below 3e-6 (and 1 at 0, so that a factor that should be none is none);
/// 2^-inf = 0; NaN stays NaN.
/// 2^x = 2^n * 2^f, n = floor(x): a polynomial of degree 5 in f, least in its largest relative error over [0, 1). For
/// bf16, whose rounding is larger by far, degree 4 is 1 to 5 % faster.
inline at::vec::Vectorized<float> exp2(at::vec::Vectorized<float> x) {
  using Vec = at::vec::Vectorized<float>;
#if defined(CPU_CAPABILITY_AVX512)
  const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); // 0 for x = -inf
#else
  x = at::vec::clamp_min(x, Vec(-127.f)); // below, the exponent's bits are those of 0
  const Vec n = x.floor();
  const Vec f = x - n;
#endif
#if defined(CPU_CAPABILITY_AVX512_BF16) // for bf16 alone
  Vec p(1.342515461e-2f);
  p = at::vec::fmadd(p, f, Vec(5.224537477e-2f));
  p = at::vec::fmadd(p, f, Vec(2.412785590e-1f));
  p = at::vec::fmadd(p, f, Vec(6.930451393e-1f));
#else
  Vec p(1.867130213e-3f);
  p = at::vec::fmadd(p, f, Vec(9.017030019e-3f));
  p = at::vec::fmadd(p, f, Vec(5.579991332e-2f));
  p = at::vec::fmadd(p, f, Vec(2.401644501e-1f));
  p = at::vec::fmadd(p, f, Vec(6.931513118e-1f));
#endif
  p = at::vec::fmadd(p, f, Vec(1.f));
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_scalef_ps(p, x); // p * 2^floor(x)
#else
  // 2^n by its bits; from n = 128 on they are those of infinity.
  const auto exponent = at::vec::convert_to_int_of_same_size(at::vec::clamp_max(n, Vec(128.f)));
  const auto bits = (exponent + at::vec::Vectorized<int32_t>(127)) << at::vec::Vectorized<int32_t>(23);
  return p * at::vec::cast<float>(bits);
#endif
}

} // namespace wmha::cpu::CPU_CAPABILITY

// A bare loop of multiply-adds: the limit that every figure stands beside.
#pragma once

#include "vec.hpp"

namespace foveal::FOVEAL_VARIANT {

template <class P>
inline double multiply_add(long rounds) {
  constexpr int sums = 12;  // enough to hide the latency of two units
  Vec sum[sums];
  for (Vec& x : sum) x = zero();
  Vec b = set1(1e-30f);
  for (long i = 0; i < rounds; i++) {
#pragma GCC unroll 12
    for (int j = 0; j < sums; j++) sum[j] = P::step(sum[j], 0x00010001u, b);
  }
  float total = 0.0f;
  for (Vec& x : sum) total += hsum(x);
  return total + (double)rounds * sums * LANES * 2 * P::per_unit;
}

// Floating-point operations done; `pairs` asks for bfloat16 pairs, 0 where there are none.
inline double peak(bool pairs, long rounds) {
  if (!pairs) return multiply_add<Floats>(rounds);
#if defined(__AVX512BF16__)
  return multiply_add<Pairs>(rounds);
#else
  return 0.0;
#endif
}

}  // namespace foveal::FOVEAL_VARIANT

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

#if defined(__AMX_BF16__)
inline double multiply_tiles(long rounds) {
  const Tiles::Session session;
  float sum[256];
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (long i = 0; i < rounds; i++) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, sum, 64);
  return sum[0] + (double)rounds * 4 * 16 * 16 * 32 * 2;
}
#endif

// Floating-point operations done; `pairs` asks for bfloat16 pairs, 0 where there are none.
inline double peak(bool pairs, long rounds) {
  if (!pairs) return multiply_add<Floats>(rounds);
#if defined(__AMX_BF16__)
  return multiply_tiles(rounds);
#elif defined(__AVX512BF16__)
  return multiply_add<Pairs>(rounds);
#else
  return 0.0;
#endif
}

}  // namespace foveal::FOVEAL_VARIANT

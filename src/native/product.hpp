// The register tile: a few rows times a few vectors of columns, summed over all steps without leaving the registers.
#pragma once

#include "vec.hpp"

namespace foveal::FOVEAL_VARIANT {

enum class Start { zero, sum, scaled };  // what the product is added to: nothing, c, or c · factor[row]

// sum [R × N vectors] of left [R × steps] · b [steps × N vectors]; left(r, s) is one unit.
template <class P, int R, int N, class Left>
inline __attribute__((always_inline)) void sum_up(const Left& left, const Unit* __restrict b, long ldb, long steps, Vec (&sum)[R][N]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) sum[r][n] = zero();
#pragma GCC unroll 2
  for (long s = 0; s < steps; s++) {
    Vec column[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) column[n] = load_units(b + s * ldb + n * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Unit x = left(r, s);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) sum[r][n] = P::step(sum[r][n], x, column[n]);
    }
  }
}

// c [R × N vectors] = start + a [R × steps] · b [steps × N vectors]. The start comes last: one rounding beside a long sum
// instead of one per step, which leaves dk and dv a tenth of the error.
template <class P, Start start, int R, int N>
inline __attribute__((always_inline)) void tile(const Unit* __restrict a, long lda, const Unit* __restrict b, long ldb,
                                                long steps, float* __restrict c, long ldc, const float* factor) {
  Vec sum[R][N];
  sum_up<P, R, N>([&](int r, long s) { return a[r * lda + s]; }, b, ldb, steps, sum);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      float* at = c + r * ldc + n * LANES;
      if constexpr (start == Start::sum) sum[r][n] = add(sum[r][n], load(at));
      if constexpr (start == Start::scaled) sum[r][n] = fma(load(at), set1(factor[r]), sum[r][n]);
      store(at, sum[r][n]);
    }
}

template <class P, Start start, int N>
inline void tile_rows(long rows, const Unit* a, long lda, const Unit* b, long ldb, long steps, float* c, long ldc,
                      const float* factor) {
  for (; rows >= TILE_ROWS; rows -= TILE_ROWS, a += TILE_ROWS * lda, c += TILE_ROWS * ldc, factor += TILE_ROWS)
    tile<P, start, TILE_ROWS, N>(a, lda, b, ldb, steps, c, ldc, factor);
  switch (rows) {
    case 1: return tile<P, start, 1, N>(a, lda, b, ldb, steps, c, ldc, factor);
    case 2: return tile<P, start, 2, N>(a, lda, b, ldb, steps, c, ldc, factor);
    case 3: return tile<P, start, 3, N>(a, lda, b, ldb, steps, c, ldc, factor);
    case 4: return tile<P, start, 4, N>(a, lda, b, ldb, steps, c, ldc, factor);
    case 5: return tile<P, start, 5, N>(a, lda, b, ldb, steps, c, ldc, factor);
    default: return;
  }
}

#if defined(__AMX_BF16__)
// The same for R × N tiles of 16 × 16 sums, and a multiple of 16 steps. The sums start from c.
template <bool from_zero, int R, int N>
inline void tile_unit(const Unit* a, long lda, const Unit* b, long ldb, long steps, float* c, long ldc) {
  asm volatile("" ::: "memory");  // the intrinsics do not say that they read memory
  float* c1 = c + 16 * ldc;
  if constexpr (from_zero) {
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (R > 1) _tile_zero(2);
    if constexpr (R > 1 && N > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, c, 4 * ldc);
    if constexpr (N > 1) _tile_loadd(1, c + 16, 4 * ldc);
    if constexpr (R > 1) _tile_loadd(2, c1, 4 * ldc);
    if constexpr (R > 1 && N > 1) _tile_loadd(3, c1 + 16, 4 * ldc);
  }
  for (long s = 0; s < steps; s += 16) {
    _tile_loadd(4, a + s, 4 * lda);
    _tile_loadd(6, b + s * ldb, 4 * ldb);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N > 1) {
      _tile_loadd(7, b + s * ldb + 16, 4 * ldb);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R > 1) {
      _tile_loadd(5, a + 16 * lda + s, 4 * lda);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (R > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 4 * ldc);
  if constexpr (N > 1) _tile_stored(1, c + 16, 4 * ldc);
  if constexpr (R > 1) _tile_stored(2, c1, 4 * ldc);
  if constexpr (R > 1 && N > 1) _tile_stored(3, c1 + 16, 4 * ldc);
}

template <bool from_zero, int R>
inline void tile_unit_rows(const Unit* a, long lda, const Unit* b, long ldb, long steps, float* c, long ldc, long width) {
  long n = 0;
  for (; n + 32 <= width; n += 32) tile_unit<from_zero, R, 2>(a, lda, b + n, ldb, steps, c + n, ldc);
  if (n < width) tile_unit<from_zero, R, 1>(a, lda, b + n, ldb, steps, c + n, ldc);
}

template <Start start>
inline void tile_unit_product(long rows, const Unit* a, long lda, const Unit* b, long ldb, long steps, float* c, long ldc,
                              long width, const float* factor) {
  constexpr bool from_zero = start == Start::zero;
  if constexpr (start == Start::scaled) {
    for (long r = 0; r < rows; r++)
      for (long n = 0; n < width; n += LANES) store(c + r * ldc + n, mul(load(c + r * ldc + n), set1(factor[r])));
  }
  long r = 0;
  for (; r + 32 <= rows; r += 32) tile_unit_rows<from_zero, 2>(a + r * lda, lda, b, ldb, steps, c + r * ldc, ldc, width);
  if (r < rows) tile_unit_rows<from_zero, 1>(a + r * lda, lda, b, ldb, steps, c + r * ldc, ldc, width);
}
#endif

// c [rows × width] = start + a · b, for a width that is a multiple of 16 and at most 64; b is [steps][ldb].
template <class P, Start start>
inline void product(long rows, const Unit* a, long lda, const Unit* b, long ldb, long steps, float* c, long ldc, long width,
                    const float* factor = nullptr) {
#if defined(__AMX_BF16__)
  if constexpr (P::tiles) {  // what does not fill the tiles is left to the registers
    const long whole = steps % 16 ? 0 : rows / 16 * 16;
    if (whole) tile_unit_product<start>(whole, a, lda, b, ldb, steps, c, ldc, width, factor);
    rows -= whole, a += whole * lda, c += whole * ldc;
    if (start == Start::scaled) factor += whole;
    if (!rows) return;
  }
#endif
  static const float none[TILE_ROWS] = {};
  if (!factor) factor = none - 0;
  long n = 0;
  for (; n + TILE_VECS * LANES <= width; n += TILE_VECS * LANES)
    tile_rows<P, start, TILE_VECS>(rows, a, lda, b + n, ldb, steps, c + n, ldc, factor);
  if constexpr (TILE_VECS * LANES > 16) {  // what is left is a multiple of 16
    switch ((width - n) / LANES) {
      case 1: return tile_rows<P, start, 1>(rows, a, lda, b + n, ldb, steps, c + n, ldc, factor);
      case 2: return tile_rows<P, start, 2>(rows, a, lda, b + n, ldb, steps, c + n, ldc, factor);
      case 3: return tile_rows<P, start, 3>(rows, a, lda, b + n, ldb, steps, c + n, ldc, factor);
      default: return;
    }
  }
}

}  // namespace foveal::FOVEAL_VARIANT

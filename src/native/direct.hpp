// Few rows read keys and values where they lie: each is used a few times only, so that packing would cost more than it saves.
#pragma once

#include "softmax.hpp"

namespace foveal::FOVEAL_VARIANT {

constexpr long DIRECT_ROWS = 16;  // beyond these, packing pays

template <bool half>
inline Vec load_as(const char* row, long at) {
  if constexpr (half) return load_bf16(reinterpret_cast<const std::uint16_t*>(row) + at);
  return load(reinterpret_cast<const float*>(row) + at);
}

inline bool direct(const Problem& p, long rows) {
  return rows <= DIRECT_ROWS && p.type != Type::f16 && p.k.step[3] == 1 && p.v.step[3] == 1 && p.dim % 16 == 0 && p.dim_v % 16 == 0;
}

// What is wanted next: it is fetched bit by bit while the work goes on, so that memory never waits.
struct Ahead {
  const char* const* rows = nullptr;  // as many as the work has keys; or null
  long bytes = 0;
  void fetch(long j) const {
    if (rows)
      for (long i = 0; i < bytes; i += 64) __builtin_prefetch(rows[j] + i, 0, 2);
  }
};

// s[r · ld + j] = q[r] · key[j] for R ≤ 4 rows and 64 keys.
template <bool half, int R>
inline void dots(const float* q, long dim, const char* const* key, float* s, long ld, Ahead ahead) {
  for (long j = 0; j < PANEL; j += 4) {
    for (long i = 0; i < 4; i++) ahead.fetch(j + i);
    Vec sum[16];
    for (Vec& x : sum) x = zero();
    for (long d = 0; d < dim; d += LANES) {
      Vec k[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) k[i] = load_as<half>(key[j + i], d);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const Vec left = load(q + r * dim + d);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sum[4 * r + i] = fma(left, k[i], sum[4 * r + i]);
      }
    }
    float sums[16];
    hsum16(sum, sums);
    for (int r = 0; r < R; r++) std::memcpy(s + r * ld + j, sums + 4 * r, 16);
  }
}

// o[r] = o[r] · factor[r] + Σ_j w[r · ld + j] · value[j] for R ≤ 4 rows and N vectors of channels.
template <bool half, int R, int N>
inline void weigh(const float* w, long ld, const char* const* value, long count, long at, float* o, long wide, const float* factor,
                  Ahead ahead) {
  Vec sum[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sum[r][n] = mul(load(o + r * wide + at + n * LANES), set1(factor[r]));
  for (long j = 0; j < count; j++) {
    ahead.fetch(j);
    Vec v[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) v[n] = load_as<half>(value[j], at + n * LANES);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) sum[r][n] = fma(set1(w[r * ld + j]), v[n], sum[r][n]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) store(o + r * wide + at + n * LANES, sum[r][n]);
}

template <bool half, int R>
inline void weigh_all(const float* w, long ld, const char* const* value, long count, float* o, long wide, const float* factor, Ahead ahead) {
  long at = 0;
  for (; at + 4 * LANES <= wide; at += 4 * LANES) weigh<half, R, 4>(w, ld, value, count, at, o, wide, factor, at ? Ahead{} : ahead);
  for (; at < wide; at += LANES) weigh<half, R, 1>(w, ld, value, count, at, o, wide, factor, at ? Ahead{} : ahead);
}

// Any number of rows, four by four.
template <bool half>
inline void all_dots(long rows, const float* q, long dim, const char* const* key, float* s, long ld, Ahead ahead) {
  for (; rows > 4; rows -= 4, q += 4 * dim, s += 4 * ld, ahead.rows = nullptr) dots<half, 4>(q, dim, key, s, ld, ahead);
  switch (rows) {
    case 1: return dots<half, 1>(q, dim, key, s, ld, ahead);
    case 2: return dots<half, 2>(q, dim, key, s, ld, ahead);
    case 3: return dots<half, 3>(q, dim, key, s, ld, ahead);
    default: return dots<half, 4>(q, dim, key, s, ld, ahead);
  }
}

template <bool half>
inline void all_weigh(long rows, const float* w, long ld, const char* const* value, long count, float* o, long wide, const float* factor, Ahead ahead) {
  for (; rows > 4; rows -= 4, w += 4 * ld, o += 4 * wide, factor += 4, ahead.rows = nullptr)
    weigh_all<half, 4>(w, ld, value, count, o, wide, factor, ahead);
  switch (rows) {
    case 1: return weigh_all<half, 1>(w, ld, value, count, o, wide, factor, ahead);
    case 2: return weigh_all<half, 2>(w, ld, value, count, o, wide, factor, ahead);
    case 3: return weigh_all<half, 3>(w, ld, value, count, o, wide, factor, ahead);
    default: return weigh_all<half, 4>(w, ld, value, count, o, wide, factor, ahead);
  }
}

}  // namespace foveal::FOVEAL_VARIANT

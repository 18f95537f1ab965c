// The online softmax with query rows across the lanes, for float32: Sᵀ = K·Qᵀ and Oᵀ = Vᵀ·Pᵀ.
//
// Keys and values are the left operands, read one number at a time where they lie. Only the rows are transposed, once for all
// their keys, so that keys which few rows share are not packed for them.
#pragma once

#include "softmax.hpp"

namespace foveal::FOVEAL_VARIANT {

// Rows whose lines are fetched one by one while others are multiplied.
struct Soon {
  const float* const* keys = nullptr;    // those after the next ones
  const float* const* values = nullptr;  // of the keys that are multiplied now
};

// s[r · PANEL + i] = key[r] · q[i] for R keys and N vectors of rows; q is [dim][PANEL].
template <int R, int N>
inline __attribute__((always_inline)) void dots_across(const float* const* key, const float* q, long dim, float* s, Soon soon) {
  const float* row[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) row[r] = key[r];
  Vec sum[R][N];
  sum_up<Floats, R, N>(
      [&](int r, long d) {
        if (soon.keys && d % 16 == 0) {
          __builtin_prefetch(soon.keys[r] + d, 0, 3);
          __builtin_prefetch(soon.values[r] + d, 0, 2);
        }
        return as_unit(row[r][d]);
      },
      reinterpret_cast<const Unit*>(q), PANEL, dim, sum);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) store(s + r * PANEL + n * LANES, sum[r][n]);
}

// o[r · PANEL + i] = o · factor[i] + Σ_j value[j][r] · w[j · PANEL + i] for R channels from `at` on and N vectors of rows.
template <int R, int N>
inline __attribute__((always_inline)) void weigh_across(const float* const* value, long at, long count, const float* w, float* o,
                                                        const float* factor) {
  Vec sum[R][N];
  sum_up<Floats, R, N>([&](int r, long j) { return as_unit(value[j][at + r]); }, reinterpret_cast<const Unit*>(w), PANEL, count, sum);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      float* to = o + (at + r) * PANEL + n * LANES;
      store(to, fma(load(to), load(factor + n * LANES), sum[r][n]));
    }
}

class Across {
  static constexpr long KEYS = 64;  // between two updates of the softmax

  const Problem& p;
  const long wide;
  float *q, *s, *o;  // [dim][PANEL] and [wide][PANEL] of each 64 rows; [KEYS][PANEL]
  float *top, *sum, *factor, *floor, *spread;
  const float **key, **value;

 public:
  // Memory for so many rows; for none, where the kernel is not used.
  Across(const Problem& problem, long rows, Carve& memory) : p(problem), wide(padded(p.dim_v)) {
    const long slabs = ceil_div(rows, PANEL), any = rows > 0;
    q = memory.take<float>(slabs * p.dim * PANEL);
    s = memory.take<float>(any * KEYS * PANEL);
    o = memory.take<float>(slabs * wide * PANEL);
    top = memory.take<float>(slabs * PANEL);
    sum = memory.take<float>(slabs * PANEL);
    factor = memory.take<float>(any * PANEL);
    floor = memory.take<float>(any * PANEL);
    spread = memory.take<float>(p.entropy ? slabs * PANEL : 0);
    key = memory.take<const float*>(any * (KEYS + 2 * TILE_ROWS));
    value = memory.take<const float*>(any * KEYS);
  }

  static bool serves(const Problem& p) {
    return p.type == Type::f32 && p.k.step[3] == 1 && p.v.step[3] == 1 && !shaped(p);
  }

  // Whether so many rows fill the lanes well enough to save more than packing costs.
  static bool pays(long rows) { return 10 * padded(rows) <= 11 * rows; }

  // The rows for which begin(c) was called attend to `count` keys that each of them sees. Leaves in `rows` what its steps would.
  void attend(const Softmax<Floats>& rows, const Chunk& c, long kv, Rows which, long count) const {
    for (long r = 0; r < c.rows; r += PANEL) {
      turn_rows(rows.queries + r * p.dim, least(PANEL, c.rows - r), q + r * p.dim);
      std::memset(o + r * wide, 0, (std::size_t)(wide * PANEL) * 4);
      for (long i = r; i < r + PANEL; i++) top[i] = -INF, sum[i] = 0.0f;
      for (long i = r; p.entropy && i < r + PANEL; i++) spread[i] = 0.0f;
    }
    for (long start = 0; start < count; start += KEYS) {
      const long here = least(KEYS, count - start);
      for (long j = 0; j < here + 2 * TILE_ROWS; j++) key[j] = floats_at(p.k, c.b, kv, which, least(start + j, count - 1));
      for (long j = 0; j < here; j++) value[j] = floats_at(p.v, c.b, kv, which, start + j);
      fetch_following(c, c.rows * start / count, c.rows * (start + here) / count);
      for (long r = 0; r < c.rows; r += PANEL) step(r, ceil_div(least(PANEL, c.rows - r), 16) * 16 / LANES, here);
    }
    for (long r = 0; r < c.rows; r += PANEL) turn_back(o + r * wide, least(PANEL, c.rows - r), rows.o + r * wide);
    std::memcpy(rows.most_seen, top, (std::size_t)c.rows * 4);
    std::memcpy(rows.sum, sum, (std::size_t)c.rows * 4);
    if (p.entropy) std::memcpy(rows.spread, spread, (std::size_t)c.rows * 4);
  }

 private:
  static const float* floats_at(const Strided& x, long b, long kv, Rows which, long r) {
    return reinterpret_cast<const float*>(row_at(x, Type::f32, b, kv, which, r));
  }

  // The queries behind rows `from` … `to` of a chunk, which most likely come next.
  void fetch_following(const Chunk& c, long from, long to) const {
    if (c.list) return;
    for (long r = from; r < to; r++) {
      const long n = c.first + c.per_head + r % c.per_head;
      if (n >= p.q_len) continue;
      const char* at = row_at(p.q, p.type, c.b, c.h + r / c.per_head, n);
      for (long d = 0; d < p.dim; d += 16) __builtin_prefetch(at + d * p.q.step[3] * 4, 0, 2);
    }
  }

  // Up to 64 rows of queries become columns; the last row stands in for those that are missing.
  void turn_rows(const Unit* from, long rows, float* to) const {
    const Unit* row[16];
    for (long r = 0; r < PANEL; r += 16) {
      for (long i = 0; i < 16; i++) row[i] = from + least(r + i, rows - 1) * p.dim;
      for (long d = 0; d < p.dim; d += 16) transpose16(row, d, least(16, p.dim - d), reinterpret_cast<Unit*>(to + d * PANEL + r), PANEL);
    }
  }

  // Columns of results become rows.
  void turn_back(const float* from, long rows, float* to) const {
    const Unit* row[16];
    for (long c = 0; c < wide; c += 16) {
      for (long i = 0; i < 16; i++) row[i] = reinterpret_cast<const Unit*>(from + (c + i) * PANEL);
      for (long r = 0; r < rows; r += 16) transpose16(row, r, least(16, rows - r), reinterpret_cast<Unit*>(to + r * wide + c), wide);
    }
  }

  // Up to 64 rows, in `vectors` vectors, and a block of keys.
  void step(long first, long vectors, long keys) const {
    const float* queries = q + first * p.dim;
    float* to = o + first * wide;
    each_tile(vectors, [&]<int N>(long at) { dots<N>(keys, queries + at, s + at); });
    p.entropy ? softmax<true>(first, vectors, keys) : softmax<false>(first, vectors, keys);
    each_tile(vectors, [&]<int N>(long at) { weigh<N>(keys, s + at, to + at, factor + at); });
  }

  // Vectors of rows in register tiles; what is left over is a multiple of 16 rows.
  template <class F>
  static void each_tile(long vectors, F f) {
    long n = 0;
    for (; n + TILE_VECS <= vectors; n += TILE_VECS) f.template operator()<TILE_VECS>(n * LANES);
    if constexpr (TILE_VECS * LANES > 16) {
      switch ((vectors - n) * LANES / 16) {
        case 1: return f.template operator()<16 / LANES>(n * LANES);
        case 2: return f.template operator()<32 / LANES>(n * LANES);
        case 3: return f.template operator()<48 / LANES>(n * LANES);
        default: return;
      }
    }
  }

  template <int N>
  void dots(long keys, const float* queries, float* to) const {
    long j = 0;
    for (; j + TILE_ROWS <= keys; j += TILE_ROWS)
      dots_across<TILE_ROWS, N>(key + j, queries, p.dim, to + j * PANEL, Soon{key + j + 2 * TILE_ROWS, value + j});
    switch (keys - j) {
      case 1: return dots_across<1, N>(key + j, queries, p.dim, to + j * PANEL, {});
      case 2: return dots_across<2, N>(key + j, queries, p.dim, to + j * PANEL, {});
      case 3: return dots_across<3, N>(key + j, queries, p.dim, to + j * PANEL, {});
      case 4: return dots_across<4, N>(key + j, queries, p.dim, to + j * PANEL, {});
      case 5: return dots_across<5, N>(key + j, queries, p.dim, to + j * PANEL, {});
      default: return;
    }
  }

  template <int N>
  void weigh(long keys, const float* w, float* to, const float* by) const {
    long c = 0;
    for (; c + TILE_ROWS <= p.dim_v; c += TILE_ROWS) weigh_across<TILE_ROWS, N>(value, c, keys, w, to, by);
    switch (p.dim_v - c) {
      case 1: return weigh_across<1, N>(value, c, keys, w, to, by);
      case 2: return weigh_across<2, N>(value, c, keys, w, to, by);
      case 3: return weigh_across<3, N>(value, c, keys, w, to, by);
      case 4: return weigh_across<4, N>(value, c, keys, w, to, by);
      case 5: return weigh_across<5, N>(value, c, keys, w, to, by);
      default: return;
    }
  }

  // Products become weights, in place.
  template <bool measured>
  void softmax(long first, long vectors, long keys) const {
    const float by = factor_of(p);
    const long rows = vectors * LANES;
    for (long n = 0; n < rows; n += LANES) {
      Vec best = load(s + n), other = best;  // two chains: one would wait for each result
      long j = 1;
      for (; j + 1 < keys; j += 2) {
        best = max(best, load(s + j * PANEL + n));
        other = max(other, load(s + (j + 1) * PANEL + n));
      }
      if (j < keys) best = max(best, load(s + j * PANEL + n));
      store(floor + n, mul(max(best, other), set1(by)));
    }
    for (long i = 0; i < rows; i++) {
      const float before = top[first + i], now = floor[i] > before ? floor[i] : before;
      top[first + i] = now;
      floor[i] = now == -INF ? 0.0f : now;
      factor[i] = before - floor[i];
      if (measured && sum[first + i] != 0.0f) spread[first + i] = fused(sum[first + i], factor[i], spread[first + i]);
    }
    for (long n = 0; n < rows; n += LANES) {
      const Vec minus = sub(zero(), load(floor + n)), share = exp2(load(factor + n));
      Vec total = zero();
      [[maybe_unused]] Vec weighted = zero();
      for (long j = 0; j < keys; j++) {
        const Vec x = fma(load(s + j * PANEL + n), set1(by), minus), w = exp2(x);
        store(s + j * PANEL + n, w);
        total = add(total, w);
        if constexpr (measured) weighted = fma(w, max(set1(-200.0f), x), weighted);
      }
      store(factor + n, share);
      store(sum + first + n, fma(load(sum + first + n), share, total));
      if constexpr (measured) store(spread + first + n, fma(load(spread + first + n), share, weighted));
    }
  }
};

}  // namespace foveal::FOVEAL_VARIANT

// Softmax of rows of logits in place, with what probes of attention ask of each row, while the row is in the nearest cache.
#pragma once

#include <cmath>

#include "pack.hpp"
#include "pool.hpp"
#include "product.hpp"

namespace foveal::FOVEAL_VARIANT {

constexpr int CHAINS = 4;  // sums that run side by side: hides latency, and keeps each sum short
constexpr float LOG2E = 1.4426950408889634f;

// Largest of x[0 … n).
inline float row_max(const float* x, long n) {
  Vec best[CHAINS];
  for (Vec& b : best) b = set1(-INFINITY);
  long j = 0;
  for (; j + CHAINS * LANES <= n; j += CHAINS * LANES)
    for (int c = 0; c < CHAINS; c++) best[c] = max(best[c], load(x + j + c * LANES));
  float top = hmax(max(max(best[0], best[1]), max(best[2], best[3])));
  for (; j < n; j++) top = x[j] > top ? x[j] : top;
  return top;
}

// Sums over the columns of a row, of e = e^(x − top).
struct RowSums {
  float e, spread, away;  // Σ e, Σ e · (x − top) and Σ e · |column − own|
};

// x becomes e^(x − top); column 0 lies `gap_to_own` columns after the row's own.
inline RowSums row_exp(float* x, long n, float top, long gap_to_own) {
  Vec sum[CHAINS], dot[CHAINS], far[CHAINS], place[CHAINS];
  for (int c = 0; c < CHAINS; c++) {
    sum[c] = dot[c] = far[c] = zero();
    float from[LANES];
    for (int i = 0; i < LANES; i++) from[i] = static_cast<float>(gap_to_own + c * LANES + i);
    place[c] = load(from);
  }
  const Vec low = set1(top), base = set1(LOG2E), on = set1(static_cast<float>(CHAINS * LANES));
  long j = 0;
  for (; j + CHAINS * LANES <= n; j += CHAINS * LANES)
    for (int c = 0; c < CHAINS; c++) {
      const Vec gap = sub(load(x + j + c * LANES), low), e = exp2(mul(gap, base));
      store(x + j + c * LANES, e);
      sum[c] = add(sum[c], e);
      dot[c] = fma(e, gap, dot[c]);
      far[c] = fma(e, max(place[c], sub(zero(), place[c])), far[c]);
      place[c] = add(place[c], on);
    }
  const auto joined = [](const Vec* v) { return hsum(add(add(v[0], v[1]), add(v[2], v[3]))); };
  RowSums sums{joined(sum), joined(dot), joined(far)};
  for (; j < n; j++) {
    const float gap = x[j] - top, e = std::exp(gap);
    x[j] = e;
    sums.e += e;
    sums.spread += e * gap;
    sums.away += e * std::fabs(static_cast<float>(gap_to_own + j));
  }
  return sums;
}

// x is scaled, and added to `sums`.
inline void row_scale(float* x, long n, float by, float* sums) {
  long j = 0;
  for (; j + LANES <= n; j += LANES) {
    const Vec w = mul(load(x + j), set1(by));
    store(x + j, w);
    store(sums + j, add(load(sums + j), w));
  }
  for (; j < n; j++) sums[j] += x[j] *= by;
}

inline void softmax_row(const LogitRows& r, long row, float* sums) {
  const long i = row % r.rows;
  const long lo = most(0, least(r.lo[i], r.width)), hi = most(lo, least(r.hi[i], r.width));
  float* x = r.x + row * r.width;
  for (long j = 0; j < lo; j++) x[j] = 0.0f;
  for (long j = hi; j < r.width; j++) x[j] = 0.0f;
  const float top = hi > lo ? row_max(x + lo, hi - lo) : r.hidden;
  r.top[row] = top;
  r.spread[row] = r.away[row] = 0.0f;
  r.on_keys[row] = r.total[row] = 1.0f;
  if (top <= r.hidden) {  // sees nothing; NaN, which no maximum has to show, stays
    for (long j = lo; j < hi; j++) sums[j] += x[j] = x[j] == x[j] ? 0.0f : NAN;
    return;
  }
  const RowSums found = row_exp(x + lo, hi - lo, top, lo - r.own - i);
  const float total = r.sink ? found.e + std::exp(r.sink[row / r.rows] - top) : found.e;
  row_scale(x + lo, hi - lo, 1.0f / total, sums + lo);
  r.total[row] = total;
  r.on_keys[row] = found.e / total;
  r.spread[row] = found.spread / total;
  r.away[row] = found.away / total;
}

// Logits of the rows i … i + count − 1 of a head, on the columns that any of them sees.
inline void row_logits(const LogitRows& r, long head, long i, long count) {
  long lo = r.width, hi = 0;
  for (long n = i; n < i + count; n++) {
    if (r.hi[n] <= r.lo[n]) continue;
    lo = least(lo, r.lo[n]);
    hi = most(hi, r.hi[n]);
  }
  lo = most(lo, 0) + r.first;
  hi = least(hi, r.width) + r.first;
  const Unit* q = reinterpret_cast<const Unit*>(r.q + (head * r.rows + i) * r.dim);
  float* x = r.x + (head * r.rows + i) * r.width;
  for (long panel = lo / PANEL; panel * PANEL < hi; panel++) {
    const Unit* keys = reinterpret_cast<const Unit*>(r.keys) + panel * r.dim * PANEL;
    const long from = most(panel * PANEL, r.first), to = least((panel + 1) * PANEL, r.first + r.width);
    if (to - from == PANEL) {
      product<Floats, Start::zero>(count, q, r.dim, keys, PANEL, r.dim, x + from - r.first, r.width, PANEL);
      continue;
    }
    for (long n = 0; n < count; n += TILE_ROWS) {  // the block ends inside this panel
      float whole[TILE_ROWS * PANEL];
      const long some = least(TILE_ROWS, count - n);
      product<Floats, Start::zero>(some, q + n * r.dim, r.dim, keys, PANEL, r.dim, whole, PANEL, PANEL);
      for (long k = 0; k < some; k++)
        std::memcpy(x + (n + k) * r.width + from - r.first, whole + k * PANEL + from - panel * PANEL, (std::size_t)(to - from) * 4);
    }
  }
}

inline void softmax_rows(const LogitRows& r, Pool& pool, int threads) {
  pool.run(r.heads * r.rows * r.width < (1 << 15) ? 1 : threads, r.heads * ceil_div(r.rows, r.each), [](void* x, long n, int) {
    const LogitRows& r = *static_cast<const LogitRows*>(x);
    const long parts = ceil_div(r.rows, r.each), head = n / parts, first = n % parts * r.each, count = least(r.rows - first, r.each);
    if (r.q) row_logits(r, head, first, count);
    for (long i = first; i < first + count; i++) softmax_row(r, head * r.rows + i, r.sums + n * r.width);
  }, const_cast<LogitRows*>(&r));
}

// Keys (count, dim) as panels [panel][dim][64], for LogitRows.
inline void pack_keys(const float* keys, long count, long dim, float* to, Pool& pool, int threads) {
  struct Job {
    Strided keys;
    long count, dim;
    Unit *to, *temp;
  } job{{const_cast<float*>(keys), {0, 0, dim, 1}}, count, dim, reinterpret_cast<Unit*>(to), nullptr};
  job.temp = static_cast<Unit*>(pool.memory((std::size_t)(threads * 65 * dim * 4)));
  pool.run(threads, ceil_div(count, PANEL), [](void* x, long panel, int worker) {
    const Job& j = *static_cast<Job*>(x);
    pack_columns<Floats>(j.keys, Type::f32, 0, 0, Rows{panel * PANEL}, least(PANEL, j.count - panel * PANEL), j.dim,
                         j.to + panel * j.dim * PANEL, j.temp + worker * 65 * j.dim);
  }, &job);
}

}  // namespace foveal::FOVEAL_VARIANT

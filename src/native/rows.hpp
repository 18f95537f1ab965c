// Softmax of rows of logits in place, with what probes of attention ask of each row, while the row is in the nearest cache.
#pragma once

#include <cmath>

#include "pool.hpp"
#include "problem.hpp"
#include "vec.hpp"

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

// x becomes e^(x − top); returns Σ e^(x − top) and, through `spread`, Σ e^(x − top) · (x − top).
inline float row_exp(float* x, long n, float top, float* spread) {
  Vec sum[CHAINS], dot[CHAINS];
  for (int c = 0; c < CHAINS; c++) sum[c] = dot[c] = zero();
  const Vec low = set1(top), base = set1(LOG2E);
  long j = 0;
  for (; j + CHAINS * LANES <= n; j += CHAINS * LANES)
    for (int c = 0; c < CHAINS; c++) {
      const Vec gap = sub(load(x + j + c * LANES), low), e = exp2(mul(gap, base));
      store(x + j + c * LANES, e);
      sum[c] = add(sum[c], e);
      dot[c] = fma(e, gap, dot[c]);
    }
  float total = hsum(add(add(sum[0], sum[1]), add(sum[2], sum[3]))), product = hsum(add(add(dot[0], dot[1]), add(dot[2], dot[3])));
  for (; j < n; j++) {
    const float gap = x[j] - top, e = std::exp(gap);
    x[j] = e;
    total += e;
    product += e * gap;
  }
  *spread = product;
  return total;
}

inline void row_scale(float* x, long n, float by) {
  long j = 0;
  for (; j + LANES <= n; j += LANES) store(x + j, mul(load(x + j), set1(by)));
  for (; j < n; j++) x[j] *= by;
}

inline void softmax_row(const LogitRows& r, long row) {
  const long i = row % r.rows;
  const long lo = most(0, least(r.lo[i], r.width)), hi = most(lo, least(r.hi[i], r.width));
  float* x = r.x + row * r.width;
  for (long j = 0; j < lo; j++) x[j] = 0.0f;
  for (long j = hi; j < r.width; j++) x[j] = 0.0f;
  const float top = hi > lo ? row_max(x + lo, hi - lo) : r.hidden;
  r.top[row] = top;
  r.spread[row] = 0.0f;
  r.on_keys[row] = r.total[row] = 1.0f;
  if (top <= r.hidden) {  // sees nothing; NaN, which no maximum has to show, stays
    for (long j = lo; j < hi; j++) x[j] = x[j] == x[j] ? 0.0f : NAN;
    return;
  }
  float spread;
  const float sum = row_exp(x + lo, hi - lo, top, &spread);
  const float total = r.sink ? sum + std::exp(r.sink[row / r.rows] - top) : sum;
  row_scale(x + lo, hi - lo, 1.0f / total);
  r.total[row] = total;
  r.on_keys[row] = sum / total;
  r.spread[row] = spread / total;
}

inline void softmax_rows(const LogitRows& r, Pool& pool, int threads) {
  const long count = r.heads * r.rows, chunk = most(1, least(ceil_div(count, 4 * threads), 64));
  struct Job {
    const LogitRows& r;
    long count, chunk;
  } job{r, count, chunk};
  pool.run(count * r.width < (1 << 15) ? 1 : threads, ceil_div(count, chunk), [](void* x, long n, int) {
    const Job& j = *static_cast<Job*>(x);
    for (long row = n * j.chunk; row < least(j.count, (n + 1) * j.chunk); row++) softmax_row(j.r, row);
  }, &job);
}

}  // namespace foveal::FOVEAL_VARIANT

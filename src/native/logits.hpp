// From products q·k to logits in base 2: scale, softcap, relative-position bias.
#pragma once

#include "problem.hpp"
#include "vec.hpp"

namespace foveal::FOVEAL_VARIANT {

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

inline Vec tanh(Vec x) {  // 1 − 2 / (1 + e^2x)
  return sub(set1(1.0f), div(set1(2.0f), add(set1(1.0f), exp2(mul(x, set1(2.0f * LOG2_E))))));
}

inline bool shaped(const Problem& p) { return p.softcap != 0.0f || p.bias; }  // more than a factor

// Of products that are not shaped; a negative scale's sign, and a scale of 0, are in the queries.
inline float factor_of(const Problem& p) { return p.scale == 0.0f ? 1.0f : (p.scale < 0 ? -p.scale : p.scale) * LOG2_E; }

// s: products of one row and 64 keys from `first` on, or of the `count` keys of `list`; become logits in base 2.
inline void shape_logits(const Problem& p, long h, long i, long first, const std::int64_t* list, long count, float* s) {
  float biases[PANEL];
  if (p.bias) {
    const float* table = p.bias + h * (2 * p.reach + 1);
    for (long j = 0; j < PANEL; j++) {
      const long key = list ? (j < count ? list[j] : 0) : first + j;
      biases[j] = table[most(0, least(2 * p.reach, key - (i + p.shift) + p.reach))] * LOG2_E;
    }
  }
  for (long j = 0; j < PANEL; j += LANES) {
    Vec x = load(s + j);
    if (p.softcap != 0.0f) {
      x = mul(tanh(mul(x, set1(p.scale / p.softcap))), set1(p.softcap * LOG2_E));
    } else {
      x = mul(x, set1(p.scale * LOG2_E));
    }
    if (p.bias) x = add(x, load(biases + j));
    store(s + j, x);
  }
}

}  // namespace foveal::FOVEAL_VARIANT

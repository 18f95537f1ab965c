// One call of linear attention's product, in the form that every instruction set's kernel receives.
#pragma once

#include "problem.hpp"

namespace foveal {

// A tensor (batch, key head, group, row, channel) of any strides, in elements of its own type.
struct Operand {
  const void* data = nullptr;
  Type type = Type::f32;
  long step[5] = {0, 0, 0, 0, 0};
};

// Every row's out = q · (start + Σ k vᵀ), the sum over all rows, or over rows up to (reversed: from) its own.
struct LinearProblem {
  long outer = 0, heads = 0;        // batch rows, or sets that lie one after the other; key heads
  long q_groups = 1, k_groups = 1;  // heads of q, and of k and v, that share one state; one of the two is 1
  long q_len = 0, kv_len = 0;
  const std::int64_t* cu = nullptr;  // (outer + 1): set w holds rows cu[w] … cu[w + 1] − 1; or null
  long features = 0, channels = 0;
  Operand q, k, v;
  // One more feature (batch, key head, group, row) of every row of q and k. Step 0 repeats one value.
  bool extra = false;
  const float *q_extra = nullptr, *k_extra = nullptr;
  long q_extra_step[4] = {0, 0, 0, 0}, k_extra_step[4] = {0, 0, 0, 0};
  const float* start = nullptr;  // (outer, heads, features + extra, channels + normalise), any strides
  long start_step[4] = {0, 0, 0, 0};
  float* out = nullptr;  // (batch, key head, group, row, channel), channels side by side
  long out_step[4] = {0, 0, 0, 0};
  float* end = nullptr;      // like start, contiguous
  bool normalise = false;    // out is divided by q · Σ k + eps
  float* divisor = nullptr;  // (batch, key head, group, row): that
  long divisor_step[4] = {0, 0, 0, 0};
  float eps = 0.0f;
  bool causal = false, reverse = false;
};

}  // namespace foveal

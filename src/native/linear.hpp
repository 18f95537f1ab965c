// Linear attention in chunks of rows: pairs inside a chunk are a small triangle of scores, all rows before it are one state
// [feature][channel] that stays in the cache. Both are the register tile of product.hpp.
//
//   O = Q · S          all rows before the chunk
//   A = Q · Kᵀ         12 rows at a time, only the columns up to their own
//   O += A · V
//   S += Kᵀ · V        Kᵀ lies as it was packed for A
#pragma once

#include "carve.hpp"
#include "linear_problem.hpp"
#include "pack.hpp"
#include "product.hpp"

namespace foveal::FOVEAL_VARIANT {

constexpr long LINEAR_CHUNK = 48;  // rows of a chunk: whole register tiles and whole registers
constexpr long LINEAR_ROWS = 12;   // rows of a step inside a chunk

// What a thread works with, and the state as it lies in the cache: [feature][padded channel], then Σ k of each feature.
struct LinearWork {
  const LinearProblem& p;
  long steps, width, values;  // features with the extra one; channels padded to 16; numbers of a state
  Unit *q, *keys, *v, *scores, *rows;
  float *out, *state, *sums;

  LinearWork(const LinearProblem& p, Carve& memory) : p(p) {
    steps = p.features + p.extra;
    width = padded(p.channels);
    values = steps * width + padded(steps);
    q = memory.take<Unit>(LINEAR_CHUNK * steps);
    keys = memory.take<Unit>(steps * LINEAR_CHUNK);
    rows = memory.take<Unit>((LINEAR_CHUNK + 1) * steps);
    v = memory.take<Unit>(LINEAR_CHUNK * width);
    scores = memory.take<Unit>(LINEAR_ROWS * LINEAR_CHUNK);
    out = memory.take<float>(LINEAR_CHUNK * width);
    state = memory.take<float>(values);
    sums = memory.take<float>(LINEAR_CHUNK);
  }

  float* totals() const { return state + steps * width; }

  void load_state(long w, long h) {
    std::memset(state, 0, (std::size_t)values * 4);
    const float* from = p.start + w * p.start_step[0] + h * p.start_step[1];
    for (long f = 0; f < steps; f++) {
      const float* line = from + f * p.start_step[2];
      for (long c = 0; c < p.channels; c++) state[f * width + c] = line[c * p.start_step[3]];
      if (p.normalise) totals()[f] = line[p.channels * p.start_step[3]];
    }
  }

  void store_end(long w, long h) const {
    const long line = p.channels + p.normalise;
    float* to = p.end + (w * p.heads + h) * steps * line;
    for (long f = 0; f < steps; f++, to += line) {
      std::memcpy(to, state + f * width, (std::size_t)p.channels * 4);
      if (p.normalise) to[p.channels] = totals()[f];
    }
  }

  static const char* at(const Operand& x, long b, long h, long g, long n) {
    return static_cast<const char*>(x.data) + (b * x.step[0] + h * x.step[1] + g * x.step[2] + n * x.step[3]) * size_of(x.type);
  }

  // `count` rows of q or k as [row][step].
  void pack_features(const Operand& x, const float* extra, const long* extra_step, long b, long h, long g, long first, long count,
                     Unit* to) const {
    for (long r = 0; r < count; r++, to += steps) {
      read_units(x, at(x, b, h, g, first + r), p.features, to);
      if (p.extra) to[p.features] = as_unit(extra[b * extra_step[0] + h * extra_step[1] + g * extra_step[2] + (first + r) * extra_step[3]]);
    }
  }

  static void read_units(const Operand& x, const char* row, long count, Unit* to) {
    if (x.type == Type::f32) {
      const float* from = reinterpret_cast<const float*>(row);
      if (x.step[4] == 1) {
        std::memcpy(to, from, (std::size_t)count * 4);
      } else {
        for (long i = 0; i < count; i++) to[i] = as_unit(from[i * x.step[4]]);
      }
      return;
    }
    const std::uint16_t* from = reinterpret_cast<const std::uint16_t*>(row);
    for (long i = 0; i < count; i++)
      to[i] = as_unit(x.type == Type::bf16 ? from_bf16(from[i * x.step[4]]) : from_f16(from[i * x.step[4]]));
  }

  // Keys as [step][row], missing rows zero, and values as [row][channel].
  void load_keys(long b, long h, long g, long first, long count) {
    pack_features(p.k, p.k_extra, p.k_extra_step, b, h, g, first, count, rows);
    Unit* none = rows + LINEAR_CHUNK * steps;
    std::memset(none, 0, (std::size_t)steps * 4);
    const Unit* lines[LINEAR_CHUNK];
    for (long r = 0; r < LINEAR_CHUNK; r++) lines[r] = r < count ? rows + r * steps : none;
    for (long r = 0; r < LINEAR_CHUNK; r += 16)
      for (long s = 0; s < steps; s += 16) transpose16(lines + r, s, least(16, steps - s), keys + s * LINEAR_CHUNK + r, LINEAR_CHUNK);
    for (long r = 0; r < count; r++) {
      read_units(p.v, at(p.v, b, h, g, first + r), p.channels, v + r * width);
      std::memset(v + r * width + p.channels, 0, (std::size_t)(width - p.channels) * 4);
    }
  }

  // The state grows by the keys that are loaded.
  void add_keys(long count) {
    product<Floats, Start::sum>(steps, keys, LINEAR_CHUNK, v, width, count, state, width, width);
    if (!p.normalise) return;
    for (long f = 0; f < steps; f++) {
      Vec sum = zero();
      for (long r = 0; r < LINEAR_CHUNK; r += LANES) sum = add(sum, load_units(keys + f * LINEAR_CHUNK + r));
      totals()[f] += hsum(sum);
    }
  }

  // Rows of q are loaded and meet the state.
  void meet_state(long b, long h, long g, long first, long count) {
    pack_features(p.q, p.q_extra, p.q_extra_step, b, h, g, first, count, q);
    product<Floats, Start::zero>(count, q, steps, reinterpret_cast<Unit*>(state), width, steps, out, width, width);
    if (!p.normalise) return;
    for (long r = 0; r < count; r++) {
      Vec sum = zero();
      long s = 0;
      for (; s + LANES <= steps; s += LANES) sum = fma(load_units(q + r * steps + s), load(totals() + s), sum);
      sums[r] = hsum(sum);
      for (; s < steps; s++) sums[r] += as_float(q[r * steps + s]) * totals()[s];
    }
  }

  // Loaded rows meet the loaded keys of their own chunk.
  void meet_chunk(long count) {
    const long columns = padded(count);
    for (long r0 = 0; r0 < count; r0 += LINEAR_ROWS) {
      const long n = least(LINEAR_ROWS, count - r0);
      const long c0 = p.reverse ? r0 / 16 * 16 : 0, c1 = p.reverse ? columns : padded(r0 + n);
      product<Floats, Start::zero>(n, q + r0 * steps, steps, keys + c0, LINEAR_CHUNK, steps, reinterpret_cast<float*>(scores), LINEAR_CHUNK,
                                   c1 - c0);
      for (long r = 0; r < n; r++) {
        Unit* line = scores + r * LINEAR_CHUNK;
        const long own = r0 + r - c0;
        if (p.reverse) {
          std::memset(line, 0, (std::size_t)own * 4);
        } else {
          std::memset(line + own + 1, 0, (std::size_t)(c1 - c0 - own - 1) * 4);
        }
        if (!p.normalise) continue;
        Vec sum = zero();
        for (long c = 0; c < c1 - c0; c += LANES) sum = add(sum, load_units(line + c));
        sums[r0 + r] += hsum(sum);
      }
      const long from = p.reverse ? r0 : 0, to = p.reverse ? count : r0 + n;
      product<Floats, Start::sum>(n, scores + (from - c0), LINEAR_CHUNK, v + from * width, width, to - from, out + r0 * width, width, width);
    }
  }

  void write_rows(long b, long h, long g, long first, long count) const {
    float* to = p.out + b * p.out_step[0] + h * p.out_step[1] + g * p.out_step[2] + first * p.out_step[3];
    for (long r = 0; r < count; r++, to += p.out_step[3]) {
      const float* from = out + r * width;
      if (!p.normalise) {
        std::memcpy(to, from, (std::size_t)p.channels * 4);
        continue;
      }
      const float divisor = sums[r] + p.eps, factor = divisor == 0.0f ? 0.0f : 1.0f / divisor;
      p.divisor[b * p.divisor_step[0] + h * p.divisor_step[1] + g * p.divisor_step[2] + (first + r) * p.divisor_step[3]] = divisor;
      for (long c = 0; c < p.channels; c++) to[c] = from[c] * factor;
    }
  }

  // The state grows by keys first … last − 1.
  void add_rows(long b, long h, long first, long last) {
    for (long g = 0; g < p.k_groups; g++)
      for (long n = first; n < last; n += LINEAR_CHUNK) {
        const long count = least(LINEAR_CHUNK, last - n);
        load_keys(b, h, g, n, count);
        add_keys(count);
      }
  }

  void meet_rows(long b, long h, long first, long last) {
    for (long g = 0; g < p.q_groups; g++)
      for (long n = first; n < last; n += LINEAR_CHUNK) {
        const long count = least(LINEAR_CHUNK, last - n);
        meet_state(b, h, g, n, count);
        write_rows(b, h, g, n, count);
      }
  }

  void causal_rows(long b, long h, long first, long last) {
    const long chunks = ceil_div(last - first, LINEAR_CHUNK);
    for (long i = 0; i < chunks; i++) {
      const long n = first + (p.reverse ? chunks - 1 - i : i) * LINEAR_CHUNK, count = least(LINEAR_CHUNK, last - n);
      if (p.k_groups == 1) {
        load_keys(b, h, 0, n, count);
        for (long g = 0; g < p.q_groups; g++) {
          meet_state(b, h, g, n, count);
          meet_chunk(count);
          write_rows(b, h, g, n, count);
        }
        add_keys(count);
        continue;
      }
      meet_state(b, h, 0, n, count);
      for (long g = 0; g < p.k_groups; g++) {
        load_keys(b, h, g, n, count);
        meet_chunk(count);
        add_keys(count);
      }
      write_rows(b, h, 0, n, count);
    }
  }
};

}  // namespace foveal::FOVEAL_VARIANT

// One step of the backward pass: 64 rows against a block of 128 keys, both packed.
//
// Everything is computed transposed, keys by rows, so that no tile ever has to be turned around:
//   Sᵀ = K·Qᵀ   Pᵀ = 2^(Sᵀ − lse)   dPᵀ = V·dOᵀ   dSᵀ = Pᵀ ∘ (dPᵀ − delta),  delta = rowsum(dO ∘ O) − dlse
//   dV += Pᵀ·dO    dK += dSᵀ·Q    dQᵀ += Kᵀ·dSᵀ
#pragma once

#include "carve.hpp"
#include "logits.hpp"
#include "pack.hpp"
#include "product.hpp"
#include "visible.hpp"

namespace foveal::FOVEAL_VARIANT {

constexpr long KEY_PANELS = 2;  // panels of keys whose gradients are summed at once

// Bit i of x[j] becomes bit j of x[i].
inline void transpose64(std::uint64_t* x) {
  std::uint64_t mask = 0x00000000ffffffffull;
  for (int width = 32; width; width >>= 1, mask ^= mask << width)
    for (int i = 0; i < 64; i = ((i | width) + 1) & ~width) {
      const std::uint64_t t = ((x[i] >> width) ^ x[i | width]) & mask;
      x[i] ^= t << width;
      x[i | width] ^= t;
    }
}

template <class P>
struct BackwardStep {
  static constexpr long STEPS = PANEL / P::per_unit;  // steps of a product that is summed over a panel
  static constexpr long BLOCK_STEPS = KEY_PANELS * STEPS;
  static constexpr long SQUARE = PANEL * PANEL;

  const Problem& p;
  const Gradients& g;
  const long steps = steps_of<P>(p.dim), steps_v = steps_of<P>(p.dim_v), wide = padded(p.dim), wide_v = padded(p.dim_v);
  // Sizes of one packed panel of rows, and of one block of keys.
  const long row_units = (steps + steps_v) * PANEL + STEPS * (wide + wide_v), key_units = KEY_PANELS * PANEL * (steps + steps_v) + p.dim * BLOCK_STEPS;

  struct PerRow {
    float *lse, *delta;           // lse in base 2; INF where a row sees nothing or is past the end
    std::int64_t *place, *table;  // with a bias: clamp(key − place, 0, 2 · reach) is the column, `table` where its head begins
    static PerRow take(const Problem& p, Carve& memory, long rows) {
      return {memory.take<float>(rows), memory.take<float>(rows), p.bias ? memory.take<std::int64_t>(rows) : nullptr,
              p.bias ? memory.take<std::int64_t>(rows) : nullptr};
    }
    PerRow from(long row) const { return {lse + row, delta + row, place ? place + row : nullptr, table ? table + row : nullptr}; }
  };
  struct RowPanel {  // right operands, and what belongs to each row
    Unit *q_columns, *dout_columns, *q_rows, *dout_rows;
    PerRow of;
    long b;
    Rows which;  // query rows, counted over the heads of batch row b
    long count;
    long columns() const { return padded(count); }  // rows that are computed
  };
  struct KeyBlock {  // left operands
    Unit *k_rows, *v_rows, *k_columns;
    Rows which;
    long count;
  };

  RowPanel rows_in(Unit* at, PerRow of, long b, Rows which, long count) const {
    return {at, at + steps * PANEL, at + (steps + steps_v) * PANEL, at + (steps + steps_v) * PANEL + STEPS * wide, of, b, which, count};
  }
  KeyBlock keys_in(Unit* at, Rows which, long count) const {
    return {at, at + KEY_PANELS * PANEL * steps, at + KEY_PANELS * PANEL * (steps + steps_v), which, count};
  }

  struct Scratch {
    float *s, *dp, *dk, *dv;
    double* dbias = nullptr;  // of the heads from `bias_begin` on, which is a place in the whole table; or null
    long bias_begin = 0;
    Unit *ds_pairs, *temp;
    std::uint64_t* bits;
    Scratch(const BackwardStep& b, Carve& memory) {
      s = memory.take<float>(KEY_PANELS * SQUARE);
      dp = memory.take<float>(KEY_PANELS * SQUARE);
      dk = memory.take<float>(KEY_PANELS * PANEL * b.wide);
      dv = memory.take<float>(KEY_PANELS * PANEL * b.wide_v);
      ds_pairs = P::pairs ? memory.take<Unit>(BLOCK_STEPS * PANEL) : nullptr;
      temp = memory.take<Unit>(most(65 * most(b.steps, b.steps_v), PANEL * most(b.wide, b.wide_v)) + 2 * most(b.wide, b.wide_v));
      bits = memory.take<std::uint64_t>(KEY_PANELS * PANEL);
    }
  };

  // `first_out` is where out, lse and their gradients of row 0 lie, or −1 if they lie as the queries do.
  void pack_queries(const RowPanel& to, long first_out, Unit* scratch) const {
    const long count = to.count;
    float* temp = reinterpret_cast<float*>(scratch);
    const bool apart = first_out >= 0;
    const Rows rows{to.which.first, to.which.list, p.q_len}, outs = apart ? Rows{first_out} : rows;
    const long b = apart ? 0 : to.b, length = apart ? p.groups.members : p.q_len, heads = apart ? 1 : p.heads;
    const Strided out{p.out, {heads * length * p.dim_v, length * p.dim_v, p.dim_v, 1}};
    pack_columns<P>(p.q, p.type, to.b, 0, rows, count, p.dim, to.q_columns, scratch);
    pack_columns<P>(g.dout, p.type, b, 0, outs, count, p.dim_v, to.dout_columns, scratch);
    pack_rows<P>(p.q, p.type, to.b, 0, rows, count, PANEL, p.dim, to.q_rows, STEPS, 0, temp);
    pack_rows<P>(g.dout, p.type, b, 0, outs, count, PANEL, p.dim_v, to.dout_rows, STEPS, 0, temp);
    for (long r = 0; r < PANEL; r++) {
      float term = 0.0f, row_lse = INF;
      if (r < count) {
        float* other = temp + wide_v;
        read_floats(type_of_out(p), row_at(out, type_of_out(p), b, 0, outs, r), 1, p.dim_v, temp);
        read_floats(p.type, row_at(g.dout, p.type, b, 0, outs, r), g.dout.step[3], p.dim_v, other);
        for (long c = 0; c < p.dim_v; c++) term += temp[c] * other[c];
        const long row = b * heads * length + outs[r];
        if (g.dlse) term -= g.dlse[row];
        if (p.lse[row] != -INF) row_lse = p.lse[row] * LOG2_E;
      }
      to.of.lse[r] = row_lse;
      to.of.delta[r] = term;
      if (p.bias) {
        const long row = rows[least(r, count - 1)];
        to.of.place[r] = row % p.q_len + p.shift - p.reach;
        to.of.table[r] = row / p.q_len * (2 * p.reach + 1);
      }
    }
  }

  void pack_keys(const KeyBlock& to, long b, long h, Unit* temp) const {
    pack_left<P>(p.k, p.type, b, h, to.which, to.count, p.dim, to.k_rows);
    pack_left<P>(p.v, p.type, b, h, to.which, to.count, p.dim_v, to.v_rows);
    std::memset(to.k_rows + to.count * steps, 0, (std::size_t)((KEY_PANELS * PANEL - to.count) * steps) * 4);
    std::memset(to.v_rows + to.count * steps_v, 0, (std::size_t)((KEY_PANELS * PANEL - to.count) * steps_v) * 4);
    // Kᵀ, each row a channel: rows of up to 64 channels, then turned around sixteen by sixteen.
    for (long n = 0; n < KEY_PANELS; n++) {
      const long here = most(0, least(PANEL, to.count - n * PANEL));
      Unit* turned = temp + 2 * wide;
      const Rows which{to.which.list ? to.which.first : to.which.first + n * PANEL, to.which.list ? to.which.list + n * PANEL : nullptr};
      pack_rows<P>(p.k, p.type, b, h, which, here, PANEL, p.dim, turned, STEPS, 0, reinterpret_cast<float*>(temp));
      for (long c0 = 0; c0 < p.dim; c0 += 16) {
        const long panel = c0 / PANEL * PANEL, width = least(PANEL, wide - panel);
        const Unit* from[16];
        for (long s = 0; s < STEPS; s += 16) {
          for (long i = 0; i < 16; i++) from[i] = turned + panel * STEPS + (s + i) * width + (c0 - panel);
          transpose16(from, 0, least(16, p.dim - c0), to.k_columns + c0 * BLOCK_STEPS + n * STEPS + s, BLOCK_STEPS);
        }
      }
    }
  }

  // Adds to mine.dk, mine.dv and dq [channel][64]. `what` says what each panel of keys shows; for Shows::some, bit i of
  // mine.bits[64 · n + j] says whether row i sees key j of panel n.
  void apply(const Scratch& mine, const RowPanel& r, const KeyBlock& k, const Shows* what, float* dq) const {
    const long columns = r.columns(), sum_steps = columns / P::per_unit;  // of a sum over rows
    for (long n = 0; n < KEY_PANELS; n++) {
      if (what[n] == Shows::nothing) continue;
      float *s = mine.s + n * SQUARE, *dp = mine.dp + n * SQUARE;
      const long keys = least(PANEL, k.count - n * PANEL);
      product<P, Start::zero>(PANEL, k.k_rows + n * PANEL * steps, steps, r.q_columns, PANEL, steps, s, PANEL, columns);
      product<P, Start::zero>(PANEL, k.v_rows + n * PANEL * steps_v, steps_v, r.dout_columns, PANEL, steps_v, dp, PANEL, columns);
      const bool some = what[n] == Shows::some;
      if (shaped(p)) {
        some ? weights<true, true>(mine, r, k, n, keys) : weights<false, true>(mine, r, k, n, keys);
      } else {
        some ? weights<true, false>(mine, r, k, n, keys) : weights<false, false>(mine, r, k, n, keys);
      }
      const Unit *w = reinterpret_cast<Unit*>(s), *ds = reinterpret_cast<Unit*>(dp);
      for (long c0 = 0; c0 < wide_v; c0 += PANEL) {
        const long width = least(PANEL, wide_v - c0);
        product<P, Start::sum>(PANEL, w, PANEL, r.dout_rows + c0 * STEPS, width, sum_steps, mine.dv + n * PANEL * wide_v + c0, wide_v, width);
      }
      for (long c0 = 0; c0 < wide; c0 += PANEL) {
        const long width = least(PANEL, wide - c0);
        product<P, Start::sum>(PANEL, ds, PANEL, r.q_rows + c0 * STEPS, width, sum_steps, mine.dk + n * PANEL * wide + c0, wide, width);
      }
    }
    const Unit* ds = P::pairs ? mine.ds_pairs : reinterpret_cast<Unit*>(mine.dp);
    for (long n = 0; n < KEY_PANELS;) {  // neighbouring panels in one product
      if (what[n] == Shows::nothing) {
        n++;
        continue;
      }
      long end = n + 1;
      while (end < KEY_PANELS && what[end] != Shows::nothing) end++;
      product<P, Start::sum>(p.dim, k.k_columns + n * STEPS, BLOCK_STEPS, ds + n * STEPS * PANEL, PANEL, (end - n) * STEPS, dq, PANEL, columns);
      n = end;
    }
  }

  // Sᵀ becomes Pᵀ and dPᵀ becomes dSᵀ, in place, both as left operands; with Pairs dSᵀ also as a right operand.
  template <bool some, bool is_shaped>
  void weights(const Scratch& mine, const RowPanel& r, const KeyBlock& k, long n, long keys) const {
    float *s = mine.s + n * SQUARE, *dp = mine.dp + n * SQUARE;
    const Vec factor = set1(p.scale * LOG2_E);
    for (long i = 0; i < r.columns(); i += LANES) {
      const Vec minus = sub(zero(), load(r.of.lse + i)), less = load(r.of.delta + i);
      for (long j = 0; j < PANEL; j += 2) {
        Vec w[2], ds[2];
        for (int t = 0; t < 2; t++) {
          Vec x = load(s + (j + t) * PANEL + i), slope = set1(1.0f);
          [[maybe_unused]] std::int64_t columns[LANES];
          if constexpr (is_shaped) {
            x = shape(x, slope, r, i, k.which[n * PANEL + least(j + t, keys - 1)], columns);
            w[t] = exp2<P::pairs>(add(x, minus));
          } else {
            w[t] = exp2<P::pairs>(fma(x, factor, minus));
          }
          if constexpr (some) w[t] = select(mine.bits[n * PANEL + j + t] >> i, w[t], zero());
          ds[t] = mul(w[t], sub(load(dp + (j + t) * PANEL + i), less));
          if constexpr (some) ds[t] = select(mine.bits[n * PANEL + j + t] >> i, ds[t], zero());
          if constexpr (is_shaped) {
            if (mine.dbias && j + t < keys) add_to_bias(mine, columns, ds[t]);
            ds[t] = mul(ds[t], slope);
          }
        }
        put(mine, n, i, j, w, ds);
      }
    }
  }

  void put(const Scratch& mine, long n, long i, long j, const Vec* w, const Vec* ds) const {
    float *s = mine.s + n * SQUARE, *dp = mine.dp + n * SQUARE;
    if constexpr (P::pairs) {  // row j's bfloat16 values lie where its first floats were: those of lanes up to i are used up
#if defined(__AVX512BF16__)
      std::uint16_t *w0 = reinterpret_cast<std::uint16_t*>(s + j * PANEL) + i, *w1 = reinterpret_cast<std::uint16_t*>(s + (j + 1) * PANEL) + i;
      std::uint16_t *d0 = reinterpret_cast<std::uint16_t*>(dp + j * PANEL) + i, *d1 = reinterpret_cast<std::uint16_t*>(dp + (j + 1) * PANEL) + i;
      store_bf16(w0, w);
      store_bf16(w1, w + 1);
      store_both(d0, d1, mine.ds_pairs + (n * STEPS + j / 2) * PANEL + i, ds[0], ds[1]);
#endif
    } else {
      for (int t = 0; t < 2; t++) {
        store(s + (j + t) * PANEL + i, w[t]);
        store(dp + (j + t) * PANEL + i, ds[t]);
      }
    }
  }

  // Products of LANES rows and one key as logits in base 2, the slope of the softcap there, and where the bias came from.
  Vec shape(Vec x, Vec& slope, const RowPanel& r, long first, long key, std::int64_t* columns) const {
    if (p.softcap != 0.0f) {
      const Vec t = tanh(mul(x, set1(p.scale / p.softcap)));
      slope = sub(set1(1.0f), mul(t, t));
      x = mul(t, set1(p.softcap * LOG2_E));
    } else {
      x = mul(x, set1(p.scale * LOG2_E));
    }
    if (!p.bias) return x;
    float biases[LANES];
    for (long i = 0; i < LANES; i++) {
      columns[i] = r.of.table[first + i] + most(0, least(2 * p.reach, key - r.of.place[first + i]));
      biases[i] = p.bias[columns[i]] * LOG2_E;
    }
    return add(x, load(biases));
  }

  static void add_to_bias(const Scratch& mine, const std::int64_t* columns, Vec ds) {
    float x[LANES];
    store(x, ds);
    for (long i = 0; i < LANES; i++) mine.dbias[columns[i] - mine.bias_begin] += x[i];
  }

  void write_key(float* dk, const float* dv, long row) const {
    for (long c = 0; c < p.dim; c++) dk[c] *= p.scale;
    write_floats(p.type, dk, p.dim, static_cast<char*>(g.dk) + row * p.dim * size_of(p.type));
    write_floats(p.type, dv, p.dim_v, static_cast<char*>(g.dv) + row * p.dim_v * size_of(p.type));
  }
};

// The gradient of the bias from its parts [batch][key head][split][head of the group][column], in order.
inline void write_bias(const Problem& p, const Gradients& g, const double* parts, long splits) {
  const long columns = p.heads / p.kv_heads * (2 * p.reach + 1);
  for (long kv = 0; kv < p.kv_heads; kv++)
    for (long c = 0; c < columns; c++) {
      double sum = 0.0;
      for (long b = 0; b < p.batch; b++)
        for (long s = 0; s < splits; s++) sum += parts[((b * p.kv_heads + kv) * splits + s) * columns + c];
      g.dbias[kv * columns + c] = (float)sum;
    }
}

}  // namespace foveal::FOVEAL_VARIANT

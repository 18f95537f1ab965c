// The backward pass: dq, dk and dv from dout and dlse.
//
// Everything is computed transposed, keys by rows, so that no tile ever has to be turned around:
//   Sᵀ = K·Qᵀ   Pᵀ = 2^(Sᵀ − lse)   dPᵀ = V·dOᵀ   dSᵀ = Pᵀ ∘ (dPᵀ − delta),  delta = rowsum(dO ∘ O) − dlse
//   dV += Pᵀ·dO    dK += dSᵀ·Q    dQᵀ += Kᵀ·dSᵀ
// A task owns every `splits`-th block of keys of one key head: its dK and dV stay in the cache while all rows of all query
// heads of the group pass by. dQ is summed in a copy per split, and the copies are added in order: the result never depends
// on which thread did what.
#pragma once

#include "carve.hpp"
#include "logits.hpp"
#include "pack.hpp"
#include "pool.hpp"
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
struct Backward {
  static constexpr long STEPS = PANEL / P::per_unit;  // steps of a product that is summed over a panel
  static constexpr long BLOCK_STEPS = KEY_PANELS * STEPS;

  const Problem& p;
  const Gradients& g;
  const long splits;
  const long group = p.heads / p.kv_heads;
  const long row_panels = ceil_div(p.q_len, PANEL), key_blocks = ceil_div(p.kv_len, KEY_PANELS * PANEL);
  const long steps = steps_of<P>(p.dim), steps_v = steps_of<P>(p.dim_v), wide = padded(p.dim), wide_v = padded(p.dim_v);
  // Sizes of one packed panel of rows, and of one block of keys.
  const long row_units = (steps + steps_v) * PANEL + STEPS * (wide + wide_v), key_units = KEY_PANELS * PANEL * (steps + steps_v) + p.dim * BLOCK_STEPS;

  Unit *rows = nullptr, *keys = nullptr;
  float *lse = nullptr, *delta = nullptr, *dq = nullptr;  // per row in base 2; per row; [splits][head][panel][dim][64]
  std::uint64_t* valid_bits = nullptr;
  Chunk* pieces = nullptr;  // rows cut at panels and at tiles, per batch of bounds
  long* piece_of = nullptr;  // first piece of each panel of rows, one more at the end
  char* scratch = nullptr;
  long scratch_bytes = 0, piece_count = 0;

  struct RowPanel {  // right operands
    Unit *q_columns, *dout_columns, *q_rows, *dout_rows;
  };
  struct KeyBlock {  // left operands
    Unit *k_rows, *v_rows, *k_columns;
  };

  RowPanel row_panel(long head, long panel) const {
    Unit* at = rows + (head * row_panels + panel) * row_units;
    return {at, at + steps * PANEL, at + (steps + steps_v) * PANEL, at + (steps + steps_v) * PANEL + STEPS * wide};
  }
  KeyBlock key_block(long kv, long block) const {
    Unit* at = keys + (kv * key_blocks + block) * key_units;
    return {at, at + KEY_PANELS * PANEL * steps, at + KEY_PANELS * PANEL * (steps + steps_v)};
  }
  float* dq_panel(long split, long head, long panel) const {
    return dq + ((split * p.batch * p.heads + head) * row_panels + panel) * p.dim * PANEL;
  }

  struct Scratch {
    float *s, *dp, *dk, *dv;
    Unit *ds_pairs, *temp;
    std::uint64_t* bits;
    Scratch(const Backward& b, Carve& memory) {
      s = memory.take<float>(KEY_PANELS * PANEL * PANEL);
      dp = memory.take<float>(KEY_PANELS * PANEL * PANEL);
      dk = memory.take<float>(KEY_PANELS * PANEL * b.wide);
      dv = memory.take<float>(KEY_PANELS * PANEL * b.wide_v);
      ds_pairs = P::pairs ? memory.take<Unit>(BLOCK_STEPS * PANEL) : nullptr;
      temp = memory.take<Unit>(most(65 * most(b.steps, b.steps_v), PANEL * most(b.wide, b.wide_v)) + 2 * most(b.wide, b.wide_v));
      bits = memory.take<std::uint64_t>(KEY_PANELS * PANEL);
    }
  };

  Scratch scratch_of(int worker) const {
    Carve memory{scratch + worker * scratch_bytes};
    return Scratch(*this, memory);
  }

  // What a thread has to itself, then the shared part.
  long lay_out(char* at, int threads) {
    Carve own{nullptr};
    Scratch(*this, own);
    scratch_bytes = own.at - (char*)nullptr;
    Carve memory{at};
    scratch = memory.take<char>(threads * scratch_bytes);
    const long heads = p.batch * p.heads, most_pieces = row_panels + (p.visible.kinds ? p.visible.q_tiles : 1);
    rows = memory.take<Unit>(heads * row_panels * row_units);
    keys = memory.take<Unit>(p.batch * p.kv_heads * key_blocks * key_units);
    lse = memory.take<float>(heads * row_panels * PANEL);
    delta = memory.take<float>(heads * row_panels * PANEL);
    dq = memory.take<float>(splits * heads * row_panels * p.dim * PANEL);
    pieces = memory.take<Chunk>(p.visible.bounds_batch * most_pieces);
    piece_of = memory.take<long>(row_panels + 1);
    valid_bits = take_valid(p, memory);
    return memory.at - at;
  }

  // Pieces end at panels and at tiles; every batch of bounds has the same ones.
  void cut_rows() {
    const long tile = p.visible.kinds ? p.visible.q_tile : p.q_len;
    const auto end_of = [&](long first) { return least(p.q_len, least((first / PANEL + 1) * PANEL, (first / tile + 1) * tile)); };
    piece_count = 0;
    for (long first = 0; first < p.q_len; first = end_of(first), piece_count++)
      if (first % PANEL == 0) piece_of[first / PANEL] = piece_count;
    piece_of[row_panels] = piece_count;
    for (long b = 0; b < p.visible.bounds_batch; b++) {
      Chunk* piece = pieces + b * piece_count;
      for (long first = 0; first < p.q_len; first = end_of(first)) *piece++ = make_rows(p, valid_bits, b, first, end_of(first) - first);
    }
  }

  // Task of the first round: one panel of rows.
  void pack_queries(long index, int worker) const {
    const long panel = index % row_panels, head = index / row_panels, b = head / p.heads, h = head % p.heads;
    const long first = panel * PANEL, count = least(PANEL, p.q_len - first);
    Scratch mine = scratch_of(worker);
    float* temp = reinterpret_cast<float*>(mine.temp);
    RowPanel to = row_panel(head, panel);
    pack_columns<P>(p.q, p.type, b, h, Rows{first}, count, p.dim, to.q_columns, mine.temp);
    pack_columns<P>(g.dout, p.type, b, h, Rows{first}, count, p.dim_v, to.dout_columns, mine.temp);
    pack_rows<P>(p.q, p.type, b, h, Rows{first}, count, PANEL, p.dim, to.q_rows, STEPS, 0, temp);
    pack_rows<P>(g.dout, p.type, b, h, Rows{first}, count, PANEL, p.dim_v, to.dout_rows, STEPS, 0, temp);
    const Strided out{p.out, {p.heads * p.q_len * p.dim_v, p.q_len * p.dim_v, p.dim_v, 1}};
    for (long r = 0; r < PANEL; r++) {
      float term = 0.0f, row_lse = INF;  // a row that sees nothing, or lies past the end, has weights 0
      if (r < count) {
        float* other = temp + wide_v;
        read_floats(p.type, row_at(out, p.type, b, h, first + r), 1, p.dim_v, temp);
        read_floats(p.type, row_at(g.dout, p.type, b, h, first + r), g.dout.step[3], p.dim_v, other);
        for (long c = 0; c < p.dim_v; c++) term += temp[c] * other[c];
        const long row = head * p.q_len + first + r;
        if (g.dlse) term -= g.dlse[row];
        if (p.lse[row] != -INF) row_lse = p.lse[row] * LOG2_E;
      }
      lse[head * row_panels * PANEL + first + r] = row_lse;
      delta[head * row_panels * PANEL + first + r] = term;
    }
  }

  // Task of the first round: one block of keys.
  void pack_keys(long index, int worker) const {
    const long block = index % key_blocks, kv = index / key_blocks, b = kv / p.kv_heads, h = kv % p.kv_heads;
    const long first = block * KEY_PANELS * PANEL, count = least(KEY_PANELS * PANEL, p.kv_len - first);
    Scratch mine = scratch_of(worker);
    KeyBlock to = key_block(kv, block);
    pack_left<P>(p.k, p.type, b, h, first, count, p.dim, to.k_rows);
    pack_left<P>(p.v, p.type, b, h, first, count, p.dim_v, to.v_rows);
    std::memset(to.k_rows + count * steps, 0, (std::size_t)((KEY_PANELS * PANEL - count) * steps) * 4);
    std::memset(to.v_rows + count * steps_v, 0, (std::size_t)((KEY_PANELS * PANEL - count) * steps_v) * 4);
    // Kᵀ, each row a channel: rows of up to 64 channels, then turned around sixteen by sixteen.
    for (long n = 0; n < KEY_PANELS; n++) {
      const long here = most(0, least(PANEL, count - n * PANEL));
      Unit* turned = mine.temp + 2 * wide;
      pack_rows<P>(p.k, p.type, b, h, Rows{first + n * PANEL}, here, PANEL, p.dim, turned, STEPS, 0, reinterpret_cast<float*>(mine.temp));
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

  // Task of the second round: dk and dv of every splits-th block of keys of one key head, and its part of dq.
  void differentiate(long index, int worker) const {
    const long split = index / (p.batch * p.kv_heads), kv = index % (p.batch * p.kv_heads), b = kv / p.kv_heads, h_kv = kv % p.kv_heads;
    Scratch mine = scratch_of(worker);
    const long first_head = b * p.heads + h_kv * group;
    std::memset(dq_panel(split, first_head, 0), 0, (std::size_t)(group * row_panels * p.dim * PANEL) * 4);
    for (long block = split; block < key_blocks; block += splits) {
      std::memset(mine.dk, 0, (std::size_t)(KEY_PANELS * PANEL * wide) * 4);
      std::memset(mine.dv, 0, (std::size_t)(KEY_PANELS * PANEL * wide_v) * 4);
      for (long head = first_head; head < first_head + group; head++)
        for (long panel = 0; panel < row_panels; panel++) step(mine, kv, block, head, panel, split);
      write_keys(mine, b, h_kv, block);
    }
  }

  // What the rows of a panel see of a panel of keys; for Shows::some, bit i of bits[j] says whether row i sees key j.
  Shows look(long head, long panel, long key_panel, std::uint64_t* bits) const {
    const long b = head / p.heads, h = head % p.heads;
    const Chunk* from = pieces + (p.visible.bounds_batch > 1 ? b : 0) * piece_count;
    bool all = (panel + 1) * PANEL <= p.q_len, any = false;
    for (long n = piece_of[panel]; n < piece_of[panel + 1]; n++) {
      Chunk c = from[n];
      place(c, b, h);
      const Shows what = shows(c, key_panel);
      all = all && what == Shows::all;
      if (what == Shows::nothing) {
        for (long r = 0; r < c.rows; r++) bits[c.first - panel * PANEL + r] = 0;
        continue;
      }
      if (what == Shows::all && all && piece_of[panel] + 1 == piece_of[panel + 1]) return Shows::all;
      for (long r = 0; r < c.rows; r++) {
        const std::uint64_t seen = what == Shows::all ? ~std::uint64_t(0) : row_bits(c, r, key_panel);
        bits[c.first - panel * PANEL + r] = seen;
        any = any || seen;
      }
    }
    if (all) return Shows::all;
    if (!any) return Shows::nothing;
    for (long r = p.q_len - panel * PANEL; r < PANEL; r++) bits[r] = 0;
    transpose64(bits);
    return Shows::some;
  }

  void step(Scratch& mine, long kv, long block, long head, long panel, long split) const {
    Shows what[KEY_PANELS];
    bool any = false;
    for (long n = 0; n < KEY_PANELS; n++) {
      const long key_panel = block * KEY_PANELS + n;
      what[n] = key_panel * PANEL < p.kv_len ? look(head, panel, key_panel, mine.bits + n * PANEL) : Shows::nothing;
      any = any || what[n] != Shows::nothing;
    }
    if (!any) return;
    const RowPanel r = row_panel(head, panel);
    const KeyBlock k = key_block(kv, block);
    constexpr long SQUARE = PANEL * PANEL;
    for (long n = 0; n < KEY_PANELS; n++) {
      if (what[n] == Shows::nothing) continue;
      float *s = mine.s + n * SQUARE, *dp = mine.dp + n * SQUARE;
      product<P, Start::zero>(PANEL, k.k_rows + n * PANEL * steps, steps, r.q_columns, PANEL, steps, s, PANEL, PANEL);
      product<P, Start::zero>(PANEL, k.v_rows + n * PANEL * steps_v, steps_v, r.dout_columns, PANEL, steps_v, dp, PANEL, PANEL);
      const long rows_at = (head * row_panels + panel) * PANEL;
      const bool some = what[n] == Shows::some;
      const long key = (block * KEY_PANELS + n) * PANEL;
      if (shaped(p)) {
        some ? weights<true, true>(mine, n, head % p.heads, panel * PANEL, key, rows_at) : weights<false, true>(mine, n, head % p.heads, panel * PANEL, key, rows_at);
      } else {
        some ? weights<true, false>(mine, n, 0, 0, 0, rows_at) : weights<false, false>(mine, n, 0, 0, 0, rows_at);
      }
      const Unit *w = reinterpret_cast<Unit*>(s), *ds = reinterpret_cast<Unit*>(dp);
      for (long c0 = 0; c0 < wide_v; c0 += PANEL) {
        const long width = least(PANEL, wide_v - c0);
        product<P, Start::sum>(PANEL, w, PANEL, r.dout_rows + c0 * STEPS, width, STEPS, mine.dv + n * PANEL * wide_v + c0, wide_v, width);
      }
      for (long c0 = 0; c0 < wide; c0 += PANEL) {
        const long width = least(PANEL, wide - c0);
        product<P, Start::sum>(PANEL, ds, PANEL, r.q_rows + c0 * STEPS, width, STEPS, mine.dk + n * PANEL * wide + c0, wide, width);
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
      product<P, Start::sum>(p.dim, k.k_columns + n * STEPS, BLOCK_STEPS, ds + n * STEPS * PANEL, PANEL, (end - n) * STEPS,
                             dq_panel(split, head, panel), PANEL, PANEL);
      n = end;
    }
  }

  // Sᵀ becomes Pᵀ and dPᵀ becomes dSᵀ, in place, both as left operands; with Pairs dSᵀ also as a right operand.
  template <bool some, bool is_shaped>
  void weights(Scratch& mine, long n, long h, long first_row, long first_key, long rows_at) const {
    float *s = mine.s + n * PANEL * PANEL, *dp = mine.dp + n * PANEL * PANEL;
    const Vec factor = set1(p.scale * LOG2_E);
    for (long i = 0; i < PANEL; i += LANES) {
      const Vec minus = sub(zero(), load(lse + rows_at + i)), less = load(delta + rows_at + i);
      for (long j = 0; j < PANEL; j += 2) {
        Vec w[2], ds[2];
        for (int t = 0; t < 2; t++) {
          Vec x = load(s + (j + t) * PANEL + i), slope = set1(1.0f);
          if constexpr (is_shaped) {
            x = shape(x, slope, h, first_row + i, first_key + j + t);
            w[t] = exp2<P::pairs>(add(x, minus));
          } else {
            w[t] = exp2<P::pairs>(fma(x, factor, minus));
          }
          if constexpr (some) w[t] = select(mine.bits[n * PANEL + j + t] >> i, w[t], zero());
          ds[t] = mul(w[t], sub(load(dp + (j + t) * PANEL + i), less));
          if constexpr (is_shaped) ds[t] = mul(ds[t], slope);
          if constexpr (some) ds[t] = select(mine.bits[n * PANEL + j + t] >> i, ds[t], zero());
        }
        put(mine, n, i, j, w, ds);
      }
    }
  }

  void put(Scratch& mine, long n, long i, long j, const Vec* w, const Vec* ds) const {
    float *s = mine.s + n * PANEL * PANEL, *dp = mine.dp + n * PANEL * PANEL;
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

  // Products of LANES rows and one key as logits in base 2, and the slope of the softcap there.
  Vec shape(Vec x, Vec& slope, long h, long row, long key) const {
    if (p.softcap != 0.0f) {
      const Vec t = tanh(mul(x, set1(p.scale / p.softcap)));
      slope = sub(set1(1.0f), mul(t, t));
      x = mul(t, set1(p.softcap * LOG2_E));
    } else {
      x = mul(x, set1(p.scale * LOG2_E));
    }
    if (!p.bias) return x;
    float biases[LANES];
    const float* table = p.bias + h * (2 * p.reach + 1);
    for (long i = 0; i < LANES; i++) biases[i] = table[most(0, least(2 * p.reach, key - (row + i + p.shift) + p.reach))] * LOG2_E;
    return add(x, load(biases));
  }

  void write_keys(Scratch& mine, long b, long h, long block) const {
    const long first = block * KEY_PANELS * PANEL, count = least(KEY_PANELS * PANEL, p.kv_len - first);
    for (long j = 0; j < count; j++) {
      const long row = (b * p.kv_heads + h) * p.kv_len + first + j;
      float* dk = mine.dk + j * wide;
      for (long c = 0; c < wide; c += LANES) store(dk + c, mul(load(dk + c), set1(p.scale)));
      write_floats(p.type, dk, p.dim, static_cast<char*>(g.dk) + row * p.dim * size_of(p.type));
      write_floats(p.type, mine.dv + j * wide_v, p.dim_v, static_cast<char*>(g.dv) + row * p.dim_v * size_of(p.type));
    }
  }

  // Task of the last round: dq of one panel of rows, from its splits in order.
  void write_rows(long index, int worker) const {
    const long head = index / row_panels, panel = index % row_panels;
    Scratch mine = scratch_of(worker);
    float* sum = dq_panel(0, head, panel);
    for (long split = 1; split < splits; split++) {
      const float* more = dq_panel(split, head, panel);
      for (long i = 0; i < p.dim * PANEL; i += LANES) store(sum + i, add(load(sum + i), load(more + i)));
    }
    const long first = panel * PANEL, count = least(PANEL, p.q_len - first);
    float* row = reinterpret_cast<float*>(mine.temp);
    for (long r = 0; r < count; r++) {
      for (long c = 0; c < p.dim; c++) row[c] = sum[c * PANEL + r] * p.scale;
      write_floats(p.type, row, p.dim, static_cast<char*>(g.dq) + (head * p.q_len + first + r) * p.dim * size_of(p.type));
    }
  }
};

template <class P>
void backward_as(const Problem& p, const Gradients& g, Pool& pool, int threads) {
  using B = Backward<P>;
  // Enough tasks for all threads to end together; the number depends on `threads` only, never on how the work went.
  const long kv = p.batch * p.kv_heads, blocks = ceil_div(p.kv_len, KEY_PANELS * PANEL);
  long splits = 1;
  while (splits < blocks && splits < 2 * threads && kv * splits % threads && kv * splits < 8 * threads) splits++;
  B b{p, g, splits};
  b.lay_out(static_cast<char*>(pool.memory((std::size_t)b.lay_out(nullptr, threads))), threads);
  mark_valid(p, b.valid_bits);
  b.cut_rows();
  pool.run(threads, p.batch * p.heads * b.row_panels, [](void* x, long i, int worker) { static_cast<B*>(x)->pack_queries(i, worker); }, &b);
  pool.run(threads, kv * b.key_blocks, [](void* x, long i, int worker) { static_cast<B*>(x)->pack_keys(i, worker); }, &b);
  pool.run(threads, kv * splits, [](void* x, long i, int worker) { static_cast<B*>(x)->differentiate(i, worker); }, &b);
  pool.run(threads, p.batch * p.heads * b.row_panels, [](void* x, long i, int worker) { static_cast<B*>(x)->write_rows(i, worker); }, &b);
}

inline void backward(const Problem& p, const Gradients& g, Pool& pool, int threads) {
#if defined(__AVX512BF16__)
  if (p.type == Type::bf16) return backward_as<Pairs>(p, g, pool, threads);
#endif
  backward_as<Floats>(p, g, pool, threads);
}

}  // namespace foveal::FOVEAL_VARIANT

// The forward pass: out and lse of chunks of query rows, over the panels of keys that they see.
//
// Keys and values are packed once per key head. A chunk then walks its panels, a few at a time:
//   S = Q·Kᵀ        register tiles; nothing is masked where a panel shows everything
//   P = 2^(S − m)   online softmax with the running maximum m and sum l of each row
//   O = O·f + P·V   f makes up for a new maximum
#pragma once

#include <cmath>

#include "carve.hpp"
#include "logits.hpp"
#include "pack.hpp"
#include "pool.hpp"
#include "product.hpp"
#include "visible.hpp"

namespace foveal::FOVEAL_VARIANT {

constexpr long CHUNK_ROWS = 96;
constexpr long BLOCK_PANELS = 2;  // panels between two updates of the softmax

template <class P>
struct Forward {
  const Problem& p;
  const Chunking cut;
  const long panels, steps, wide;  // panels of keys, units per row of q and k, padded channels of v
  Unit *keys = nullptr, *values = nullptr;
  std::uint64_t* valid_bits = nullptr;
  char* scratch = nullptr;
  long scratch_bytes = 0;

  Forward(const Problem& problem, const Chunking& chunking)
      : p(problem), cut(chunking), panels(ceil_div(p.kv_len, PANEL)), steps(steps_of<P>(p.dim)), wide(padded(p.dim_v)) {}

  long value_steps() const { return panels * PANEL / P::per_unit; }
  Unit* keys_of(long b, long h) const { return keys + (b * p.kv_heads + h) * panels * steps * PANEL; }
  Unit* values_of(long b, long h) const { return values + (b * p.kv_heads + h) * value_steps() * wide; }

  // The shared part, then what each thread has to itself.
  long lay_out(char* at, int threads) {
    Carve memory{at};
    const long kv = p.batch * p.kv_heads;
    keys = memory.take<Unit>(kv * panels * steps * PANEL);
    values = memory.take<Unit>(kv * value_steps() * wide);
    valid_bits = take_valid(p, memory);
    scratch = memory.at;
    Carve own{nullptr};
    Scratch(*this, own);
    scratch_bytes = own.at - (char*)nullptr;
    return memory.at - at + threads * scratch_bytes;
  }

  struct Scratch {
    Unit *queries, *temp;
    float *s, *o, *most_seen, *sum, *factor, *floor;
    std::uint64_t* bits;  // [rows][BLOCK_PANELS]
    Scratch(const Forward& f, Carve& memory) {
      queries = memory.take<Unit>(f.cut.rows * f.steps);
      temp = memory.take<Unit>(65 * f.steps + 2 * f.wide);
      s = memory.take<float>(f.cut.rows * BLOCK_PANELS * PANEL);
      o = memory.take<float>(f.cut.rows * f.wide);
      most_seen = memory.take<float>(f.cut.rows + 16);
      sum = memory.take<float>(f.cut.rows + 16);
      factor = memory.take<float>(f.cut.rows + 16);
      floor = memory.take<float>(f.cut.rows + 16);
      bits = memory.take<std::uint64_t>(f.cut.rows * BLOCK_PANELS);
    }
  };

  Scratch scratch_of(int worker) const {
    Carve memory{scratch + worker * scratch_bytes};
    return Scratch(*this, memory);
  }

  // Task of the first round: pack one panel of one key head.
  void pack(long index, int worker) const {
    const long panel = index % panels, kv = index / panels, b = kv / p.kv_heads, h = kv % p.kv_heads;
    const long first = panel * PANEL, count = least(PANEL, p.kv_len - first);
    Scratch mine = scratch_of(worker);
    pack_columns<P>(p.k, p.type, b, h, first, count, p.dim, keys_of(b, h) + panel * steps * PANEL, mine.temp);
    // All panels of a head continue each other: row `first` is step `first / per_unit` of every panel of channels.
    for (long c0 = 0; c0 < wide; c0 += PANEL) {
      const long width = least(PANEL, wide - c0), dim = least(PANEL, p.dim_v - c0);
      Strided part = p.v;
      part.data = static_cast<const char*>(p.v.data) + c0 * p.v.step[3] * size_of(p.type);
      pack_rows<P>(part, p.type, b, h, first, count, PANEL, dim, values_of(b, h) + c0 * value_steps() + first / P::per_unit * width, 0,
                   reinterpret_cast<float*>(mine.temp));
    }
  }

  // Task of the second round: one chunk of query rows, last rows first because causal ones see most.
  void attend(long index, int worker) const {
    const long heads = p.batch * p.heads, b = index % heads / p.heads, h = index % p.heads;
    const Chunk chunk = make_chunk(p, valid_bits, cut, b, h, cut.count - 1 - index / heads);
    if (chunk.rows <= 0) return;
    Scratch mine = scratch_of(worker);
    pack_left<P>(p.q, p.type, b, h, chunk.first, chunk.rows, p.dim, mine.queries);
    if (!shaped(p) && p.scale == 0.0f) std::memset(mine.queries, 0, (std::size_t)(chunk.rows * steps) * 4);
    if (!shaped(p) && p.scale < 0.0f)
      for (long i = 0; i < chunk.rows * steps; i++) mine.queries[i] ^= P::pairs ? 0x80008000u : 0x80000000u;
    for (long r = 0; r < chunk.rows; r++) mine.most_seen[r] = -INF, mine.sum[r] = 0.0f;
    std::memset(mine.o, 0, (std::size_t)(chunk.rows * wide) * 4);

    const Unit *k = keys_of(b, h / (p.heads / p.kv_heads)), *v = values_of(b, h / (p.heads / p.kv_heads));
    long block[BLOCK_PANELS], count = 0;
    bool cut_block = false;
    const long last = ceil_div(chunk.hi_most, PANEL);
    for (long panel = chunk.lo_least / PANEL; panel < last; panel++) {
      const Shows what = shows(chunk, panel);
      bool wanted = what == Shows::all;
      if (what == Shows::some) {
        for (long r = 0; r < chunk.rows; r++) {
          const std::uint64_t bits = row_bits(chunk, r, panel);
          mine.bits[r * BLOCK_PANELS + count] = bits;
          wanted = wanted || bits;
        }
        cut_block = cut_block || wanted;
      } else if (wanted) {
        for (long r = 0; r < chunk.rows; r++) mine.bits[r * BLOCK_PANELS + count] = ~std::uint64_t(0);
      }
      if (wanted) block[count++] = panel;
      if (count == BLOCK_PANELS || (count && panel == last - 1)) {
        cut_block ? step<true>(chunk, mine, k, v, block, count) : step<false>(chunk, mine, k, v, block, count);
        count = 0;
        cut_block = false;
      }
    }
    if (count) cut_block ? step<true>(chunk, mine, k, v, block, count) : step<false>(chunk, mine, k, v, block, count);
    finish(chunk, mine);
  }

  // One block of `count` panels for all rows of the chunk; with `cut_block`, mine.bits says what each row sees.
  template <bool cut_block>
  void step(const Chunk& c, Scratch& mine, const Unit* k, const Unit* v, const long* block, long count) const {
    constexpr long ld = BLOCK_PANELS * PANEL;
    std::uint64_t seen[BLOCK_PANELS];  // by any row of a register tile
    for (long n = 0; n < count; n++) {
      const Unit* panel = k + block[n] * steps * PANEL;
      if (!cut_block) {
        product<P, Start::zero>(c.rows, mine.queries, steps, panel, PANEL, steps, mine.s + n * PANEL, ld, PANEL);
        continue;
      }
      for (long r = 0; r < c.rows; r += TILE_ROWS) {
        const long rows = least(TILE_ROWS, c.rows - r);
        std::uint64_t any = 0;
        for (long i = r; i < r + rows; i++) any |= mine.bits[i * BLOCK_PANELS + n];
        if (any) product<P, Start::zero>(rows, mine.queries + r * steps, steps, panel, PANEL, steps, mine.s + r * ld + n * PANEL, ld, PANEL);
      }
    }
    for (long r = 0; r < c.rows; r += TILE_ROWS) {
      const long rows = least(TILE_ROWS, c.rows - r);
      for (long n = 0; n < count; n++) {
        seen[n] = ~std::uint64_t(0);
        if (cut_block) {
          seen[n] = 0;
          for (long i = r; i < r + rows; i++) seen[n] |= mine.bits[i * BLOCK_PANELS + n];
        }
        if (cut_block || shaped(p))
          for (long i = r; i < r + rows; i++)
            logits<cut_block>(c, i, block[n], mine.s + i * ld + n * PANEL, mine.bits[i * BLOCK_PANELS + n], seen[n]);
      }
      softmax(mine, r, rows, count * PANEL);
      weigh<cut_block>(mine, r, rows, v, block, count, seen);
    }
  }

  template <bool cut_block>
  void logits(const Chunk& c, long r, long panel, float* s, std::uint64_t bits, std::uint64_t computed) const {
    if (shaped(p) && computed) shape_logits(p, c.h, c.first + r, panel * PANEL, s);
    if (cut_block && bits != ~std::uint64_t(0))
      for (long j = 0; j < PANEL; j += LANES) store(s + j, select(bits >> j, load(s + j), set1(-INF)));
  }

  // Logits of `width` keys become weights, in place; with Pairs the weights are bfloat16 and take half the room.
  void softmax(Scratch& mine, long first, long rows, long width) const {
    constexpr long ld = BLOCK_PANELS * PANEL;
    const float factor = shaped(p) ? 1.0f : p.scale == 0.0f ? 1.0f : (p.scale < 0 ? -p.scale : p.scale) * LOG2_E;
    for (long r = first; r < first + rows; r++) {
      const float* s = mine.s + r * ld;
      Vec top = load(s);
      for (long j = LANES; j < width; j += LANES) top = max(top, load(s + j));
      const float here = hmax(top) * factor, before = mine.most_seen[r];
      const float now = here > before ? here : before;
      mine.most_seen[r] = now;
      mine.floor[r] = now == -INF ? 0.0f : now;
      mine.factor[r] = before - mine.floor[r];
    }
    for (long r = first; r < first + rows; r += LANES) store(mine.factor + r, exp2(load(mine.factor + r)));
    const Vec times = set1(factor);
    for (long r = first; r < first + rows; r++) {
      float* s = mine.s + r * ld;
      const Vec minus = set1(-mine.floor[r]);
      Vec total = zero();
      for (long j = 0; j < width; j += 16) {
        Vec w[16 / LANES];
        for (int i = 0; i < 16 / LANES; i++) {
          w[i] = exp2<P::pairs>(fma(load(s + j + i * LANES), times, minus));
          total = add(total, w[i]);
        }
        if constexpr (P::pairs) {
          store_bf16(reinterpret_cast<std::uint16_t*>(s) + j, w);
        } else {
          for (int i = 0; i < 16 / LANES; i++) store(s + j + i * LANES, w[i]);
        }
      }
      mine.sum[r] = mine.sum[r] * mine.factor[r] + hsum(total);
    }
  }

  // o = o · factor + weights · values; neighbouring panels run as one product.
  template <bool cut_block>
  void weigh(Scratch& mine, long r, long rows, const Unit* v, const long* block, long count, const std::uint64_t* seen) const {
    constexpr long ld = BLOCK_PANELS * PANEL;
    const Unit* w = reinterpret_cast<const Unit*>(mine.s + r * ld);
    bool started = false;
    for (long n = 0; n < count;) {
      if (cut_block && !seen[n]) {
        n++;
        continue;
      }
      long end = n + 1;
      while (end < count && block[end] == block[end - 1] + 1 && (!cut_block || seen[end])) end++;
      const long first = n * PANEL / P::per_unit, length = (end - n) * PANEL / P::per_unit;
      for (long c0 = 0; c0 < wide; c0 += PANEL) {
        const long width = least(PANEL, wide - c0);
        const Unit* values = v + c0 * value_steps() + block[n] * PANEL / P::per_unit * width;
        float* o = mine.o + r * wide + c0;
        if (started) {
          product<P, Start::sum>(rows, w + first, ld, values, width, length, o, wide, width);
        } else {
          product<P, Start::scaled>(rows, w + first, ld, values, width, length, o, wide, width, mine.factor + r);
        }
      }
      started = true;
      n = end;
    }
  }

  void finish(const Chunk& c, Scratch& mine) const {
    const long row = (c.b * p.heads + c.h) * p.q_len + c.first;
    for (long r = 0; r < c.rows; r++) {
      const float sum = mine.sum[r];
      float* o = mine.o + r * wide;
      const Vec share = set1(sum == 0.0f ? 0.0f : 1.0f / sum);
      for (long j = 0; j < wide; j += LANES) store(o + j, mul(load(o + j), share));
      write_floats(p.type, o, p.dim_v, static_cast<char*>(p.out) + (row + r) * p.dim_v * size_of(p.type));
      p.lse[row + r] = sum == 0.0f ? -INF : (mine.most_seen[r] + std::log2(sum)) * LN_2;
    }
  }
};

template <class P>
void forward_as(const Problem& p, Pool& pool, int threads) {
  Forward<P> f(p, Chunking(p, CHUNK_ROWS));
  f.lay_out(nullptr, threads);
  f.lay_out(static_cast<char*>(pool.memory((std::size_t)f.lay_out(nullptr, threads))), threads);
  mark_valid(p, f.valid_bits);
  pool.run(threads, p.batch * p.kv_heads * f.panels,
           [](void* x, long i, int worker) { static_cast<Forward<P>*>(x)->pack(i, worker); }, &f);
  pool.run(threads, p.batch * p.heads * f.cut.count,
           [](void* x, long i, int worker) { static_cast<Forward<P>*>(x)->attend(i, worker); }, &f);
}

inline void forward(const Problem& p, Pool& pool, int threads) {
#if defined(__AVX512BF16__)
  if (p.type == Type::bf16) return forward_as<Pairs>(p, pool, threads);
#endif
  forward_as<Floats>(p, pool, threads);
}

}  // namespace foveal::FOVEAL_VARIANT

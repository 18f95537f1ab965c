// The online softmax over a chunk of rows: what one thread holds while panels of packed keys pass by.
//   S = Q·Kᵀ        register tiles; nothing is masked where a panel shows everything
//   P = 2^(S − m)   with the running maximum m and sum l of each row
//   O = O·f + P·V   f makes up for a new maximum
#pragma once

#include <bit>
#include <climits>
#include <cmath>

#include "carve.hpp"
#include "logits.hpp"
#include "pack.hpp"
#include "product.hpp"
#include "visible.hpp"

namespace foveal::FOVEAL_VARIANT {

template <class P>
constexpr long BLOCK_PANELS = P::tiles ? 4 : 2;  // panels between two updates of the softmax

// Packed keys and values of one key head.
struct Keys {
  const Unit *k, *v;
  long value_steps;                    // of one panel of channels
  const std::int64_t* list = nullptr;  // the keys' positions where they are a list, and how many
  long listed = 0;
  long value_rows = LONG_MAX;  // nothing lies behind these; what is packed has whole panels
};

// Keys of a panel between the first and the last that some row sees, in whole tiles of the multiplying unit.
struct Span {
  long first = 0, last = PANEL;
};

template <class P>
inline Span span_of(std::uint64_t seen) {
  constexpr long unit = P::tiles ? 32 : 16;
  if (!seen) return {0, 0};
  return {std::countr_zero(seen) / unit * unit, PANEL - std::countl_zero(seen) / unit * unit};
}

template <class P>
struct Softmax {
  const Problem& p;
  const long steps, wide;  // units per row of q and k, padded channels of v
  Unit* queries;
  float *s, *o, *most_seen, *sum, *factor, *floor;
  float* spread;        // Σ 2^(s − m) · (s − m) of each row, where the entropy is asked for
  std::uint64_t* bits;  // [rows][BLOCK_PANELS<P>]

  Softmax(const Problem& problem, long rows, Carve& memory)
      : p(problem), steps(steps_of<P>(p.dim)), wide(padded(p.dim_v)) {
    queries = memory.take<Unit>(rows * steps);
    s = memory.take<float>(rows * BLOCK_PANELS<P> * PANEL);
    o = memory.take<float>(rows * wide);
    most_seen = memory.take<float>(rows + 16);
    sum = memory.take<float>(rows + 16);
    factor = memory.take<float>(rows + 16);
    floor = memory.take<float>(rows + 16);
    spread = memory.take<float>(p.entropy ? rows : 0);
    bits = memory.take<std::uint64_t>(rows * BLOCK_PANELS<P>);
  }

  // One block of `count` panels for all rows of the chunk; with `cut_block`, `bits` says what each row sees.
  template <bool cut_block>
  void step(const Chunk& c, const Keys& from, const long* block, long count) const {
    constexpr long ld = BLOCK_PANELS<P> * PANEL;
    std::uint64_t seen[BLOCK_PANELS<P>];  // by any of the rows at once
    Span span[BLOCK_PANELS<P>];
    if (!cut_block && !P::tiles)  // a panel stays in the first-level cache for all rows
      for (long n = 0; n < count; n++) multiply(from, block[n], n, 0, c.rows, Span{});
    for (long r = 0; r < c.rows; r += P::rows_at_once) {
      const long rows = least(P::rows_at_once, c.rows - r);
      for (long n = 0; n < count; n++) {
        seen[n] = ~std::uint64_t(0);
        if (cut_block) {
          seen[n] = 0;
          for (long i = r; i < r + rows; i++) seen[n] |= bits[i * BLOCK_PANELS<P> + n];
          span[n] = span_of<P>(seen[n]);
        }
        if (cut_block ? seen[n] != 0 : P::tiles) multiply(from, block[n], n, r, rows, span[n]);
        if (cut_block || shaped(p))
          for (long i = r; i < r + rows; i++)
            logits<cut_block>(c, from, i, block[n], s + i * ld + n * PANEL, bits[i * BLOCK_PANELS<P> + n], seen[n]);
      }
      const long last = cut_block ? span[count - 1].last : PANEL;
      softmax(r, rows, most(16, (count - 1) * PANEL + last));
      weigh<cut_block>(from, r, rows, block, count, span);
    }
  }

  // Products of rows and keys of one panel, the n-th of its block.
  void multiply(const Keys& from, long panel, long n, long r, long rows, Span span) const {
    constexpr long ld = BLOCK_PANELS<P> * PANEL;
    product<P, Start::zero>(rows, queries + r * steps, steps, from.k + panel * steps * PANEL + span.first, PANEL, steps,
                            s + r * ld + n * PANEL + span.first, ld, span.last - span.first);
  }

  template <bool cut_block>
  void logits(const Chunk& c, const Keys& from, long r, long panel, float* s, std::uint64_t bits, std::uint64_t computed) const {
    if (shaped(p) && computed)
      shape_logits(p, query_of(c, r) / p.q_len, query_of(c, r) % p.q_len, panel * PANEL, from.list ? from.list + panel * PANEL : nullptr, from.listed - panel * PANEL, s);
    if (cut_block && bits != ~std::uint64_t(0))
      for (long j = 0; j < PANEL; j += LANES) store(s + j, select(bits >> j, load(s + j), set1(-INF)));
  }

  // Logits of `width` keys become weights, in place; with Pairs the weights are bfloat16 and take half the room.
  void softmax(long first, long rows, long width) const {
    p.entropy ? softmax_as<true>(first, rows, width) : softmax_as<false>(first, rows, width);
  }

  template <bool measured>
  void softmax_as(long first, long rows, long width) const {
    constexpr long ld = BLOCK_PANELS<P> * PANEL;
    const float by = shaped(p) ? 1.0f : factor_of(p);
    for (long r = first; r < first + rows; r++) {
      const float* row = s + r * ld;
      Vec top = load(row);
      for (long j = LANES; j < width; j += LANES) top = max(top, load(row + j));
      const float here = hmax(top) * by, before = most_seen[r];
      const float now = here > before ? here : before;
      most_seen[r] = now;
      floor[r] = now == -INF ? 0.0f : now;
      factor[r] = before - floor[r];
      if (measured && sum[r] != 0.0f) spread[r] += sum[r] * factor[r];
    }
    for (long r = first; r < first + rows; r += LANES) store(factor + r, exp2(load(factor + r)));
    const Vec times = set1(by);
    for (long r = first; r < first + rows; r++) {
      float* row = s + r * ld;
      const Vec minus = set1(-floor[r]);
      Vec total = zero();
      [[maybe_unused]] Vec weighted = zero();
      for (long j = 0; j < width; j += 16) {
        Vec w[16 / LANES];
        for (int i = 0; i < 16 / LANES; i++) {
          const Vec x = fma(load(row + j + i * LANES), times, minus);
          w[i] = exp2<P::pairs>(x);
          total = add(total, w[i]);
          if constexpr (measured) weighted = fma(w[i], max(set1(-200.0f), x), weighted);
        }
        if constexpr (P::pairs) {
          store_bf16(reinterpret_cast<std::uint16_t*>(row) + j, w);
        } else {
          for (int i = 0; i < 16 / LANES; i++) store(row + j + i * LANES, w[i]);
        }
      }
      sum[r] = fused(sum[r], factor[r], hsum(total));
      if constexpr (measured) spread[r] = fused(spread[r], factor[r], hsum(weighted));
    }
  }

  // o = o · factor + weights · values; neighbouring panels run as one product.
  template <bool cut_block>
  void weigh(const Keys& from, long r, long rows, const long* block, long count, const Span* span) const {
    constexpr long ld = BLOCK_PANELS<P> * PANEL;
    const Unit* w = reinterpret_cast<const Unit*>(s + r * ld);
    bool started = false;
    for (long n = 0; n < count;) {
      if (cut_block && !span[n].last) {
        n++;
        continue;
      }
      long end = n + 1;
      while (end < count && block[end] == block[end - 1] + 1 && (!cut_block || span[end].last)) end++;
      const long start = cut_block ? span[n].first : 0, stop = (end - 1 - n) * PANEL + (cut_block ? span[end - 1].last : PANEL);
      const long first = (n * PANEL + start) / P::per_unit, key = block[n] * PANEL + start;
      const long length = least(stop - start, from.value_rows - key) / P::per_unit;
      for (long c0 = 0; c0 < wide; c0 += PANEL) {
        const long width = least(PANEL, wide - c0);
        const Unit* values = from.v + c0 * from.value_steps + key / P::per_unit * width;
        float* to = o + r * wide + c0;
        if (started) {
          product<P, Start::sum>(rows, w + first, ld, values, width, length, to, wide, width);
        } else {
          product<P, Start::scaled>(rows, w + first, ld, values, width, length, to, wide, width, factor + r);
        }
      }
      started = true;
      n = end;
    }
  }

  void begin(const Chunk& c) const {
    const long rows = c.rows;
    for (long r = 0; r < rows; r += c.per_head)
      pack_left<P>(p.q, p.type, c.b, c.h + r / c.per_head, Rows{c.first, c.list, c.list ? p.q_len : 0}, c.per_head, p.dim, queries + r * steps);
    if (!shaped(p) && p.scale == 0.0f) std::memset(queries, 0, (std::size_t)(rows * steps) * 4);
    if (!shaped(p) && p.scale < 0.0f)
      for (long i = 0; i < rows * steps; i++) queries[i] ^= P::pairs ? 0x80008000u : 0x80000000u;
    for (long r = 0; r < rows; r++) most_seen[r] = -INF, sum[r] = 0.0f;
    for (long r = 0; p.entropy && r < rows; r++) spread[r] = 0.0f;
    std::memset(o, 0, (std::size_t)(rows * wide) * 4);
  }

  // Out, lse and entropy of all rows. What is too large to be found in a cache later does not take other things' place there.
  void finish(const Chunk& c) const {
    const bool past_caches = p.fresh && straight() && reinterpret_cast<std::uintptr_t>(p.out) % 64 == 0;
    for (long r = 0; r < c.rows; r++) write(c, r, o + r * wide, most_seen[r], sum[r], p.entropy ? spread[r] : 0.0f, past_caches);
    if (past_caches) end_stream();
  }

  // Whether a row of results lies in out as it does here.
  bool straight() const { return type_of_out(p) == Type::f32 && wide == p.dim_v; }

  // Out, lse and entropy of one row of the chunk; `from` is used up.
  void write(const Chunk& c, long r, float* from, float top, float total, float spread_of, bool past_caches = false) const {
    const long row = c.to >= 0 ? c.to + r : c.b * p.heads * p.q_len + query_of(c, r);
    const Vec share = set1(total == 0.0f ? 0.0f : 1.0f / total);
    char* out = static_cast<char*>(p.out) + row * p.dim_v * size_of(type_of_out(p));
    float* to = straight() ? reinterpret_cast<float*>(out) : from;
    if (past_caches) {
      for (long j = 0; j < wide; j += LANES) stream(to + j, mul(load(from + j), share));
    } else {
      for (long j = 0; j < wide; j += LANES) store(to + j, mul(load(from + j), share));
    }
    if (!straight()) write_floats(type_of_out(p), from, p.dim_v, out);
    p.lse[row] = total == 0.0f ? -INF : (top + std::log2(total)) * LN_2;
    if (p.entropy) p.entropy[row] = total == 0.0f ? 0.0f : (std::log2(total) - spread_of / total) * LN_2;
  }
};

}  // namespace foveal::FOVEAL_VARIANT

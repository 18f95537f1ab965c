// Which pairs a panel of 64 keys shows to a chunk of rows: nothing, everything, or 64 bits per row.
#pragma once

#include "problem.hpp"
#include "vec.hpp"

namespace foveal::FOVEAL_VARIANT {

enum class Shows { nothing, all, some };

// Consecutive rows of one head that share their tiles.
struct Chunk {
  const Problem* problem;
  const std::uint64_t* valid_bits;  // (valid_batch, panels) or null
  long b, h, first, rows, per_head;  // row r is query first + r % per_head of head h + r / per_head
  const std::int64_t* list = nullptr;  // or query list[r], counting on over the heads from head h on
  long to = -1;  // where row 0 of out and lse lies, if they do not lie as the queries do
  const std::int64_t *lo, *hi;  // of the chunk's rows
  long lo_least, lo_most, hi_least, hi_most;
  bool blind_rows;  // some row sees no key at all
  const std::int8_t* kinds;  // of the chunk's row of tiles, or null
  const std::int32_t* slot;  // or null
};

// Query row r of a chunk, counted over all heads of its batch row.
inline long query_of(const Chunk& c, long r) {
  return c.list ? c.h * c.problem->q_len + c.list[r] : (c.h + r / c.per_head) * c.problem->q_len + c.first + r % c.per_head;
}

// How rows are cut into chunks: never across a row of tiles.
struct Chunking {
  long rows, per_tile, count;
  explicit Chunking(const Problem& p, long target) {
    const long tile = least(p.visible.kinds ? p.visible.q_tile : p.q_len, p.q_len);
    const long parts = ceil_div(tile, target + target / 3);  // one chunk may be a third longer instead of leaving a short rest
    rows = p.visible.kinds ? ceil_div(tile, parts) : least(target, p.q_len);
    per_tile = ceil_div(tile, rows);
    count = p.visible.kinds ? p.visible.q_tiles * per_tile : per_tile;
  }
};

// A chunk of rows with these intervals; tiles are added by place().
inline Chunk make_rows(const Problem& p, const std::uint64_t* valid_bits, long b, long first, long rows, const std::int64_t* lo_of,
                       const std::int64_t* hi_of) {
  Chunk c;
  c.problem = &p;
  c.valid_bits = valid_bits;
  c.b = b;
  c.h = 0;
  c.first = first;
  c.rows = c.per_head = rows;
  c.lo = lo_of;
  c.hi = hi_of;
  c.lo_least = c.hi_least = p.kv_len;
  c.lo_most = c.hi_most = 0;
  c.blind_rows = false;
  c.kinds = nullptr;
  c.slot = nullptr;
  for (long r = 0; r < rows; r++) {
    const long lo = most(0, c.lo[r]), hi = least(p.kv_len, c.hi[r]);
    if (lo >= hi) {
      c.blind_rows = true;
      continue;
    }
    c.lo_least = least(c.lo_least, lo);
    c.lo_most = most(c.lo_most, lo);
    c.hi_least = least(c.hi_least, hi);
    c.hi_most = most(c.hi_most, hi);
  }
  return c;
}

// The intervals of `rows` rows from `first` on.
inline Chunk make_rows(const Problem& p, const std::uint64_t* valid_bits, long b, long first, long rows) {
  const long at = (p.visible.bounds_batch > 1 ? b : 0) * p.q_len + first;
  return make_rows(p, valid_bits, b, first, rows, p.visible.lo + at, p.visible.hi + at);
}

// The same rows of batch row b and head h, with the tiles of that head.
inline void place(Chunk& c, long b, long h) {
  const Visible& v = c.problem->visible;
  c.b = b;
  c.h = h;
  const long u = c.first / v.q_tile;
  if (v.kinds) c.kinds = v.kinds + (((v.kinds_batch > 1 ? b : 0) * v.kinds_heads + (v.kinds_heads > 1 ? h : 0)) * v.q_tiles + u) * v.kv_tiles;
  if (v.slot) c.slot = v.slot + (((v.slot_batch > 1 ? b : 0) * v.slot_heads + (v.slot_heads > 1 ? h : 0)) * v.q_tiles + u) * v.kv_tiles;
}

inline Chunk make_chunk(const Problem& p, const std::uint64_t* valid_bits, const Chunking& cut, long b, long h, long index) {
  const long u = index / cut.per_tile, tile = p.visible.kinds ? p.visible.q_tile : p.q_len;
  const long first = u * tile + index % cut.per_tile * cut.rows;
  const long end = least(least(p.q_len, (u + 1) * tile), first + cut.rows);  // a short last tile has fewer chunks
  Chunk c = make_rows(p, valid_bits, b, least(first, p.q_len - 1), most(0, end - first));
  place(c, b, h);
  return c;
}

inline std::uint64_t valid_word(const Chunk& c, long panel) {
  const long panels = ceil_div(c.problem->kv_len, PANEL);
  return c.valid_bits[(c.problem->visible.valid_batch > 1 ? c.b : 0) * panels + panel];
}

inline Shows shows(const Chunk& c, long panel) {
  const long start = panel * PANEL, end = start + PANEL;
  if (c.hi_most <= start || c.lo_least >= end) return Shows::nothing;
  bool all = !c.blind_rows && c.lo_most <= start && c.hi_least >= end;
  if (c.valid_bits) {
    const std::uint64_t valid = valid_word(c, panel);
    if (!valid) return Shows::nothing;
    all = all && valid == ~std::uint64_t(0);
  }
  if (c.kinds) {
    const long width = c.problem->visible.kv_tile;
    bool any = false;
    for (long t = start / width; t < c.problem->visible.kv_tiles && t * width < end; t++) {
      const bool kept = c.kinds[t] != 0;
      any = any || kept;
      all = all && kept && !(c.slot && c.slot[t] >= 0);
    }
    if (!any) return Shows::nothing;
  }
  return all ? Shows::all : Shows::some;
}

inline std::uint64_t ones(long n) { return n <= 0 ? 0 : n >= 64 ? ~std::uint64_t(0) : (std::uint64_t(1) << n) - 1; }

// Bits [at, at + 64) of a row of `words` words; what lies past them is 0.
inline std::uint64_t bits_at(const std::uint64_t* row, long words, long at) {
  const long w = at / 64, shift = at % 64;
  std::uint64_t x = row[w] >> shift;
  if (shift && w + 1 < words) x |= row[w + 1] << (64 - shift);
  return x;
}

// Bit j of the answer: does row `r` of the chunk see key 64 · panel + j?
inline std::uint64_t row_bits(const Chunk& c, long r, long panel) {
  const long start = panel * PANEL;
  const Problem& p = *c.problem;
  std::uint64_t bits = ones(least(p.kv_len, c.hi[r]) - start) & ~ones(most(0, c.lo[r]) - start);
  if (c.valid_bits) bits &= valid_word(c, panel);
  if (!c.kinds || !bits) return bits;
  const Visible& v = p.visible;
  const long in_tile = (c.first + r) % v.q_tile;
  for (long t = start / v.kv_tile; t < v.kv_tiles && t * v.kv_tile < start + PANEL; t++) {
    const long from = most(start, t * v.kv_tile), to = least(start + PANEL, (t + 1) * v.kv_tile);
    const std::uint64_t here = ones(to - start) & ~ones(from - start);
    if (c.kinds[t] == 0) {
      bits &= ~here;
    } else if (c.slot && c.slot[t] >= 0) {
      const std::uint64_t* row = v.table + (c.slot[t] * v.q_tile + in_tile) * v.words;
      bits &= ~here | bits_at(row, v.words, from - t * v.kv_tile) << (from - start);
    }
  }
  return bits;
}

// The bits of all rows, at bits[r · stride], and whether any is set. Where no interval cuts the panel, what whole tiles and padding
// hide looks the same to every row, and what one tile hides lies row by row in the table.
inline bool all_row_bits(const Chunk& c, long panel, std::uint64_t* bits, long stride) {
  const Visible& v = c.problem->visible;
  const long start = panel * PANEL, end = least(start + PANEL, c.problem->kv_len), tile = start / v.kv_tile;
  const bool between = !c.blind_rows && c.lo_most <= start && c.hi_least >= end;
  bool cut = false;
  for (long t = tile; c.slot && t < v.kv_tiles && t * v.kv_tile < end; t++) cut = cut || c.slot[t] >= 0;
  std::uint64_t any = 0;
  if (between && cut && end <= (tile + 1) * v.kv_tile) {
    const std::uint64_t* row = v.table + (c.slot[tile] * v.q_tile + c.first % v.q_tile) * v.words;
    const std::uint64_t real = ones(end - start) & (c.valid_bits ? valid_word(c, panel) : ~std::uint64_t(0));
    for (long r = 0; r < c.per_head; r++) any |= bits[r * stride] = real & bits_at(row + r * v.words, v.words, start - tile * v.kv_tile);
    return any;
  }
  for (long r = 0; r < c.per_head; r++) any |= bits[r * stride] = r && between && !cut ? bits[0] : row_bits(c, r, panel);
  return any;
}

}  // namespace foveal::FOVEAL_VARIANT

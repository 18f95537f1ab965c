// The forward pass for few rows and for lists of keys: decoding, and the blocks of a KeySelection.
//
// Nothing is packed in advance. A task gathers the panels that its rows see into the cache, 64 keys at a time, and uses them
// there and then; query heads that share their keys are stacked as rows. Where there are fewer heads than threads, a task takes
// a part of the keys, and the parts are joined in order by their log-sum-exps.
#pragma once

#include "across.hpp"
#include "direct.hpp"
#include "listed.hpp"
#include "pool.hpp"
#include "softmax.hpp"

namespace foveal::FOVEAL_VARIANT {

constexpr long FEW_ROWS = 128;
constexpr long LEAST_PANELS = 4;  // that a task gets when keys are split
constexpr long RUN_ROWS = 256;    // of a task, where there are enough: lists that follow each other often share keys

template <class P>
struct Few {
  static constexpr long VALUE_STEPS = BLOCK_PANELS<P> * PANEL / P::per_unit;

  const Problem& p;
  const long stacked;                // query heads that are rows of one task
  const long block_rows, block_count;  // rows per list
  const long chunk_rows, per_block;  // query rows of a task, tasks per block
  const long units, splits, most_keys;
  const long run, tasks;  // parts of units in one task; how many tasks that makes
  const int threads;
  const bool in_place;  // keys and values are not packed
  const bool across;    // nor are those that all rows see
  std::uint64_t* valid_bits = nullptr;
  char* scratch = nullptr;
  long scratch_bytes = 0;
  float *part_o = nullptr, *part_most = nullptr, *part_sum = nullptr, *part_spread = nullptr;  // [units][splits][rows]

  static long stack(const Problem& p, bool may) {
    const long group = p.heads / p.kv_heads;
    return may && group * least(p.q_len, p.lists.index ? p.lists.block_rows : p.q_len) <= FEW_ROWS ? group : 1;
  }
  static bool may_stack(const Problem& p) {
    return p.lists.index ? p.lists.heads <= p.kv_heads : !p.visible.kinds || (p.visible.kinds_heads == 1 && p.visible.slot_heads == 1);
  }
  static long split(const Problem& p, long units, int threads) {
    const long panels = ceil_div(p.lists.index ? p.lists.width : p.kv_len, PANEL);
    return units >= 4 * threads ? 1 : most(1, least(ceil_div(4 * threads, units), panels / LEAST_PANELS));
  }

  Few(const Problem& problem, int threads)
      : p(problem),
        stacked(stack(p, may_stack(p))),
        block_rows(p.lists.index ? least(p.q_len, p.lists.block_rows) : p.q_len),
        block_count(ceil_div(p.q_len, block_rows)),
        chunk_rows(least(block_rows, FEW_ROWS / stacked)),
        per_block(ceil_div(block_rows, chunk_rows)),
        units(p.batch * (p.heads / stacked) * block_count * per_block),
        splits(split(p, units, threads)),
        most_keys(p.lists.index ? p.lists.width : 0),
        run(splits > 1 ? 1 : most(1, least(RUN_ROWS / (chunk_rows * stacked), units / (FINE_TASKS * threads)))),
        tasks(ceil_div(units * splits, run)),
        threads(threads),
        in_place(!P::pairs && direct(p, chunk_rows * stacked)),
        across(!P::pairs && !in_place && Across::serves(p)) {}

  struct Scratch {
    Softmax<P> rows;
    Across across;
    Unit *keys, *values, *temp;
    std::int64_t *list, *where;  // the task's keys without pads; those of the gathered panels
    const char **rows_at, **next_at;  // where the rows of a panel's keys, and of all values, lie; those of later keys
    Scratch(const Few& f, Carve& memory)
        : rows(f.p, f.chunk_rows * f.stacked, memory), across(f.p, f.across ? f.chunk_rows * f.stacked : 0, memory) {
      keys = memory.take<Unit>(f.in_place ? 0 : BLOCK_PANELS<P> * PANEL * rows.steps);
      values = memory.take<Unit>(f.in_place ? 0 : VALUE_STEPS * rows.wide);
      temp = memory.take<Unit>(f.in_place ? 0 : 65 * rows.steps + 2 * rows.wide);
      list = memory.take<std::int64_t>(f.most_keys);
      where = memory.take<std::int64_t>(BLOCK_PANELS<P> * PANEL);
      rows_at = memory.take<const char*>((1 + BLOCK_PANELS<P>) * PANEL);
      next_at = memory.take<const char*>(BLOCK_PANELS<P> * PANEL);
    }
  };

  long lay_out(char* at, int threads) {
    Carve memory{at};
    valid_bits = take_valid(p, memory);
    if (splits > 1) {
      const long rows = units * splits * chunk_rows * stacked;
      part_o = memory.take<float>(rows * padded(p.dim_v));
      part_most = memory.take<float>(rows);
      part_sum = memory.take<float>(rows);
      part_spread = memory.take<float>(p.entropy ? rows : 0);
    }
    Carve own{nullptr};
    Scratch(*this, own);
    scratch_bytes = own.at - (char*)nullptr;
    scratch = memory.take<char>(threads * scratch_bytes);
    return memory.at - at;
  }

  Scratch scratch_of(int worker) const {
    Carve memory{scratch + worker * scratch_bytes};
    return Scratch(*this, memory);
  }

  Chunk chunk_of(long unit) const {
    const long piece = unit % per_block, block = unit / per_block % block_count, head = unit / (per_block * block_count);
    const long b = head / (p.heads / stacked), h = head % (p.heads / stacked) * stacked;
    const long first = block * block_rows + piece * chunk_rows;
    const long end = least(least(p.q_len, (block + 1) * block_rows), first + chunk_rows);
    Chunk c = make_rows(p, valid_bits, b, least(first, p.q_len - 1), most(0, end - first));
    place(c, b, h);
    c.rows *= stacked;
    return c;
  }

  // Task of the first round. What threads do at the same time lies far apart: neighbors would write to the same lines, and where a
  // page of memory is new, both would clear it. Parts of one unit are read in order.
  void attend_run(long task, int worker) const {
    const long share = task % threads;
    const long turn = splits > 1 ? task : share * (tasks / threads) + least(share, tasks % threads) + task / threads;
    for (long i = turn * run; i < least((turn + 1) * run, units * splits); i++) attend(i, worker);
  }

  // The rows of a unit over one part of their keys.
  void attend(long index, int worker) const {
    const long unit = index / splits, split = index % splits;
    const Chunk c = chunk_of(unit);
    if (c.rows <= 0) return;
    Scratch mine = scratch_of(worker);
    const Softmax<P>& rows = mine.rows;
    rows.begin(c);
    const long listed = p.lists.index ? keys_of_block(p, c.b, c.h, c.first / block_rows, mine.list) : 0;
    const long first = p.lists.index ? 0 : c.lo_least / PANEL;
    const long panels = most(0, ceil_div(p.lists.index ? listed : c.hi_most, PANEL) - first);
    const long begin = first + panels * split / splits, end = first + panels * (split + 1) / splits;
    over(c, mine, whole_across(c, mine, begin, end, p.lists.index ? listed : p.kv_len), end, listed);
    if (splits == 1) return rows.finish(c);
    for (long r = 0; r < c.rows; r++) {
      const long at = (unit * splits + split) * chunk_rows * stacked + r;
      std::memcpy(part_o + at * rows.wide, rows.o + r * rows.wide, (std::size_t)rows.wide * 4);
      part_most[at] = rows.most_seen[r];
      part_sum[at] = rows.sum[r];
      if (p.entropy) part_spread[at] = rows.spread[r];
    }
  }

  Rows keys_from(const Scratch& mine, long start) const {
    return {p.lists.index ? 0 : start, p.lists.index ? mine.list + start : nullptr};
  }

  // The first panels of which every row sees each key, as lists of a causal model begin; the panel after them.
  long whole_across(const Chunk& c, const Scratch& mine, long begin, long end, long keys) const {
    long at = begin;
    if constexpr (!P::pairs) {
      if (!across || !Across::pays(c.rows)) return begin;
      while (at < end && shows_whole(c, keys_from(mine, at * PANEL), least(PANEL, keys - at * PANEL))) at++;
      if (at == begin) return begin;
      mine.across.attend(mine.rows, c, c.h / (p.heads / p.kv_heads), keys_from(mine, begin * PANEL), least(at * PANEL, keys) - begin * PANEL);
    }
    return at;
  }

  // Panels `begin` … `end` of the list, or of all keys.
  void over(const Chunk& c, Scratch& mine, long begin, long end, long listed) const {
    const Softmax<P>& rows = mine.rows;
    const Keys from{mine.keys, mine.values, VALUE_STEPS, mine.where, BLOCK_PANELS<P> * PANEL};
    long block[BLOCK_PANELS<P>], count = 0;
    bool cut_block = false;
    for (long panel = begin; panel < end; panel++) {
      const long start = panel * PANEL, here = least(PANEL, (p.lists.index ? listed : p.kv_len) - start);
      std::uint64_t* bits = rows.bits + count;
      const Shows what = p.lists.index ? shows_listed(c, mine.list + start, here, bits, BLOCK_PANELS<P>) : shows(c, panel);
      bool wanted = what == Shows::all;
      if (what == Shows::some && !p.lists.index) all_row_bits(c, panel, bits, BLOCK_PANELS<P>);
      for (long i = 0; what != Shows::nothing && i < c.per_head; i++) {
        if (what == Shows::all) bits[i * BLOCK_PANELS<P>] = ~std::uint64_t(0);
        wanted = wanted || bits[i * BLOCK_PANELS<P>];
      }
      if (wanted) {
        for (long r = c.per_head; r < c.rows; r++) bits[r * BLOCK_PANELS<P>] = bits[r % c.per_head * BLOCK_PANELS<P>];
        gather(c, mine, count, start, here, p.lists.index ? listed : p.kv_len);
        cut_block = cut_block || what == Shows::some;
        block[count] = count;
        count++;
      }
      if (count == BLOCK_PANELS<P> || (count && panel == end - 1)) {
        cut_block ? step<true>(c, mine, from, block, count) : step<false>(c, mine, from, block, count);
        count = 0;
        cut_block = false;
      }
    }
  }

  // Pack keys `start` … of the list, or of all keys, as panel `slot`; or, in place, multiply them right away.
  void gather(const Chunk& c, Scratch& mine, long slot, long start, long count, long end) const {
    const long steps = mine.rows.steps, kv = c.h / (p.heads / p.kv_heads);
    const Rows which = keys_from(mine, start);
    for (long j = 0; j < PANEL; j++) mine.where[slot * PANEL + j] = which[least(j, count - 1)];
    if constexpr (!P::pairs) {
      if (in_place) {
        for (long j = 0; j < PANEL; j++) {
          mine.rows_at[j] = row_at(p.k, p.type, c.b, kv, mine.where[slot * PANEL + j]);
          mine.rows_at[(slot + 1) * PANEL + j] = row_at(p.v, p.type, c.b, kv, mine.where[slot * PANEL + j]);
        }
        for (long j = 0; j < PANEL; j++)  // most likely the keys that are wanted when the values are done
          mine.next_at[slot * PANEL + j] = row_at(p.k, p.type, c.b, kv, which[least(BLOCK_PANELS<P> * PANEL + j, end - start - 1)]);
        const Ahead ahead{mine.rows_at + (slot + 1) * PANEL, p.dim_v * size_of(p.type)};
        float* s = mine.rows.s + slot * PANEL;
        const float* q = reinterpret_cast<const float*>(mine.rows.queries);
        p.type == Type::bf16 ? all_dots<true>(c.rows, q, p.dim, mine.rows_at, s, BLOCK_PANELS<P> * PANEL, ahead)
                             : all_dots<false>(c.rows, q, p.dim, mine.rows_at, s, BLOCK_PANELS<P> * PANEL, ahead);
        return;
      }
    }
    pack_columns<P>(p.k, p.type, c.b, kv, which, count, p.dim, mine.keys + slot * PANEL * steps, mine.temp);
    pack_rows<P>(p.v, p.type, c.b, kv, which, count, PANEL, p.dim_v, mine.values, VALUE_STEPS, slot * PANEL / P::per_unit,
                 reinterpret_cast<float*>(mine.temp));
  }

  // The softmax and the weighted sum of a block of gathered panels.
  template <bool cut_block>
  void step(const Chunk& c, Scratch& mine, const Keys& from, const long* block, long count) const {
    if constexpr (!P::pairs) {
      if (in_place) {
        constexpr long ld = BLOCK_PANELS<P> * PANEL;
        const Softmax<P>& rows = mine.rows;
        for (long r = 0; r < c.rows; r++)
          for (long n = 0; n < count; n++)
            rows.template logits<cut_block>(c, from, r, n, rows.s + r * ld + n * PANEL, rows.bits[r * BLOCK_PANELS<P> + n], 1);
        rows.softmax(0, c.rows, count * PANEL);
        const char** value = mine.rows_at + PANEL;
        const Ahead ahead{mine.next_at, p.dim * size_of(p.type)};
        p.type == Type::bf16 ? all_weigh<true>(c.rows, rows.s, ld, value, count * PANEL, rows.o, rows.wide, rows.factor, ahead)
                             : all_weigh<false>(c.rows, rows.s, ld, value, count * PANEL, rows.o, rows.wide, rows.factor, ahead);
        return;
      }
    }
    mine.rows.template step<cut_block>(c, from, block, count);
  }

  // Task of the second round: join the parts of a unit.
  void join(long unit, int worker) const {
    const Chunk c = chunk_of(unit);
    if (c.rows <= 0) return;
    const Softmax<P> rows = scratch_of(worker).rows;
    const long wide = rows.wide, ld = chunk_rows * stacked;
    for (long r = 0; r < c.rows; r++) {
      const long at = unit * splits * ld + r;
      float top = -INF, total = 0.0f, spread = 0.0f;
      for (long s = 0; s < splits; s++) top = part_most[at + s * ld] > top ? part_most[at + s * ld] : top;
      std::memset(rows.o, 0, (std::size_t)wide * 4);
      for (long s = 0; s < splits; s++) {
        if (part_sum[at + s * ld] == 0.0f) continue;
        const float share = std::exp2(part_most[at + s * ld] - top);
        total += part_sum[at + s * ld] * share;
        if (p.entropy) spread += share * (part_spread[at + s * ld] + part_sum[at + s * ld] * (part_most[at + s * ld] - top));
        const float* o = part_o + (at + s * ld) * wide;
        for (long i = 0; i < wide; i += LANES) store(rows.o + i, fma(load(o + i), set1(share), load(rows.o + i)));
      }
      rows.write(c, r, rows.o, top, total, spread);
    }
  }
};

template <class P>
void few_as(const Problem& p, Pool& pool, int threads) {
  Few<P> f(p, threads);
  f.lay_out(static_cast<char*>(pool.memory((std::size_t)f.lay_out(nullptr, threads))), threads);
  mark_valid(p, f.valid_bits);
  pool.run(threads, f.tasks, [](void* x, long i, int worker) { static_cast<Few<P>*>(x)->attend_run(i, worker); }, &f);
  if (f.splits > 1) pool.run(threads, f.units, [](void* x, long i, int worker) { static_cast<Few<P>*>(x)->join(i, worker); }, &f);
}

// Whether few rows share a panel, so that it is read where it lies.
inline bool very_few(const Problem& p) {
  const long stacked = Few<Floats>::stack(p, Few<Floats>::may_stack(p));
  return direct(p, least(least(p.q_len, p.lists.index ? p.lists.block_rows : p.q_len), FEW_ROWS / stacked) * stacked);
}

// Whether a call is better served here: its rows fit one task per key head.
inline bool few(const Problem& p) {
  if (p.lists.index) return true;
  const long stacked = Few<Floats>::may_stack(p) ? p.heads / p.kv_heads : 1;
  return p.q_len * stacked <= FEW_ROWS && (!p.visible.kinds || p.q_len <= p.visible.q_tile);
}

}  // namespace foveal::FOVEAL_VARIANT

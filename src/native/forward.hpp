// The forward pass for many rows: out and lse of chunks of query rows, over the panels of keys that they see.
// Keys and values are packed once per key head and shared by all rows and query heads; values that lie as packing would lay them
// stay where they are. A few key heads take their turn after
// each other, as many as keep all threads busy, so that what is packed is still in the cache when it is used.
#pragma once

#include "pool.hpp"
#include "softmax.hpp"

namespace foveal::FOVEAL_VARIANT {

constexpr long CHUNK_ROWS = 96;

template <class P>
struct Forward {
  const Problem& p;
  const Chunking cut;
  const long panels, steps, wide;  // panels of keys, units per row of q and k, padded channels of v
  const long group, turn;          // query heads per key head; key heads (of all batch rows) per turn
  const bool in_place;             // values need no packing
  long first = 0, here = 0;        // key heads of this turn
  Unit *keys = nullptr, *values = nullptr;
  std::uint64_t* valid_bits = nullptr;
  char* scratch = nullptr;
  long scratch_bytes = 0;

  Forward(const Problem& problem, int threads)
      : p(problem),
        cut(p, CHUNK_ROWS),
        panels(ceil_div(p.kv_len, PANEL)),
        steps(steps_of<P>(p.dim)),
        wide(padded(p.dim_v)),
        group(p.heads / p.kv_heads),
        turn(least(p.batch * p.kv_heads, ceil_div(FINE_TASKS * threads, group * cut.count))),
        in_place(!P::pairs && rows_are_packed(p.v, p.type, p.dim_v)) {}

  long value_steps() const { return panels * PANEL / P::per_unit; }
  Unit* keys_of(long kv) const { return keys + (kv - first) * panels * steps * PANEL; }
  Unit* values_of(long kv) const { return values + (kv - first) * value_steps() * wide; }
  Keys packed(long kv) const {
    if (!in_place) return {keys_of(kv), values_of(kv), value_steps()};
    const char* v = row_at(p.v, p.type, kv / p.kv_heads, kv % p.kv_heads, 0);
    return {keys_of(kv), reinterpret_cast<const Unit*>(v), value_steps(), nullptr, 0, p.kv_len};
  }

  struct Scratch {
    Softmax<P> rows;
    Unit* temp;
    Scratch(const Forward& f, Carve& memory) : rows(f.p, f.cut.rows, memory), temp(memory.take<Unit>(65 * f.steps + 2 * f.wide)) {}
  };

  Scratch scratch_of(int worker) const {
    Carve memory{scratch + worker * scratch_bytes};
    return Scratch(*this, memory);
  }

  // The shared part, then what each thread has to itself.
  long lay_out(char* at, int threads) {
    Carve memory{at};
    keys = memory.take<Unit>(turn * panels * steps * PANEL);
    values = memory.take<Unit>(in_place ? 0 : turn * value_steps() * wide);
    valid_bits = take_valid(p, memory);
    Carve own{nullptr};
    Scratch(*this, own);
    scratch_bytes = own.at - (char*)nullptr;
    scratch = memory.take<char>(threads * scratch_bytes);
    return memory.at - at;
  }

  // Task of the first round: pack one panel of one key head. The panels of a head's values continue each other.
  void pack(long index, int worker) const {
    const long panel = index % panels, kv = first + index / panels, b = kv / p.kv_heads, h = kv % p.kv_heads;
    const Rows which{panel * PANEL};
    const long count = least(PANEL, p.kv_len - which.first);
    Unit* temp = scratch_of(worker).temp;
    pack_columns<P>(p.k, p.type, b, h, which, count, p.dim, keys_of(kv) + panel * steps * PANEL, temp);
    if (in_place) return;
    pack_rows<P>(p.v, p.type, b, h, which, count, PANEL, p.dim_v, values_of(kv), value_steps(), which.first / P::per_unit,
                 reinterpret_cast<float*>(temp));
  }

  // Task of the second round: one chunk of query rows, last rows first because causal ones see most.
  void attend(long index, int worker) const {
    const long heads = here * group, head = first * group + index % heads, b = head / p.heads, h = head % p.heads;
    const Chunk chunk = make_chunk(p, valid_bits, cut, b, h, cut.count - 1 - index / heads);
    if (chunk.rows <= 0) return;
    [[maybe_unused]] const typename P::Session session;
    const Softmax<P> rows = scratch_of(worker).rows;
    const Keys from = packed(head / group);
    rows.begin(chunk);
    long block[BLOCK_PANELS<P>], count = 0;
    bool cut_block = false;
    const long last = ceil_div(chunk.hi_most, PANEL);
    for (long panel = chunk.lo_least / PANEL; panel < last; panel++) {
      const Shows what = shows(chunk, panel);
      bool wanted = what == Shows::all;
      if (what == Shows::some) {
        wanted = all_row_bits(chunk, panel, rows.bits + count, BLOCK_PANELS<P>);
        cut_block = cut_block || wanted;
      } else if (wanted) {
        for (long r = 0; r < chunk.rows; r++) rows.bits[r * BLOCK_PANELS<P> + count] = ~std::uint64_t(0);
      }
      if (wanted) block[count++] = panel;
      if (count == BLOCK_PANELS<P> || (count && panel == last - 1)) {
        cut_block ? rows.template step<true>(chunk, from, block, count) : rows.template step<false>(chunk, from, block, count);
        count = 0;
        cut_block = false;
      }
    }
    rows.finish(chunk);
  }
};

template <class P>
void forward_as(const Problem& p, Pool& pool, int threads) {
  Forward<P> f(p, threads);
  f.lay_out(static_cast<char*>(pool.memory((std::size_t)f.lay_out(nullptr, threads))), threads);
  mark_valid(p, f.valid_bits);
  for (; f.first < p.batch * p.kv_heads; f.first += f.turn) {
    f.here = least(f.turn, p.batch * p.kv_heads - f.first);
    pool.run(threads, f.here * f.panels, [](void* x, long i, int worker) { static_cast<Forward<P>*>(x)->pack(i, worker); }, &f);
    pool.run(threads, f.here * f.group * f.cut.count, [](void* x, long i, int worker) { static_cast<Forward<P>*>(x)->attend(i, worker); }, &f);
  }
}

}  // namespace foveal::FOVEAL_VARIANT

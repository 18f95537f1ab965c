// The forward pass for many rows: out and lse of chunks of query rows, over the panels of keys that they see.
// Keys and values are packed once per key head and shared by all rows and query heads.
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
  Unit *keys = nullptr, *values = nullptr;
  std::uint64_t* valid_bits = nullptr;
  char* scratch = nullptr;
  long scratch_bytes = 0;

  explicit Forward(const Problem& problem)
      : p(problem), cut(p, CHUNK_ROWS), panels(ceil_div(p.kv_len, PANEL)), steps(steps_of<P>(p.dim)), wide(padded(p.dim_v)) {}

  long value_steps() const { return panels * PANEL / P::per_unit; }
  Unit* keys_of(long b, long h) const { return keys + (b * p.kv_heads + h) * panels * steps * PANEL; }
  Unit* values_of(long b, long h) const { return values + (b * p.kv_heads + h) * value_steps() * wide; }

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
    const long kv = p.batch * p.kv_heads;
    keys = memory.take<Unit>(kv * panels * steps * PANEL);
    values = memory.take<Unit>(kv * value_steps() * wide);
    valid_bits = take_valid(p, memory);
    Carve own{nullptr};
    Scratch(*this, own);
    scratch_bytes = own.at - (char*)nullptr;
    scratch = memory.take<char>(threads * scratch_bytes);
    return memory.at - at;
  }

  // Task of the first round: pack one panel of one key head. The panels of a head's values continue each other.
  void pack(long index, int worker) const {
    const long panel = index % panels, kv = index / panels, b = kv / p.kv_heads, h = kv % p.kv_heads;
    const Rows which{panel * PANEL};
    const long count = least(PANEL, p.kv_len - which.first);
    Unit* temp = scratch_of(worker).temp;
    pack_columns<P>(p.k, p.type, b, h, which, count, p.dim, keys_of(b, h) + panel * steps * PANEL, temp);
    pack_rows<P>(p.v, p.type, b, h, which, count, PANEL, p.dim_v, values_of(b, h), value_steps(), which.first / P::per_unit,
                 reinterpret_cast<float*>(temp));
  }

  // Task of the second round: one chunk of query rows, last rows first because causal ones see most.
  void attend(long index, int worker) const {
    const long heads = p.batch * p.heads, b = index % heads / p.heads, h = index % p.heads;
    const Chunk chunk = make_chunk(p, valid_bits, cut, b, h, cut.count - 1 - index / heads);
    if (chunk.rows <= 0) return;
    const Softmax<P> rows = scratch_of(worker).rows;
    const long kv = h / (p.heads / p.kv_heads);
    const Keys from{keys_of(b, kv), values_of(b, kv), value_steps()};
    rows.begin(chunk);
    long block[BLOCK_PANELS], count = 0;
    bool cut_block = false;
    const long last = ceil_div(chunk.hi_most, PANEL);
    for (long panel = chunk.lo_least / PANEL; panel < last; panel++) {
      const Shows what = shows(chunk, panel);
      bool wanted = what == Shows::all;
      if (what == Shows::some) {
        for (long r = 0; r < chunk.rows; r++) wanted = (rows.bits[r * BLOCK_PANELS + count] = row_bits(chunk, r, panel)) || wanted;
        cut_block = cut_block || wanted;
      } else if (wanted) {
        for (long r = 0; r < chunk.rows; r++) rows.bits[r * BLOCK_PANELS + count] = ~std::uint64_t(0);
      }
      if (wanted) block[count++] = panel;
      if (count == BLOCK_PANELS || (count && panel == last - 1)) {
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
  Forward<P> f(p);
  f.lay_out(static_cast<char*>(pool.memory((std::size_t)f.lay_out(nullptr, threads))), threads);
  mark_valid(p, f.valid_bits);
  pool.run(threads, p.batch * p.kv_heads * f.panels,
           [](void* x, long i, int worker) { static_cast<Forward<P>*>(x)->pack(i, worker); }, &f);
  pool.run(threads, p.batch * p.heads * f.cut.count,
           [](void* x, long i, int worker) { static_cast<Forward<P>*>(x)->attend(i, worker); }, &f);
}

}  // namespace foveal::FOVEAL_VARIANT

// The backward pass of dense calls and masks of tiles: dq, dk and dv from dout and dlse.
//
// A task owns every `splits`-th block of keys of one key head: its dK and dV stay in the cache while all rows of all query
// heads of the group pass by. dQ is summed in a copy per split, and the copies are added in order: the result never depends
// on which thread did what. Key heads take turns, as in the forward pass.
#pragma once

#include "backward_step.hpp"
#include "pool.hpp"

namespace foveal::FOVEAL_VARIANT {

template <class P>
struct Backward : BackwardStep<P> {
  using Step = BackwardStep<P>;
  using typename Step::KeyBlock, typename Step::RowPanel, typename Step::Scratch;
  using Step::p, Step::g, Step::wide, Step::wide_v;

  const long splits;
  const long group = p.heads / p.kv_heads;
  const long row_panels = ceil_div(p.q_len, PANEL), key_blocks = ceil_div(p.kv_len, KEY_PANELS * PANEL);
  const long turn;           // key heads (of all batch rows) per turn
  long first = 0, here = 0;  // key heads of this turn; heads and key heads are counted from there on

  Unit *rows = nullptr, *keys = nullptr;
  typename Step::PerRow per_row;  // of every row of every panel
  float* dq = nullptr;            // [splits][head of the turn][panel][dim][64]
  double* dbias = nullptr;        // [task][heads of the group][column]
  std::uint64_t* valid_bits = nullptr;
  Chunk* pieces = nullptr;  // rows cut at panels and at tiles, per batch of bounds
  long* piece_of = nullptr;  // first piece of each panel of rows, one more at the end
  char* scratch = nullptr;
  long scratch_bytes = 0, piece_count = 0;

  Backward(const Problem& problem, const Gradients& gradients, int threads)
      : Step{problem, gradients},
        splits(copies_for(problem.batch * problem.kv_heads, ceil_div(problem.kv_len, KEY_PANELS * PANEL), threads)),
        turn(heads_per_turn(threads)) {}

  // The fewest key heads that keep all threads equally busy, with enough work to be worth a turn.
  long heads_per_turn(int threads) const {
    const long all = p.batch * p.kv_heads;
    long t = least(all, ceil_div(16 * threads, group * row_panels));
    while (t < all && t * splits % threads) t++;
    return t;
  }

  RowPanel row_panel(long head, long panel) const {
    const long at = (head - first * group) * row_panels + panel, row = panel * PANEL;
    return this->rows_in(rows + at * this->row_units, per_row.from(at * PANEL), head / p.heads, Rows{head % p.heads * p.q_len + row},
                         least(PANEL, p.q_len - row));
  }
  KeyBlock key_block(long kv, long block) const {
    const long key = block * KEY_PANELS * PANEL;
    return this->keys_in(keys + ((kv - first) * key_blocks + block) * this->key_units, Rows{key}, least(KEY_PANELS * PANEL, p.kv_len - key));
  }
  float* dq_panel(long split, long head, long panel) const {
    return dq + ((split * turn * group + head - first * group) * row_panels + panel) * p.dim * PANEL;
  }
  long bias_columns() const { return group * (2 * p.reach + 1); }

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
    const long heads = turn * group, most_pieces = row_panels + (p.visible.kinds ? p.visible.q_tiles : 1);
    rows = memory.take<Unit>(heads * row_panels * this->row_units);
    keys = memory.take<Unit>(turn * key_blocks * this->key_units);
    per_row = Step::PerRow::take(p, memory, heads * row_panels * PANEL);
    dq = memory.take<float>(splits * heads * row_panels * p.dim * PANEL);
    dbias = g.dbias ? memory.take<double>(p.batch * p.kv_heads * splits * bias_columns()) : nullptr;
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

  // Tasks of the first round: one panel of rows, one block of keys.
  void pack_rows_of(long index, int worker) const {
    this->pack_queries(row_panel(first * group + index / row_panels, index % row_panels), -1, scratch_of(worker).temp);
  }
  void pack_keys_of(long index, int worker) const {
    const long kv = first + index / key_blocks;
    this->pack_keys(key_block(kv, index % key_blocks), kv / p.kv_heads, kv % p.kv_heads, scratch_of(worker).temp);
  }

  // Task of the second round: dk and dv of every splits-th block of keys of one key head, and its part of dq.
  void differentiate(long index, int worker) const {
    [[maybe_unused]] const typename P::Session session;
    const long split = index / here, kv = first + index % here, b = kv / p.kv_heads, h_kv = kv % p.kv_heads;
    Scratch mine = scratch_of(worker);
    const long first_head = b * p.heads + h_kv * group;
    if (dbias) {
      mine.dbias = dbias + (kv * splits + split) * bias_columns();
      mine.bias_begin = h_kv * bias_columns();
      std::memset(mine.dbias, 0, (std::size_t)bias_columns() * sizeof(double));
    }
    std::memset(dq_panel(split, first_head, 0), 0, (std::size_t)(group * row_panels * p.dim * PANEL) * 4);
    for (long block = split; block < key_blocks; block += splits) {
      std::memset(mine.dk, 0, (std::size_t)(KEY_PANELS * PANEL * wide) * 4);
      std::memset(mine.dv, 0, (std::size_t)(KEY_PANELS * PANEL * wide_v) * 4);
      const KeyBlock k = key_block(kv, block);
      for (long head = first_head; head < first_head + group; head++)
        for (long panel = 0; panel < row_panels; panel++) {
          Shows what[KEY_PANELS];
          bool any = false;
          for (long n = 0; n < KEY_PANELS; n++) {
            what[n] = n * PANEL < k.count ? look(head, panel, block * KEY_PANELS + n, mine.bits + n * PANEL) : Shows::nothing;
            any = any || what[n] != Shows::nothing;
          }
          if (any) this->apply(mine, row_panel(head, panel), k, what, dq_panel(split, head, panel));
        }
      for (long j = 0; j < k.count; j++) this->write_key(mine.dk + j * wide, mine.dv + j * wide_v, kv * p.kv_len + k.which[j]);
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

  // Task of the last round: dq of one panel of rows, from its splits in order.
  void write_rows(long index, int worker) const {
    const long head = first * group + index / row_panels, panel = index % row_panels;
    Scratch mine = scratch_of(worker);
    float* sum = dq_panel(0, head, panel);
    for (long split = 1; split < splits; split++) {
      const float* more = dq_panel(split, head, panel);
      for (long i = 0; i < p.dim * PANEL; i += LANES) store(sum + i, add(load(sum + i), load(more + i)));
    }
    const long from = panel * PANEL, count = least(PANEL, p.q_len - from);
    float* row = reinterpret_cast<float*>(mine.temp);
    for (long r = 0; r < count; r++) {
      for (long c = 0; c < p.dim; c++) row[c] = sum[c * PANEL + r] * p.scale;
      write_floats(p.type, row, p.dim, static_cast<char*>(g.dq) + (head * p.q_len + from + r) * p.dim * size_of(p.type));
    }
  }
};

template <class P>
void backward_as(const Problem& p, const Gradients& g, Pool& pool, int threads) {
  using B = Backward<P>;
  B b(p, g, threads);
  b.lay_out(static_cast<char*>(pool.memory((std::size_t)b.lay_out(nullptr, threads))), threads);
  mark_valid(p, b.valid_bits);
  b.cut_rows();
  for (; b.first < p.batch * p.kv_heads; b.first += b.turn) {
    b.here = least(b.turn, p.batch * p.kv_heads - b.first);
    const long panels = b.here * b.group * b.row_panels;
    pool.run(threads, panels, [](void* x, long i, int worker) { static_cast<B*>(x)->pack_rows_of(i, worker); }, &b);
    pool.run(threads, b.here * b.key_blocks, [](void* x, long i, int worker) { static_cast<B*>(x)->pack_keys_of(i, worker); }, &b);
    pool.run(threads, b.here * b.splits, [](void* x, long i, int worker) { static_cast<B*>(x)->differentiate(i, worker); }, &b);
    pool.run(threads, panels, [](void* x, long i, int worker) { static_cast<B*>(x)->write_rows(i, worker); }, &b);
  }
  if (g.dbias) write_bias(p, g, b.dbias, b.splits);
}

}  // namespace foveal::FOVEAL_VARIANT

// The backward pass of KeySelection and Groups: rows and keys are gathered by their positions.
//
// A task owns one key head, or every `splits`-th set of rows of it, and walks through its sets in order. What a set adds to
// dq, dk and dv is added to float sums of the task's own; the sums of the splits are added in order.
#pragma once

#include "backward_step.hpp"
#include "grouped.hpp"

namespace foveal::FOVEAL_VARIANT {

template <class P>
struct ListedBackward : BackwardStep<P> {
  using Step = BackwardStep<P>;
  using typename Step::KeyBlock, typename Step::PerRow, typename Step::RowPanel;
  using Step::p, Step::g, Step::wide, Step::wide_v;

  const long group = p.heads / p.kv_heads;
  const bool grouped = p.groups.count > 0;
  // KeySelection: query heads that share a list and are rows of one set; rows of a block; panels of a set.
  const long stacked = p.lists.heads < p.heads || group == 1 ? group : 1;
  const long block_rows = grouped ? 0 : least(p.q_len, p.lists.block_rows), set_panels = ceil_div(stacked * block_rows, PANEL);
  const long splits;
  Pieces pieces;

  float *dq = nullptr, *dk = nullptr, *dv = nullptr;  // [splits][rows or keys of all heads][channels]
  double* dbias = nullptr;                            // [task][heads of the group][column]
  char* scratch = nullptr;
  long scratch_bytes = 0;

  ListedBackward(const Problem& problem, const Gradients& gradients, int threads)
      : Step{problem, gradients}, splits(copies_for(problem.batch * problem.kv_heads, 2 * threads, threads)), pieces(problem, PANEL) {}

  struct Scratch : Step::Scratch {
    Unit *row_units, *key_units;
    PerRow per_row;
    float* dq;
    std::int64_t *rows, *lo, *hi, *list;
    Scratch(const ListedBackward& b, Carve& memory) : Step::Scratch(b, memory) {
      row_units = memory.take<Unit>(b.row_units);
      key_units = memory.take<Unit>(b.key_units);
      per_row = PerRow::take(b.p, memory, PANEL);
      dq = memory.take<float>(b.p.dim * PANEL);
      rows = memory.take<std::int64_t>(PANEL);
      lo = memory.take<std::int64_t>(PANEL);
      hi = memory.take<std::int64_t>(PANEL);
      list = memory.take<std::int64_t>(b.grouped ? 0 : b.p.lists.width);
    }
  };

  Scratch scratch_of(int worker) const {
    Carve memory{scratch + worker * scratch_bytes};
    return Scratch(*this, memory);
  }

  long query_rows() const { return p.batch * p.heads * p.q_len; }
  long key_rows() const { return p.batch * p.kv_heads * p.kv_len; }
  long bias_columns() const { return group * (2 * p.reach + 1); }

  long lay_out(char* at, int threads) {
    Carve memory{at};
    Carve own{nullptr};
    Scratch(*this, own);
    scratch_bytes = own.at - (char*)nullptr;
    scratch = memory.take<char>(threads * scratch_bytes);
    if (grouped) pieces.take(memory);
    dq = memory.take<float>(splits * query_rows() * p.dim);
    dk = memory.take<float>(splits * key_rows() * p.dim);
    dv = memory.take<float>(splits * key_rows() * p.dim_v);
    dbias = g.dbias ? memory.take<double>(p.batch * p.kv_heads * splits * bias_columns()) : nullptr;
    return memory.at - at;
  }

  // Task of the first round.
  void differentiate(long index, int worker) const {
    [[maybe_unused]] const typename P::Session session;
    const long split = index % splits, owner = index / splits, b = owner / p.kv_heads, kv = owner % p.kv_heads;
    Scratch mine = scratch_of(worker);
    if (dbias) {
      mine.dbias = dbias + index * bias_columns();
      mine.bias_begin = kv * bias_columns();
      std::memset(mine.dbias, 0, (std::size_t)bias_columns() * sizeof(double));
    }
    std::memset(dq + (split * query_rows() + (b * p.heads + kv * group) * p.q_len) * p.dim, 0, (std::size_t)(group * p.q_len * p.dim) * 4);
    std::memset(dk + (split * key_rows() + owner * p.kv_len) * p.dim, 0, (std::size_t)(p.kv_len * p.dim) * 4);
    std::memset(dv + (split * key_rows() + owner * p.kv_len) * p.dim_v, 0, (std::size_t)(p.kv_len * p.dim_v) * 4);
    grouped ? through_groups(mine, split, b, kv) : through_lists(mine, split, b, kv);
  }

  void through_groups(Scratch& mine, long split, long b, long kv) const {
    const Groups& sets = p.groups;
    const long owner = sets.per_head ? b * p.kv_heads + kv : b;
    for (long n = pieces.start[owner] + split; n < pieces.start[owner + 1]; n += splits)
      for (long h = kv * group; h < (sets.per_head ? kv * group + 1 : (kv + 1) * group); h++) {
        const Pieces::Piece& piece = pieces.piece[n];
        const Chunk c = chunk_of_piece(p, piece, h, mine.lo, mine.hi);
        const std::int64_t* list = sets.keys + sets.cu_k[piece.group];
        step(mine, split, c, kv, Rows{c.h * p.q_len, c.list}, list, sets.cu_k[piece.group + 1] - sets.cu_k[piece.group]);
      }
  }

  void through_lists(Scratch& mine, long split, long b, long kv) const {
    const std::int64_t *lo = p.visible.lo + (p.visible.bounds_batch > 1 ? b : 0) * p.q_len, *hi = p.visible.hi + (lo - p.visible.lo);
    const long blocks = p.lists.blocks;
    for (long n = split; n < blocks * (group / stacked); n += splits) {
      const long block = n / (group / stacked), h = kv * group + n % (group / stacked) * stacked;
      const long first = block * block_rows, here = least(block_rows, p.q_len - first);
      const long listed = keys_of_block(p, b, h, block, mine.list);
      for (long at = 0; at < stacked * here; at += PANEL) {
        const long count = least(PANEL, stacked * here - at);
        for (long r = 0; r < count; r++) {
          const long i = first + (at + r) % here;
          mine.rows[r] = (h + (at + r) / here) * p.q_len + i;
          mine.lo[r] = lo[i];
          mine.hi[r] = hi[i];
        }
        step(mine, split, make_rows(p, nullptr, b, 0, count, mine.lo, mine.hi), kv, Rows{0, mine.rows}, mine.list, listed);
      }
    }
  }

  // One panel of rows against all keys of its list.
  void step(Scratch& mine, long split, const Chunk& c, long kv, Rows which, const std::int64_t* list, long listed) const {
    const RowPanel r = this->rows_in(mine.row_units, mine.per_row, c.b, which, c.rows);
    this->pack_queries(r, c.to, mine.temp);
    std::memset(mine.dq, 0, (std::size_t)(p.dim * PANEL) * 4);
    for (long start = 0; start < listed; start += KEY_PANELS * PANEL) {
      const long count = least(KEY_PANELS * PANEL, listed - start);
      Shows what[KEY_PANELS];
      bool any = false;
      for (long n = 0; n < KEY_PANELS; n++) {
        what[n] = n * PANEL < count ? look(c, list + start + n * PANEL, least(PANEL, count - n * PANEL), mine.bits + n * PANEL) : Shows::nothing;
        any = any || what[n] != Shows::nothing;
      }
      if (!any) continue;
      const KeyBlock k = this->keys_in(mine.key_units, Rows{0, list + start}, count);
      this->pack_keys(k, c.b, kv, mine.temp);
      std::memset(mine.dk, 0, (std::size_t)(KEY_PANELS * PANEL * wide) * 4);
      std::memset(mine.dv, 0, (std::size_t)(KEY_PANELS * PANEL * wide_v) * 4);
      this->apply(mine, r, k, what, mine.dq);
      for (long j = 0; j < count; j++) {
        const long row = split * key_rows() + (c.b * p.kv_heads + kv) * p.kv_len + k.which[j];
        float *to_k = dk + row * p.dim, *to_v = dv + row * p.dim_v;
        for (long i = 0; i < p.dim; i++) to_k[i] += mine.dk[j * wide + i];
        for (long i = 0; i < p.dim_v; i++) to_v[i] += mine.dv[j * wide_v + i];
      }
    }
    for (long i = 0; i < c.rows; i++) {
      float* to = dq + (split * query_rows() + c.b * p.heads * p.q_len + which[i]) * p.dim;
      for (long d = 0; d < p.dim; d++) to[d] += mine.dq[d * PANEL + i];
    }
  }

  // As shows_listed(), but bit i of bits[j] says whether row i sees key j.
  Shows look(const Chunk& c, const std::int64_t* list, long count, std::uint64_t* bits) const {
    Shows what = shows_listed(c, list, count, bits, 1);
    if (what == Shows::nothing) return what;
    if (what == Shows::all) {
      if (c.rows == PANEL) return what;
      for (long r = 0; r < c.rows; r++) bits[r] = ~std::uint64_t(0);
    }
    for (long r = c.rows; r < PANEL; r++) bits[r] = 0;
    transpose64(bits);
    return Shows::some;
  }

  // Tasks of the last round: 64 rows of dq; 64 rows of dk and dv.
  void write_rows(long index, int worker) const {
    float* row = reinterpret_cast<float*>(scratch_of(worker).temp);
    for (long i = index * PANEL; i < least(query_rows(), (index + 1) * PANEL); i++) {
      total(dq + i * p.dim, query_rows() * p.dim, p.dim, row);
      for (long c = 0; c < p.dim; c++) row[c] *= p.scale;
      write_floats(p.type, row, p.dim, static_cast<char*>(g.dq) + i * p.dim * size_of(p.type));
    }
  }
  void write_keys(long index, int worker) const {
    float* row = reinterpret_cast<float*>(scratch_of(worker).temp);
    for (long i = index * PANEL; i < least(key_rows(), (index + 1) * PANEL); i++) {
      total(dk + i * p.dim, key_rows() * p.dim, p.dim, row);
      total(dv + i * p.dim_v, key_rows() * p.dim_v, p.dim_v, row + wide);
      this->write_key(row, row + wide, i);
    }
  }
  void total(const float* from, long step, long count, float* to) const {
    std::memcpy(to, from, (std::size_t)count * 4);
    for (long s = 1; s < splits; s++)
      for (long c = 0; c < count; c++) to[c] += from[s * step + c];
  }
};

template <class P>
void listed_backward_as(const Problem& p, const Gradients& g, Pool& pool, int threads) {
  using B = ListedBackward<P>;
  B b(p, g, threads);
  b.lay_out(static_cast<char*>(pool.memory((std::size_t)b.lay_out(nullptr, threads))), threads);
  if (b.grouped) b.pieces.fill();
  pool.run(threads, p.batch * p.kv_heads * b.splits, [](void* x, long i, int worker) { static_cast<B*>(x)->differentiate(i, worker); }, &b);
  pool.run(threads, ceil_div(b.query_rows(), PANEL), [](void* x, long i, int worker) { static_cast<B*>(x)->write_rows(i, worker); }, &b);
  pool.run(threads, ceil_div(b.key_rows(), PANEL), [](void* x, long i, int worker) { static_cast<B*>(x)->write_keys(i, worker); }, &b);
  if (g.dbias) write_bias(p, g, b.dbias, b.splits);
}

}  // namespace foveal::FOVEAL_VARIANT

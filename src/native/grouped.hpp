// The forward pass over Groups: packed documents, windows of a grid, clusters, routed blocks.
//
// A piece is some rows of one group. Its rows and keys are gathered by their positions while they are packed, so that
// nothing is padded, sorted or copied in memory. Where a row may be in several groups, one task walks through all groups of a
// key head in order and joins each piece to what its rows have so far; otherwise a task is a piece, or a few of a group.
#pragma once

#include <algorithm>

#include "across.hpp"
#include "listed.hpp"
#include "pool.hpp"
#include "softmax.hpp"

namespace foveal::FOVEAL_VARIANT {

constexpr long TASK_PIECES = 4;  // of one group that share what is packed, where there are tasks enough

// Groups cut into pieces, in an order in which the pieces of one key head follow each other.
struct Pieces {
  struct Piece {
    long group, first, rows;  // rows `first` … of all rows of all groups
  };
  const Groups& g;
  const long owners;          // key heads of all batch rows; or, where heads share the groups, batch rows
  long count = 0;
  Piece* piece = nullptr;
  long* start = nullptr;      // of each owner, and the end

  Pieces(const Problem& p, long most_rows) : g(p.groups), owners(p.batch * (g.per_head ? p.kv_heads : 1)), kv_heads(p.kv_heads), rows(most_rows) {
    for (long i = 0; i < g.count; i++) count += of_group(i);
  }

  void take(Carve& memory) {
    piece = memory.take<Piece>(count);
    start = memory.take<long>(owners + 1);
  }

  void fill() {
    std::memset(start, 0, (std::size_t)(owners + 1) * sizeof(long));
    for (long i = 0; i < g.count; i++) start[owner(i) + 1] += of_group(i);
    for (long o = 0; o < owners; o++) start[o + 1] += start[o];
    for (long i = 0; i < g.count; i++) {
      for (long first = g.cu_q[i]; of_group(i) && first < g.cu_q[i + 1]; first += rows)
        piece[start[owner(i)]++] = {i, first, least(rows, g.cu_q[i + 1] - first)};
    }
    for (long o = owners; o > 0; o--) start[o] = start[o - 1];
    start[0] = 0;
  }

  long pairs(long owner) const {
    long sum = 0;
    for (long n = start[owner]; n < start[owner + 1]; n++) sum += piece[n].rows * (g.cu_k[piece[n].group + 1] - g.cu_k[piece[n].group]);
    return sum;
  }

 private:
  const long kv_heads, rows;
  long of_group(long i) const { return g.cu_k[i + 1] > g.cu_k[i] ? ceil_div(g.cu_q[i + 1] - g.cu_q[i], rows) : 0; }
  long owner(long i) const { return g.per_head ? g.batch_of[i] * kv_heads + g.kv_of[i] : g.batch_of[i]; }
};

// Intervals of the rows of a piece, gathered into lo and hi.
inline Chunk chunk_of_piece(const Problem& p, const Pieces::Piece& piece, long h, std::int64_t* lo, std::int64_t* hi) {
  const Groups& g = p.groups;
  const long b = g.batch_of[piece.group], at = (p.visible.bounds_batch > 1 ? b : 0) * p.q_len;
  for (long r = 0; r < piece.rows; r++) {
    const long i = at + g.rows[piece.first + r] % p.q_len;
    lo[r] = p.visible.lo[i];
    hi[r] = p.visible.hi[i];
  }
  Chunk c = make_rows(p, nullptr, b, 0, piece.rows, lo, hi);
  c.h = g.per_head ? 0 : h;
  c.list = g.rows + piece.first;
  if (g.combine == Combine::apart) c.to = c.h * g.members + piece.first;
  return c;
}

inline long kv_of_piece(const Problem& p, const Pieces::Piece& piece, long h) {
  return p.groups.per_head ? p.groups.kv_of[piece.group] : h / (p.heads / p.kv_heads);
}

template <class P>
struct Grouped {
  static constexpr long PIECE_ROWS = P::pairs ? 96 : 128;  // whole register tiles where keys are packed, whole panels across the lanes
  // Panels of keys that are packed at once. A group of at most as many is packed once for all its pieces: half a small second-level
  // cache where heads have 64 channels.
  static constexpr long HELD_PANELS = 8, VALUE_STEPS = HELD_PANELS * PANEL / P::per_unit;

  const Problem& p;
  const Groups& g;
  const bool joint;             // rows may be in several groups
  const bool across;            // keys that all rows of a piece see are not packed
  const long copies, group;     // heads that share a piece; query heads per key head
  const long steps, wide, all_rows;
  const long task_rows;         // of one group
  long splits = 1;
  Pieces pieces;
  char* scratch = nullptr;
  long scratch_bytes = 0;
  long *turn = nullptr, *work = nullptr;  // key heads in the order in which they are begun, and how much each has to do
  float *sum_o = nullptr, *sum_most = nullptr, *sum_sum = nullptr;  // [splits][rows]: what a row has so far

  Grouped(const Problem& problem, int threads)
      : p(problem),
        g(p.groups),
        joint(g.combine == Combine::softmax),
        across(!P::pairs && Across::serves(p)),
        copies(g.per_head ? 1 : p.heads),
        group(p.heads / p.kv_heads),
        steps(steps_of<P>(p.dim)),
        wide(padded(p.dim_v)),
        all_rows(p.batch * p.heads * p.q_len),
        task_rows(joint || Pieces(p, TASK_PIECES * PIECE_ROWS).count * copies < FINE_TASKS * threads ? PIECE_ROWS : TASK_PIECES * PIECE_ROWS),
        pieces(p, task_rows) {
    if (joint) splits = copies_for(p.batch * p.kv_heads, 2 * threads, threads);
  }

  long tasks() const { return joint ? p.batch * p.kv_heads * splits : pieces.count * copies; }

  struct Scratch {
    Softmax<P> rows;
    Across across;
    Unit *keys, *values, *temp;
    std::int64_t *lo, *hi, *where;
    long held = -1, held_of = -1;  // the group whose keys are packed, and the key head
    Scratch(const Grouped& f, Carve& memory) : rows(f.p, PIECE_ROWS, memory), across(f.p, f.across ? PIECE_ROWS : 0, memory) {
      keys = memory.take<Unit>(HELD_PANELS * PANEL * f.steps);
      values = memory.take<Unit>(VALUE_STEPS * f.wide);
      temp = memory.take<Unit>(65 * f.steps + 2 * f.wide);
      lo = memory.take<std::int64_t>(PIECE_ROWS);
      hi = memory.take<std::int64_t>(PIECE_ROWS);
      where = memory.take<std::int64_t>(HELD_PANELS * PANEL);
    }
  };

  Scratch scratch_of(int worker) const {
    Carve memory{scratch + worker * scratch_bytes};
    return Scratch(*this, memory);
  }

  long lay_out(char* at, int threads) {
    Carve memory{at};
    pieces.take(memory);
    if (joint) {
      turn = memory.take<long>(p.batch * p.kv_heads);
      work = memory.take<long>(p.batch * p.kv_heads);
      sum_o = memory.take<float>(splits * all_rows * wide);
      sum_most = memory.take<float>(splits * all_rows);
      sum_sum = memory.take<float>(splits * all_rows);
    }
    Carve own{nullptr};
    Scratch(*this, own);
    scratch_bytes = own.at - (char*)nullptr;
    scratch = memory.take<char>(threads * scratch_bytes);
    return memory.at - at;
  }

  // Those with the most work first, so that no thread waits long for the last one.
  void fill() {
    pieces.fill();
    if (!joint) return;
    const long owners = p.batch * p.kv_heads;
    for (long i = 0; i < owners; i++) turn[i] = i, work[i] = pieces.pairs(owner_of(i));
    std::stable_sort(turn, turn + owners, [this](long a, long b) { return work[a] > work[b]; });
  }

  long owner_of(long head) const { return g.per_head ? head : head / p.kv_heads; }

  // Keys of one key head as the panel in this slot.
  void pack(const Scratch& mine, long b, long kv, const std::int64_t* list, long count, long slot) const {
    for (long j = 0; j < PANEL; j++) mine.where[slot * PANEL + j] = list[least(j, count - 1)];
    pack_columns<P>(p.k, p.type, b, kv, Rows{0, list}, count, p.dim, mine.keys + slot * PANEL * steps, mine.temp);
    pack_rows<P>(p.v, p.type, b, kv, Rows{0, list}, count, PANEL, p.dim_v, mine.values, VALUE_STEPS, slot * PANEL / P::per_unit,
                 reinterpret_cast<float*>(mine.temp));
  }

  // The rows of a piece over all keys of its group; `several` of them may follow each other.
  Chunk attend(const Pieces::Piece& piece, long h, Scratch& mine, bool several) const {
    const Softmax<P>& rows = mine.rows;
    const Chunk c = chunk_of_piece(p, piece, h, mine.lo, mine.hi);
    const long kv = kv_of_piece(p, piece, h);
    const std::int64_t* list = g.keys + g.cu_k[piece.group];
    const long listed = g.cu_k[piece.group + 1] - g.cu_k[piece.group];
    rows.begin(c);
    if constexpr (!P::pairs) {
      if (across && Across::pays(c.rows) && shows_whole(c, Rows{0, list}, listed)) {
        mine.across.attend(rows, c, kv, Rows{0, list}, listed);
        return c;
      }
    }
    const Keys from{mine.keys, mine.values, VALUE_STEPS, mine.where, HELD_PANELS * PANEL};
    const bool all_at_once = several && listed <= HELD_PANELS * PANEL;
    if (all_at_once && (mine.held != piece.group || mine.held_of != kv)) {
      for (long start = 0; start < listed; start += PANEL) pack(mine, c.b, kv, list + start, least(PANEL, listed - start), start / PANEL);
      mine.held = piece.group;
      mine.held_of = kv;
    }
    if (!all_at_once) mine.held = -1;
    long block[BLOCK_PANELS<P>], count = 0;
    bool cut_block = false;
    for (long start = 0; start < listed; start += PANEL) {
      const long here = least(PANEL, listed - start);
      std::uint64_t* bits = rows.bits + count;
      const Shows what = shows_listed(c, list + start, here, bits, BLOCK_PANELS<P>);
      if (what != Shows::nothing) {
        for (long r = 0; what == Shows::all && r < c.rows; r++) bits[r * BLOCK_PANELS<P>] = ~std::uint64_t(0);
        block[count] = all_at_once ? start / PANEL : count;
        if (!all_at_once) pack(mine, c.b, kv, list + start, here, count);
        cut_block = cut_block || what == Shows::some;
        count++;
      }
      if (count == BLOCK_PANELS<P> || (count && start + PANEL >= listed)) {
        cut_block ? rows.template step<true>(c, from, block, count) : rows.template step<false>(c, from, block, count);
        count = 0;
        cut_block = false;
      }
    }
    return c;
  }

  void attend_one(long index, int worker) const {
    [[maybe_unused]] const typename P::Session session;
    Scratch mine = scratch_of(worker);
    const Pieces::Piece& all = pieces.piece[index / copies];
    for (long r = 0; r < all.rows; r += PIECE_ROWS) {
      const Pieces::Piece piece{all.group, all.first + r, least(PIECE_ROWS, all.rows - r)};
      mine.rows.finish(attend(piece, index % copies, mine, all.rows > PIECE_ROWS));
    }
  }

  // All pieces of one key head, or a share of them: those that follow each other, whose keys are often the same.
  void attend_in_turn(long index, int worker) const {
    [[maybe_unused]] const typename P::Session session;
    const long split = index % splits, head = turn[index / splits], b = head / p.kv_heads, kv = head % p.kv_heads;
    Scratch mine = scratch_of(worker);
    const long first = (b * p.heads + kv * group) * p.q_len, at = split * all_rows;
    for (long r = first; r < first + group * p.q_len; r++) sum_most[at + r] = -INF, sum_sum[at + r] = 0.0f;
    const long of = owner_of(head);
    const long begin = pieces.start[of], all = pieces.start[of + 1] - begin;
    for (long n = begin + all * split / splits; n < begin + all * (split + 1) / splits; n++)
      for (long h = kv * group; h < (g.per_head ? kv * group + 1 : (kv + 1) * group); h++) {
        const Chunk c = attend(pieces.piece[n], h, mine, true);
        for (long r = 0; r < c.rows; r++) join(at + b * p.heads * p.q_len + query_of(c, r), mine.rows.o + r * wide, mine.rows.most_seen[r], mine.rows.sum[r]);
      }
    const long panels = ceil_div(p.q_len, PANEL);
    for (long i = 0; splits == 1 && i < group * panels; i++) write((b * p.heads + kv * group) * panels + i, worker);  // still in the cache
  }

  void join(long row, const float* o, float top, float total) const {
    if (total == 0.0f) return;
    float* to = sum_o + row * wide;
    if (sum_sum[row] == 0.0f) {
      std::memcpy(to, o, (std::size_t)wide * 4);
      sum_most[row] = top;
      sum_sum[row] = total;
      return;
    }
    const float now = sum_most[row] > top ? sum_most[row] : top;
    const float old_share = std::exp2(sum_most[row] - now), share = std::exp2(top - now);
    for (long i = 0; i < wide; i += LANES) store(to + i, fma(load(o + i), set1(share), mul(load(to + i), set1(old_share))));
    sum_most[row] = now;
    sum_sum[row] = sum_sum[row] * old_share + total * share;
  }

  // Out and lse of 64 rows of one head, from all splits in order.
  void write(long index, int worker) const {
    const Softmax<P> rows = scratch_of(worker).rows;
    const long panels = ceil_div(p.q_len, PANEL), head = index / panels, first = index % panels * PANEL;
    Chunk c = make_rows(p, nullptr, head / p.heads, first, least(PANEL, p.q_len - first));
    c.h = head % p.heads;
    for (long r = 0; r < c.rows; r++) {
      const long row = head * p.q_len + first + r;
      for (long s = 1; s < splits; s++) {
        const long other = s * all_rows + row;
        join(row, sum_o + other * wide, sum_most[other], sum_sum[other]);
      }
      if (sum_sum[row] == 0.0f) std::memset(sum_o + row * wide, 0, (std::size_t)wide * 4);
      rows.write(c, r, sum_o + row * wide, sum_most[row], sum_sum[row], 0.0f);
    }
  }
};

template <class P>
void grouped_as(const Problem& p, Pool& pool, int threads) {
  using G = Grouped<P>;
  G f(p, threads);
  f.lay_out(static_cast<char*>(pool.memory((std::size_t)f.lay_out(nullptr, threads))), threads);
  f.fill();
  if (!f.joint) return pool.run(threads, f.tasks(), [](void* x, long i, int worker) { static_cast<G*>(x)->attend_one(i, worker); }, &f);
  pool.run(threads, f.tasks(), [](void* x, long i, int worker) { static_cast<G*>(x)->attend_in_turn(i, worker); }, &f);
  if (f.splits == 1) return;
  pool.run(threads, p.batch * p.heads * ceil_div(p.q_len, PANEL), [](void* x, long i, int worker) { static_cast<G*>(x)->write(i, worker); }, &f);
}

}  // namespace foveal::FOVEAL_VARIANT

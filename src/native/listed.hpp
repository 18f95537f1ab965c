// Keys that are given as lists of positions: what they show to a chunk of rows.
#pragma once

#include "pack.hpp"
#include "visible.hpp"

namespace foveal::FOVEAL_VARIANT {

// Whether every row of the chunk sees all of these keys.
inline bool shows_whole(const Chunk& c, Rows which, long count) {
  const Problem& p = *c.problem;
  const std::uint8_t* valid = p.visible.valid ? p.visible.valid + (p.visible.valid_batch > 1 ? c.b : 0) * p.kv_len : nullptr;
  if (c.blind_rows || c.kinds) return false;
  if (!valid && c.lo_most <= 0 && c.hi_least >= p.kv_len) return true;
  for (long j = 0; j < count; j++)
    if (which[j] < c.lo_most || which[j] >= c.hi_least || (valid && !valid[which[j]])) return false;
  return true;
}

// As shows() and row_bits(), for up to 64 keys of `list`; bits of row i go to bits[i · stride].
inline Shows shows_listed(const Chunk& c, const std::int64_t* list, long count, std::uint64_t* bits, long stride) {
  const Problem& p = *c.problem;
  const std::uint8_t* valid = p.visible.valid ? p.visible.valid + (p.visible.valid_batch > 1 ? c.b : 0) * p.kv_len : nullptr;
  if (count == PANEL && !valid && !c.blind_rows && c.lo_most <= 0 && c.hi_least >= p.kv_len) return Shows::all;
  std::int64_t first = list[0], last = list[0];
  std::uint64_t real = 0;
  bool run = true;  // positions that follow each other
  for (long j = 0; j < count; j++) {
    run = run && list[j] == list[0] + j;
    first = least(first, list[j]);
    last = most(last, list[j]);
    real |= (std::uint64_t)(!valid || valid[list[j]]) << j;
  }
  if (!real || last < c.lo_least || first >= c.hi_most) return Shows::nothing;
  if (real == ~std::uint64_t(0) && !c.blind_rows && first >= c.lo_most && last < c.hi_least) return Shows::all;
  for (long i = 0; i < c.per_head; i++) {
    std::uint64_t seen = run ? ones(c.hi[i] - first) & ~ones(c.lo[i] - first) : 0;
    for (long j = 0; j < count && !run; j++) seen |= (std::uint64_t)(list[j] >= c.lo[i] && list[j] < c.hi[i]) << j;
    bits[i * stride] = seen & real;
  }
  return Shows::some;
}

// The list of block `block` of query head h without its pads; how many keys it has.
inline long keys_of_block(const Problem& p, long b, long h, long block, std::int64_t* list) {
  const Lists& l = p.lists;
  const std::int64_t* from = l.index + (((l.batch > 1 ? b : 0) * l.heads + h * l.heads / p.heads) * l.blocks + block) * l.width;
  long count = 0;
  for (long j = 0; j < l.width; j++) {
    list[count] = from[j];
    count += from[j] >= 0;
  }
  return count;
}

}  // namespace foveal::FOVEAL_VARIANT

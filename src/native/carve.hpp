// Memory of one call: parts of one block.
#pragma once

#include "problem.hpp"
#include "vec.hpp"

namespace foveal::FOVEAL_VARIANT {

constexpr float INF = __builtin_inff();

inline long padded(long channels) { return ceil_div(channels, 16) * 16; }

// Every part begins at a multiple of 64 bytes. Starting at null, it only counts.
struct Carve {
  char* at;
  template <class T>
  T* take(long count) {
    T* p = reinterpret_cast<T*>(at);
    at += (count * (long)sizeof(T) + 63) / 64 * 64;
    return p;
  }
};

// Into how many parts each task is split, each with sums of its own, so that all threads are equally busy. The number depends on
// `threads` only, never on how the work went, and the sums are added in order.
inline long copies_for(long tasks, long most_copies, int threads) {
  long splits = 1;
  while (splits < most_copies && splits < 2 * threads && tasks * splits % threads && tasks * splits < 8 * threads) splits++;
  return splits;
}

// Padding as one bit per key.
inline std::uint64_t* take_valid(const Problem& p, Carve& memory) {
  return p.visible.valid ? memory.take<std::uint64_t>(p.visible.valid_batch * ceil_div(p.kv_len, PANEL)) : nullptr;
}

inline void mark_valid(const Problem& p, std::uint64_t* bits) {
  const long panels = ceil_div(p.kv_len, PANEL);
  for (long b = 0; bits && b < p.visible.valid_batch; b++)
    for (long panel = 0; panel < panels; panel++) {
      std::uint64_t word = 0;
      const long count = least(PANEL, p.kv_len - panel * PANEL);
      for (long j = 0; j < count; j++) word |= (std::uint64_t)(p.visible.valid[b * p.kv_len + panel * PANEL + j] != 0) << j;
      bits[b * panels + panel] = word;
    }
}

}  // namespace foveal::FOVEAL_VARIANT

// Threads and memory that stay between calls. Compiled once, for every instruction set.
#pragma once

#include <cstddef>

namespace foveal {

constexpr long FINE_TASKS = 32;  // per thread, so that the last ones keep the others waiting for 3 % of the time at most

struct Pool {
  // Run task 0 … tasks−1 on up to `threads` threads, the caller among them; `worker` is below `threads`. Which thread runs
  // a task is open, so a task must write only what is its own.
  void run(int threads, long tasks, void (*task)(void* context, long index, int worker), void* context);

  // Uninitialised memory, 64-byte aligned, valid until the pool is released. One block per call.
  void* memory(std::size_t bytes);

  struct State;
  State* state;
  void* own = nullptr;  // memory of a call that found the shared one in use
};

// The pool of this process for the length of one call; a second caller at the same time gets one without helpers.
struct PoolLock {
  PoolLock();
  ~PoolLock();
  PoolLock(const PoolLock&) = delete;
  Pool pool;
};

// Asks the system for large pages for a result that is so large that its memory is surely fresh: touching it page by page takes
// as long as a sparse attention. Whether it is.
bool prefer_large_pages(void* data, std::size_t bytes);

}  // namespace foveal

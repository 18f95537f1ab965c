#include "pool.hpp"

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>

namespace foveal {

namespace {

constexpr std::size_t KEPT_BYTES = std::size_t(1) << 26;  // memory that stays between calls, at most
constexpr std::size_t FRESH_BYTES = std::size_t(1) << 25;  // glibc never keeps blocks of this size: they are mapped anew each time
constexpr int SPINS = 4000;                              // looks at the counter before a thread sleeps: some tens of µs

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

void* allocate(std::size_t bytes) {
  void* p = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!p) throw std::bad_alloc();
  return p;
}

}  // namespace

namespace {

// Torch's own threads, where they are GNU OpenMP's. They spin for a while after torch's last operation and would fight with
// threads of ours for the processors; so a job runs on them. A forked child must not use its parent's team.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

const pid_t home = getpid();  // where this library was loaded

Parallel torch_threads() {
  static const Parallel found = [] {
    void* library = dlopen("libgomp.so.1", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Parallel>(dlsym(library, "GOMP_parallel")) : nullptr;
  }();
  return getpid() == home ? found : nullptr;
}

struct Team {
  std::atomic<long> next{0};
  std::atomic<int> worker{0};
  long tasks;
  void (*task)(void*, long, int);
  void* context;

  static void work(void* self) {
    Team& t = *static_cast<Team*>(self);
    const int worker = t.worker.fetch_add(1);
    for (long i; (i = t.next.fetch_add(1, std::memory_order_relaxed)) < t.tasks;) t.task(t.context, i, worker);
  }
};

}  // namespace

struct Pool::State {
  const pid_t process = getpid();
  std::mutex busy;  // held for a whole call
  std::mutex mutex;
  std::condition_variable wake, done;
  std::atomic<std::uint64_t> round{0};  // counts jobs; a helper that sees a new number joins if it is wanted
  std::atomic<long> next{0};
  std::atomic<int> running{0};
  int helpers = 0, wanted = 0, sleeping = 0;
  bool waiting = false;
  long tasks = 0;
  void (*task)(void*, long, int) = nullptr;
  void* context = nullptr;
  void* kept = nullptr;
  std::size_t kept_bytes = 0;

  void work(int worker) {
    for (long i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(context, i, worker);
  }

  void help(int worker, std::uint64_t seen) {
    for (;;) {
      for (int i = 0; i < SPINS && round.load(std::memory_order_acquire) == seen; i++) relax();
      if (round.load(std::memory_order_acquire) == seen) {
        std::unique_lock lock(mutex);
        sleeping++;
        wake.wait(lock, [&] { return round.load() != seen; });
        sleeping--;
      }
      bool mine;
      {
        std::lock_guard lock(mutex);
        seen = round.load();
        mine = worker <= wanted;
      }
      if (!mine) continue;
      work(worker);
      if (running.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        std::lock_guard lock(mutex);
        if (waiting) done.notify_one();
      }
    }
  }
};

void Pool::run(int threads, long tasks, void (*task)(void*, long, int), void* context) {
  int helpers = (int)(threads < tasks ? threads : tasks) - 1;
  if (!state || helpers < 1) {
    for (long i = 0; i < tasks; i++) task(context, i, 0);
    return;
  }
  if (Parallel parallel = torch_threads()) {
    Team team{};
    team.tasks = tasks;
    team.task = task;
    team.context = context;
    parallel(Team::work, &team, (unsigned)helpers + 1, 0);
    return;
  }
  State& s = *state;
  {
    std::lock_guard lock(s.mutex);
    while (s.helpers < helpers) {
      int number = s.helpers + 1;
      std::thread([&s, number, seen = s.round.load()] { s.help(number, seen); }).detach();
      s.helpers++;
    }
    s.task = task;
    s.context = context;
    s.tasks = tasks;
    s.wanted = helpers;
    s.next.store(0);
    s.running.store(helpers);
    s.round.fetch_add(1, std::memory_order_release);
    if (s.sleeping) s.wake.notify_all();
  }
  s.work(0);
  for (int i = 0; i < SPINS && s.running.load(std::memory_order_acquire); i++) relax();
  if (s.running.load(std::memory_order_acquire)) {
    std::unique_lock lock(s.mutex);
    s.waiting = true;
    s.done.wait(lock, [&] { return s.running.load() == 0; });
    s.waiting = false;
  }
}

void* Pool::memory(std::size_t bytes) {
  if (state && bytes <= KEPT_BYTES) {
    if (state->kept_bytes < bytes) {
      std::free(state->kept);
      state->kept = nullptr;
      state->kept_bytes = 0;
      state->kept = allocate(bytes);
      state->kept_bytes = bytes;
    }
    return state->kept;
  }
  std::free(own);
  own = nullptr;
  return own = allocate(bytes);
}

namespace {

// The state is never destroyed: helpers may still look at it while the process ends. A forked child has none of its parent's
// threads and may have inherited locked mutexes, so it starts afresh.
std::atomic<Pool::State*> shared{nullptr};

Pool::State* current() {
  Pool::State* found = shared.load(std::memory_order_acquire);
  while (!found || found->process != getpid()) {
    Pool::State* fresh = new Pool::State;
    if (shared.compare_exchange_strong(found, fresh, std::memory_order_acq_rel)) return fresh;
    delete fresh;
  }
  return found;
}

}  // namespace

bool prefer_large_pages([[maybe_unused]] void* data, std::size_t bytes) {
  if (bytes < FRESH_BYTES) return false;
#if defined(MADV_HUGEPAGE)
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE)), begin = (reinterpret_cast<std::uintptr_t>(data) + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(begin), bytes - page, MADV_HUGEPAGE);  // advice only: where it is refused nothing changes
#endif
  return true;
}

PoolLock::PoolLock() {
  Pool::State* s = current();
  pool.state = s->busy.try_lock() ? s : nullptr;
}

PoolLock::~PoolLock() {
  std::free(pool.own);
  if (pool.state) pool.state->busy.unlock();
}

}  // namespace foveal

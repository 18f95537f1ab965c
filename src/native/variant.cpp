// One instruction set's kernels: this file is compiled once for each, with FOVEAL_VARIANT as its namespace.
// No standard containers here: an inline function compiled for a newer processor must never serve an older one.
#include "backward.hpp"
#include "few.hpp"
#include "forward.hpp"
#include "grouped.hpp"
#include "linear_threads.hpp"
#include "listed_backward.hpp"
#include "peak.hpp"
#include "rows.hpp"

#if defined(__AMX_BF16__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace foveal::FOVEAL_VARIANT {

#if defined(__AMX_BF16__)
// Whether there is a tile unit for bfloat16. Linux lets a process use it once it has asked: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
static bool has_tiles() {
  unsigned a, b, c, d;
  constexpr unsigned both = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & both) == both && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}
using Halves = Tiles;
#elif defined(__AVX512BF16__)
using Halves = Pairs;
#endif

static bool usable() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#if defined(__AMX_BF16__)
  if (!has_tiles()) return false;
#endif
#if defined(__AVX512BF16__)
  if (!__builtin_cpu_supports("avx512bf16")) return false;
#endif
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#endif
  return true;
}

template <class P, class Few>
static void forward_that_fits(const Problem& p, Pool& pool, int threads) {
  if (p.groups.count) return grouped_as<P>(p, pool, threads);
  // Waking a helper takes as long as half a million multiply-adds.
  const double work = (double)p.batch * p.heads * p.q_len * (p.lists.index ? p.lists.width : p.kv_len) * (p.dim + p.dim_v);
  if (work / (1 << 19) + 1 < threads) threads = (int)(work / (1 << 19)) + 1;
  if (!few(p)) return forward_as<P>(p, pool, threads);
  very_few(p) ? few_as<Floats>(p, pool, threads) : few_as<Few>(p, pool, threads);
}

static void forward(const Problem& p, Pool& pool, int threads) {
#if defined(__AVX512BF16__)
  if (p.type == Type::bf16) return forward_that_fits<Halves, Pairs>(p, pool, threads);
#endif
  forward_that_fits<Floats, Floats>(p, pool, threads);
}

template <class P>
static void backward_that_fits(const Problem& p, const Gradients& g, Pool& pool, int threads) {
  p.groups.count || p.lists.index ? listed_backward_as<P>(p, g, pool, threads) : backward_as<P>(p, g, pool, threads);
}

static void backward(const Problem& p, const Gradients& g, Pool& pool, int threads) {
#if defined(__AVX512BF16__)
  if (p.type == Type::bf16) return backward_that_fits<Halves>(p, g, pool, threads);
#endif
  backward_that_fits<Floats>(p, g, pool, threads);
}

#define FOVEAL_TEXT_OF(x) #x
#define FOVEAL_TEXT(x) FOVEAL_TEXT_OF(x)

extern const Variant variant{FOVEAL_TEXT(FOVEAL_VARIANT), usable, forward, backward, softmax_rows, pack_keys, linear, peak};

}  // namespace foveal::FOVEAL_VARIANT

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

namespace foveal::FOVEAL_VARIANT {

static bool usable() {
#if defined(__x86_64__)
  __builtin_cpu_init();
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

template <class P>
static void forward_that_fits(const Problem& p, Pool& pool, int threads) {
  if (p.groups.count) return grouped_as<P>(p, pool, threads);
  // Waking a helper takes as long as half a million multiply-adds.
  const double work = (double)p.batch * p.heads * p.q_len * (p.lists.index ? p.lists.width : p.kv_len) * (p.dim + p.dim_v);
  if (work / (1 << 19) + 1 < threads) threads = (int)(work / (1 << 19)) + 1;
  if (!few(p)) return forward_as<P>(p, pool, threads);
  very_few(p) ? few_as<Floats>(p, pool, threads) : few_as<P>(p, pool, threads);
}

static void forward(const Problem& p, Pool& pool, int threads) {
#if defined(__AVX512BF16__)
  if (p.type == Type::bf16) return forward_that_fits<Pairs>(p, pool, threads);
#endif
  forward_that_fits<Floats>(p, pool, threads);
}

template <class P>
static void backward_that_fits(const Problem& p, const Gradients& g, Pool& pool, int threads) {
  p.groups.count || p.lists.index ? listed_backward_as<P>(p, g, pool, threads) : backward_as<P>(p, g, pool, threads);
}

static void backward(const Problem& p, const Gradients& g, Pool& pool, int threads) {
#if defined(__AVX512BF16__)
  if (p.type == Type::bf16) return backward_that_fits<Pairs>(p, g, pool, threads);
#endif
  backward_that_fits<Floats>(p, g, pool, threads);
}

#define FOVEAL_TEXT_OF(x) #x
#define FOVEAL_TEXT(x) FOVEAL_TEXT_OF(x)

extern const Variant variant{FOVEAL_TEXT(FOVEAL_VARIANT), usable, forward, backward, softmax_rows, pack_keys, linear, peak};

}  // namespace foveal::FOVEAL_VARIANT

// One instruction set's kernels: this file is compiled once for each, with FOVEAL_VARIANT as its namespace.
// No standard containers here: an inline function compiled for a newer processor must never serve an older one.
#include "backward.hpp"
#include "forward.hpp"
#include "peak.hpp"

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

#define FOVEAL_TEXT_OF(x) #x
#define FOVEAL_TEXT(x) FOVEAL_TEXT_OF(x)

extern const Variant variant{FOVEAL_TEXT(FOVEAL_VARIANT), usable, forward, backward, peak};

}  // namespace foveal::FOVEAL_VARIANT

// The vector layer: one register of floats, and the few operations that the kernels need, for the instruction set that this
// translation unit is compiled for. Everything above this file is written once.
//
// Packed operands are arrays of 32-bit units. A unit is one float, or (Pairs) two bfloat16 neighbours along the summed axis.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace foveal::FOVEAL_VARIANT {

using Unit = std::uint32_t;

inline float as_float(Unit x) { float f; std::memcpy(&f, &x, 4); return f; }
inline Unit as_unit(float x) { Unit u; std::memcpy(&u, &x, 4); return u; }
inline long least(long a, long b) { return a < b ? a : b; }
inline long most(long a, long b) { return a > b ? a : b; }
inline long ceil_div(long a, long b) { return (a + b - 1) / b; }

// 2^f on [0, 1): minimax polynomials. EXACT is within 7.5e-8, QUICK (for weights that are rounded to bfloat16) within 2.6e-6.
constexpr float EXACT[6] = {0.9999999251f, 0.6931530732f, 0.240153617f, 0.05582631805f, 0.008989340095f, 0.001877576673f};
constexpr float QUICK[5] = {1.000002593f, 0.6930038345f, 0.2414427569f, 0.05201146062f, 0.01353416791f};

#if defined(__AVX512F__)

using Vec = __m512;
constexpr int LANES = 16;
constexpr int TILE_ROWS = 6, TILE_VECS = 4;  // 24 sums, 4 columns and 1 row value in 32 registers

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec set1(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load_units(const Unit* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline void stream(float* p, Vec x) { _mm512_stream_ps(p, x); }  // past the caches, p aligned to a vector; then end_stream()
inline void end_stream() { _mm_sfence(); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // b where either is NaN
inline float hsum(Vec x) { return _mm512_reduce_add_ps(x); }
inline float hmax(Vec x) { return _mm512_reduce_max_ps(x); }
inline Vec select(std::uint64_t bits, Vec yes, Vec no) { return _mm512_mask_mov_ps(no, (__mmask16)bits, yes); }

template <bool quick>
inline Vec polynomial(Vec f) {
  constexpr int degree = quick ? 4 : 5;
  constexpr const float* c = quick ? QUICK : EXACT;
  Vec p = fma(set1(c[degree]), f, set1(c[degree - 1]));
#pragma GCC unroll 8
  for (int i = degree - 2; i >= 0; i--) p = fma(p, f, set1(c[i]));
  return p;
}

// 2^x for any x: 0 where it is below the least normal number (a result that underflows costs a hundred cycles), NaN for NaN.
template <bool quick = false>
inline Vec exp2(Vec x) {
  const __mmask16 normal = _mm512_cmp_ps_mask(x, set1(-126.0f), _CMP_NLT_UQ);
  x = max(set1(-126.0f), x);
  Vec f = _mm512_reduce_ps(x, 1);  // x − floor(x)
  Vec p = polynomial<quick>(f);
  return _mm512_maskz_scalef_ps(normal, p, x);  // p · 2^floor(x)
}

// to[i] = sum of the lanes of x[i], for 16 vectors at once.
inline void hsum16(const Vec* x, float* to) {
  Vec t[8], u[4];
  for (int i = 0; i < 8; i++) t[i] = add(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
    u[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const Vec v = add(_mm512_shuffle_f32x4(u[0], u[1], 0x44), _mm512_shuffle_f32x4(u[0], u[1], 0xee));
  const Vec w = add(_mm512_shuffle_f32x4(u[2], u[3], 0x44), _mm512_shuffle_f32x4(u[2], u[3], 0xee));
  store(to, add(_mm512_shuffle_f32x4(v, w, 0x88), _mm512_shuffle_f32x4(v, w, 0xdd)));
}
inline Vec load_bf16(const std::uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}

#elif defined(__AVX2__)

using Vec = __m256;
constexpr int LANES = 8;
constexpr int TILE_ROWS = 6, TILE_VECS = 2;  // 12 sums, 2 columns and 1 row value in 16 registers

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec set1(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load_units(const Unit* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline void stream(float* p, Vec x) { _mm256_stream_ps(p, x); }
inline void end_stream() { _mm_sfence(); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline float hsum(Vec x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline float hmax(Vec x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline Vec select(std::uint64_t bits, Vec yes, Vec no) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  __m256i on = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)(bits & 255)), lane), lane);
  return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(on));
}
template <bool quick>
inline Vec polynomial(Vec f) {
  constexpr int degree = quick ? 4 : 5;
  constexpr const float* c = quick ? QUICK : EXACT;
  Vec p = fma(set1(c[degree]), f, set1(c[degree - 1]));
#pragma GCC unroll 8
  for (int i = degree - 2; i >= 0; i--) p = fma(p, f, set1(c[i]));
  return p;
}

template <bool quick = false>
inline Vec exp2(Vec x) {
  x = _mm256_min_ps(set1(127.0f), max(set1(-127.0f), x));
  Vec n = _mm256_floor_ps(x), f = sub(x, n);
  Vec p = polynomial<quick>(f);
  __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  Vec y = mul(p, _mm256_castsi256_ps(e));
  asm("" : "+x"(y));  // a caller's sum must not take the product in without its rounding: the same weights for every caller
  return y;
}

#else  // portable: the compiler's own vectors of 16 bytes (SSE2, NEON, …)

typedef float Vec __attribute__((vector_size(16)));
typedef std::int32_t Ints __attribute__((vector_size(16)));
constexpr int LANES = 4;
#if defined(__aarch64__)
constexpr int TILE_ROWS = 6, TILE_VECS = 4;
#else
constexpr int TILE_ROWS = 6, TILE_VECS = 2;
#endif

inline Vec zero() { return Vec{0, 0, 0, 0}; }
inline Vec set1(float x) { return Vec{x, x, x, x}; }
inline Vec load(const float* p) { Vec x; std::memcpy(&x, p, 16); return x; }
inline Vec load_units(const Unit* p) { Vec x; std::memcpy(&x, p, 16); return x; }
inline void store(float* p, Vec x) { std::memcpy(p, &x, 16); }
inline void stream(float* p, Vec x) { store(p, x); }
inline void end_stream() {}
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline float hsum(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline float hmax(Vec x) {
  float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}
inline Vec select(std::uint64_t bits, Vec yes, Vec no) {
  std::int32_t m = (std::int32_t)(bits & 15);
  return ((Ints{m, m, m, m} & Ints{1, 2, 4, 8}) != 0) ? yes : no;
}
template <bool quick>
inline Vec polynomial(Vec f) {
  constexpr int degree = quick ? 4 : 5;
  constexpr const float* c = quick ? QUICK : EXACT;
  Vec p = fma(set1(c[degree]), f, set1(c[degree - 1]));
#pragma GCC unroll 8
  for (int i = degree - 2; i >= 0; i--) p = fma(p, f, set1(c[i]));
  return p;
}

template <bool quick = false>
inline Vec exp2(Vec x) {
  x = max(set1(-127.0f), x);
  x = set1(127.0f) < x ? set1(127.0f) : x;
  Vec clean = x == x ? x : zero();  // NaN has no integer part
  Ints n = __builtin_convertvector(clean, Ints);
  n = n + (__builtin_convertvector(n, Vec) > clean);  // truncation went up: true is −1
  Vec f = x - __builtin_convertvector(n, Vec);
  Vec p = polynomial<quick>(f);
  Ints e = (n + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &e, 16);
  return p * scale;
}

#endif

// --- bfloat16 and float16 in memory --------------------------------------------------------------------------------------

inline float from_bf16(std::uint16_t x) { return as_float((Unit)x << 16); }

inline std::uint16_t to_bf16(float x) {  // to nearest, ties to even
  Unit u = as_unit(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (std::uint16_t)((u >> 16) | 0x40);
  return (std::uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

inline float from_f16(std::uint16_t h) {
  Unit sign = (Unit)(h & 0x8000u) << 16, rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return as_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  float x = as_float(rest << 13) * as_float(0x77800000u);  // · 2^112 puts the exponent right, also of subnormal numbers
  return as_float(as_unit(x) | sign);
}

inline std::uint16_t to_f16(float x) {  // to nearest, ties to even
  Unit u = as_unit(x), sign = (u >> 16) & 0x8000u;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return (std::uint16_t)(sign | 0x7e00u);
  if (u >= 0x477ff000u) return (std::uint16_t)(sign | 0x7c00u);
  if (u < 0x38800000u) {  // subnormal: the sum rounds at the right place
    float y = as_float(u) + 0.5f;
    return (std::uint16_t)(sign | (as_unit(y) - 0x3f000000u));
  }
  u += 0xc8000fffu + ((u >> 13) & 1);
  return (std::uint16_t)(sign | (u >> 13));
}

#if !defined(__AVX512F__)
inline void hsum16(const Vec* x, float* to) {
  for (int i = 0; i < 16; i++) to[i] = hsum(x[i]);
}
inline Vec load_bf16(const std::uint16_t* p) {
  float f[LANES];
  for (int i = 0; i < LANES; i++) f[i] = from_bf16(p[i]);
  return load(f);
}
#endif

// --- how a product adds up ------------------------------------------------------------------------------------------------

struct Idle {  // what a thread needs to hold while it computes: nothing
  Idle() {}
};

struct Floats {  // one float per unit
  using Session = Idle;
  static constexpr bool pairs = false, tiles = false;
  static constexpr int per_unit = 1;
  static constexpr long rows_at_once = TILE_ROWS;  // between two products
  static inline Vec step(Vec sum, Unit a, Vec b) { return fma(set1(as_float(a)), b, sum); }
};

#if defined(__AVX512BF16__)
struct Pairs {  // two bfloat16 per unit: sum += a₀·b₀ + a₁·b₁, in float32
  using Session = Idle;
  static constexpr bool pairs = true, tiles = false;
  static constexpr int per_unit = 2;
  static constexpr long rows_at_once = TILE_ROWS;
  static inline Vec step(Vec sum, Unit a, Vec b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)_mm512_castps_si512(b));
  }
};
#endif

#if defined(__AMX_BF16__)
struct Tiles : Pairs {  // products in the tile unit: 16 × 16 sums at a time
  static constexpr bool tiles = true;
  static constexpr long rows_at_once = 32;
  struct Session {  // all eight tiles whole: 16 rows of 64 bytes
    Session() {
      alignas(64) static constexpr struct {
        std::uint8_t palette = 1, rest[15] = {};
        std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } whole;
      _tile_loadconfig(&whole);
    }
    ~Session() { _tile_release(); }
    Session(const Session&) = delete;
  };
};
#endif

#if defined(__AVX512BF16__)
// Two rows of 16 floats as bfloat16: each in order, and as 16 units that pair the two rows.
inline void store_both(std::uint16_t* row0, std::uint16_t* row1, Unit* pairs, Vec a, Vec b) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);  // a in the lower half
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(row0), _mm512_castsi512_si256(both));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(row1), _mm512_extracti64x4_epi64(both, 1));
  _mm512_storeu_si512(pairs, _mm512_permutexvar_epi16(order, both));
}
#endif

// a · b + c with one rounding where the processor can, always: left to the compiler, two builds of a loop may round differently.
inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// 16 floats as bfloat16, in order.
inline void store_bf16(std::uint16_t* p, const Vec* x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x[0]));
#else
  float f[16];
  for (int i = 0; i < 16 / LANES; i++) store(f + i * LANES, x[i]);
  for (int i = 0; i < 16; i++) p[i] = to_bf16(f[i]);
#endif
}

}  // namespace foveal::FOVEAL_VARIANT

// Packing: rows of any stride and type become operands of the register tile.
//
//   panel of columns (keys):   64 rows × D, transposed   →  [step][64]      for q·kᵀ
//   panel of rows (values):    rows × ≤ 64 channels      →  [step][width]   for p·v; with Pairs two rows share a step
//   left operand (queries):    rows × D                  →  [row][step]
#pragma once

#include "problem.hpp"
#include "vec.hpp"

namespace foveal::FOVEAL_VARIANT {

inline long size_of(Type type) { return type == Type::f32 ? 4 : 2; }

inline const char* row_at(const Strided& x, Type type, long b, long h, long n) {
  return static_cast<const char*>(x.data) + (b * x.step[0] + h * x.step[1] + n * x.step[2]) * size_of(type);
}

// Rows first, first + 1, … or, with a list, first + list[0], first + list[1], … With `across` they count on over the heads,
// each of which has that many rows.
struct Rows {
  long first;
  const std::int64_t* list = nullptr;
  long across = 0;
  long operator[](long r) const { return first + (list ? list[r] : r); }
};

inline const char* row_at(const Strided& x, Type type, long b, long h, const Rows& which, long r) {
  const long n = which[r];
  return which.across ? row_at(x, type, b, h + n / which.across, n % which.across) : row_at(x, type, b, h, n);
}

// Channel values of one row as floats.
inline void read_floats(Type type, const char* row, long step, long count, float* to) {
  if (type == Type::f32) {
    const float* x = reinterpret_cast<const float*>(row);
    if (step == 1) {
      std::memcpy(to, x, (std::size_t)count * 4);
    } else {
      for (long i = 0; i < count; i++) to[i] = x[i * step];
    }
  } else if (type == Type::bf16) {
    const std::uint16_t* x = reinterpret_cast<const std::uint16_t*>(row);
    if (step == 1) {
      for (long i = 0; i < count; i++) to[i] = from_bf16(x[i]);
    } else {
      for (long i = 0; i < count; i++) to[i] = from_bf16(x[i * step]);
    }
  } else {
    const std::uint16_t* x = reinterpret_cast<const std::uint16_t*>(row);
    for (long i = 0; i < count; i++) to[i] = from_f16(x[i * step]);
  }
}

inline void write_floats(Type type, const float* from, long count, char* row) {
  if (type == Type::f32) {
    std::memcpy(row, from, (std::size_t)count * 4);
  } else if (type == Type::bf16) {
    std::uint16_t* x = reinterpret_cast<std::uint16_t*>(row);
    for (long i = 0; i < count; i++) x[i] = to_bf16(from[i]);
  } else {
    std::uint16_t* x = reinterpret_cast<std::uint16_t*>(row);
    for (long i = 0; i < count; i++) x[i] = to_f16(from[i]);
  }
}

template <class P>
constexpr long steps_of(long summed) { return ceil_div(summed, P::per_unit); }

// One row as units: where it lies if it can be used there, else copied to `temp` (steps_of<P>(count) units).
template <class P>
inline const Unit* row_units(Type type, const char* row, long step, long count, Unit* temp) {
  if constexpr (P::pairs) {  // only chosen for bfloat16 inputs
    if (step == 1 && count % 2 == 0) return reinterpret_cast<const Unit*>(row);
    const std::uint16_t* x = reinterpret_cast<const std::uint16_t*>(row);
    for (long i = 0; i < count / 2; i++) temp[i] = x[2 * i * step] | (Unit)x[(2 * i + 1) * step] << 16;
    if (count % 2) temp[count / 2] = x[(count - 1) * step];
  } else {
    if (step == 1 && type == Type::f32) return reinterpret_cast<const Unit*>(row);
    read_floats(type, row, step, count, reinterpret_cast<float*>(temp));
  }
  return temp;
}

#if defined(__AVX512F__)
// 16 rows of `count` ≤ 16 units become `count` rows of 16.
inline void transpose16(const Unit* const* rows, long at, long count, Unit* to, long ld) {
  const __mmask16 some = (__mmask16)((1u << count) - 1);
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i++) a[i] = _mm512_maskz_loadu_epi32(some, rows[i] + at);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
    a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
    a[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd);
  }
  for (int i = 0; i < 16; i++)
    if (i < count) _mm512_storeu_si512(to + i * ld, a[i]);
}
#else
#if defined(__AVX2__)
// 8 rows of 8 units become 8 rows of 8.
inline void transpose8(const Unit* const* rows, long at, Unit* to, long ld) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i++) a[i] = load_units(rows[i] + at);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(reinterpret_cast<float*>(to + i * ld), _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(reinterpret_cast<float*>(to + (i + 4) * ld), _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}
#endif

inline void transpose16(const Unit* const* rows, long at, long count, Unit* to, long ld) {
#if defined(__AVX2__)
  for (; count >= 8; count -= 8, at += 8, to += 8 * ld) {
    transpose8(rows, at, to, ld);
    transpose8(rows + 8, at, to + 8, ld);
  }
#endif
  for (long i = 0; i < count; i++)
    for (int r = 0; r < 16; r++) to[i * ld + r] = rows[r][at + i];
}
#endif

// Up to 64 rows of `x` as a panel of columns, `to` [steps][64]; missing rows are zero. `temp`: 65 · steps units.
template <class P>
inline void pack_columns(const Strided& x, Type type, long b, long h, Rows which, long count, long dim, Unit* to, Unit* temp) {
  const long steps = steps_of<P>(dim);
  const Unit* rows[PANEL];
  Unit* none = temp + PANEL * steps;
  if (count < PANEL) std::memset(none, 0, (std::size_t)steps * 4);
  for (long r = 0; r < PANEL; r++) {
    rows[r] = r < count ? row_units<P>(type, row_at(x, type, b, h, which, r), x.step[3], dim, temp + r * steps) : none;
  }
  for (long r = 0; r < PANEL; r += 16)
    for (long s = 0; s < steps; s += 16) transpose16(rows + r, s, least(16, steps - s), to + s * PANEL + r, PANEL);
}

// Rows of `x` as panels of at most 64 channels, each [steps][width] with the width padded to 16; missing rows are zero.
// Channels c0 … c0 + 63 of step s lie at `to + c0 · panel_steps + (first_step + s) · width`. `temp`: 2 · padded channels floats.
template <class P>
inline void pack_rows(const Strided& x, Type type, long b, long h, Rows which, long count, long padded_count, long dim,
                      Unit* to, long panel_steps, long first_step, float* temp) {
  const long padded = ceil_div(dim, 16) * 16;
  for (long r = 0; r < padded_count; r += P::per_unit) {
    const long s = first_step + r / P::per_unit;
    if constexpr (P::pairs) {
      std::uint16_t* pair[2] = {reinterpret_cast<std::uint16_t*>(temp), reinterpret_cast<std::uint16_t*>(temp + padded)};
      const std::uint16_t* from[2];
      for (int i = 0; i < 2; i++) {
        const std::uint16_t* row = r + i < count ? reinterpret_cast<const std::uint16_t*>(row_at(x, type, b, h, which, r + i)) : nullptr;
        if (row && x.step[3] == 1 && padded == dim) {
          from[i] = row;
          continue;
        }
        for (long c = 0; c < padded; c++) pair[i][c] = row && c < dim ? row[c * x.step[3]] : (std::uint16_t)0;
        from[i] = pair[i];
      }
      for (long c0 = 0; c0 < padded; c0 += PANEL) {
        const long width = least(PANEL, padded - c0);
        Unit* line = to + c0 * panel_steps + s * width;
        for (long c = 0; c < width; c++) line[c] = from[0][c0 + c] | (Unit)from[1][c0 + c] << 16;
      }
    } else {
      const float* row = temp;
      if (r < count) {
        const char* from = row_at(x, type, b, h, which, r);
        if (type == Type::f32 && x.step[3] == 1 && padded == dim) {
          row = reinterpret_cast<const float*>(from);
        } else {
          read_floats(type, from, x.step[3], dim, temp);
          for (long c = dim; c < padded; c++) temp[c] = 0.0f;
        }
      } else {
        for (long c = 0; c < padded; c++) temp[c] = 0.0f;
      }
      for (long c0 = 0; c0 < padded; c0 += PANEL) {
        const long width = least(PANEL, padded - c0);
        float* line = reinterpret_cast<float*>(to + c0 * panel_steps + s * width);
        for (long c = 0; c < width; c += LANES) store(line + c, load(row + c0 + c));
      }
    }
  }
}

// Whether pack_rows would copy float rows as they lie: nothing to convert or to pad, one panel of channels, whole cache lines.
inline bool rows_are_packed(const Strided& x, Type type, long dim) {
  const bool lines = reinterpret_cast<std::uintptr_t>(x.data) % 64 == 0 && x.step[0] % 16 == 0 && x.step[1] % 16 == 0;
  return type == Type::f32 && dim <= PANEL && dim % 16 == 0 && x.step[3] == 1 && x.step[2] == dim && lines;
}

// Rows of `x` as a left operand, `to` [count][steps].
template <class P>
inline void pack_left(const Strided& x, Type type, long b, long h, Rows which, long count, long dim, Unit* to) {
  const long steps = steps_of<P>(dim);
  for (long r = 0; r < count; r++) {
    Unit* line = to + r * steps;
    const Unit* row = row_units<P>(type, row_at(x, type, b, h, which, r), x.step[3], dim, line);
    if (row != line) std::memcpy(line, row, (std::size_t)steps * 4);
  }
}

}  // namespace foveal::FOVEAL_VARIANT

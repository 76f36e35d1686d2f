// Tiles of bfloat16 numbers, multiplied by the instructions for pairs of them (AVX512_BF16), which sum in float32. Compiled
// with the flags of that instruction set where the compiler knows them; without, there are no such kernels.
#include "kernels.h"

#if defined(__AVX512BF16__)

#define STRUCTMAT_ISA isa_bfloat16
#include "pairs.h"

namespace structmat {
namespace isa_bfloat16 {

constexpr int lines = 8;                      // of the outcome whose sums stay in registers: rows b of a panel
constexpr int64_t pack_pairs_together = 32;  // matrices of neighbouring d that are packed at a time

inline uint32_t word(const Bits* p) {
  uint32_t w;
  std::memcpy(&w, p, sizeof w);
  return w;
}

// ------------------------------------------------------------------------------------------------- transposition

void load(const Bits* x, int64_t stride, int64_t count, int64_t features, Bits* tile, int64_t columns) {
  for (int64_t c = 0; c < columns; c += 16) {
    const int64_t valid = count - c < 16 ? (count - c < 0 ? 0 : count - c) : 16;
    int64_t f = 0;
    for (; f + 32 <= features; f += 32) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) r[i] = i < valid ? line(x + (c + i) * stride + f) : _mm512_setzero_si512();
      turn(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        Bits* to = tile + (f + 2 * i) * columns + c;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(r[i]));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + columns),
                            _mm512_cvtepi32_epi16(_mm512_srli_epi32(r[i], 16)));
      }
    }
    for (; f < features; ++f)
      for (int64_t i = 0; i < 16; ++i) tile[f * columns + c + i] = i < valid ? x[(c + i) * stride + f] : Bits(0);
  }
}

inline float wide(Bits x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline Bits narrow(float value) {
  const __m128bh rounded = _mm_cvtneps_pbh(_mm_set_ss(value));
  Bits bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  return bits;
}

// 16 numbers of a row, widened to words; with the bias added, and rounded again.
inline __m512i words(const Bits* p, const Bits* bias) {
  __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  if (!bias) return w;
  const __m512 sum = _mm512_add_ps(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), _mm512_set1_ps(wide(*bias)));
  const __m256bh rounded = _mm512_cvtneps_pbh(sum);
  __m256i bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  return _mm512_cvtepu16_epi32(bits);
}

void store(const Bits* tile, int64_t columns, const Bits* bias, Bits* y, int64_t stride, int64_t count,
           int64_t features) {
  for (int64_t c = 0; c < columns && c < count; c += 16) {
    const int64_t valid = count - c < 16 ? count - c : 16;
    int64_t f = 0;
    for (; f + 32 <= features; f += 32) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const Bits *from = tile + (f + 2 * i) * columns + c, *own = bias ? bias + f + 2 * i : nullptr;
        r[i] = _mm512_or_si512(words(from, own), _mm512_slli_epi32(words(from + columns, own ? own + 1 : own), 16));
      }
      turn(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (i < valid) _mm512_storeu_si512(y + (c + i) * stride + f, r[i]);
    }
    for (; f < features; ++f)
      for (int64_t i = 0; i < valid; ++i) {
        const Bits value = tile[f * columns + c + i];
        y[(c + i) * stride + f] = bias ? narrow(wide(value) + wide(bias[f])) : value;
      }
  }
}

// Without transposition: row after row of the tile, a part of one in memory.
void load_by_features(const Bits* x, int64_t stride, int64_t count, int64_t features, Bits* tile, int64_t columns) {
  const int64_t valid = count < columns ? count : columns;
  for (int64_t f = 0; f < features; ++f, x += stride, tile += columns) {
    std::memcpy(tile, x, size_t(valid) * sizeof *x);
    std::memset(tile + valid, 0, size_t(columns - valid) * sizeof *tile);
  }
}

void store_by_features(const Bits* tile, int64_t columns, const Bits* bias, Bits* y, int64_t stride, int64_t count,
                       int64_t features) {
  const int64_t valid = count < columns ? count : columns;
  for (int64_t f = 0; f < features; ++f, y += stride, tile += columns) {
    if (bias)
      for (int64_t c = 0; c < valid; ++c) y[c] = narrow(wide(tile[c]) + wide(bias[f]));
    else
      std::memcpy(y, tile, size_t(valid) * sizeof *y);
  }
}

// ------------------------------------------------------------------------------------------------------- products

// Weights are read where they are if pairs of columns lie side by side, and all d share them.
Panels panels(const Contract& s) {
  if (s.stride_c == 1 && s.stride_d == 0 && s.c % 2 == 0) return {0, 0};
  const int64_t a = s.stride_a ? s.a : 1, deep = s.stride_d ? s.d : 1;
  const int64_t groups = (deep + pack_pairs_together - 1) / pack_pairs_together, tall = (s.b + lines - 1) / lines;
  return {a * groups * tall, a * deep * s.b * ((s.c + 1) / 2 * 2)};
}

// Panels hold pair after pair of columns, of each the rows of the panel; the number that an odd column lacks is zero.
void pack(const Contract& s, const Bits* weight, Bits* packed, int64_t begin, int64_t end) {
  const int64_t pairs = (s.c + 1) / 2, matrix = 2 * pairs * s.b, deep = s.stride_d ? s.d : 1;
  const int64_t groups = (deep + pack_pairs_together - 1) / pack_pairs_together, tall = (s.b + lines - 1) / lines;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t a = unit / (groups * tall), first = unit / tall % groups * pack_pairs_together;
    const int64_t last = first + pack_pairs_together < deep ? first + pack_pairs_together : deep;
    const int64_t b = unit % tall * lines;
    const int64_t height = s.b - b < lines ? s.b - b : lines;
    const Bits* from = weight + a * s.stride_a + b * s.stride_b;
    Bits* to = packed + a * deep * matrix + b * 2 * pairs;
    int64_t j = 0;
    // 32 matrices of neighbouring d at a time: four columns of eight rows become one line of each.
    if (s.stride_d == 1 && height == lines && last - first == pack_pairs_together)
      for (; 2 * j + 4 <= s.c; j += 2) {
        __m512i low[16], high[16];
#pragma GCC unroll 16
        for (int q = 0; q < 16; ++q) {
          const Bits* own = from + first + q % 8 * s.stride_b + 2 * (j + q / 8) * s.stride_c;
          const __m512i one = line(own), two = line(own + s.stride_c);
          low[q] = _mm512_unpacklo_epi16(one, two), high[q] = _mm512_unpackhi_epi16(one, two);
        }
        turn(low), turn(high);
#pragma GCC unroll 16
        for (int q = 0; q < 16; ++q) {
          const int64_t d = first + q / 4 * 8 + q % 4;
          _mm512_storeu_si512(to + d * matrix + 2 * j * lines, low[q]);
          _mm512_storeu_si512(to + (d + 4) * matrix + 2 * j * lines, high[q]);
        }
      }
    for (; j < pairs; ++j)
      for (int64_t i = 0; i < height; ++i) {
        const Bits *one = from + i * s.stride_b + 2 * j * s.stride_c, *two = one + s.stride_c;
        for (int64_t d = first; d < last; ++d) {
          Bits* pair = to + d * matrix + 2 * (j * height + i);
          pair[0] = one[d * s.stride_d], pair[1] = 2 * j + 1 < s.c ? two[d * s.stride_d] : Bits(0);
        }
      }
  }
}

template <int rows>
inline void block(const Bits* w, int64_t wi, int64_t wj, const __m512i* pairs, int64_t count, Bits* y, int64_t y_stride,
                  bool add) {
  __m512 sum[rows][2];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
    const __m512i before = add ? line(y + i * y_stride) : _mm512_setzero_si512();
    sum[i][0] = widen_low(before), sum[i][1] = widen_high(before);
  }
  for (int64_t j = 0; j < count; ++j) {
    const __m512bh low = (__m512bh)pairs[2 * j], high = (__m512bh)pairs[2 * j + 1];
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const __m512bh factor = (__m512bh)_mm512_set1_epi32(int(word(w + i * wi + j * wj)));
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], low, factor);
      sum[i][1] = _mm512_dpbf16_ps(sum[i][1], high, factor);
    }
  }
  const Rounding rounding;
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) rounding.put(y + i * y_stride, sum[i][0], sum[i][1]);
}

template <int rows>
inline void rest(int64_t b, const Bits* w, int64_t wi, int64_t wj, const __m512i* pairs, int64_t count, Bits* y,
                 int64_t y_stride, bool add) {
  if constexpr (rows >= 1) {
    if (b & rows) {
      block<rows>(w, wi, wj, pairs, count, y, y_stride, add);
      w += rows * wi, y += rows * y_stride;
    }
    rest<rows / 2>(b, w, wi, wj, pairs, count, y, y_stride, add);
  }
}

// One matrix times 32 columns.
inline void multiply(const Contract& s, const Bits* w, bool packed, const Bits* x, int64_t pitch, Bits* y,
                     __m512i* pairs, bool add) {
  const int64_t count = (s.c + 1) / 2;
  pair_up(x, pitch, s.c, 2 * count, pairs);
  for (int64_t b = 0; b < s.b; b += lines) {
    const int64_t height = s.b - b < lines ? s.b - b : lines;
    const Bits* own = packed ? w + b * 2 * count : w + b * s.stride_b;
    const int64_t wi = packed ? 2 : s.stride_b, wj = packed ? 2 * height : 2;
    if (height == lines)
      block<lines>(own, wi, wj, pairs, count, y + b * pitch, pitch, add);
    else
      rest<lines / 2>(height, own, wi, wj, pairs, count, y + b * pitch, pitch, add);
  }
}

void contract(const Contract& s, const Bits* weight, const Bits* x, Bits* y, Bits* scratch, int64_t columns, bool add) {
  const bool packed = panels(s).units > 0;
  __m512i* pairs = reinterpret_cast<__m512i*>(scratch);
  const int64_t pitch = s.d * columns, matrix = (s.c + 1) / 2 * 2 * s.b;
  const int64_t step_a = !s.stride_a ? 0 : packed ? matrix * (s.stride_d ? s.d : 1) : s.stride_a;
  for (int64_t a = 0; a < s.a; ++a)
    for (int64_t p = 0; p < pitch; p += lanes) {
      const Bits* w = weight + a * step_a + (s.stride_d ? p / columns * matrix : 0);
      multiply(s, w, packed, x + a * s.c * pitch + p, pitch, y + a * s.b * pitch + p, pairs, add);
    }
}

void copy(const Bits* x, Bits* y, int64_t rows, int64_t columns, bool add) {
  if (!add) {
    std::memcpy(y, x, size_t(rows * columns) * sizeof *x);
    return;
  }
  const Rounding rounding;
  for (int64_t p = 0; p < rows * columns; p += lanes) {
    const __m512i one = line(y + p), two = line(x + p);
    rounding.put(y + p, _mm512_add_ps(widen_low(one), widen_low(two)), _mm512_add_ps(widen_high(one), widen_high(two)));
  }
}

const PairKernels kernels = {load, store, load_by_features, store_by_features, panels, pack, contract, copy};

}  // namespace isa_bfloat16

const PairKernels* pair_kernels() { return &isa_bfloat16::kernels; }

}  // namespace structmat

#else

namespace structmat {
const PairKernels* pair_kernels() { return nullptr; }
}  // namespace structmat

#endif

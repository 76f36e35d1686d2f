// Pairs of neighbouring rows of a tile of bfloat16 numbers, which multiply together: what all kernels for them share.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "kernels.h"
#include "vectors.h"

namespace structmat {
namespace STRUCTMAT_ISA {

typedef uint16_t Bits;  // of one number

constexpr int64_t lanes = pair_columns;  // columns of the tile in one register

inline __m512i line(const Bits* p) { return _mm512_loadu_si512(p); }

// 16 x 16 words of 32 bits, transposed.
inline void turn(__m512i* r) {
  V<float> v[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = V<float>(_mm512_castsi512_ps(r[i]));
  transpose<float>(v);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_castps_si512(__m512(v[i]));
}

// Rows of x two by two, as the products read them: words of a pair for 16 columns, and for the other 16. Rows from c on
// are zero, up to `padded`, which is even.
inline void pair_up(const Bits* x, int64_t stride, int64_t c, int64_t padded, __m512i* pairs) {
  const __m512i zero = _mm512_setzero_si512();
  for (int64_t j = 0; j < c; j += 2) {
    const __m512i one = line(x + j * stride), two = j + 1 < c ? line(x + (j + 1) * stride) : zero;
    pairs[j] = _mm512_unpacklo_epi16(one, two), pairs[j + 1] = _mm512_unpackhi_epi16(one, two);
  }
  for (int64_t j = (c + 1) / 2 * 2; j < padded; ++j) pairs[j] = zero;
}

// A row in float32, in the order of columns that pairs have: 16 of them, and the other 16.
inline __m512 widen_low(__m512i row) {
  return _mm512_castsi512_ps(_mm512_unpacklo_epi16(_mm512_setzero_si512(), row));
}
inline __m512 widen_high(__m512i row) {
  return _mm512_castsi512_ps(_mm512_unpackhi_epi16(_mm512_setzero_si512(), row));
}

// Back to a row of bfloat16 numbers in the order of the tile.
class Rounding {
 public:
  Rounding() {
    Bits index[32];
    for (int p = 0; p < 32; ++p) index[p] = Bits(p % 8 < 4 ? p / 8 * 4 + p % 8 : 16 + p / 8 * 4 + p % 8 - 4);
    order_ = _mm512_loadu_si512(index);
  }
  void put(Bits* row, __m512 low, __m512 high) const {
    _mm512_storeu_si512(row, _mm512_permutexvar_epi16(order_, (__m512i)_mm512_cvtne2ps_pbh(high, low)));
  }

 private:
  __m512i order_;
};

}  // namespace STRUCTMAT_ISA
}  // namespace structmat

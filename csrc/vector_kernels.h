// Stages on a few vectors, each contiguous: what runs where a batch is too small to fill the lanes of a tile. Here the
// lanes run over features, so that every number of a weight is read once for all vectors.
//
// Vectors lie `pitch` numbers apart. A contraction is cut into units of `unit_lines` lines b, for threads to share.
#pragma once

#include <algorithm>

#include "gradients.h"
#include "kernels.h"
#include "vectors.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace structmat {
namespace STRUCTMAT_ISA {

// Lines of a matrix whose numbers are contiguous, by dot products: as many sums as one register has lanes, for `together`
// vectors at a time.
template <class Real, int together>
void dot_lines(const Real* w, int64_t stride, int64_t lines, int64_t length, const Real* x, Real* y, int64_t pitch_x,
               int64_t pitch_y, bool add) {
  constexpr int n = Vector<Real>::lanes, at_once = n / together;
  static_assert(at_once > 0, "a register has room for a sum of each vector");
  const int64_t whole = length / n * n, rest = has_masks ? length - whole : 0;
  const auto rest_of = [&](const Real* line, const Real* vector) {
    Real sum = 0;
    for (int64_t c = whole + rest; c < length; ++c) sum += line[c] * vector[c];
    return sum;
  };
  int64_t b = 0;
  for (; b + at_once <= lines; b += at_once) {
    V<Real> sum[n] = {};
    const Real* line = w + b * stride;
    const auto take = [&](int64_t c, const auto& read) {
      V<Real> values[together];
#pragma GCC unroll 4
      for (int r = 0; r < together; ++r) values[r] = read(x + r * pitch_x + c);
#pragma GCC unroll 16
      for (int i = 0; i < at_once; ++i) {
        const V<Real> factor = read(line + i * stride + c);
#pragma GCC unroll 4
        for (int r = 0; r < together; ++r) sum[r * at_once + i] += factor * values[r];
      }
    };
    for (int64_t c = 0; c < whole; c += n) take(c, [](const Real* p) { return at(p); });
    if (rest) take(whole, [&](const Real* p) { return first_of(p, rest); });
    const V<Real> total = sum_lanes<Real>(sum);
    if constexpr (has_masks && together == 1) {  // nothing is left over
      put(y + b, add ? at(y + b) + total : total);
      continue;
    }
    for (int r = 0; r < together; ++r)
      for (int i = 0; i < at_once; ++i) {
        Real* to = y + r * pitch_y + b + i;
        *to = total[r * at_once + i] + rest_of(line + i * stride, x + r * pitch_x) + (add ? *to : Real(0));
      }
  }
  for (; b < lines; ++b)
    for (int r = 0; r < together; ++r) {
      const Real *line = w + b * stride, *vector = x + r * pitch_x;
      const V<Real> sums = products(line, vector, whole + rest);
      Real sum = rest_of(line, vector), *to = y + r * pitch_y + b;
      for (int l = 0; l < n; ++l) sum += sums[l];
      *to = sum + (add ? *to : Real(0));
    }
}

// Numbers 0 .. length: `columns` for `wide` registers of them at a time, then for one, and `number` for each that is left.
template <class Real, int wide, class Columns, class Number>
inline void in_registers(int64_t length, const Columns& columns, const Number& number) {
  constexpr int n = Vector<Real>::lanes;
  int64_t k = 0;
  for (; k + wide * n <= length; k += wide * n) columns(std::integral_constant<int, wide>(), k);
  if constexpr (wide > 1)
    for (; k + n <= length; k += n) columns(std::integral_constant<int, 1>(), k);
  for (; k < length; ++k) number(k);
}

// y[k] (+)= the sum over c of w[c, k] x[c], or of w[c] x[c, k]: numbers side by side are outcomes side by side. The
// factors that all k share lie `step` apart in the one, the registers `stride` apart in the other.
template <class Real, int together, bool weights_run>
void add_rows(const Real* w, int64_t w_step, const Real* x, int64_t x_step, int64_t pitch_x, int64_t depth, Real* y,
              int64_t pitch_y, int64_t length, bool add) {
  constexpr int n = Vector<Real>::lanes, wide = together == 1 ? 4 : 2;
  const auto columns = [&](auto vectors, int64_t k) {
    constexpr int v = decltype(vectors)::value;
    Sums<Real, together, v> sum(y + k, pitch_y, add);
    for (int64_t c = 0; c < depth; ++c)
#pragma GCC unroll 4
      for (int i = 0; i < v; ++i) {
        if constexpr (weights_run) {
          const V<Real> factor = at(w + c * w_step + k + i * n);
#pragma GCC unroll 4
          for (int r = 0; r < together; ++r) sum.of[r][i] += factor * x[r * pitch_x + c * x_step];
        } else {
#pragma GCC unroll 4
          for (int r = 0; r < together; ++r)
            sum.of[r][i] += at(x + r * pitch_x + c * x_step + k + i * n) * w[c * w_step];
        }
      }
    sum.put_to(y + k, pitch_y);
  };
  in_registers<Real, wide>(length, columns, [&](int64_t k) {
    for (int r = 0; r < together; ++r) {
      Real sum = add ? y[r * pitch_y + k] : Real(0);
      for (int64_t c = 0; c < depth; ++c)
        sum += w[c * w_step + (weights_run ? k : 0)] * x[r * pitch_x + c * x_step + (weights_run ? 0 : k)];
      y[r * pitch_y + k] = sum;
    }
  });
}

// The same where the weights run, for more numbers than accumulators hold at a time: lines of weights are read one after
// the other, a few at a time, and added to y.
template <class Real, int together>
void add_long_rows(const Real* w, int64_t w_step, const Real* x, int64_t pitch_x, int64_t depth, Real* y,
                   int64_t pitch_y, int64_t length, bool add) {
  const auto lines = [&](auto count, int64_t c, bool adds) {
    constexpr int g = decltype(count)::value;
    Real factor[together][g];
    for (int r = 0; r < together; ++r) std::copy_n(x + r * pitch_x + c, g, factor[r]);
    const Real* line = w + c * w_step;
    const auto columns = [&](auto, int64_t k) {
      Sums<Real, together, 1> sum(y + k, pitch_y, adds);
#pragma GCC unroll 8
      for (int i = 0; i < g; ++i) {
        const V<Real> values = at(line + i * w_step + k);
#pragma GCC unroll 4
        for (int r = 0; r < together; ++r) sum.of[r][0] += values * factor[r][i];
      }
      sum.put_to(y + k, pitch_y);
    };
    in_registers<Real, 1>(length, columns, [&](int64_t k) {
      for (int r = 0; r < together; ++r) {
        Real sum = adds ? y[r * pitch_y + k] : Real(0);
        for (int i = 0; i < g; ++i) sum += line[i * w_step + k] * factor[r][i];
        y[r * pitch_y + k] = sum;
      }
    });
  };
  constexpr int few = together == 1 ? 8 : 4;
  int64_t c = 0;
  for (; c + few <= depth; c += few) lines(std::integral_constant<int, few>(), c, add || c > 0);
  for (; c < depth; ++c) lines(std::integral_constant<int, 1>(), c, add || c > 0);
}

// Both the weights and x run along d: y[d] (+)= the sum over c of w[c, d] x[c, d].
template <class Real, int together>
void multiply_rows(const Real* w, int64_t w_step, const Real* x, int64_t x_step, int64_t pitch_x, int64_t depth, Real* y,
                   int64_t pitch_y, int64_t length, bool add) {
  const auto columns = [&](auto, int64_t k) {
    Sums<Real, together, 1> sum(y + k, pitch_y, add);
    for (int64_t c = 0; c < depth; ++c) {
      const V<Real> factor = at(w + c * w_step + k);
#pragma GCC unroll 4
      for (int r = 0; r < together; ++r) sum.of[r][0] += factor * at(x + r * pitch_x + c * x_step + k);
    }
    sum.put_to(y + k, pitch_y);
  };
  in_registers<Real, 1>(length, columns, [&](int64_t k) {
    for (int r = 0; r < together; ++r) {
      Real sum = add ? y[r * pitch_y + k] : Real(0);
      for (int64_t c = 0; c < depth; ++c) sum += w[c * w_step + k] * x[r * pitch_x + c * x_step + k];
      y[r * pitch_y + k] = sum;
    }
  });
}

// The same where d is a divisor of the lanes and every line holds (c, d) side by side: products number by number, whose
// lanes are summed over c at the end. One line a time, in several sums.
template <class Real, int together>
void fold_lines(const Real* w, int64_t stride, int64_t lines, int64_t depth, int64_t d, const Real* x, Real* y,
                int64_t pitch, bool add) {
  constexpr int n = Vector<Real>::lanes, chains = 4 / together > 1 ? 4 / together : 1;
  const int64_t length = depth * d;
  for (int64_t b = 0; b < lines; ++b) {
    const Real* line = w + b * stride;
    V<Real> sum[together][chains] = {};
    int64_t k = 0;
    for (; k + chains * n <= length; k += chains * n)
#pragma GCC unroll 4
      for (int i = 0; i < chains; ++i) {
        const V<Real> factor = at(line + k + i * n);
#pragma GCC unroll 4
        for (int r = 0; r < together; ++r) sum[r][i] += factor * at(x + r * pitch + k + i * n);
      }
    for (; k + n <= length; k += n)
#pragma GCC unroll 4
      for (int r = 0; r < together; ++r) sum[r][0] += at(line + k) * at(x + r * pitch + k);
#pragma GCC unroll 4
    for (int r = 0; r < together; ++r) {
      V<Real> total = sum[r][0];
#pragma GCC unroll 4
      for (int i = 1; i < chains; ++i) total += sum[r][i];
      alignas(64) Real numbers[n];
      put(numbers, total);
      for (int64_t i = k; i < length; ++i) numbers[i & (d - 1)] += line[i] * x[r * pitch + i];
      for (int64_t half = n / 2; half >= d; half /= 2)  // d is a power of two, as the number of lanes is
        for (int64_t i = 0; i < half; ++i) numbers[i] += numbers[i + half];
      Real* to = y + r * pitch + b * d;
      for (int64_t i = 0; i < d; ++i) to[i] = numbers[i] + (add ? to[i] : Real(0));
    }
  }
}

// The same for what `fold_lines` reads, transposed: weights of neighbouring lines lie side by side, (b, d), and the d
// numbers of x that they share are repeated over the lanes.
template <class Real, int together>
void unfold_lines(const Real* w, int64_t w_step, const Real* x, int64_t depth, int64_t d, Real* y, int64_t pitch,
                  int64_t length, bool add) {
  typedef typename Exchange<Real>::Mask Mask;
  constexpr int n = Vector<Real>::lanes, wide = together == 1 ? 4 : 2;
  Mask repeat;
  for (int l = 0; l < n; ++l) repeat[l] = l & (d - 1);  // d is a power of two, as the number of lanes is
  const auto repeated = [&](const Real* from, int64_t left) {
    return __builtin_shuffle(some_of(from, left), repeat);
  };
  const auto columns = [&](auto vectors, int64_t k) {
    constexpr int v = decltype(vectors)::value;
    Sums<Real, together, v> sum(y + k, pitch, add);
    for (int64_t c = 0; c < depth; ++c) {
      V<Real> values[together];
#pragma GCC unroll 4
      for (int r = 0; r < together; ++r) values[r] = repeated(x + r * pitch + c * d, (depth - c) * d);
#pragma GCC unroll 4
      for (int i = 0; i < v; ++i) {
        const V<Real> factor = at(w + c * w_step + k + i * n);
#pragma GCC unroll 4
        for (int r = 0; r < together; ++r) sum.of[r][i] += factor * values[r];
      }
    }
    sum.put_to(y + k, pitch);
  };
  in_registers<Real, wide>(length, columns, [&](int64_t k) {
    for (int r = 0; r < together; ++r) {
      Real sum = add ? y[r * pitch + k] : Real(0);
      for (int64_t c = 0; c < depth; ++c) sum += w[c * w_step + k] * x[r * pitch + c * d + (k & (d - 1))];
      y[r * pitch + k] = sum;
    }
  });
}

template <class Real, int together>
void contract_few(const Contract& s, const Real* weight, const Real* x, Real* y, int64_t pitch, bool add, int64_t begin,
                  int64_t end) {
  constexpr int sums = together < Vector<Real>::lanes ? together : Vector<Real>::lanes;
  const int64_t units = (s.b + unit_lines - 1) / unit_lines;
  // Transposed, neighbouring lines lie side by side: the more of them at a time, the longer are the rows that are read.
  const bool is_long = s.stride_b == s.d && (s.d == 1 ? s.stride_c != 1 : s.stride_d == 1);
  for (int64_t unit = begin; unit < end;) {
    const int64_t a = unit / units, first = unit % units * unit_lines;
    const int64_t taken = is_long ? std::min(units - unit % units, end - unit) : 1;
    const int64_t lines = std::min(s.b - first, taken * unit_lines);
    unit += taken;
    const Real* w = weight + a * s.stride_a + first * s.stride_b;
    const Real* xa = x + a * s.c * s.d;
    Real* ya = y + (a * s.b + first) * s.d;
    if (s.d == 1 && s.stride_c == 1)
      for (int r = 0; r < together; r += sums)
        dot_lines<Real, sums>(w, s.stride_b, lines, s.c, xa + r * pitch, ya + r * pitch, pitch, pitch, add);
    else if (s.d == 1 && lines > 4 * Vector<Real>::lanes)  // transposed: neighbouring lines lie side by side
      add_long_rows<Real, together>(w, s.stride_c, xa, pitch, s.c, ya, pitch, lines, add);
    else if (s.d == 1)
      add_rows<Real, together, true>(w, s.stride_c, xa, 1, pitch, s.c, ya, pitch, lines, add);
    else if (s.stride_d == 1 && s.stride_c == s.d && Vector<Real>::lanes % s.d == 0 &&
             s.c * s.d >= 2 * Vector<Real>::lanes)
      fold_lines<Real, together>(w, s.stride_b, lines, s.c, s.d, xa, ya, pitch, add);
    else if (s.stride_d == 1 && s.stride_b == s.d && Vector<Real>::lanes % s.d == 0)
      unfold_lines<Real, together>(w, s.stride_c, xa, s.c, s.d, ya, pitch, lines * s.d, add);
    else
      for (int64_t b = 0; b < lines; ++b)
        if (s.stride_d == 0)
          add_rows<Real, together, false>(w + b * s.stride_b, s.stride_c, xa, s.d, pitch, s.c, ya + b * s.d, pitch, s.d,
                                          add);
        else
          multiply_rows<Real, together>(w + b * s.stride_b, s.stride_c, xa, s.d, pitch, s.c, ya + b * s.d, pitch, s.d,
                                        add);
  }
}

// Four vectors at a time share what is read of the weights, then two, then one.
template <class Real>
void contract_vectors(const Contract& s, const Real* weight, const Real* x, Real* y, int64_t pitch, int64_t vectors,
                      bool add, int64_t begin, int64_t end) {
  for (; vectors >= 4; vectors -= 4, x += 4 * pitch, y += 4 * pitch)
    contract_few<Real, 4>(s, weight, x, y, pitch, add, begin, end);
  if (vectors >= 2) {
    contract_few<Real, 2>(s, weight, x, y, pitch, add, begin, end);
    vectors -= 2, x += 2 * pitch, y += 2 * pitch;
  }
  if (vectors) contract_few<Real, 1>(s, weight, x, y, pitch, add, begin, end);
}

// Numbers of x at places that are held in a register.
template <class Real>
inline V<Real> gathered(const Real* x, const int32_t* place) {
  constexpr int n = Vector<Real>::lanes;
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == 4)
    return V<Real>(_mm512_i32gather_ps(_mm512_loadu_si512(place), x, 4));
  else
    return V<Real>(_mm512_i32gather_pd(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(place)), x, 8));
#else
  V<Real> r = {};
  for (int l = 0; l < n; ++l) r[l] = x[place[l]];
  return r;
#endif
}

template <class Real>
inline Real sum_of(V<Real> v) {
  Real sum = 0;
  for (int l = 0; l < Vector<Real>::lanes; ++l) sum += v[l];
  return sum;
}

template <class Real>
void sparse_vectors(const Compressed& m, const Real* values, const Real* x, Real* y, int64_t pitch, int64_t vectors,
                    bool add, int64_t begin, int64_t end) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t i = begin; i < end; ++i)
    for (int64_t v = 0; v < vectors; ++v) {
      const Real* from = x + v * pitch;
      int32_t k = m.start[i];
      const int32_t last = m.start[i + 1];
      V<Real> one = {}, two = {};
      for (; k + 2 * n <= last; k += 2 * n) {
        one += at(values + k) * gathered(from, m.column + k);
        two += at(values + k + n) * gathered(from, m.column + k + n);
      }
      Real sum = sum_of<Real>(one + two);
      for (; k < last; ++k) sum += values[k] * from[m.column[k]];
      Real* to = y + v * pitch + i;
      *to = sum + (add ? *to : Real(0));
    }
}

}  // namespace STRUCTMAT_ISA
}  // namespace structmat

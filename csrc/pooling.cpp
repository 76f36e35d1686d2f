// What the layers of convolutional arithmetic circuits do beside products of matrices, on tiles with the batch innermost:
// products over windows, powers of two that keep numbers near one, exponentials and logarithms; forwards and backwards.
// Compiled once for each instruction set, as kernels.cpp is.
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <cmath>
#include <limits>

#include "activations.h"
#include "kernels.h"
#include "vectors.h"

namespace structmat {
namespace STRUCTMAT_ISA {

template <class Real>
struct Bits {
  typedef typename Constants<Real>::Integer type __attribute__((vector_size(register_bytes)));
};

template <class Real>
inline V<Real> size_of(V<Real> x) {
  typedef typename Constants<Real>::Integer Integer;
  return V<Real>(typename Bits<Real>::type(x) & std::numeric_limits<Integer>::max());
}

// The larger of two; `a` where either is NaN. One instruction where there is one.
template <class Real>
inline V<Real> larger(V<Real> a, V<Real> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == 4)
    return V<Real>(_mm512_maskz_max_ps(__mmask16(-1), __m512(b), __m512(a)));
  else
    return V<Real>(_mm512_maskz_max_pd(__mmask8(-1), __m512d(b), __m512d(a)));
#else
  return b > a ? b : a;
#endif
}

// The largest number of each column, or the largest size; 0 where that is not finite.
template <class Real>
void column_tops(const Real* x, int64_t rows, int64_t columns, bool of_sizes, Real* top) {
  constexpr int n = Vector<Real>::lanes;
  constexpr Real most = std::numeric_limits<Real>::max();
  const V<Real> start = all<Real>(of_sizes ? 0 : -std::numeric_limits<Real>::infinity());
  for (int64_t p = 0; p < columns; p += n) {
    V<Real> one = start, two = start;
    int64_t i = 0;
    const auto number = [&](int64_t row) {
      const V<Real> own = at(x + row * columns + p);
      return of_sizes ? size_of<Real>(own) : own;
    };
    for (; i + 2 <= rows; i += 2) one = larger<Real>(one, number(i)), two = larger<Real>(two, number(i + 1));
    if (i < rows) one = larger<Real>(one, number(i));
    one = larger<Real>(one, two);
    one = one >= -most ? one : V<Real>{};
    put(top + p, one <= most ? one : V<Real>{});
  }
}

// Of sizes, the powers of two that bring them near one, exactly, and their exponents with the opposite sign: a subnormal
// number is lifted as far as one factor can.
template <class Real>
void powers(const Real* top, Real* factor, typename Constants<Real>::Integer* exponent, int64_t columns) {
  typedef Constants<Real> C;
  typedef typename Bits<Real>::type B;
  constexpr int n = Vector<Real>::lanes;
  for (int64_t p = 0; p < columns; p += n) {
    const V<Real> size = at(top + p);
    B e = (B(size) >> C::mantissa) - C::exponent;
    const B least = B{} + (1 - C::exponent), most = B{} + (C::exponent - 1);
    e = e < least ? least : e;
    e = e > most ? most : e;
    e = size > 0 ? e : B{};
    put(factor + p, V<Real>((C::exponent - e) << C::mantissa));
    for (int l = 0; l < n; ++l) exponent[p + l] = e[l];
  }
}

// Columns times a number each; the rows of y lie `pitch` apart. x may be y.
template <class Real>
void scale_columns(const Real* x, const Real* factor, Real* y, int64_t pitch, int64_t rows, int64_t columns) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t p = 0; p < columns; p += n) put(y + i * pitch + p, at(x + i * columns + p) * at(factor + p));
}

template <class Real>
void multiply_numbers(const Real* a, const Real* b, Real* y, int64_t count) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t p = 0; p < count; p += n) put(y + p, at(a + p) * at(b + p));
}

// Of y = a b: a and b become the gradients of themselves. No division: a zero is a number like any other.
template <class Real>
void multiply_back(const Real* gy, Real* a, Real* b, int64_t count) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t p = 0; p < count; p += n) {
    const V<Real> g = at(gy + p), first = at(a + p);
    put(a + p, g * at(b + p));
    put(b + p, g * first);
  }
}

// Windows of four, tiles `apart` numbers from one another: (y0 y2) (y1 y3), with the largest size of each column if `top`
// is not null.
template <class Real>
void multiply_four(const Real* y, int64_t apart, Real* z, int64_t pitch, int64_t rows, int64_t columns, Real* top) {
  constexpr int n = Vector<Real>::lanes;
  constexpr Real most = std::numeric_limits<Real>::max();
  for (int64_t p = 0; p < columns; p += n) {
    V<Real> largest = {};
    for (int64_t i = 0; i < rows; ++i) {
      const Real* own = y + i * columns + p;
      const V<Real> made = (at(own) * at(own + 2 * apart)) * (at(own + apart) * at(own + 3 * apart));
      largest = larger<Real>(largest, size_of<Real>(made));
      put(z + i * pitch + p, made);
    }
    if (top) put(top + p, largest <= most ? largest : V<Real>{});
  }
}

// The four become their gradients; columns of the outcome's gradient count `factor` times, if that is not null.
template <class Real>
void multiply_four_back(const Real* gz, const Real* factor, Real* y, int64_t apart, int64_t rows, int64_t columns) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t p = 0; p < columns; p += n) {
      Real* own = y + i * columns + p;
      V<Real> g = at(gz + i * columns + p);
      if (factor) g = g * at(factor + p);
      const V<Real> y0 = at(own), y1 = at(own + apart), y2 = at(own + 2 * apart), y3 = at(own + 3 * apart);
      const V<Real> even = g * (y1 * y3), odd = g * (y0 * y2);
      put(own, even * y2);
      put(own + 2 * apart, even * y0);
      put(own + apart, odd * y3);
      put(own + 3 * apart, odd * y1);
    }
}

// exp(x - top), columns with a number `top` each; below the smallest normal number it is 0. x may be y.
template <class Real>
void exponentials(const Real* x, const Real* top, Real* y, int64_t rows, int64_t columns) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t p = 0; p < columns; p += n) {
    const V<Real> shift = at(top + p);
#pragma GCC unroll 2
    for (int64_t i = 0; i < rows; ++i) {
      const V<Real> own = at(x + i * columns + p) - shift;
      put(y + i * columns + p, own < Constants<Real>::least ? V<Real>{} : exponential<Real>(own));
    }
  }
}

template <class Real>
struct LogSeries;
template <>
struct LogSeries<float> {
  static constexpr int terms = 4;
};
template <>
struct LogSeries<double> {
  static constexpr int terms = 10;
};

// log(x) of a normal positive number: x = 2^e m, m near one, log(m) = 2 artanh((m - 1) / (m + 1)) by its series.
template <class Real>
inline V<Real> logarithm(V<Real> x) {
  typedef Constants<Real> C;
  typedef typename Bits<Real>::type B;
  const B root = B(all<Real>(Real(0.70710678118654752440)));
  const B e = (B(x) - root) >> C::mantissa;
  const V<Real> f = V<Real>(B(x) - (e << C::mantissa)) - 1;
  const V<Real> s = f / (f + 2), square = s * s;
  V<Real> sum = all<Real>(Real(2) / (2 * LogSeries<Real>::terms + 1));
#pragma GCC unroll 16
  for (int i = LogSeries<Real>::terms - 1; i > 0; --i) sum = sum * square + Real(2) / (2 * i + 1);
  const V<Real> power = __builtin_convertvector(e, V<Real>);
  // 2 s = f - s f, which loses nothing of f.
  return power * C::ln2_high + (f + (power * C::ln2_low - s * (f - square * sum)));
}

// Of any number that is not negative.
template <class Real>
inline V<Real> any_logarithm(V<Real> x) {
  constexpr Real least = std::numeric_limits<Real>::min(), most = std::numeric_limits<Real>::max();
  constexpr int lifted = Constants<Real>::mantissa + 1;
  const V<Real> up = x < least ? x * Real(int64_t(1) << lifted) : x;
  const V<Real> log = logarithm<Real>(up) - (x < least ? all<Real>(Real(lifted * 0.69314718055994530942)) : V<Real>{});
  const V<Real> usual = x > 0 ? log : all<Real>(-std::numeric_limits<Real>::infinity());
  return x <= most ? usual : x;  // infinity, NaN
}

// Sums of logarithms over windows, plus a number of each column: one logarithm for four factors, if their product is a
// normal number, else one for each. The logarithm of 0 is -inf.
template <class Real>
void log_products(const Real* y, int64_t window, int64_t apart, const Real* shift, Real* z, int64_t pitch, int64_t rows,
                  int64_t columns) {
  typedef typename Bits<Real>::type B;
  constexpr int n = Vector<Real>::lanes;
  constexpr Real least = std::numeric_limits<Real>::min(), most = std::numeric_limits<Real>::max();
  for (int64_t p = 0; p < columns; p += n)
    for (int64_t first = 0; first < window; first += 4) {
      const int64_t count = window - first < 4 ? window - first : 4;
      const Real* from = y + first * apart + p;
      const V<Real> before = at(shift + p);
      B normal = B{} - 1;
      for (int64_t i = 0; i < rows; ++i) {
        V<Real> product = at(from + i * columns);
        for (int64_t k = 1; k < count; ++k) product = product * at(from + k * apart + i * columns);
        normal &= (product >= least) & (product <= most);
        Real* to = z + i * pitch + p;
        put(to, (first ? at(to) : before) + logarithm<Real>(product));
      }
      bool usual = true;
      for (int l = 0; l < n; ++l) usual = usual && normal[l];
      if (usual) continue;
      // What was there before is lost: all factors of these columns once more, one by one.
      for (int64_t i = 0; i < rows; ++i) {
        V<Real> sum = before;
        for (int64_t k = 0; k < first + count; ++k) sum += any_logarithm<Real>(at(y + k * apart + i * columns + p));
        put(z + i * pitch + p, sum);
      }
    }
}

// The gradient of log(y), in place of y: 0 where y is 0.
template <class Real>
void log_back(const Real* gz, Real* y, int64_t count) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t p = 0; p < count; p += n) {
    const V<Real> own = at(y + p);
    put(y + p, own > 0 ? at(gz + p) / own : V<Real>{});
  }
}

// y where x is above 0, else 0.
template <class Real>
void keep_positive(const Real* x, Real* y, int64_t count) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t p = 0; p < count; p += n) put(y + p, at(x + p) > 0 ? at(y + p) : V<Real>{});
}

// Columns times a number each and divided by the root mean square of what that gives, unless it is 0. The number becomes
// what they were multiplied by in all. The rows of z lie `pitch` apart; it may be x.
template <class Real>
void normalize(const Real* x, Real* factor, Real* z, int64_t pitch, int64_t rows, int64_t columns) {
  constexpr int n = Vector<Real>::lanes;
  constexpr Real most = std::numeric_limits<Real>::max();
  for (int64_t p = 0; p < columns; p += n) {
    const V<Real> near = at(factor + p);  // one first, then the other: their product may be no number
    V<Real> one = {}, two = {};
    int64_t i = 0;
    const auto number = [&](int64_t row) { return at(x + row * columns + p) * near; };
    for (; i + 2 <= rows; i += 2) {
      const V<Real> a = number(i), b = number(i + 1);
      one += a * a, two += b * b;
    }
    if (i < rows) one += number(i) * number(i);
    V<Real> inverse = one + two;
    for (int l = 0; l < n; ++l) inverse[l] = inverse[l] != 0 ? std::sqrt(Real(rows) / inverse[l]) : Real(1);
    for (i = 0; i < rows; ++i) put(z + i * pitch + p, number(i) * inverse);
    const V<Real> all_of_it = near * inverse;
    put(factor + p, all_of_it <= most ? all_of_it : all<Real>(most));
  }
}

// The gradient of what was normalized, from that of the outcome z; g may be gz.
template <class Real>
void normalize_back(const Real* gz, const Real* z, const Real* factor, Real* g, int64_t rows, int64_t columns) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t p = 0; p < columns; p += n) {
    V<Real> one = {}, two = {};
    int64_t i = 0;
    const auto number = [&](int64_t row) { return at(gz + row * columns + p) * at(z + row * columns + p); };
    for (; i + 2 <= rows; i += 2) one += number(i), two += number(i + 1);
    if (i < rows) one += number(i);
    const V<Real> mean = (one + two) / Real(rows), own = at(factor + p);
    for (i = 0; i < rows; ++i)
      put(g + i * columns + p, (at(gz + i * columns + p) - at(z + i * columns + p) * mean) * own);
  }
}

template <class Real>
constexpr PoolKernels<Real> pool_table = {column_tops<Real>,   powers<Real>,        scale_columns<Real>,
                                          multiply_numbers<Real>, multiply_back<Real>, multiply_four<Real>,
                                          multiply_four_back<Real>, exponentials<Real>,  log_products<Real>,
                                          log_back<Real>,      keep_positive<Real>, normalize<Real>,
                                          normalize_back<Real>};

const PoolKernels<float>* single_pool() { return &pool_table<float>; }
const PoolKernels<double>* wide_pool() { return &pool_table<double>; }

}  // namespace STRUCTMAT_ISA
}  // namespace structmat

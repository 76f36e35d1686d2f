// Biases and activations on the rows of a tile, forwards and backwards, for the instruction set that a source is compiled
// for. Functions are series of their own for both precisions: relative errors of a few units in the last place, NaN
// stays NaN, and no number depends on where in a register it stands.
#pragma once

#include <type_traits>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "gradients.h"
#include "kernels.h"
#include "vectors.h"

namespace structmat {
namespace STRUCTMAT_ISA {

// The numbers of a tensor that belong to one row after the other.
class Walk {
 public:
  explicit Walk(const Spread& spread) : spread_(spread) {}
  int64_t next() {
    const int64_t found = place_;
    if (++within_ == spread_.inner) {
      within_ = 0;
      if (++place_ == spread_.count) place_ = 0;
    }
    return found;
  }

 private:
  Spread spread_;
  int64_t within_ = 0, place_ = 0;
};

template <class Real>
struct Constants;

template <>
struct Constants<float> {
  typedef int32_t Integer;
  static constexpr int mantissa = 23, exponent = 127;
  static constexpr float shift = 12582912.0f;                  // 1.5 * 2^23: sums with it are rounded to integers
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float most = 88.0f, least = -87.0f;         // arguments of exp
  static constexpr float most_tanh = 9.5f, most_gauss = 20.0f;  // from where on a function is constant
  // (exp(r) - 1 - r) / r^2 for |r| below ln(2) / 2, from the constant on.
  static constexpr float exp_series[] = {0.5f, 0.166665770255979882f, 0.041666554662050534f, 0.0083631730745137109f,
                                         0.00139261761199355789f};
  // log(erfc(z) exp(z^2) / t) for t = 1 / (1 + z / 2) from `lowest` to 1, by Chebyshev polynomials.
  static constexpr float lowest = 0.125f;
  static constexpr float erfc_series[] = {-0.576866633395125153f,   0.574217440032091111f,    0.00990209222199284769f,
                                          -0.00717579473332839082f, -0.000296613618633646144f, 0.000225025220143187194f,
                                          2.87967496524451976e-6f,  -9.1961864529953375e-6f,  4.87105066371596669e-7f,
                                          3.7951964480570755e-7f,   -6.15054611315157523e-8f};
};

template <>
struct Constants<double> {
  typedef int64_t Integer;
  static constexpr int mantissa = 52, exponent = 1023;
  static constexpr double shift = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 6.93147180369123816490e-1, ln2_low = 1.90821492927058770002e-10;
  static constexpr double most = 709.0, least = -708.0;
  static constexpr double most_tanh = 19.5, most_gauss = 39.5;
  static constexpr double exp_series[] = {0.5,
                                          0.16666666666666671,
                                          0.0416666666666666698,
                                          0.00833333333332614088,
                                          0.00138888888888837524,
                                          0.00019841269874800492,
                                          0.0000248015873255333638,
                                          2.75572554257464343e-6,
                                          2.75572736613486362e-7,
                                          2.51052063739570111e-8,
                                          2.09146793765839351e-9};
  static constexpr double lowest = 1.0 / 15;
  static constexpr double erfc_series[] = {
      -0.612112796947552447,   0.606609323395592968,    0.0140721642657179002,   -0.00830924380805546596,
      -0.000553603888031184115, 0.000291228350442060122, 0.0000163278956573168406, -0.0000140097155427370633,
      -3.74112133605047908e-8, 7.32820459095759778e-7,  -5.6968092327950931e-8,  -3.55965751863190837e-8,
      6.84486611939404604e-9,  1.29035325644131762e-9,  -5.50518466114497776e-10, -4.98991522553991312e-12,
      3.26345732773457265e-11, -4.3459085348656468e-12, -1.2199958863301252e-12, 4.35611260579419947e-13,
      -3.23519828668120657e-15, -2.30887805253619988e-14, 4.28016398666835154e-15, 3.78339164351457236e-16,
      -2.85880157682579902e-16, 4.36162249302677409e-17, 2.08066481420764811e-18};
};

template <class Real>
inline V<Real> all(Real value) {
  return V<Real>{} + value;
}

// x between two bounds; NaN stays NaN. These instructions give their second argument where one is NaN; written as
// comparisons and choices, loops take two more.
template <class Real>
inline V<Real> limited(V<Real> x, Real least, Real most) {
  const V<Real> low = all<Real>(least), high = all<Real>(most);
  [[maybe_unused]] constexpr bool single = sizeof(Real) == 4;
#if defined(__AVX512F__)
  constexpr __mmask16 every = 0xffff;  // without a mask the compiler warns of its own headers
  if constexpr (single)
    return V<Real>(_mm512_maskz_max_ps(every, __m512(low), _mm512_maskz_min_ps(every, __m512(high), __m512(x))));
  else
    return V<Real>(_mm512_maskz_max_pd(0xff, __m512d(low), _mm512_maskz_min_pd(0xff, __m512d(high), __m512d(x))));
#elif defined(__AVX__)
  if constexpr (single) return V<Real>(_mm256_max_ps(__m256(low), _mm256_min_ps(__m256(high), __m256(x))));
  else return V<Real>(_mm256_max_pd(__m256d(low), _mm256_min_pd(__m256d(high), __m256d(x))));
#elif defined(__SSE2__)
  if constexpr (single) return V<Real>(_mm_max_ps(__m128(low), _mm_min_ps(__m128(high), __m128(x))));
  else return V<Real>(_mm_max_pd(__m128d(low), _mm_min_pd(__m128d(high), __m128d(x))));
#else
  x = x > high ? high : x;
  return x < low ? low : x;
#endif
}

// exp(x) = scale + scale * rest, where scale is a power of two, exactly: what is small beside 1 is not lost in `rest`. With
// `precise` the remainder of a large x is as precise as that of a small one.
template <class Real, bool precise>
inline void split_exponential(V<Real> x, V<Real>& scale, V<Real>& rest) {
  typedef Constants<Real> C;
  typedef typename C::Integer Bits __attribute__((vector_size(register_bytes)));
  const V<Real> shifted = x * Real(1.44269504088896340736) + C::shift;
  const V<Real> whole = shifted - C::shift;
  V<Real> r;
  if constexpr (precise)
    r = (x - whole * C::ln2_high) - whole * C::ln2_low;
  else
    r = x - whole * Real(0.693147180559945309417);
  scale = V<Real>((Bits(shifted) << C::mantissa) + (typename C::Integer(C::exponent) << C::mantissa));
  constexpr int terms = sizeof C::exp_series / sizeof(Real);
  V<Real> sum = all<Real>(C::exp_series[terms - 1]);
#pragma GCC unroll 16
  for (int i = terms - 2; i >= 0; --i) sum = sum * r + C::exp_series[i];
  rest = sum * (r * r) + r;
}

template <class Real>
inline V<Real> exponential(V<Real> x) {
  V<Real> scale, rest;
  split_exponential<Real, true>(limited<Real>(x, Constants<Real>::least, Constants<Real>::most), scale, rest);
  return scale * rest + scale;
}

// t / (t + 2) for t = exp(2 x) - 1.
template <class Real>
inline V<Real> hyperbolic_tangent(V<Real> x) {
  V<Real> scale, rest;
  // Where x is large, 1 - tanh(x) is small, and takes the error of its argument along.
  split_exponential<Real, false>(2 * limited<Real>(x, -Constants<Real>::most_tanh, Constants<Real>::most_tanh), scale,
                                 rest);
  const V<Real> t = scale * rest + (scale - 1);
  return t / (t + 2);
}

template <class Real>
inline V<Real> logistic(V<Real> x) {
  return 1 / (1 + exponential<Real>(-x));
}

// The normal distribution function.
template <class Real>
inline V<Real> normal(V<Real> x) {
  typedef Constants<Real> C;
  x = limited<Real>(x, -C::most_gauss, C::most_gauss);
  const V<Real> size = x < 0 ? -x : x;
  const V<Real> t = 1 / (1 + size * Real(0.353553390593273762));  // 1 / (2 sqrt(2))
  const V<Real> u = (2 * t - (C::lowest + 1)) * (1 / (1 - C::lowest)), twice = u + u;
  constexpr int terms = sizeof C::erfc_series / sizeof(Real);
  V<Real> one = {}, two = {};  // Clenshaw's recurrence
#pragma GCC unroll 32
  for (int i = terms - 1; i > 0; --i) {
    const V<Real> next = twice * one - two + C::erfc_series[i];
    two = one, one = next;
  }
  const V<Real> log = u * one - two + C::erfc_series[0];
  const V<Real> tail = Real(0.5) * t * exponential<Real>(log - Real(0.5) * (x * x));
  return x < 0 ? tail : 1 - tail;
}

template <class Real>
inline V<Real> normal_density(V<Real> x) {
  return Real(0.398942280401432678) * exponential<Real>(Real(-0.5) * (x * x));
}

// One activation: its values, and the derivative from its argument, or from its value where `is_inverse` of kernels.h says
// so.
template <class Real, Activate::Kind kind>
struct Function {
  static inline V<Real> value(V<Real> x, Real slope) {
    if constexpr (kind == Activate::relu) return x < 0 ? V<Real>{} : x;
    if constexpr (kind == Activate::tanh) return hyperbolic_tangent<Real>(x);
    if constexpr (kind == Activate::sigmoid) return logistic<Real>(x);
    if constexpr (kind == Activate::silu) return x * logistic<Real>(x);
    if constexpr (kind == Activate::gelu) return x * normal<Real>(x);
    if constexpr (kind == Activate::gelu_tanh) return Real(0.5) * x * (1 + hyperbolic_tangent<Real>(inside(x)));
    if constexpr (kind == Activate::rectifier) return x > 0 ? x : x * slope;
    return x;
  }

  static inline V<Real> derivative(V<Real> x, Real slope) {
    if constexpr (kind == Activate::relu) return x > 0 ? all<Real>(1) : V<Real>{};
    if constexpr (kind == Activate::tanh) return 1 - x * x;
    if constexpr (kind == Activate::sigmoid) return x * (1 - x);
    if constexpr (kind == Activate::silu) {
      const V<Real> s = logistic<Real>(x);
      return s * (1 + x * (1 - s));
    }
    if constexpr (kind == Activate::gelu) return normal<Real>(x) + x * normal_density<Real>(x);
    if constexpr (kind == Activate::gelu_tanh) {
      const V<Real> t = hyperbolic_tangent<Real>(inside(x));
      const V<Real> slopes = Real(0.797884560802865356) * (1 + Real(3 * 0.044715) * (x * x));
      return Real(0.5) * (1 + t) + Real(0.5) * x * (1 - t * t) * slopes;
    }
    if constexpr (kind == Activate::rectifier) return x > 0 ? all<Real>(1) : all<Real>(slope);
    return all<Real>(1);
  }

 private:
  static inline V<Real> inside(V<Real> x) {
    return Real(0.797884560802865356) * (x + Real(0.044715) * (x * x * x));  // sqrt(2 / pi)
  }
};

template <class Real, Activate::Kind kind>
void activate_as(const Activate& s, const Real* bias, const Real* slope, const Real* x, Real* y, int64_t columns) {
  constexpr int n = Vector<Real>::lanes;
  Walk shifts(s.bias), slopes(s.slope);
  for (int64_t i = 0; i < s.rows; ++i, x += columns, y += columns) {
    const Real shift = bias ? bias[shifts.next()] : Real(0), a = slope ? slope[slopes.next()] : Real(0);
#pragma GCC unroll 2
    for (int64_t p = 0; p < columns; p += n) put(y + p, Function<Real, kind>::value(at(x + p) + shift, a));
  }
}

// A few vectors, each contiguous: lanes run along the rows.
template <class Real, Activate::Kind kind>
void activate_vector_as(const Activate& s, const Real* bias, const Real* slope, const Real* x, Real* y) {
  constexpr int n = Vector<Real>::lanes;
  Walk shifts(s.bias), slopes(s.slope);
  for (int64_t i = 0; i < s.rows; i += n) {
    const int64_t count = s.rows - i < n ? s.rows - i : n;
    Real given[n] = {}, shift[n] = {}, a[n] = {}, made[n];
    for (int64_t l = 0; l < count; ++l) given[l] = x[i + l];
    if (bias)
      for (int64_t l = 0; l < count; ++l) shift[l] = bias[shifts.next()];
    if (slope)
      for (int64_t l = 0; l < count; ++l) a[l] = slope[slopes.next()];
    if constexpr (kind == Activate::rectifier) {
      for (int64_t l = 0; l < count; ++l) {
        const Real z = given[l] + shift[l];
        made[l] = z > 0 ? z : z * a[l];
      }
    } else {
      put(made, Function<Real, kind>::value(at<Real>(given) + at<Real>(shift), Real(0)));
    }
    for (int64_t l = 0; l < count; ++l) y[i + l] = made[l];
  }
}

// Sums of rows that go to one number after the other, or several of them to the same.
template <class Real>
class SpreadSums {
 public:
  SpreadSums(const Spread& spread, Real* sums) : walk_(spread), sums_(sums) {}
  void add(V<Real> lanes) {
    if (!sums_) return;
    const int64_t place = walk_.next();
    if (place != place_) settle(), place_ = place, held_ = V<Real>{};
    held_ += lanes;
  }
  void flush() {
    if (!sums_) return;
    settle(), totals_.flush();
  }

 private:
  void settle() {
    if (place_ >= 0) totals_.add(held_, sums_ + place_);
  }
  Walk walk_;
  Real* sums_;
  Totals<Real> totals_;
  int64_t place_ = -1;
  V<Real> held_ = {};
};

// The gradient of one row's argument, and the sum of its columns, lane by lane.
template <class Real, Activate::Kind kind, bool adds>
inline V<Real> row_back(const Real* x, const Real* gy, Real* gx, Real shift, int64_t columns) {
  constexpr int n = Vector<Real>::lanes;
  V<Real> sum = {};
#pragma GCC unroll 4
  for (int64_t p = 0; p < columns; p += n) {
    V<Real> back = at(gy + p);
    if constexpr (kind != Activate::identity) back *= Function<Real, kind>::derivative(at(x + p) + shift, Real(0));
    sum += back;
    if (gx) put(gx + p, adds ? at(gx + p) + back : back);
  }
  return sum;
}

// The same of all rows where each has a number of its own: registers full of sums at once.
template <class Real, Activate::Kind kind, bool adds>
void activate_back_rows(int64_t rows, const Real* bias, const Real* x, const Real* gy, Real* gx, Real* sums,
                        int64_t columns) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t i = 0; i < rows; i += n) {
    const int64_t count = rows - i < n ? rows - i : n;
    V<Real> sum[n];
    for (int l = 0; l < n; ++l) {
      sum[l] = V<Real>{};
      if (l >= count) continue;
      const int64_t first = (i + l) * columns;
      const Real* given = kind == Activate::identity ? nullptr : x + first;
      const Real shift = by_value(kind) ? Real(0) : bias[i + l];
      sum[l] = row_back<Real, kind, adds>(given, gy + first, gx ? gx + first : nullptr, shift, columns);
    }
    const V<Real> total = sum_lanes<Real>(sum);
    for (int l = 0; l < count; ++l) sums[i + l] += total[l];
  }
}

template <class Real, Activate::Kind kind, bool adds>
void activate_back_as(const Activate& s, const Real* bias, const Real* slope, const Real* x, const Real* gy, Real* gx,
                      Real* bias_sums, Real* slope_sums, int64_t columns) {
  constexpr int n = Vector<Real>::lanes;
  constexpr bool from_value = by_value(kind);
  if (kind != Activate::rectifier && bias && bias_sums && s.bias.inner == 1 && s.bias.count == s.rows)
    return activate_back_rows<Real, kind, adds>(s.rows, bias, x, gy, gx, bias_sums, columns);
  Walk shifts(s.bias), slopes(s.slope);
  SpreadSums<Real> onto_bias(s.bias, bias_sums), onto_slope(s.slope, slope_sums);
  for (int64_t i = 0; i < s.rows; ++i) {
    const Real shift = bias && !from_value ? bias[shifts.next()] : Real(0), a = slope ? slope[slopes.next()] : Real(0);
    V<Real> sum = {}, slope_sum = {};
#pragma GCC unroll 2
    for (int64_t p = i * columns; p < (i + 1) * columns; p += n) {
      const V<Real> g = at(gy + p);
      V<Real> back = g;
      if constexpr (kind != Activate::identity) {
        const V<Real> argument = at(x + p) + shift;
        back = g * Function<Real, kind>::derivative(argument, a);
        if constexpr (kind == Activate::rectifier) slope_sum += argument > 0 ? V<Real>{} : g * argument;
      }
      sum += back;
      if (gx) put(gx + p, adds ? at(gx + p) + back : back);
    }
    onto_bias.add(sum);
    if constexpr (kind == Activate::rectifier) onto_slope.add(slope_sum);
  }
  onto_bias.flush();
  if constexpr (kind == Activate::rectifier) onto_slope.flush();
}

// What `call` does with the kind of activation as a constant.
template <class Call>
inline void for_kind(Activate::Kind kind, const Call& call) {
  typedef Activate A;
  switch (kind) {
    case A::identity: return call(std::integral_constant<A::Kind, A::identity>());
    case A::relu: return call(std::integral_constant<A::Kind, A::relu>());
    case A::tanh: return call(std::integral_constant<A::Kind, A::tanh>());
    case A::sigmoid: return call(std::integral_constant<A::Kind, A::sigmoid>());
    case A::silu: return call(std::integral_constant<A::Kind, A::silu>());
    case A::gelu: return call(std::integral_constant<A::Kind, A::gelu>());
    case A::gelu_tanh: return call(std::integral_constant<A::Kind, A::gelu_tanh>());
    case A::rectifier: return call(std::integral_constant<A::Kind, A::rectifier>());
  }
}

template <class Real>
void activate(const Activate& s, const Real* bias, const Real* slope, const Real* x, Real* y, int64_t columns) {
  for_kind(s.kind, [&](auto kind) { activate_as<Real, decltype(kind)::value>(s, bias, slope, x, y, columns); });
}

template <class Real>
void activate_vector(const Activate& s, const Real* bias, const Real* slope, const Real* x, Real* y) {
  for_kind(s.kind, [&](auto kind) { activate_vector_as<Real, decltype(kind)::value>(s, bias, slope, x, y); });
}

template <class Real>
void activate_back(const Activate& s, const Real* bias, const Real* slope, const Real* x, const Real* gy, Real* gx,
                   Real* bias_sums, Real* slope_sums, int64_t columns, bool add) {
  for_kind(s.kind, [&](auto kind) {
    constexpr Activate::Kind own = decltype(kind)::value;
    if (add)
      activate_back_as<Real, own, true>(s, bias, slope, x, gy, gx, bias_sums, slope_sums, columns);
    else
      activate_back_as<Real, own, false>(s, bias, slope, x, gy, gx, bias_sums, slope_sums, columns);
  });
}

}  // namespace STRUCTMAT_ISA
}  // namespace structmat

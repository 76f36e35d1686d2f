// Vector registers of the instruction set that a source is compiled for.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef STRUCTMAT_ISA
#error "STRUCTMAT_ISA must name the instruction set"
#endif

namespace structmat {
namespace STRUCTMAT_ISA {

#if defined(__AVX512F__)
constexpr int register_bytes = 64, registers = 32;
#elif defined(__AVX__)
constexpr int register_bytes = 32, registers = 16;
#else
constexpr int register_bytes = 16, registers = 16;
#endif

template <class Real>
struct Vector {
  static constexpr int lanes = register_bytes / sizeof(Real);
  typedef Real type __attribute__((vector_size(register_bytes), aligned(alignof(Real)), may_alias));
};

template <class Real>
using V = typename Vector<Real>::type;

template <class Real>
inline V<Real> at(const Real* p) {
  return *reinterpret_cast<const V<Real>*>(p);
}

template <class Real>
inline void put(Real* p, V<Real> v) {
  *reinterpret_cast<V<Real>*>(p) = v;
}

#if defined(__AVX512F__)
constexpr bool has_masks = true;  // a part of a register costs as much as all of it
#else
constexpr bool has_masks = false;
#endif

// The first `count` of a register's numbers, and zeros.
template <class Real>
inline V<Real> first_of(const Real* p, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == 4)
    return V<Real>(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p));
  else
    return V<Real>(_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p));
#else
  V<Real> r = {};
  std::memcpy(&r, p, size_t(count) * sizeof(Real));
  return r;
#endif
}

template <class Real>
inline void put_first(Real* p, V<Real> values, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == 4)
    _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), __m512(values));
  else
    _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), __m512d(values));
#else
  std::memcpy(p, &values, size_t(count) * sizeof(Real));
#endif
}

// The same of a register's worth or less.
template <class Real>
inline V<Real> some_of(const Real* p, int64_t count) {
  return count >= Vector<Real>::lanes ? at(p) : first_of(p, count);
}

// `rows` rows of an outcome, `vectors` registers of each, `pitch` numbers apart: in registers, where all indices are known
// to the compiler.
template <class Real, int rows, int vectors>
struct Sums {
  V<Real> of[rows][vectors];

  // What is there, to be added to, or zeros.
  inline Sums(const Real* y, int64_t pitch, bool add) {
#pragma GCC unroll 24
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) of[i][v] = add ? at(y + i * pitch + v * Vector<Real>::lanes) : V<Real>{};
  }

  inline void put_to(Real* y, int64_t pitch) const {
#pragma GCC unroll 24
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) put(y + i * pitch + v * Vector<Real>::lanes, of[i][v]);
  }
};

// Products number by number, their sums still in lanes.
template <class Real>
inline V<Real> products(const Real* one, const Real* other, int64_t length) {
  constexpr int n = Vector<Real>::lanes;
  V<Real> sum = {}, second = {};
  int64_t j = 0;
  for (; j + 2 * n <= length; j += 2 * n) {
    sum += at(one + j) * at(other + j);
    second += at(one + j + n) * at(other + j + n);
  }
  if (j + n <= length) {
    sum += at(one + j) * at(other + j);
    j += n;
  }
  if (j < length) second += first_of(one + j, length - j) * first_of(other + j, length - j);
  return sum + second;
}

// Calls `of` with a constant: how many registers, a power of two up to `most`, divide rows of so many numbers.
template <class Real, int most, class Of>
inline void by_registers(int64_t columns, const Of& of) {
  if constexpr (most > 1) {
    if (columns % (most * Vector<Real>::lanes) != 0) {
      by_registers<Real, most / 2>(columns, of);
      return;
    }
  }
  of(std::integral_constant<int, most>());
}

// Of two registers seen as a 2 x 2 matrix of groups of s lanes, again and again: its first row and its second, transposed.
template <class Real>
struct Exchange {
  typedef typename std::conditional<sizeof(Real) == 4, int32_t, int64_t>::type Index;
  typedef Index Mask __attribute__((vector_size(register_bytes)));
  Mask first, second;
  inline explicit Exchange(int s) {
    constexpr int n = Vector<Real>::lanes;
#pragma GCC unroll 16
    for (int l = 0; l < n; ++l) {
      first[l] = (l & s) ? n + (l - s) : l;
      second[l] = (l & s) ? n + l : l + s;
    }
  }
};

// A square of registers transposed in place: log2(lanes) rounds of exchanging off-diagonal halves.
template <class Real>
inline void transpose(V<Real>* r) {
  constexpr int n = Vector<Real>::lanes;
#pragma GCC unroll 8
  for (int s = n / 2; s > 0; s /= 2) {
    const Exchange<Real> of(s);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if (i & s) continue;
      const V<Real> a = r[i], b = r[i + s];
      r[i] = __builtin_shuffle(a, b, of.first);
      r[i + s] = __builtin_shuffle(a, b, of.second);
    }
  }
}

}  // namespace STRUCTMAT_ISA
}  // namespace structmat

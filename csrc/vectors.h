// Vector registers of the instruction set that a source is compiled for.
#pragma once

#include <cstdint>
#include <type_traits>

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

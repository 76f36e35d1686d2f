// One source, compiled once for each instruction set: STRUCTMAT_ISA names it, the compiler's flags allow it.
#include "kernels.h"

#include <cstring>

#include "activations.h"
#include "cells.h"
#include "contraction.h"
#include "convolution.h"
#include "gradients.h"
#include "panels.h"
#include "vector_kernels.h"
#include "vectors.h"
#include "windows.h"

namespace structmat {
namespace STRUCTMAT_ISA {

// ------------------------------------------------------------------------------------------ storage outside of tiles

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen_bf16(uint16_t x) { return from_bits(uint32_t(x) << 16); }

// To nearest, ties to even; a NaN stays one.
inline uint16_t narrow_bf16(float x) {
  const uint32_t bits = to_bits(x);
  const uint16_t rounded = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  return x == x ? rounded : uint16_t((bits >> 16) | 0x40);
}

inline float widen_f16(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16, rest = x & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | ((rest & 0x3ff) << 13));  // infinite or NaN
  // Shifted into place and scaled by 2^112: subnormal numbers come out right too.
  return from_bits(sign | to_bits(from_bits(rest << 13) * from_bits(0x77800000)));
}

inline uint16_t narrow_f16(float x) {
  const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return uint16_t(sign | 0x7e00 | ((size >> 13) & 0x3ff));  // NaN
  if (size >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
  if (size < 0x38800000) {  // subnormal: the addition of 1/2 rounds to multiples of 2^-24
    const float rounded = from_bits(size) + 0.5f;
    return uint16_t(sign | (to_bits(rounded) - 0x3f000000));
  }
  return uint16_t(sign | ((size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13));
}

template <Storage S>
struct Stored;
template <>
struct Stored<Storage::f32> {
  typedef float type;
  template <class Real>
  static Real widen(float x) { return Real(x); }
  template <class Real>
  static float narrow(Real x) { return float(x); }
};
template <>
struct Stored<Storage::f64> {
  typedef double type;
  template <class Real>
  static Real widen(double x) { return Real(x); }
  template <class Real>
  static double narrow(Real x) { return double(x); }
};
template <>
struct Stored<Storage::bf16> {
  typedef uint16_t type;
  template <class Real>
  static Real widen(uint16_t x) { return Real(widen_bf16(x)); }
  template <class Real>
  static uint16_t narrow(Real x) { return narrow_bf16(float(x)); }
};
template <>
struct Stored<Storage::f16> {
  typedef uint16_t type;
  template <class Real>
  static Real widen(uint16_t x) { return Real(widen_f16(x)); }
  template <class Real>
  static uint16_t narrow(Real x) { return narrow_f16(float(x)); }
};

// -------------------------------------------------------------------------------------------------- transposition

template <class Real, Storage S>
inline V<Real> load_row(const typename Stored<S>::type* p) {
  constexpr int n = Vector<Real>::lanes;
  if constexpr (std::is_same<typename Stored<S>::type, Real>::value) return at<Real>(p);
  V<Real> r = {};
  for (int l = 0; l < n; ++l) r[l] = Stored<S>::template widen<Real>(p[l]);
  return r;
}

template <class Real, Storage S>
void load_as(const typename Stored<S>::type* x, int64_t stride, int64_t count, int64_t features, Real* tile,
             int64_t columns) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t c = 0; c < columns; c += n) {
    const int64_t valid = count - c < n ? (count - c < 0 ? 0 : count - c) : n;
    int64_t f = 0;
    for (; f + n <= features; f += n) {
      V<Real> r[n];
      if (valid == n) {
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) r[i] = load_row<Real, S>(x + (c + i) * stride + f);
      } else {
        for (int i = 0; i < n; ++i) r[i] = i < valid ? load_row<Real, S>(x + (c + i) * stride + f) : V<Real>{};
      }
      transpose<Real>(r);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) put(tile + (f + i) * columns + c, r[i]);
    }
    for (; f < features; ++f)
      for (int i = 0; i < n; ++i)
        tile[f * columns + c + i] =
            i < valid ? Stored<S>::template widen<Real>(x[(c + i) * stride + f]) : Real(0);
  }
}

template <class Real, Storage S>
void store_as(const Real* tile, int64_t columns, const Real* bias, typename Stored<S>::type* y, int64_t stride,
              int64_t count, int64_t features) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t c = 0; c < columns && c < count; c += n) {
    const int64_t valid = count - c < n ? count - c : n;
    int64_t f = 0;
    for (; f + n <= features; f += n) {
      V<Real> r[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) r[i] = at(tile + (f + i) * columns + c);
      if (bias)
        for (int i = 0; i < n; ++i) r[i] += bias[f + i];
      transpose<Real>(r);
      for (int i = 0; i < valid; ++i) {
        auto* to = y + (c + i) * stride + f;
        if constexpr (std::is_same<typename Stored<S>::type, Real>::value)
          put(to, r[i]);
        else
          for (int l = 0; l < n; ++l) to[l] = Stored<S>::template narrow<Real>(r[i][l]);
      }
    }
    for (; f < features; ++f)
      for (int i = 0; i < valid; ++i)
        y[(c + i) * stride + f] =
            Stored<S>::template narrow<Real>(tile[f * columns + c + i] + (bias ? bias[f] : Real(0)));
  }
}

// Without transposition: row after row of the tile, a part of one in memory.
template <class Real, Storage S>
void load_by_features_as(const typename Stored<S>::type* x, int64_t stride, int64_t count, int64_t features,
                         Real* tile, int64_t columns) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t f = 0; f < features; ++f, x += stride, tile += columns) {
    int64_t c = 0;
    for (; c + n <= count; c += n) put(tile + c, load_row<Real, S>(x + c));
    for (; c < count; ++c) tile[c] = Stored<S>::template widen<Real>(x[c]);
    for (; c < columns; ++c) tile[c] = Real(0);
  }
}

template <class Real, Storage S>
void store_by_features_as(const Real* tile, int64_t columns, const Real* bias, typename Stored<S>::type* y,
                          int64_t stride, int64_t count, int64_t features) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t f = 0; f < features; ++f, y += stride, tile += columns) {
    const Real shift = bias ? bias[f] : Real(0);
    int64_t c = 0;
    for (; c + n <= count; c += n) {
      const V<Real> row = at(tile + c) + shift;
      if constexpr (std::is_same<typename Stored<S>::type, Real>::value)
        put(y + c, row);
      else
        for (int l = 0; l < n; ++l) y[c + l] = Stored<S>::template narrow<Real>(row[l]);
    }
    for (; c < count; ++c) y[c] = Stored<S>::template narrow<Real>(tile[c] + shift);
  }
}

#define STRUCTMAT_BY_STORAGE(call)                        \
  switch (storage) {                                      \
    case Storage::f32: { constexpr Storage S = Storage::f32; call; break; }   \
    case Storage::f64: { constexpr Storage S = Storage::f64; call; break; }   \
    case Storage::bf16: { constexpr Storage S = Storage::bf16; call; break; } \
    case Storage::f16: { constexpr Storage S = Storage::f16; call; break; }   \
  }

template <class Real>
void load(const void* x, Storage storage, int64_t stride, int64_t count, int64_t features, Real* tile,
          int64_t columns) {
  STRUCTMAT_BY_STORAGE((load_as<Real, S>(static_cast<const typename Stored<S>::type*>(x), stride, count, features,
                                         tile, columns)))
}

template <class Real>
void store(const Real* tile, int64_t columns, const Real* bias, void* y, Storage storage, int64_t stride,
           int64_t count, int64_t features) {
  STRUCTMAT_BY_STORAGE(
      (store_as<Real, S>(tile, columns, bias, static_cast<typename Stored<S>::type*>(y), stride, count, features)))
}

template <class Real>
void load_by_features(const void* x, Storage storage, int64_t stride, int64_t count, int64_t features, Real* tile,
                      int64_t columns) {
  STRUCTMAT_BY_STORAGE((load_by_features_as<Real, S>(static_cast<const typename Stored<S>::type*>(x), stride, count,
                                                     features, tile, columns)))
}

template <class Real>
void store_by_features(const Real* tile, int64_t columns, const Real* bias, void* y, Storage storage, int64_t stride,
                       int64_t count, int64_t features) {
  STRUCTMAT_BY_STORAGE((store_by_features_as<Real, S>(tile, columns, bias, static_cast<typename Stored<S>::type*>(y),
                                                      stride, count, features)))
}

template <class Real>
void widen(const void* from, Storage storage, Real* to, int64_t count) {
  STRUCTMAT_BY_STORAGE((
      [&] {
        const auto* values = static_cast<const typename Stored<S>::type*>(from);
        for (int64_t i = 0; i < count; ++i) to[i] = Stored<S>::template widen<Real>(values[i]);
      }()))
}

template <class Real>
void narrow(const Real* from, Storage storage, void* to, int64_t count) {
  STRUCTMAT_BY_STORAGE((
      [&] {
        auto* values = static_cast<typename Stored<S>::type*>(to);
        for (int64_t i = 0; i < count; ++i) values[i] = Stored<S>::template narrow<Real>(from[i]);
      }()))
}

// -------------------------------------------------------------------------------------------- stages of 2 x 2 blocks

template <class Real, int count, int vectors>
void radix_columns(const Radix& s, const Real* const* tensors, const Real* x, Real* y, int64_t columns) {
  constexpr int n = Vector<Real>::lanes, size = 1 << count;
  const Real* weight[count];
  for (int k = 0; k < count; ++k) weight[k] = tensors[s.weight[k]];
  const int64_t groups = s.rows / (size * s.lowest);
  for (int64_t hi = 0; hi < groups; ++hi)
    for (int64_t lo = 0; lo < s.lowest; ++lo) {
      const int64_t base = (hi * size * s.lowest + lo) * columns, step = s.lowest * columns;
      for (int64_t p = 0; p < columns; p += vectors * n) {
        V<Real> r[size][vectors];
#pragma GCC unroll 8
        for (int g = 0; g < size; ++g)
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) r[g][v] = at(x + base + g * step + p + v * n);
#pragma GCC unroll 3
        for (int k = 0; k < count; ++k) {
          const int m = s.bit[k];
          const int64_t d = s.lowest << m, across = s.transposed[k] ? 2 * d : d, down = s.transposed[k] ? d : 2 * d;
          // A constant pattern for each bit, so that registers are addressed by constants.
          auto mix = [&](auto bit) {
            constexpr int b = decltype(bit)::value;
            if constexpr (b < count) {
#pragma GCC unroll 8
              for (int g = 0; g < size; ++g) {
                if (g & (1 << b)) continue;
                const int64_t block = (hi << (count - 1 - b)) + (g >> (b + 1));
                const Real* w = weight[k] + block * 4 * d + (g & ((1 << b) - 1)) * s.lowest + lo;
                const Real w00 = w[0], w01 = w[across], w10 = w[down], w11 = w[3 * d];
#pragma GCC unroll 4
                for (int v = 0; v < vectors; ++v) {
                  const V<Real> one = r[g][v], two = r[g | (1 << b)][v];
                  r[g][v] = one * w00 + two * w01;
                  r[g | (1 << b)][v] = one * w10 + two * w11;
                }
              }
            }
          };
          if (m == 0) mix(std::integral_constant<int, 0>());
          else if (m == 1) mix(std::integral_constant<int, 1>());
          else mix(std::integral_constant<int, 2>());
        }
#pragma GCC unroll 8
        for (int g = 0; g < size; ++g)
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) put(y + base + g * step + p + v * n, r[g][v]);
      }
    }
}

template <class Real>
void radix(const Radix& stage, const Real* const* tensors, const Real* x, Real* y, int64_t columns) {
  constexpr int n = Vector<Real>::lanes;
  const bool two = registers == 32 && columns % (2 * n) == 0;
#define STRUCTMAT_RADIX(k) \
  two ? radix_columns<Real, k, 2>(stage, tensors, x, y, columns) : radix_columns<Real, k, 1>(stage, tensors, x, y, columns)
  if (stage.count == 1) STRUCTMAT_RADIX(1);
  else if (stage.count == 2) STRUCTMAT_RADIX(2);
  else STRUCTMAT_RADIX(3);
#undef STRUCTMAT_RADIX
}

// ---------------------------------------------------------------------------------------------------- row by row

template <class Real>
inline void add_row(const Real* x, Real* y, int64_t columns, Real factor) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t p = 0; p < columns; p += n) put(y + p, at(y + p) + at(x + p) * factor);
}

template <class Real>
inline void copy_row(const Real* x, Real* y, int64_t columns, bool add) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t p = 0; p < columns; p += n) put(y + p, add ? at(y + p) + at(x + p) : at(x + p));
}

template <class Real>
void diagonal(const Real* weight, const Real* x, Real* y, int64_t rows, int64_t columns, bool add) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t i = 0; i < rows; ++i) {
    const Real factor = weight[i];
    for (int64_t p = i * columns; p < (i + 1) * columns; p += n)
      put(y + p, add ? at(y + p) + at(x + p) * factor : at(x + p) * factor);
  }
}

template <class Real>
void gather(const int64_t* index, const Real* x, Real* y, int64_t rows, int64_t columns, bool add) {
  for (int64_t i = 0; i < rows; ++i) copy_row(x + index[i] * columns, y + i * columns, columns, add);
}

template <class Real>
void scatter_add(const int64_t* index, const Real* x, Real* y, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) copy_row(x + i * columns, y + index[i] * columns, columns, true);
}

template <class Real>
void copy(const Real* x, Real* y, int64_t rows, int64_t columns, bool add) {
  copy_row(x, y, rows * columns, add);
}

// Two chains of sums for each register of the row, so that the latency of one hides behind the other.
template <class Real, int vectors>
void sparse_columns(const Compressed& m, const Real* values, const Real* x, Real* y, int64_t rows, int64_t columns,
                    bool add) {
  constexpr int n = Vector<Real>::lanes;
  constexpr int chains = vectors >= 4 ? 1 : 4 / vectors;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t p = 0; p < columns; p += vectors * n) {
      V<Real> sum[chains][vectors] = {};
      int32_t k = m.start[i];
      const int32_t end = m.start[i + 1];
      for (; k + chains <= end; k += chains)
#pragma GCC unroll 4
        for (int c = 0; c < chains; ++c) {
          const Real* row = x + int64_t(m.column[k + c]) * columns + p;
          const Real factor = values[k + c];
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) sum[c][v] += at(row + v * n) * factor;
        }
      for (; k < end; ++k) {
        const Real* row = x + int64_t(m.column[k]) * columns + p;
        for (int v = 0; v < vectors; ++v) sum[0][v] += at(row + v * n) * values[k];
      }
      for (int v = 0; v < vectors; ++v) {
        V<Real> total = sum[0][v];
        for (int c = 1; c < chains; ++c) total += sum[c][v];
        Real* to = y + i * columns + p + v * n;
        put(to, add ? at(to) + total : total);
      }
    }
}

template <class Real>
void sparse(const Compressed& matrix, const Real* values, const Real* x, Real* y, int64_t rows, int64_t columns,
            bool add) {
  by_registers<Real, 4>(columns, [&](auto vectors) {
    sparse_columns<Real, decltype(vectors)::value>(matrix, values, x, y, rows, columns, add);
  });
}

template <class Real>
constexpr Kernels<Real> table = {load<Real>,
                                 store<Real>,
                                 load_by_features<Real>,
                                 store_by_features<Real>,
                                 contract<Real>,
                                 radix<Real>,
                                 pack<Real>,
                                 contract_packed<Real>,
                                 quads<Real>,
                                 diagonal<Real>,
                                 gather<Real>,
                                 scatter_add<Real>,
                                 copy<Real>,
                                 sparse<Real>,
                                 read_windows<Real>,
                                 write_windows<Real>,
                                 contract_vectors<Real>,
                                 sparse_vectors<Real>,
                                 read_vector<Real>,
                                 write_vector<Real>,
                                 contract_sums<Real>,
                                 radix_back<Real>,
                                 diagonal_sums<Real>,
                                 sparse_back<Real>,
                                 window_sums<Real>,
                                 row_sums<Real>,
                                 activate<Real>,
                                 activate_vector<Real>,
                                 activate_back<Real>,
                                 cell<Real>,
                                 cell_back<Real>,
                                 convolve<Real>,
                                 convolve_sparse<Real>,
                                 widen<Real>,
                                 narrow<Real>,
                                 Vector<Real>::lanes};

const Kernels<float>* single() { return &table<float>; }
const Kernels<double>* wide() { return &table<double>; }

}  // namespace STRUCTMAT_ISA
}  // namespace structmat

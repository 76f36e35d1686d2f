// Contractions with a matrix of its own for every d, from weights that were brought into panels before.
//
// As tensors, weights of neighbouring d lie side by side and those of one matrix far apart, often a power of two apart,
// where caches hold few of them. In panels everything that is read at a time lies together: matrix (a, d) after matrix,
// cut into panels of `panel_rows` rows b (the last may be lower), each column after column.
#pragma once

#include "contraction.h"
#include "kernels.h"
#include "vectors.h"

namespace structmat {
namespace STRUCTMAT_ISA {

constexpr int64_t near_bytes = 16 << 10;  // of what is copied into the L1 cache at a time

// One register of a panel for each of as many neighbouring d as it has lanes: `tall` rows of some columns.
template <class Real, int tall>
inline void pack_block(const Real* from, int64_t down, int64_t across, Real* to, int64_t matrix) {
  constexpr int n = Vector<Real>::lanes;
  V<Real> r[n];
#pragma GCC unroll 16
  for (int q = 0; q < n; ++q) r[q] = at(from + q / tall * across + q % tall * down);
  transpose<Real>(r);
#pragma GCC unroll 16
  for (int q = 0; q < n; ++q) put(to + q * matrix, r[q]);
}

// Units of work: one panel of the matrices of one a and up to `pack_together` neighbouring d.
template <class Real>
void pack(const Contract& s, const Real* weight, Real* panels, int64_t begin, int64_t end) {
  constexpr int n = Vector<Real>::lanes, few = n < 4 ? n : 4;
  const int64_t groups = (s.d + pack_together - 1) / pack_together, matrix = s.b * s.c;
  const int64_t tall = (s.b + panel_rows - 1) / panel_rows;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t a = unit / (groups * tall), first = unit / tall % groups * pack_together;
    const int64_t last = first + pack_together < s.d ? first + pack_together : s.d;
    const int64_t b = unit % tall * panel_rows;
    const int64_t height = s.b - b < panel_rows ? s.b - b : panel_rows;
    const Real* from = weight + a * s.stride_a + b * s.stride_b;
    Real* to = panels + a * s.d * matrix + b * s.c;
    int64_t d = first;
    if (s.stride_d == 1 && height % n == 0)
      for (; d + n <= last; d += n)
        for (int64_t j = 0; j < s.c; ++j)
          for (int64_t i = 0; i < height; i += n)
            pack_block<Real, n>(from + d + j * s.stride_c + i * s.stride_b, s.stride_b, s.stride_c,
                                to + d * matrix + j * height + i, matrix);
    else if (s.stride_d == 1 && height == few && s.c % (n / few) == 0)
      for (; d + n <= last; d += n)
        for (int64_t j = 0; j < s.c; j += n / few)
          pack_block<Real, few>(from + d + j * s.stride_c, s.stride_b, s.stride_c, to + d * matrix + j * few, matrix);
    for (int64_t j = 0; j < s.c; ++j)
      for (int64_t i = 0; i < height; ++i) {
        const Real* own = from + j * s.stride_c + i * s.stride_b;
        for (int64_t k = d; k < last; ++k) to[k * matrix + j * height + i] = own[k * s.stride_d];
      }
  }
}

// Rows with neighbouring c lie d rows apart, often a power of two: a part of them is copied into the L1 cache, where all
// panels of a matrix find it.
template <class Real, int vectors>
void packed_columns(const Contract& s, const Real* panels, const Real* x, Real* y, int64_t columns, bool add) {
  constexpr int n = Vector<Real>::lanes;
  constexpr int rows = registers == 32 ? int(panel_rows) / vectors : 8 / vectors;
  constexpr int64_t wide = vectors * n, most = near_bytes / (wide * int64_t(sizeof(Real)));
  alignas(register_bytes) Real near[most * wide];
  const int64_t pitch = s.d * columns, stride = s.stride_a ? s.d * s.b * s.c : 0;
  for (int64_t a = 0; a < s.a; ++a)
    for (int64_t d = 0; d < s.d; ++d)
      for (int64_t p = d * columns; p < (d + 1) * columns; p += wide)
        for (int64_t k = 0; k < s.c; k += most) {
          const int64_t depth = s.c - k < most ? s.c - k : most;
          const Real* from = x + (a * s.c + k) * pitch + p;
          for (int64_t j = 0; j < depth; ++j)
            for (int64_t v = 0; v < wide; v += n) put(near + j * wide + v, at(from + j * pitch + v));
          for (int64_t b = 0; b < s.b; b += panel_rows) {
            const int64_t height = s.b - b < panel_rows ? s.b - b : panel_rows;
            const Real* w = panels + a * stride + (d * s.b + b) * s.c + k * height;
            rest<Real, rows, vectors>(height, w, 1, height, near, wide, y + (a * s.b + b) * pitch + p, pitch, depth,
                                      add || k > 0);
          }
        }
}

template <class Real>
void contract_packed(const Contract& stage, const Real* panels, const Real* x, Real* y, int64_t columns, bool add) {
  constexpr int n = Vector<Real>::lanes;
  if (registers == 32 && columns % (4 * n) == 0)
    packed_columns<Real, 4>(stage, panels, x, y, columns, add);
  else if (columns % (2 * n) == 0)
    packed_columns<Real, 2>(stage, panels, x, y, columns, add);
  else
    packed_columns<Real, 1>(stage, panels, x, y, columns, add);
}

// A 4 x 4 matrix, row after row or column after column, times four rows of a tile. Rows have names here, since compilers
// keep arrays in memory where they can't see every index.
template <class Real, bool by_rows>
inline void mix(V<Real>& r0, V<Real>& r1, V<Real>& r2, V<Real>& r3, const Real* w) {
  constexpr int i = by_rows ? 4 : 1, j = by_rows ? 1 : 4;
  const V<Real> y0 = r0 * w[0] + r1 * w[j] + r2 * w[2 * j] + r3 * w[3 * j];
  const V<Real> y1 = r0 * w[i] + r1 * w[i + j] + r2 * w[i + 2 * j] + r3 * w[i + 3 * j];
  const V<Real> y2 = r0 * w[2 * i] + r1 * w[2 * i + j] + r2 * w[2 * i + 2 * j] + r3 * w[2 * i + 3 * j];
  const V<Real> y3 = r0 * w[3 * i] + r1 * w[3 * i + j] + r2 * w[3 * i + 2 * j] + r3 * w[3 * i + 3 * j];
  r0 = y0, r1 = y1, r2 = y2, r3 = y3;
}

template <class Real, int vectors, bool by_rows>
void one_quad(const Quads& s, const Real* w, const Real* x, Real* y, int64_t columns) {
  constexpr int n = Vector<Real>::lanes;
  const int64_t step = s.lowest * columns;
  for (int64_t hi = 0; hi < s.rows / (4 * s.lowest); ++hi)
    for (int64_t lo = 0; lo < s.lowest; ++lo, w += 16)
      for (int64_t p = 0; p < columns; p += vectors * n) {
        const int64_t base = (hi * 4 * s.lowest + lo) * columns + p;
        const Real* from = x + base;
        Real* to = y + base;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v, from += n, to += n) {
          V<Real> r0 = at(from), r1 = at(from + step), r2 = at(from + 2 * step), r3 = at(from + 3 * step);
          mix<Real, by_rows>(r0, r1, r2, r3, w);
          put(to, r0), put(to + step, r1), put(to + 2 * step, r2), put(to + 3 * step, r3);
        }
      }
}

// Two stages: `up` says whether the first mixes the low digit of a group's index, and the second the high one; `by_rows`
// how the weights of the low one lie.
template <class Real, bool up, bool by_rows>
void two_quads(const Quads& s, const Real* const* panels, const Real* x, Real* y, int64_t columns) {
  constexpr int n = Vector<Real>::lanes;
  const int64_t step = s.lowest * columns, next = s.lowest * 16;
  for (int64_t hi = 0; hi < s.rows / (16 * s.lowest); ++hi)
    for (int64_t lo = 0; lo < s.lowest; ++lo) {
      const Real *w = panels[0] + (hi * 4 * s.lowest + lo) * 16, *u = panels[1] + (hi * 4 * s.lowest + lo) * 16;
      for (int64_t p = 0; p < columns; p += n) {
        const int64_t base = (hi * 16 * s.lowest + lo) * columns + p;
        V<Real> r[16];
#pragma GCC unroll 4
        for (int h = 0; h < 4; ++h) {
          const Real* from = x + base + 4 * h * step;
          r[4 * h] = at(from), r[4 * h + 1] = at(from + step);
          r[4 * h + 2] = at(from + 2 * step), r[4 * h + 3] = at(from + 3 * step);
        }
        const auto low = [&](const Real* v) {
          mix<Real, by_rows>(r[0], r[1], r[2], r[3], v), mix<Real, by_rows>(r[4], r[5], r[6], r[7], v + next);
          mix<Real, by_rows>(r[8], r[9], r[10], r[11], v + 2 * next);
          mix<Real, by_rows>(r[12], r[13], r[14], r[15], v + 3 * next);
        };
        const auto high = [&](const Real* v) {
          mix<Real, false>(r[0], r[4], r[8], r[12], v), mix<Real, false>(r[1], r[5], r[9], r[13], v + next);
          mix<Real, false>(r[2], r[6], r[10], r[14], v + 2 * next);
          mix<Real, false>(r[3], r[7], r[11], r[15], v + 3 * next);
        };
        if constexpr (up)
          low(w), high(u);
        else
          high(w), low(u);
#pragma GCC unroll 4
        for (int h = 0; h < 4; ++h) {
          Real* to = y + base + 4 * h * step;
          put(to, r[4 * h]), put(to + step, r[4 * h + 1]);
          put(to + 2 * step, r[4 * h + 2]), put(to + 3 * step, r[4 * h + 3]);
        }
      }
    }
}

template <class Real>
void quads(const Quads& stage, const Real* const* panels, const Real* x, Real* y, int64_t columns) {
  constexpr int n = Vector<Real>::lanes;
  if (stage.count == 2 && registers == 32) {
    const bool up = stage.digit[0] == 0;
    if (stage.by_rows)
      return up ? two_quads<Real, true, true>(stage, panels, x, y, columns)
                : two_quads<Real, false, true>(stage, panels, x, y, columns);
    return up ? two_quads<Real, true, false>(stage, panels, x, y, columns)
              : two_quads<Real, false, false>(stage, panels, x, y, columns);
  }
  for (int k = 0; k < stage.count; ++k) {  // one after the other where registers are few
    Quads one;
    one.count = 1, one.rows = stage.rows, one.lowest = stage.lowest << 2 * stage.digit[k];
    const Real* from = k ? y : x;
    const bool wide = registers == 32 && columns % (2 * n) == 0;
    if (stage.by_rows && stage.digit[k] == 0)
      wide ? one_quad<Real, 2, true>(one, panels[k], from, y, columns)
           : one_quad<Real, 1, true>(one, panels[k], from, y, columns);
    else
      wide ? one_quad<Real, 2, false>(one, panels[k], from, y, columns)
           : one_quad<Real, 1, false>(one, panels[k], from, y, columns);
  }
}

}  // namespace STRUCTMAT_ISA
}  // namespace structmat

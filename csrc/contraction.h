// Products of many small matrices with the rows of a tile, for the instruction set that a source is compiled for.
#pragma once

#include "kernels.h"
#include "vectors.h"

namespace structmat {
namespace STRUCTMAT_ISA {

// `rows` rows of the outcome, `vectors` registers of each, from rows of x that `row_of` finds: accumulators stay in
// registers over all of c.
template <class Real, int rows, int vectors, class RowOf>
inline void block(const Real* w, int64_t wi, int64_t wj, const RowOf& row_of, Real* y, int64_t y_stride, int64_t c,
                  bool add) {
  constexpr int n = Vector<Real>::lanes;
  Sums<Real, rows, vectors> sum(y, y_stride, add);
  for (int64_t j = 0; j < c; ++j) {
    const Real* x = row_of(j);
    V<Real> values[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) values[v] = at(x + v * n);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const Real factor = w[i * wi + j * wj];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum.of[i][v] += values[v] * factor;
    }
  }
  sum.put_to(y, y_stride);
}

// The next smaller block: the fewer of them a remainder takes, the fewer wait for their accumulators.
constexpr int smaller(int rows) { return rows > 8 ? 8 : rows > 6 ? 6 : rows > 4 ? 4 : rows - 1; }

// Fewer rows than a full block: one after the other of smaller sizes.
template <class Real, int rows, int vectors>
inline void rest(int64_t b, const Real* w, int64_t wi, int64_t wj, const Real* x, int64_t x_stride, Real* y,
                 int64_t y_stride, int64_t c, bool add) {
  if constexpr (rows >= 1) {
    while (b >= rows) {
      block<Real, rows, vectors>(w, wi, wj, [=](int64_t j) { return x + j * x_stride; }, y, y_stride, c, add);
      w += rows * wi, y += rows * y_stride, b -= rows;
    }
    if (b) rest<Real, smaller(rows), vectors>(b, w, wi, wj, x, x_stride, y, y_stride, c, add);
  }
}

constexpr int64_t inner = 256;  // rows of x that are contracted at once: with 16 columns they fit the L1 cache

template <class Real, int vectors>
void contract_columns(const Contract& s, const Real* weight, const Real* x, Real* y, int64_t columns, bool add) {
  constexpr int n = Vector<Real>::lanes;
  // Accumulators, the values of x and one factor share the registers; latency asks for at least 8 accumulators.
  constexpr int rows = registers == 32 ? (vectors == 1 ? 12 : 24 / vectors) : (vectors == 1 ? 12 : 6);
  const int64_t pitch = s.d * columns;  // distance of rows with neighbouring c
  for (int64_t a = 0; a < s.a; ++a) {
    const Real* wa = weight + a * s.stride_a;
    const Real* xa = x + a * s.c * pitch;
    Real* ya = y + a * s.b * pitch;
    for (int64_t k = 0; k < s.c; k += inner) {
      const int64_t depth = s.c - k < inner ? s.c - k : inner;
      const bool adds = add || k > 0;
      const Real* wk = wa + k * s.stride_c;
      const Real* xk = xa + k * pitch;
      if (s.stride_d == 0) {  // one matrix for all of d: its rows and the columns of the tile are one long row
        for (int64_t p = 0; p < pitch; p += vectors * n)
          rest<Real, rows, vectors>(s.b, wk, s.stride_b, s.stride_c, xk + p, pitch, ya + p, pitch, depth, adds);
        continue;
      }
      // A block of rows for all d: the weights of neighbouring d share cache lines.
      constexpr int64_t few = rows < 8 ? rows : 8;
      for (int64_t b = 0; b < s.b; b += few) {
        const int64_t height = s.b - b < few ? s.b - b : few;
        for (int64_t d = 0; d < s.d; ++d)
          for (int64_t p = 0; p < columns; p += vectors * n)
            rest<Real, few, vectors>(height, wk + b * s.stride_b + d * s.stride_d, s.stride_b, s.stride_c,
                                     xk + d * columns + p, pitch, ya + (b * s.d + d) * columns + p, pitch, depth,
                                     adds);
      }
    }
  }
}

template <class Real>
void contract(const Contract& stage, const Real* weight, const Real* x, Real* y, int64_t columns, bool add) {
  constexpr int n = Vector<Real>::lanes;
  if (registers == 32 && columns % (4 * n) == 0)
    contract_columns<Real, 4>(stage, weight, x, y, columns, add);
  else if (columns % (2 * n) == 0)
    contract_columns<Real, 2>(stage, weight, x, y, columns, add);
  else
    contract_columns<Real, 1>(stage, weight, x, y, columns, add);
}

}  // namespace STRUCTMAT_ISA
}  // namespace structmat

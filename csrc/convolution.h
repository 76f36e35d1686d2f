// Convolutions as sums of shifted rows, for the instruction set that a source is compiled for.
#pragma once

#include <utility>

#include "contraction.h"
#include "kernels.h"
#include "vectors.h"

namespace structmat {
namespace STRUCTMAT_ISA {

constexpr int wide_part = registers == 32 ? 3 : 2;       // registers of a line at once
constexpr int most_lines = registers == 32 ? 8 : 6;      // and lines: all their sums fit the registers
constexpr int64_t at_once = 16 * wide_part;              // registers of a line whose inputs stay in the nearest cache

template <class Real, int rows>
inline void shifted_lines(int64_t lines, const Real* w, int64_t depth, const int64_t* shifts, const Real* x, Real* y,
                          int64_t pitch, int64_t count) {
  constexpr int n = Vector<Real>::lanes;
  const auto part = [&](auto registers_of, int64_t p) {
    constexpr int vectors = decltype(registers_of)::value;
    block<Real, rows, vectors>(w, depth, 1, [=](int64_t k) { return x + p + shifts[k]; }, y + p, pitch, depth, false);
    return vectors * n;
  };
  for (; lines >= rows; lines -= rows, w += rows * depth, y += rows * pitch) {
    int64_t p = 0;
    while (p + wide_part * n <= count) p += part(std::integral_constant<int, wide_part>(), p);
    if (wide_part > 2 && count - p > n) p += part(std::integral_constant<int, 2>(), p);
    while (p < count) p += part(std::integral_constant<int, 1>(), p);
  }
  if constexpr (rows > 1)
    if (lines) shifted_lines<Real, smaller(rows)>(lines, w, depth, shifts, x, y, pitch, count);
}

template <class Real>
void convolve(const Real* w, int64_t lines, int64_t depth, const int64_t* shifts, const Real* x, Real* y, int64_t pitch,
              int64_t count) {
  constexpr int64_t part = at_once * Vector<Real>::lanes;
  for (int64_t p = 0; p < count; p += part)
    shifted_lines<Real, most_lines>(lines, w, depth, shifts, x + p, y + p, pitch, count - p < part ? count - p : part);
}

// One line of the outcome, `vectors` registers of it, from the entries of its row, in two sums where one would wait for
// itself. Two shifts of a line have no more in common than their memory, so that this takes a load for each product: half
// of what a full matrix reaches.
template <class Real, int vectors>
void entries(const Real* values, const int32_t* shifts, int64_t count, const Real* x, Real* y) {
  constexpr int n = Vector<Real>::lanes, chains = vectors > registers / 4 ? 1 : 2;
  V<Real> sum[chains][vectors] = {};
  const auto take = [&](int64_t k, int c) {
    const Real* from = x + shifts[k];
    const Real factor = values[k];
#pragma GCC unroll 12
    for (int v = 0; v < vectors; ++v) sum[c][v] += at(from + v * n) * factor;
  };
  int64_t k = 0;
  for (; k + chains <= count; k += chains)
#pragma GCC unroll 2
    for (int c = 0; c < chains; ++c) take(k + c, c);
  if (k < count) take(k, 0);
#pragma GCC unroll 12
  for (int v = 0; v < vectors; ++v) put(y + v * n, chains == 1 ? sum[0][v] : sum[0][v] + sum[chains - 1][v]);
}

template <class Real>
using Entries = void (*)(const Real*, const int32_t*, int64_t, const Real*, Real*);

constexpr int longest_part = registers == 32 ? 12 : 8;  // registers of a line whose sums fit

template <class Real, int... vectors>
inline Entries<Real> entries_of(int64_t wanted, std::integer_sequence<int, vectors...>) {
  static constexpr Entries<Real> known[] = {entries<Real, vectors + 1>...};
  return known[wanted - 1];
}

template <class Real>
void convolve_sparse(const int32_t* start, const Real* values, const int32_t* shifts, int64_t lines, const Real* x, Real* y,
                     int64_t pitch, int64_t count) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t p = 0; p < count; p += longest_part * n) {
    const int64_t left = (count - p + n - 1) / n;
    const Entries<Real> run =
        entries_of<Real>(left < longest_part ? left : longest_part, std::make_integer_sequence<int, longest_part>());
    for (int64_t i = 0; i < lines; ++i)
      run(values + start[i], shifts + start[i], start[i + 1] - start[i], x + p, y + i * pitch + p);
  }
}

}  // namespace STRUCTMAT_ISA
}  // namespace structmat

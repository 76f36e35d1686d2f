// Stages backwards, for the instruction set that a source is compiled for. Gradients of weights are sums over the columns
// of a tile: lanes are summed by themselves, and only then with one another, for a register full of sums at once.
#pragma once

#include <cstring>

#include "contraction.h"
#include "kernels.h"
#include "vectors.h"

namespace structmat {
namespace STRUCTMAT_ISA {

// Lane l of the outcome is the sum of all lanes of r[l].
template <class Real>
inline V<Real> sum_lanes(V<Real>* r) {
  constexpr int n = Vector<Real>::lanes;
#pragma GCC unroll 8
  for (int s = n / 2; s > 0; s /= 2) {
    const Exchange<Real> of(s);
#pragma GCC unroll 16
    for (int i = 0; i < s; ++i)
      r[i] = __builtin_shuffle(r[i], r[i + s], of.first) + __builtin_shuffle(r[i], r[i + s], of.second);
  }
  return r[0];
}

// Registers whose lanes are to be summed, each onto a number of its own.
template <class Real>
class Totals {
 public:
  void add(V<Real> lanes, Real* onto) {
    pending_[count_] = lanes, onto_[count_] = onto;
    if (++count_ == n) flush();
  }

  void flush() {
    for (int i = count_; i < n; ++i) pending_[i] = V<Real>{};
    const V<Real> sums = sum_lanes<Real>(pending_);
    for (int i = 0; i < count_; ++i) *onto_[i] += sums[i];
    count_ = 0;
  }

 private:
  static constexpr int n = Vector<Real>::lanes;
  V<Real> pending_[n];
  Real* onto_[n];
  int count_ = 0;
};

// ------------------------------------------------------------------------------------------------------ contractions

// What is summed over: so many numbers of a row, again at other places.
struct Stretch {
  int64_t length, repeats, gy_step, x_step;
};

template <class Real, int rows, int others>
inline void sums_of_pairs(const Real* gy, const Real* x, int64_t pitch, Stretch run, Real* sums, int64_t stride_b,
                          int64_t stride_c, Totals<Real>& totals) {
  constexpr int n = Vector<Real>::lanes;
  V<Real> sum[rows][others] = {};
  for (int64_t r = 0; r < run.repeats; ++r, gy += run.gy_step, x += run.x_step)
    for (int64_t p = 0; p < run.length; p += n) {
      V<Real> values[others];
#pragma GCC unroll 4
      for (int j = 0; j < others; ++j) values[j] = at(x + j * pitch + p);
#pragma GCC unroll 6
      for (int i = 0; i < rows; ++i) {
        const V<Real> factor = at(gy + i * pitch + p);
#pragma GCC unroll 4
        for (int j = 0; j < others; ++j) sum[i][j] += factor * values[j];
      }
    }
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < others; ++j) totals.add(sum[i][j], sums + i * stride_b + j * stride_c);
}

// Every number by itself, a few at a time.
template <class Real, int rows>
inline void sums_of_rows(const Contract& s, const Real* gy, const Real* x, int64_t pitch, Stretch run, Real* sums,
                         Totals<Real>& totals) {
  int64_t j = 0;
  const auto some = [&](auto count) {
    constexpr int others = decltype(count)::value;
    for (; j + others <= s.c; j += others)
      sums_of_pairs<Real, rows, others>(gy, x + j * pitch, pitch, run, sums + j * s.stride_c, s.stride_b,
                                        s.stride_c, totals);
  };
  some(std::integral_constant<int, 4>());
  some(std::integral_constant<int, 2>());
  some(std::integral_constant<int, 1>());
}

template <class Real>
void sums_alone(const Contract& s, const Real* x, const Real* gy, Real* sums, int64_t columns) {
  const int64_t pitch = s.d * columns;
  Totals<Real> totals;
  // One matrix for all of d: its rows and the columns of the tile are one long row, in parts that stay in the L1 cache.
  const int64_t across = s.stride_d ? columns : pitch, most = 4096 / int64_t(sizeof(Real));
  const int64_t parts = across <= most ? 1 : (across + most - 1) / most;
  const int64_t part = (across / parts + columns - 1) / columns * columns;
  // One for all of a: the sums of all stay in registers, if the tile is too narrow to pay for taking them out.
  const int64_t together = s.stride_a ? 1 : s.a;
  for (int64_t a = 0; a < s.a; a += together)
    for (int64_t begin = 0; begin < pitch; begin += part) {
      const int64_t length = s.stride_d || pitch - begin > part ? part : pitch - begin;
      const Stretch run{length, together, s.b * pitch, s.c * pitch};
      const Real *g = gy + a * s.b * pitch + begin, *v = x + a * s.c * pitch + begin;
      Real* to = sums + a * s.stride_a + (s.stride_d ? begin / columns : 0);
      int64_t i = 0;
      const auto some = [&](auto count) {
        constexpr int rows = decltype(count)::value;
        for (; i + rows <= s.b; i += rows)
          sums_of_rows<Real, rows>(s, g + i * pitch, v, pitch, run, to + i * s.stride_b, totals);
      };
      if (registers == 32) some(std::integral_constant<int, 6>());
      if (registers == 32) some(std::integral_constant<int, 4>());
      some(std::integral_constant<int, 2>());
      some(std::integral_constant<int, 1>());
    }
  totals.flush();
}

// Rows at distances of `pitch`, `count` of them and then zeros, as columns: `width` numbers each.
template <class Real>
void turn(const Real* rows, int64_t pitch, int64_t count, int64_t width, int64_t columns, Real* turned) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t f = 0; f < width; f += n)
    for (int64_t c = 0; c < columns; c += n) {
      V<Real> r[n];
      if (f + n <= count) {
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) r[i] = at(rows + (f + i) * pitch + c);
      } else {
        for (int i = 0; i < n; ++i) r[i] = f + i < count ? at(rows + (f + i) * pitch + c) : V<Real>{};
      }
      transpose<Real>(r);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) put(turned + (c + i) * width + f, r[i]);
    }
}

template <class Real>
void contract_sums(const Contract& s, const BlockSums& shape, const Real* x, const Real* gy, Real* sums, Real* scratch,
                   int64_t columns) {
  if (shape.along == BlockSums::none) return sums_alone<Real>(s, x, gy, sums, columns);
  constexpr int n = Vector<Real>::lanes, vectors = registers == 32 ? 4 : 2;
  constexpr int rows = registers == 32 ? 6 : 6, narrow_rows = 12;
  const int64_t pitch = s.d * columns, block = shape.lines * shape.width;
  const bool along_c = shape.along == BlockSums::c;
  const int64_t length = along_c ? s.c : s.b, own = length * pitch, other = shape.lines * pitch;
  const int64_t deep = s.stride_d ? s.d : 1;
  for (int64_t a = 0; a < s.a; ++a)
    for (int64_t d = 0; d < s.d; ++d) {
      const Real* across = (along_c ? x : gy) + a * own + d * columns;   // what runs along the lines
      const Real* down = (along_c ? gy : x) + a * other + d * columns;  // one row of which each line takes
      Real* to = sums + ((s.stride_a ? a * deep : 0) + (s.stride_d ? d : 0)) * block;
      for (int64_t w = 0; w < shape.width; w += block_width) {
        const int64_t width = shape.width - w < block_width ? shape.width - w : block_width;
        turn<Real>(across + w * pitch, pitch, length - w, width, columns, scratch);
        int64_t p = 0;
        for (; p + vectors * n <= width; p += vectors * n)
          rest<Real, rows, vectors>(shape.lines, down, pitch, 1, scratch + p, width, to + w + p, shape.width, columns,
                                    true);
        for (; p < width; p += n)
          rest<Real, narrow_rows, 1>(shape.lines, down, pitch, 1, scratch + p, width, to + w + p, shape.width, columns,
                                     true);
      }
    }
}

// -------------------------------------------------------------------------------------------- stages of 2 x 2 blocks

// Where the rows of a group lie: one after the other at distances of `pitch`.
template <class Real>
struct Rows {
  Real* first;
  int64_t pitch;
};

// One stage of a group: which of its weights belong to which pair of rows.
template <int size, int bit>
struct Pairs {
  const Radix& stage;
  int64_t distance, across, down, first;

  Pairs(const Radix& s, int k, int64_t hi, int64_t lo) : stage(s) {
    distance = s.lowest << bit;
    across = s.transposed[k] ? 2 * distance : distance, down = s.transposed[k] ? distance : 2 * distance;
    first = hi * (size >> (bit + 1)) * 4 * distance + lo;
  }
  // The first weight of the pair of row g with the one across the bit.
  int64_t weight(int g) const {
    return first + (g >> (bit + 1)) * 4 * distance + (g & ((1 << bit) - 1)) * stage.lowest;
  }
};

template <class Real, int size, int bit>
void mix(const Radix& s, int k, int64_t hi, int64_t lo, const Real* weights, Rows<const Real> x, Rows<Real> y,
         int64_t columns) {
  constexpr int n = Vector<Real>::lanes;
  const Pairs<size, bit> pairs(s, k, hi, lo);
  for (int g = 0; g < size; ++g) {
    if (g & (1 << bit)) continue;
    const Real* w = weights + pairs.weight(g);
    const Real w00 = w[0], w01 = w[pairs.across], w10 = w[pairs.down], w11 = w[3 * pairs.distance];
    const Real *one = x.first + g * x.pitch, *two = one + (1 << bit) * x.pitch;
    Real *first = y.first + g * y.pitch, *second = first + (1 << bit) * y.pitch;
    for (int64_t p = 0; p < columns; p += n) {
      const V<Real> u = at(one + p), v = at(two + p);
      put(first + p, u * w00 + v * w01);
      put(second + p, u * w10 + v * w11);
    }
  }
}

// The transposed pair: gx (+)= W^T gy.
template <class Real, bool add>
inline void pair_back(Real w00, Real w01, Real w10, Real w11, const Real* g0, const Real* g1, Real* to0, Real* to1,
                      int64_t columns) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t p = 0; p < columns; p += n) {
    const V<Real> u = at(g0 + p), v = at(g1 + p);
    V<Real> first = u * w00 + v * w10, second = u * w01 + v * w11;
    if (add) first += at(to0 + p), second += at(to1 + p);
    put(to0 + p, first);
    put(to1 + p, second);
  }
}

template <class Real, int size, int bit>
void mix_back(const Radix& stage, int number, int64_t hi, int64_t lo, const Real* weights, Real* sums,
              Rows<const Real> x, Rows<const Real> gy, Rows<Real> gx, int64_t columns, bool add) {
  constexpr int n = Vector<Real>::lanes, count = 2 * size;
  const Pairs<size, bit> pairs(stage, number, hi, lo);
  if (sums) {
    V<Real> sum[count < n ? n : count] = {};
    int k = 0;
#pragma GCC unroll 8
    for (int g = 0; g < size; ++g) {
      if (g & (1 << bit)) continue;
      const Real *x0 = x.first + g * x.pitch, *x1 = x0 + (1 << bit) * x.pitch;
      const Real *g0 = gy.first + g * gy.pitch, *g1 = g0 + (1 << bit) * gy.pitch;
      V<Real> s00 = {}, s01 = {}, s10 = {}, s11 = {};
      for (int64_t p = 0; p < columns; p += n) {
        const V<Real> u = at(x0 + p), v = at(x1 + p), one = at(g0 + p), two = at(g1 + p);
        s00 += one * u, s01 += one * v, s10 += two * u, s11 += two * v;
      }
      sum[k++] = s00, sum[k++] = s01, sum[k++] = s10, sum[k++] = s11;
    }
    if (count < n) {
      const V<Real> total = sum_lanes<Real>(sum);
      for (int i = 0; i < count; ++i) sums[i] += total[i];
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < count; i += n) put(sums + i, at(sums + i) + sum_lanes<Real>(sum + i));
    }
  }
  if (!gx.first) return;
  for (int g = 0; g < size; ++g) {
    if (g & (1 << bit)) continue;
    const Real* w = weights + pairs.weight(g);
    const Real w00 = w[0], w01 = w[pairs.across], w10 = w[pairs.down], w11 = w[3 * pairs.distance];
    const Real *g0 = gy.first + g * gy.pitch, *g1 = g0 + (1 << bit) * gy.pitch;
    Real *to0 = gx.first + g * gx.pitch, *to1 = to0 + (1 << bit) * gx.pitch;
    if (add)
      pair_back<Real, true>(w00, w01, w10, w11, g0, g1, to0, to1, columns);
    else
      pair_back<Real, false>(w00, w01, w10, w11, g0, g1, to0, to1, columns);
  }
}

// The two ways of one stage, for the bit that it mixes.
template <class Real>
struct Ways {
  void (*mix)(const Radix& s, int k, int64_t hi, int64_t lo, const Real* weights, Rows<const Real> x, Rows<Real> y,
              int64_t columns);
  void (*back)(const Radix& s, int k, int64_t hi, int64_t lo, const Real* weights, Real* sums, Rows<const Real> x,
               Rows<const Real> gy, Rows<Real> gx, int64_t columns, bool add);
};

template <class Real, int count>
Ways<Real> ways_of(int bit) {
  constexpr int size = 1 << count, last = count - 1;
  if (bit == 0) return {mix<Real, size, 0>, mix_back<Real, size, 0>};
  if (bit == 1) return {mix<Real, size, last < 1 ? last : 1>, mix_back<Real, size, last < 1 ? last : 1>};
  return {mix<Real, size, last>, mix_back<Real, size, last>};
}

// Group by group: the values between its stages are computed again, in memory that stays in the nearest cache.
template <class Real, int count>
void radix_back_groups(const Radix& s, const Real* const* tensors, const Real* x, const Real* gy, Real* gx,
                       Real* const* sums, int64_t columns, bool add) {
  constexpr int size = 1 << count, widest = widest_row / sizeof(Real);
  alignas(64) Real between[count][size * widest], back[size * widest];
  Ways<Real> ways[count];
  int first = count, last = 0;  // stages whose weights have gradients
  for (int k = 0; k < count; ++k) {
    ways[k] = ways_of<Real, count>(s.bit[k]);
    if (sums[k]) first = first < k ? first : k, last = k;
  }
  const int64_t groups = s.rows / (size * s.lowest), step = s.lowest * columns;
  for (int64_t hi = 0; hi < groups; ++hi)
    for (int64_t lo = 0; lo < s.lowest; ++lo) {
      const int64_t base = (hi * size * s.lowest + lo) * columns;
      Rows<const Real> input[count];
      input[0] = {x + base, step};
      for (int k = 1; k < count; ++k) {
        input[k] = {between[k], columns};
        if (k <= last)
          ways[k - 1].mix(s, k - 1, hi, lo, tensors[s.weight[k - 1]], input[k - 1], {between[k], columns}, columns);
      }
      Rows<const Real> from{gy + base, step};
      for (int k = count - 1; k >= (gx ? 0 : first); --k) {
        const Rows<Real> to = k ? Rows<Real>{back, columns} : gx ? Rows<Real>{gx + base, step} : Rows<Real>{nullptr, 0};
        Real* own = sums[k] ? sums[k] + (hi * s.lowest + lo) * 2 * size : nullptr;
        ways[k].back(s, k, hi, lo, tensors[s.weight[k]], own, input[k], from, to, columns, add && !k);
        from = {back, columns};
      }
    }
}

template <class Real>
void radix_back(const Radix& stage, const Real* const* tensors, const Real* x, const Real* gy, Real* gx,
                Real* const* sums, int64_t columns, bool add) {
  if (stage.count == 1) radix_back_groups<Real, 1>(stage, tensors, x, gy, gx, sums, columns, add);
  else if (stage.count == 2) radix_back_groups<Real, 2>(stage, tensors, x, gy, gx, sums, columns, add);
  else radix_back_groups<Real, 3>(stage, tensors, x, gy, gx, sums, columns, add);
}

// ---------------------------------------------------------------------------------------------------------- by rows

// sums[i] += the lanes of row(i), summed, for a register full of rows at once.
template <class Real, class Row>
inline void sum_each(int64_t rows, Real* sums, const Row& row) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t i = 0; i < rows; i += n) {
    V<Real> sum[n];
    if (i + n <= rows) {
#pragma GCC unroll 16
      for (int l = 0; l < n; ++l) sum[l] = row(i + l);
      put(sums + i, at(sums + i) + sum_lanes<Real>(sum));
      continue;
    }
    for (int l = 0; l < n; ++l) sum[l] = i + l < rows ? row(i + l) : V<Real>{};
    const V<Real> total = sum_lanes<Real>(sum);
    for (int l = 0; i + l < rows; ++l) sums[i + l] += total[l];
  }
}

template <class Real>
void diagonal_sums(const Real* x, const Real* gy, Real* sums, int64_t rows, int64_t columns) {
  constexpr int n = Vector<Real>::lanes;
  sum_each<Real>(rows, sums, [&](int64_t i) {
    V<Real> sum = {};
    for (int64_t p = i * columns; p < (i + 1) * columns; p += n) sum += at(x + p) * at(gy + p);
    return sum;
  });
}

template <class Real>
void row_sums(const Real* rows, Real* sums, int64_t count, int64_t columns) {
  constexpr int n = Vector<Real>::lanes;
  sum_each<Real>(count, sums, [&](int64_t i) {
    V<Real> sum = {};
    for (int64_t p = i * columns; p < (i + 1) * columns; p += n) sum += at(rows + p);
    return sum;
  });
}

// Row by row of the outcome, whose gradient stays in registers; entries are read once for both gradients.
template <class Real, int vectors, bool passes, bool weighs>
void sparse_back_columns(const Compressed& m, const Real* values, const Real* x, const Real* gy, Real* gx, Real* sums,
                         int64_t rows, int64_t columns) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t p = 0; p < columns; p += vectors * n) {
    V<Real> pending[n];  // of the entries before the current one
    int count = 0;
    for (int64_t i = 0; i < rows; ++i) {
      V<Real> g[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) g[v] = at(gy + i * columns + p + v * n);
      for (int32_t k = m.start[i]; k < m.start[i + 1]; ++k) {
        const int64_t row = int64_t(m.column[k]) * columns + p;
        if (weighs) {
          V<Real> sum = {};
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) sum += at(x + row + v * n) * g[v];
          pending[count++] = sum;
          if (count == n) {
            Real* to = sums + k + 1 - n;
            put(to, at(to) + sum_lanes<Real>(pending));
            count = 0;
          }
        }
        if (passes) {
          const Real factor = values[k];
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) put(gx + row + v * n, at(gx + row + v * n) + g[v] * factor);
        }
      }
    }
    if (!count) continue;
    for (int l = count; l < n; ++l) pending[l] = V<Real>{};
    const V<Real> total = sum_lanes<Real>(pending);
    for (int l = 0; l < count; ++l) sums[m.start[rows] - count + l] += total[l];
  }
}

template <class Real, int vectors>
void sparse_back_as(const Compressed& m, const Real* values, const Real* x, const Real* gy, Real* gx, Real* sums,
                    int64_t rows, int64_t columns) {
  if (gx && sums)
    sparse_back_columns<Real, vectors, true, true>(m, values, x, gy, gx, sums, rows, columns);
  else if (gx)
    sparse_back_columns<Real, vectors, true, false>(m, values, x, gy, gx, sums, rows, columns);
  else
    sparse_back_columns<Real, vectors, false, true>(m, values, x, gy, gx, sums, rows, columns);
}

template <class Real>
void sparse_back(const Compressed& m, const Real* values, const Real* x, const Real* gy, Real* gx, Real* sums,
                 int64_t rows, int64_t columns) {
  constexpr int n = Vector<Real>::lanes;
  if (columns % (4 * n) == 0)
    sparse_back_as<Real, 4>(m, values, x, gy, gx, sums, rows, columns);
  else if (columns % (2 * n) == 0)
    sparse_back_as<Real, 2>(m, values, x, gy, gx, sums, rows, columns);
  else
    sparse_back_as<Real, 1>(m, values, x, gy, gx, sums, rows, columns);
}

}  // namespace STRUCTMAT_ISA
}  // namespace structmat

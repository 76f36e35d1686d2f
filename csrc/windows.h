// Windowed matrices: sums of rank-one terms, each on an interval of rows and one of columns.
//
// Either side of such a matrix is a list of runs. One side reads, z[term] += content * x[row], the other writes,
// y[row] += content * z[term]. Term by term both would load (and one of them store) a row for each of its numbers. So
// they sweep over blocks of rows that stay in registers, with all terms that cover a block.
#pragma once

#include <algorithm>
#include <cstring>

#include "gradients.h"
#include "kernels.h"
#include "vectors.h"

namespace structmat {
namespace STRUCTMAT_ISA {

constexpr int block_rows = registers == 32 ? 8 : 4;

// One term and rows first .. last that it covers.
template <class Real, bool reads>
inline void window_part(const Real* contents, int64_t first, int64_t last, Real* rows, Real* term, int64_t columns) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t p = 0; p < columns; p += n) {
    V<Real> z = at(term + p);
    for (int64_t i = first; i < last; ++i) {
      Real* row = rows + i * columns + p;
      if (reads)
        z += at(row) * contents[i - first];
      else
        put(row, at(row) + z * contents[i - first]);
    }
    if (reads) put(term + p, z);
  }
}

// A block of rows, from `row` on, and the terms that cover all of it.
template <class Real, bool reads, int vectors>
inline void window_block(const Run* runs, const int32_t* covering, int64_t count, const Real* contents, int64_t row,
                         Real* rows, Real* terms, int64_t columns) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t p = 0; p < columns; p += vectors * n) {
    Real* block = rows + row * columns + p;
    V<Real> held[block_rows][vectors];
#pragma GCC unroll 8
    for (int i = 0; i < block_rows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) held[i][v] = at(block + i * columns + v * n);
    for (int64_t k = 0; k < count; ++k) {
      const Run& run = runs[covering[k]];
      const Real* factors = contents + run.content + (row - run.first);
      Real* term = terms + run.term * columns + p;
      V<Real> z[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) z[v] = at(term + v * n);
#pragma GCC unroll 8
      for (int i = 0; i < block_rows; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v)
          if (reads)
            z[v] += held[i][v] * factors[i];
          else
            held[i][v] += z[v] * factors[i];
      if (reads)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) put(term + v * n, z[v]);
    }
    if (!reads)
#pragma GCC unroll 8
      for (int i = 0; i < block_rows; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) put(block + i * columns + v * n, held[i][v]);
  }
}

// Blocks of `height` rows from the first to the last: `part` for terms that cover some rows first .. last of one, and then
// `whole` for all that cover it. `room` holds two numbers for each run.
template <class Part, class Whole>
inline void sweep(const Run* runs, int64_t count, int64_t height, int32_t* room, const Part& part, const Whole& whole) {
  int32_t *active = room, *covering = room + count;
  int64_t next = 0, alive = 0;
  for (int64_t row = 0; next < count || alive > 0; row += height) {
    if (alive == 0) row = std::max(row, runs[next].first / height * height);
    const int64_t end = row + height;
    while (next < count && runs[next].first < end) active[alive++] = int32_t(next++);
    int64_t kept = 0, found = 0;
    for (int64_t k = 0; k < alive; ++k) {
      const Run& run = runs[active[k]];
      const int64_t first = std::max(run.first, row), last = std::min(run.last, end);
      if (last - first == height)
        covering[found++] = active[k];
      else
        part(run, first, last);
      if (run.last > end) active[kept++] = active[k];
    }
    alive = kept;
    if (found) whole(row, covering, found);
  }
}

template <class Real, bool reads, int vectors>
void pass_windows(const Run* runs, int64_t count, const Real* contents, Real* rows, Real* terms, int64_t columns,
                  int32_t* room) {
  sweep(
      runs, count, block_rows, room,
      [&](const Run& run, int64_t first, int64_t last) {
        window_part<Real, reads>(contents + run.content + (first - run.first), first, last, rows,
                                 terms + run.term * columns, columns);
      },
      [&](int64_t row, const int32_t* covering, int64_t found) {
        window_block<Real, reads, vectors>(runs, covering, found, contents, row, rows, terms, columns);
      });
}

template <class Real, bool reads>
void pass_any(const Run* runs, int64_t count, const Real* contents, Real* rows, Real* terms, int64_t columns,
              int32_t* room) {
  by_registers<Real, 2>(columns, [&](auto vectors) {
    pass_windows<Real, reads, decltype(vectors)::value>(runs, count, contents, rows, terms, columns, room);
  });
}

template <class Real>
void read_windows(const Run* runs, int64_t count, const Real* contents, const Real* x, Real* z, int64_t columns,
                  int32_t* room) {
  pass_any<Real, true>(runs, count, contents, const_cast<Real*>(x), z, columns, room);
}

template <class Real>
void write_windows(const Run* runs, int64_t count, const Real* contents, const Real* z, Real* y, int64_t columns,
                   int32_t* room) {
  pass_any<Real, false>(runs, count, contents, y, const_cast<Real*>(z), columns, room);
}

// Sums of rows first .. last of one term: each row times the term's.
template <class Real, int vectors>
inline void window_sums_part(const Run& run, int64_t first, int64_t last, const Real* z, const Real* rows, Real* sums,
                             int64_t columns) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t p = 0; p < columns; p += vectors * n) {
    V<Real> own[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) own[v] = at(z + run.term * columns + p + v * n);
    const Real* row = rows + first * columns + p;
    sum_each<Real>(last - first, sums + run.content + (first - run.first), [&](int64_t i) {
      V<Real> sum = at(row + i * columns) * own[0];
#pragma GCC unroll 4
      for (int v = 1; v < vectors; ++v) sum += at(row + i * columns + v * n) * own[v];
      return sum;
    });
  }
}

constexpr int sum_registers = 2;                           // of a block of rows, one beside the other
constexpr int sums_together = registers == 32 ? 8 : 4;     // terms
constexpr int64_t sum_columns = 64;                        // of a block that is turned at once

// Rows from `rows` on turned: one column after the other, each in `sum_registers` registers.
template <class Real>
inline void turn_rows(const Real* rows, int64_t pitch, int64_t count, Real* turned) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t c = 0; c < count; c += n)
    for (int v = 0; v < sum_registers; ++v) {
      V<Real> r[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) r[i] = at(rows + (v * n + i) * pitch + c);
      transpose<Real>(r);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) put(turned + ((c + i) * sum_registers + v) * n, r[i]);
    }
}

// The sums of several terms that cover a block of rows: no sum over lanes, since the rows lie in them.
template <class Real, int terms>
inline void window_sums_block(const Run* runs, const int32_t* which, int64_t row, const Real* z, int64_t columns,
                              const Real* turned, int64_t count, Real* sums) {
  constexpr int n = Vector<Real>::lanes;
  const Real* own[terms];
  V<Real> held[terms][sum_registers] = {};
#pragma GCC unroll 8
  for (int t = 0; t < terms; ++t) own[t] = z + runs[which[t]].term * columns;
  for (int64_t c = 0; c < count; ++c) {
    V<Real> column[sum_registers];
#pragma GCC unroll 2
    for (int v = 0; v < sum_registers; ++v) column[v] = at(turned + (c * sum_registers + v) * n);
#pragma GCC unroll 8
    for (int t = 0; t < terms; ++t)
#pragma GCC unroll 2
      for (int v = 0; v < sum_registers; ++v) held[t][v] += column[v] * own[t][c];
  }
#pragma GCC unroll 8
  for (int t = 0; t < terms; ++t) {
    const Run& run = runs[which[t]];
    Real* to = sums + run.content + (row - run.first);
#pragma GCC unroll 2
    for (int v = 0; v < sum_registers; ++v) put(to + v * n, at(to + v * n) + held[t][v]);
  }
}

// Sums of blocks of rows, each row times that of a term that covers it. Blocks that many terms cover are turned first.
template <class Real>
void window_sums(const Run* runs, int64_t count, const Real* z, const Real* rows, Real* sums, int64_t columns,
                 int32_t* room) {
  constexpr int64_t height = sum_registers * Vector<Real>::lanes;
  const auto part = [&](const Run& run, int64_t first, int64_t last) {
    by_registers<Real, 4>(columns, [&](auto vectors) {
      window_sums_part<Real, decltype(vectors)::value>(run, first, last, z, rows, sums, columns);
    });
  };
  sweep(runs, count, height, room, part, [&](int64_t row, const int32_t* covering, int64_t found) {
    const int64_t together = found / sums_together * sums_together;
    if (together > 0) {
      alignas(register_bytes) Real turned[sum_columns * height];
      for (int64_t p = 0; p < columns; p += sum_columns) {
        const int64_t held = std::min(sum_columns, columns - p);
        turn_rows<Real>(rows + row * columns + p, columns, held, turned);
        for (int64_t k = 0; k < together; k += sums_together)
          window_sums_block<Real, sums_together>(runs, covering + k, row, z + p, columns, turned, held, sums);
      }
    }
    for (int64_t k = together; k < found; ++k) part(runs[covering[k]], row, row + height);
  });
}

// --------------------------------------------------------------------------------------------------- a few vectors

template <class Real>
void read_vector(const WindowSide& side, int64_t begin, int64_t end, const Real* contents, const Real* x, Real* z) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t k = begin; k < end; k += n) {
    const int64_t count = std::min<int64_t>(n, end - k);
    V<Real> lanes[n] = {};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = side.windows[4 * (k + i)], width = side.windows[4 * (k + i) + 1];
      const int64_t above = std::min(width, side.size - first);
      const Real* own = contents + side.beginnings[k + i];
      lanes[i] = products(own, x + first, above);
      if (width > above) lanes[i] += products(own + above, x, width - above);
    }
    put_first(z + k, sum_lanes<Real>(lanes), count);
  }
}

// y += content * value on rows first .. last.
template <class Real>
inline void add_multiple(const Real* content, Real value, Real* y, int64_t first, int64_t last) {
  constexpr int n = Vector<Real>::lanes;
  for (; first + n <= last; first += n, content += n) put(y + first, at(y + first) + at(content) * value);
  if (first < last)
    put_first(y + first, first_of(y + first, last - first) + first_of(content, last - first) * value, last - first);
}

template <class Real>
void write_vector(const WindowSide& side, int64_t terms, const Real* contents, const Real* z, Real* y, int64_t begin,
                  int64_t end) {
  for (int64_t t = 0; t < terms; ++t) {
    const int64_t at_row = side.windows[4 * t], width = side.windows[4 * t + 1];
    const int64_t above = std::min(width, side.size - at_row);
    const Real* own = contents + side.beginnings[t];
    const int64_t first = std::max(at_row, begin);
    add_multiple(own + (first - at_row), z[t], y, first, std::min(at_row + above, end));
    if (width > above) add_multiple(own + above + begin, z[t], y, begin, std::min(width - above, end));
  }
}

}  // namespace STRUCTMAT_ISA
}  // namespace structmat

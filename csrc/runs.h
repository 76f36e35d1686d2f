// A windowed matrix's windows as the kernels read them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "kernels.h"

namespace structmat {

// Runs in memory that somebody else holds.
struct Runs {
  Run* first = nullptr;
  int64_t count = 0;

  const Run* data() const { return first; }
  int64_t size() const { return count; }
  const Run& operator[](int64_t k) const { return first[k]; }
};

// A windowed matrix of height x width on either side: its runs for tiles, in the order of their first rows, or its windows
// as they stand for vectors.
struct Windows {
  Runs rows, columns;
  WindowSide left, right;

  // So many runs, or beginnings of contents, lie in the memory that they are written to.
  static int64_t runs(int64_t terms) { return 6 * terms; }
  static int64_t beginnings(int64_t terms) { return 2 * terms; }
};

// Walks over the terms of one side of `size` places: `windows` holds location and width of a term, and four numbers on
// those of the next; `held` is the sum of the widths. Calls note(t, first, width, content).
template <class Note>
inline void for_windows(const int64_t* windows, int64_t terms, int64_t size, int64_t held, const Note& note) {
  int64_t content = 0;
  for (int64_t t = 0; t < terms; ++t) {
    const int64_t first = windows[4 * t], width = windows[4 * t + 1];
    if (uint64_t(first) >= uint64_t(size) || uint64_t(width) > uint64_t(size))  // below zero is far above
      throw std::invalid_argument("structmat: a window is out of range");
    note(t, first, width, content);
    content += width;
  }
  if (content != held)
    throw std::invalid_argument("structmat: the widths of the windows do not sum to what they hold");
}

// The runs of a side, in the order of their first rows by counting; `to` has room for two a term, and so has `beside`.
inline Runs runs_of(const int64_t* windows, int64_t terms, int64_t size, int64_t held, Run* to, Run* beside) {
  int64_t count = 0;
  std::vector<int64_t> place(size + 1, 0);
  for_windows(windows, terms, size, held, [&](int64_t t, int64_t first, int64_t width, int64_t content) {
    const int64_t above = std::min(width, size - first);
    if (above > 0) beside[count++] = {first, first + above, content, t}, ++place[first + 1];
    if (width > above) beside[count++] = {0, width - above, content + above, t}, ++place[1];
  });
  for (int64_t i = 0; i < size; ++i) place[i + 1] += place[i];
  for (int64_t k = 0; k < count; ++k) to[place[beside[k].first]++] = beside[k];
  return {to, count};
}

inline WindowSide side_of(const int64_t* windows, int64_t terms, int64_t size, int64_t held, int64_t* beginnings) {
  for_windows(windows, terms, size, held,
              [&](int64_t t, int64_t, int64_t, int64_t content) { beginnings[t] = content; });
  return {windows, beginnings, size};
}

}  // namespace structmat

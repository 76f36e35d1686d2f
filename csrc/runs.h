// A windowed matrix's windows as the kernels read them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "kernels.h"

namespace structmat {

// The runs of either side of a windowed matrix.
struct Windows {
  std::vector<Run> rows, columns;
};

// Of one side of `size` places: `windows` holds location and width of a term, and four numbers on those of the next; `held`
// is the sum of the widths. In the order of their terms, or of their first rows.
inline std::vector<Run> runs_of(const int64_t* windows, int64_t terms, int64_t size, int64_t held, bool by_rows) {
  std::vector<Run> runs;
  runs.reserve(terms + terms / 8);
  int64_t content = 0;
  for (int64_t t = 0; t < terms; ++t) {
    const int64_t first = windows[4 * t], width = windows[4 * t + 1];
    if (first < 0 || first >= size || width < 0 || width > size)
      throw std::invalid_argument("structmat: a window is out of range");
    const int64_t above = std::min(width, size - first);
    if (above > 0) runs.push_back({first, first + above, content, t});
    if (width > above) runs.push_back({0, width - above, content + above, t});
    content += width;
  }
  if (content != held)
    throw std::invalid_argument("structmat: the widths of the windows do not sum to what they hold");
  if (!by_rows) return runs;
  std::vector<int64_t> place(size + 1, 0);  // a counting sort
  for (const Run& run : runs) ++place[run.first + 1];
  for (int64_t i = 0; i < size; ++i) place[i + 1] += place[i];
  std::vector<Run> sorted(runs.size());
  for (const Run& run : runs) sorted[place[run.first]++] = run;
  return sorted;
}

}  // namespace structmat

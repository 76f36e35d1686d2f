// A windowed matrix's windows as the kernels read them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "kernels.h"

namespace structmat {

// The runs of either side of a windowed matrix, in the order of their first rows.
struct Windows {
  std::vector<Run> rows, columns;
};

// Of one side of `size` places: `windows` holds location and width of a term, and four numbers on those of the next; `held`
// is the sum of the widths. A counting sort.
inline std::vector<Run> runs_of(const int64_t* windows, int64_t terms, int64_t size, int64_t held) {
  std::vector<int64_t> start(size + 1, 0);
  int64_t content = 0;
  const auto each_run = [&](auto&& act) {
    content = 0;
    for (int64_t t = 0; t < terms; ++t) {
      const int64_t first = windows[4 * t], width = windows[4 * t + 1], above = std::min(width, size - first);
      if (above > 0) act(Run{first, first + above, content, t});
      if (width > above) act(Run{0, width - above, content + above, t});
      content += width;
    }
  };
  for (int64_t t = 0; t < terms; ++t)
    if (windows[4 * t] < 0 || windows[4 * t] >= size || windows[4 * t + 1] < 0 || windows[4 * t + 1] > size)
      throw std::invalid_argument("structmat: a window is out of range");
  each_run([&](const Run& run) { ++start[run.first + 1]; });
  if (content != held)
    throw std::invalid_argument("structmat: the widths of the windows do not sum to what they hold");
  for (int64_t i = 0; i < size; ++i) start[i + 1] += start[i];
  std::vector<Run> runs(start[size]);
  each_run([&](const Run& run) { runs[start[run.first]++] = run; });
  return runs;
}

}  // namespace structmat

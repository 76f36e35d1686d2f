#include "convolve.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>

#include "prepared.h"

namespace structmat {
namespace {

constexpr int64_t lines_together = 8;      // channels that one thread makes at a time
constexpr int64_t alone = 1 << 17;         // multiply-adds of a step that one thread does sooner than several
constexpr int64_t longest_register = 16;   // numbers
constexpr int64_t near_numbers = 1 << 18;  // of an image that stay in the second cache

int64_t up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

// What a row of a plane holds: to[j] = x[row * height stride + above][j * width stride + first], zero beyond the ends.
struct Phase {
  int64_t above, first;
  bool operator==(const Phase& other) const { return above == other.above && first == other.first; }
};

// How a step reads and writes. The places of all rows lie in one long line, so that a tap is a shift of it, within a plane
// that has what the tap reads: one plane for each remainder of its row by the stride and, where these are not too many, for
// each of its columns, which leaves nothing between the rows. Else the rows have their padding between them, once for both
// that it divides, and what is computed there belongs to nothing.
struct Layout {
  bool in_place;                 // reads what the step before wrote, or the images themselves
  int64_t height, width;         // of the input
  int64_t out_height, out_width;
  int64_t pitch;                 // from one row of a plane to the next
  int64_t rows, plane;           // rows of a plane, and numbers with what follows them
  std::vector<Phase> phases;
  int64_t count, out_plane;      // numbers of a line of the outcome, and from one line to the next
  std::vector<int64_t> shifts;   // of every channel of a group and every tap
  std::vector<int32_t> entries;  // the same of every entry of the kernel

  int64_t numbers(const Convolution& step) const {
    return in_place ? 0 : step.in * int64_t(phases.size()) * plane + longest_register;
  }
};

Layout layout_of(const Convolution& step, int64_t height, int64_t width, const Layout* before, int64_t lanes) {
  Layout made{};
  made.height = height, made.width = width;
  made.out_height = step.height.places(height), made.out_width = step.width.places(width);
  const int64_t channels = step.in / step.groups;
  if (step.is_pointwise() && (before || height * width % lanes == 0)) {
    made.in_place = true;
    made.pitch = before ? before->pitch : width;
    made.count = before ? before->count : height * width;
    made.plane = before ? before->out_plane : height * width;
    made.phases = {{0, 0}};
    made.out_plane = up(made.count, lanes);
    for (int64_t c = 0; c < channels; ++c) made.shifts.push_back(c * made.plane);
    return made;
  }
  const Along &h = step.height, &w = step.width;
  made.rows = (height + 2 * h.padding + h.stride - 1) / h.stride;
  const int64_t phases = std::min(h.kernel, h.stride) * w.kernel;
  const bool by_columns = w.stride > 1 || step.in * phases * made.rows * made.out_width <= near_numbers;
  made.pitch = by_columns ? made.out_width : width + w.padding;
  made.plane = up(made.rows * made.pitch + (by_columns ? 0 : w.padding), lanes);
  std::vector<int64_t> taps;
  for (int64_t i = 0; i < h.kernel; ++i)
    for (int64_t j = 0; j < w.kernel; ++j) {
      const int64_t column = j * w.dilation;
      const Phase phase{i * h.dilation % h.stride - h.padding, (by_columns ? column : 0) - w.padding};
      const auto found = std::find(made.phases.begin(), made.phases.end(), phase);
      const int64_t number = found - made.phases.begin();
      if (found == made.phases.end()) made.phases.push_back(phase);
      taps.push_back(number * made.plane + i * h.dilation / h.stride * made.pitch + (by_columns ? 0 : column));
    }
  for (int64_t c = 0; c < channels; ++c)
    for (const int64_t tap : taps) made.shifts.push_back(c * int64_t(made.phases.size()) * made.plane + tap);
  made.count = (made.out_height - 1) * made.pitch + made.out_width;
  made.out_plane = up(made.count, lanes);
  return made;
}

// A whole channel at once, where no row begins elsewhere in the plane than in the image but for `first` numbers.
template <class Real>
void spread_whole(const Layout& at, const Phase& phase, const Real* x, Real* to) {
  const int64_t count = at.height * at.width, first = phase.first, width = at.width;
  to = std::fill_n(to, -phase.above * width, Real(0));
  if (first < 0) {
    std::memcpy(to - first, x, size_t(count + first) * sizeof(Real));
    for (int64_t i = 0; i < at.height; ++i)
      for (int64_t j = 0; j < -first; ++j) to[i * width + j] = 0;
  } else {
    std::memcpy(to, x + first, size_t(count - first) * sizeof(Real));
    for (int64_t i = 0; i < at.height; ++i)
      for (int64_t j = width - first; j < width; ++j) to[i * width + j] = 0;
  }
  std::fill_n(to + count, at.plane - count + phase.above * width, Real(0));
}

// One channel of the input, `pitch` numbers from row to row, into its planes.
template <class Real>
void spread(const Convolution& step, const Layout& at, const Real* x, int64_t pitch, Real* to) {
  const Along &h = step.height, &w = step.width;
  const bool is_whole = h.stride == 1 && w.stride == 1 && at.pitch == at.width && pitch == at.width;
  for (const Phase& phase : at.phases) {
    Real* plane = to;
    to += at.plane;
    if (is_whole && std::abs(phase.first) < at.width) {
      spread_whole(at, phase, x, plane);
      continue;
    }
    const int64_t first = phase.first;
    const int64_t begin = std::min(at.pitch, first < 0 ? (w.stride - 1 - first) / w.stride : 0);
    const int64_t end = std::max(begin, std::min(at.pitch, (at.width - 1 - first + w.stride) / w.stride));
    for (int64_t i = 0; i < at.rows; ++i, plane += at.pitch) {
      const int64_t row = i * h.stride + phase.above;
      if (row < 0 || row >= at.height) {
        std::fill_n(plane, at.pitch, Real(0));
        continue;
      }
      const Real* from = x + row * pitch + first;
      for (int64_t j = 0; j < begin; ++j) plane[j] = 0;
      if (w.stride == 1)
        std::memcpy(plane + begin, from + begin, size_t(end - begin) * sizeof(Real));
      else if (w.stride == 2)  // the usual one, as a constant
        for (int64_t j = begin; j < end; ++j) plane[j] = from[j * 2];
      else
        for (int64_t j = begin; j < end; ++j) plane[j] = from[j * w.stride];
      for (int64_t j = end; j < at.pitch; ++j) plane[j] = 0;
    }
    std::fill(plane, to, Real(0));
  }
}

template <class Real>
class Runner {
 public:
  Runner(const std::vector<Convolution>& steps, const Images& images, const Kernels<Real>& kernels)
      : steps_(steps), images_(images), kernels_(kernels) {
    int64_t height = images.height, width = images.width;
    for (size_t i = 0; i < steps.size(); ++i) {
      layouts_.push_back(layout_of(steps[i], height, width, i ? &layouts_[i - 1] : nullptr, kernels.lanes));
      Layout& own = layouts_.back();
      if (steps[i].by_entries) {
        own.entries.resize(size_t(steps[i].start[steps[i].out]));
        for (size_t k = 0; k < own.entries.size(); ++k)
          own.entries[k] = int32_t(own.shifts[size_t(steps[i].column[k])]);
      }
      height = own.out_height, width = own.out_width;
      input_ = std::max(input_, up(own.numbers(steps[i]), longest_register));
      output_ = std::max(output_, steps[i].out * own.out_plane + longest_register);
    }
    output_ = up(output_, longest_register);
    const Layout& last = layouts_.back();
    writes_ = !images.bias && last.pitch == last.out_width && last.count == last.out_plane;
  }

  int64_t bytes() const { return (input_ + 2 * output_) * int64_t(sizeof(Real)); }

  // One image; `parallel` shares the channels of a step.
  void run(int64_t number, Real* scratch, Parallel parallel, bool several) const {
    const Real* x = static_cast<const Real*>(images_.x) + number * steps_[0].in * images_.height * images_.width;
    int64_t pitch = images_.width, plane = images_.height * images_.width;
    Real* outputs[2] = {scratch + input_, scratch + input_ + output_};
    for (size_t i = 0; i < steps_.size(); ++i) {
      const Layout& at = layouts_[i];
      Real* y = i + 1 == steps_.size() && writes_ ? image(number) : outputs[i % 2];
      Task task{this, &steps_[i], &at, x, pitch, plane, scratch, y};
      const bool shares = several && steps_[i].out * steps_[i].depth() * at.count > alone;
      if (!at.in_place) {
        share(shares, parallel, steps_[i].in, spread_some, &task);
        std::fill_n(scratch + steps_[i].in * int64_t(at.phases.size()) * at.plane, longest_register, Real(0));
        task.x = scratch;
      }
      share(shares, parallel, units(steps_[i]), multiply_some, &task);
      x = task.y, pitch = at.pitch, plane = at.out_plane;
    }
    if (!writes_) finish(number, x);
  }

 private:
  struct Task {
    const Runner* runner;
    const Convolution* step;
    const Layout* at;
    const Real* x;
    int64_t pitch, plane;
    Real *spread, *y;
  };

  static int64_t blocks(const Convolution& step) {
    return (step.out / step.groups + lines_together - 1) / lines_together;
  }
  static int64_t units(const Convolution& step) { return step.groups * blocks(step); }

  static void share(bool shares, Parallel parallel, int64_t count, Body body, Task* task) {
    if (shares)
      parallel(count, body, task);
    else
      body(0, count, task);
  }

  static void spread_some(int64_t begin, int64_t end, void* opaque) {
    const Task& t = *static_cast<const Task*>(opaque);
    const int64_t own = int64_t(t.at->phases.size()) * t.at->plane;
    for (int64_t c = begin; c < end; ++c) spread(*t.step, *t.at, t.x + c * t.plane, t.pitch, t.spread + c * own);
  }

  static void multiply_some(int64_t begin, int64_t end, void* opaque) {
    const Task& t = *static_cast<const Task*>(opaque);
    const Convolution& step = *t.step;
    const int64_t lines = step.out / step.groups, depth = step.depth(), per_group = blocks(step);
    const int64_t group_x = step.in / step.groups * int64_t(t.at->phases.size()) * t.at->plane;
    while (begin < end) {  // all units of a group at once
      const int64_t group = begin / per_group, last = std::min(end, (group + 1) * per_group);
      const int64_t first = (begin - group * per_group) * lines_together;
      const int64_t some = std::min(lines, (last - group * per_group) * lines_together) - first;
      const int64_t line = group * lines + first;
      const Kernels<Real>& kernels = t.runner->kernels_;
      const Real *weight = static_cast<const Real*>(step.weight), *x = t.x + group * group_x;
      Real* y = t.y + line * t.at->out_plane;
      if (step.by_entries)
        kernels.convolve_sparse(step.start + line, weight, t.at->entries.data(), some, x, y, t.at->out_plane,
                                t.at->count);
      else
        kernels.convolve(weight + line * depth, some, depth, t.at->shifts.data(), x, y, t.at->out_plane, t.at->count);
      begin = last;
    }
  }

  Real* image(int64_t number) const {
    const Layout& at = layouts_.back();
    return static_cast<Real*>(images_.y) + number * steps_.back().out * at.out_height * at.out_width;
  }

  // Lines with places between the rows to an image without.
  void finish(int64_t number, const Real* lines) const {
    const Layout& at = layouts_.back();
    const int64_t out = steps_.back().out;
    Real* y = image(number);
    const Real* bias = static_cast<const Real*>(images_.bias);
    for (int64_t c = 0; c < out; ++c)
      for (int64_t i = 0; i < at.out_height; ++i, y += at.out_width) {
        const Real* row = lines + c * at.out_plane + i * at.pitch;
        const Real added = bias ? bias[c] : Real(0);
        for (int64_t j = 0; j < at.out_width; ++j) y[j] = row[j] + added;
      }
  }

  const std::vector<Convolution>& steps_;
  const Images& images_;
  const Kernels<Real>& kernels_;
  std::vector<Layout> layouts_;
  int64_t input_ = 0, output_ = 0;
  bool writes_;  // whether the last step writes the images of the outcome
};

template <class Real>
void convolve_as(const std::vector<Convolution>& steps, const Images& images, const Kernels<Real>& kernels,
                 Parallel parallel, int threads) {
  const Runner<Real> runner(steps, images, kernels);
  static thread_local Scratch scratch;
  if (images.count < threads) {
    Real* room = static_cast<Real*>(scratch.reserve(runner.bytes()));
    for (int64_t i = 0; i < images.count; ++i) runner.run(i, room, parallel, true);
    return;
  }
  const auto some = [](int64_t begin, int64_t end, void* opaque) {
    const Runner<Real>& own = *static_cast<const Runner<Real>*>(opaque);
    Real* room = static_cast<Real*>(scratch.reserve(own.bytes()));
    for (int64_t i = begin; i < end; ++i) own.run(i, room, serially, false);
  };
  if (threads > 1)
    parallel(images.count, some, const_cast<Runner<Real>*>(&runner));
  else
    some(0, images.count, const_cast<Runner<Real>*>(&runner));
}

}  // namespace

std::vector<Convolution> convolutions_of(const std::string& words) {
  std::istringstream read(words);
  std::vector<Convolution> steps;
  int tensors;
  while (read >> tensors) {
    Convolution step{};
    step.by_entries = tensors == 3;
    read >> step.in >> step.out >> step.groups;
    bool fits = tensors == step.tensors() && step.in > 0 && step.out > 0 && step.groups > 0;
    fits = fits && step.in % step.groups == 0 && step.out % step.groups == 0;
    for (Along* along : {&step.height, &step.width}) {
      read >> along->kernel >> along->stride >> along->padding >> along->dilation;
      fits = fits && along->kernel > 0 && along->stride > 0 && along->padding >= 0 && along->dilation > 0;
    }
    if (!read || !fits || (!steps.empty() && steps.back().out != step.in))
      throw std::invalid_argument("structmat: these are no steps of convolutions");
    steps.push_back(step);
  }
  if (steps.empty()) throw std::invalid_argument("structmat: there is no step of a convolution");
  return steps;
}

void check_entries(const Convolution& step, int64_t count) {
  bool fits = step.start[0] == 0 && step.start[step.out] == count;
  for (int64_t i = 0; i < step.out; ++i) fits = fits && step.start[i] <= step.start[i + 1];
  for (int64_t k = 0; k < count; ++k) fits = fits && step.column[k] >= 0 && step.column[k] < step.depth();
  if (!fits) throw std::invalid_argument("structmat: the entries of a kernel are out of range");
}

void convolve(const std::vector<Convolution>& steps, const Images& images, Parallel parallel, int threads) {
  if (images.storage == Storage::f64)
    convolve_as<double>(steps, images, *chosen().wide, parallel, threads);
  else
    convolve_as<float>(steps, images, *chosen().single, parallel, threads);
}

}  // namespace structmat

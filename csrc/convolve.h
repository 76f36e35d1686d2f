// Convolutions of images in one call, one after the other: what lies between two of them stays in the caches.
#pragma once

#include <string>
#include <vector>

#include "execute.h"

namespace structmat {

// Of one axis of places: y[p] reads x[p * stride + t * dilation - padding] at tap t, and zero beyond the ends.
struct Along {
  int64_t kernel, stride, padding, dilation;
  int64_t places(int64_t size) const {
    const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
    return room < 0 ? 0 : room / stride + 1;
  }
};

// The weight is (out, in / groups, height, width), contiguous; or the entries of this as a matrix with `out` rows: values,
// where each row begins among them, and the columns.
struct Convolution {
  int64_t in, out, groups;
  Along height, width;
  bool by_entries;
  const void* weight;
  const int32_t *start, *column;

  int tensors() const { return by_entries ? 3 : 1; }  // that hold the weight
  int64_t depth() const { return in / groups * height.kernel * width.kernel; }
  bool is_pointwise() const {
    return height.kernel * width.kernel * height.stride * width.stride == 1 && !height.padding && !width.padding;
  }
};

// Of every step: how many tensors hold its weight (1, or 3 for entries), in and out channels, groups, and then of the height
// and of the width: kernel, stride, padding, dilation. Throws std::invalid_argument.
std::vector<Convolution> convolutions_of(const std::string& words);

// Throws std::invalid_argument if so many entries are not those of a kernel.
void check_entries(const Convolution& step, int64_t count);

struct Images {
  int64_t count, height, width;
  const void* x;     // (count, channels, height, width), contiguous
  void* y;           // the same of the outcome
  const void* bias;  // a number for each channel of it, or null
  Storage storage;   // f32 or f64
};

// Every step reads what the one before it puts out. Throws std::bad_alloc.
void convolve(const std::vector<Convolution>& steps, const Images& images, Parallel parallel, int threads);

}  // namespace structmat

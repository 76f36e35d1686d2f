// Layers of convolutional arithmetic circuits: a matrix times each location of a window, and the product of the results.
#pragma once

#include <cstdint>

#include "execute.h"

namespace structmat {

// How numbers are carried: as they are; with one power of two for each location and sample; as logarithms; divided by their
// root mean square over channels, whatever it was.
enum class Semiring : int { plain = 0, scaled = 1, log = 2, normalized = 3 };

struct PoolLayer {
  int64_t windows, window;              // how many, and the locations of each
  int64_t in, out, locations, batch;    // x is (locations, in, batch), z (windows, out, batch)
  int64_t copies;                       // weights are (copies, out, in)
  Semiring semiring;
  bool lifts, lowers;                   // x holds plain numbers; z is to hold them (logarithms if that is the semiring)
  Storage storage;                      // float32 or float64
  const void* x;
  const int64_t* x_scale;               // (locations, batch); null: all 0
  const void* weight;
  const int64_t* child;                 // (windows, window): which location, or -1 for the factor one
  const int64_t* slot;                  // which matrix
};

// `z_scale` (windows, batch) is written for two semirings: the exponents (int64) of scaled numbers; what the products of a
// window were multiplied by, in the numbers of z, where they were normalized. Throws std::invalid_argument for an index
// that is out of range, and std::bad_alloc.
void pool_forward(const PoolLayer& layer, void* z, void* z_scale, Parallel parallel);

// Gradients, of which those are not wanted that are null; no location may be read twice. `z_scale` is what the way
// forwards wrote, and so is `z`, which is read where it was normalized. Locations that are not read keep what is there.
void pool_backward(const PoolLayer& layer, const void* z, const void* z_scale, const void* grad, void* grad_x,
                   void* grad_weight, Parallel parallel);

}  // namespace structmat

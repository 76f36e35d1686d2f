// Running a backward plan over a batch.
#pragma once

#include <cstdint>

#include "backward_plan.h"
#include "execute.h"

namespace structmat {

struct BackwardBatch {
  const void* x;
  int64_t x_stride;  // numbers from one row to the next
  const void* grad;  // of the outcome
  int64_t grad_stride;
  void* grad_x;      // dense; null where it is not wanted
  int64_t rows;
  Storage storage;   // of all of these, of learned tensors and of their gradients
  const void* kept = nullptr;  // what `execute` kept, if the plan is made for that
};

// Gradients of the input and of tensors, each written, none added to; those of tensors that are not wanted may be null.
// No number depends on how the work is shared between threads. Throws as `execute`.
void execute_backward(const BackwardPlan& plan, const BackwardBatch& batch, const Array* tensors,
                      void* const* gradients, Parallel parallel);

}  // namespace structmat

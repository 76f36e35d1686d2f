// All times of one direction of a recurrent net in one call.
#pragma once

#include "execute.h"

namespace structmat {

struct Sequence {
  Cell cell;
  bool backwards;  // the last time is read first
  int64_t times, rows, size;
  const void* x;  // gates of the input: rows of gates_of(cell) * size numbers
  int64_t x_time, x_row;  // distances, in numbers
  const void* start;  // the state before, `size` numbers a row
  int64_t start_row;
  void* memory;  // of an LSTM, (rows, size) contiguous: before, and then after
  void* y;       // the states: rows of `size` numbers
  int64_t y_time, y_row;
  void* kept;       // where (times, rows, kept_of(cell) * size) numbers are kept for the way back; null for none
  Storage storage;  // f32 or f64
};

// The way back; contiguous where nothing else is said.
struct SequenceBack {
  Cell cell;
  bool backwards;  // the last time was read first
  int64_t times, rows, size;
  const void* kept;
  const void *start, *memory;  // (rows, size), before the first time
  const void* y;
  const void* grad;  // of y
  int64_t grad_time, grad_row;
  void* grad_memory;  // of an LSTM: of the last memory, and then of the first
  void* grad_x;       // of the gates of the input
  void* grad_s;       // of what the state's matrix put out; null where it is the same
  void* grad_start;
  Storage storage;
};

// The plan multiplies the state; made for vectors or tiles as `runs_by_vectors` says for so many rows. Throws as `execute`.
void recur(const Plan& plan, const Sequence& sequence, const Array* tensors, Parallel parallel, int threads);

// The plan multiplies by the transposed matrix of the state. Its gradients are sums over all times of `grad_s` times the
// states before, which one product finds afterwards.
void recur_back(const Plan& plan, const SequenceBack& sequence, const Array* tensors, Parallel parallel, int threads);

}  // namespace structmat

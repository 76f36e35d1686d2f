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
  Storage storage;  // f32 or f64
};

// The plan multiplies the state; made for vectors or tiles as `runs_by_vectors` says for so many rows. Throws as `execute`.
void recur(const Plan& plan, const Sequence& sequence, const Array* tensors, Parallel parallel, int threads);

}  // namespace structmat

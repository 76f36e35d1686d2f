// Running a plan over a batch.
#pragma once

#include <cstdint>
#include <memory>

#include "plan.h"

namespace structmat {

// One array of numbers outside of the tiles.
struct Array {
  const void* data;
  int64_t count;
};

// How loops are shared between threads: body(begin, end, context) for ranges that cover 0 .. count.
typedef void (*Body)(int64_t begin, int64_t end, void* context);
typedef void (*Parallel)(int64_t count, Body body, void* context);
void serially(int64_t count, Body body, void* context);

struct Batch {
  const void* x;
  int64_t x_stride;  // numbers from one row to the next
  void* y;
  int64_t y_stride;
  int64_t rows;
  Storage storage;   // of x, y and all learned tensors
  // Whether it is the rows that lie side by side, and the strides lead from one feature to the next.
  bool x_by_features = false, y_by_features = false;
  void* kept = nullptr;  // where values are kept for the way back, if they are: `kept_numbers` of them

  // Where a row begins.
  const char* x_at(int64_t row) const {
    return static_cast<const char*>(x) + row * (x_by_features ? 1 : x_stride) * bytes_of(storage);
  }
  char* y_at(int64_t row) const {
    return static_cast<char*>(y) + row * (y_by_features ? 1 : y_stride) * bytes_of(storage);
  }
};

// Which instruction set runs: the widest that the machine has, or less by STRUCTMAT_ISA (base, avx2, avx512, avx512_bf16,
// amx; amx_emulated for tests).
const InstructionSet& chosen();

// Learned tensors in the storage of the batch, indices as int64. Throws std::invalid_argument for an index that is out
// of range, and std::bad_alloc.
void execute(const Plan& plan, const Batch& batch, const Array* tensors, Parallel parallel, int threads);

// How many numbers a plan keeps for its way back, tile after tile.
int64_t kept_numbers(const Plan& plan, int64_t rows, Storage storage);

// Batches of fewer rows than this run vector by vector, if they are stored as they are computed.
constexpr int64_t few_rows = 8;

inline bool runs_by_vectors(int64_t rows, Storage storage) {
  return rows < few_rows && (storage == Storage::f32 || storage == Storage::f64);
}

// Whether a plan runs on tiles of bfloat16 numbers on this machine, and the same for one that does.
bool runs_by_pairs(const Plan& plan, const Batch& batch);
void execute_pairs(const Plan& plan, const Batch& batch, const Array* tensors, Parallel parallel, int threads);

// The same for a plan that was made for vectors.
void execute_vectors(const Plan& plan, const Batch& batch, const Array* tensors, Parallel parallel, int threads);

// A plan with its tensors prepared once, for many batches of equally many rows. Plan and tensors outlive it.
class Product {
 public:
  virtual ~Product() = default;
  virtual void run(const Batch& batch) = 0;
};

// For a plan of tiles or of vectors, and numbers that are stored as they are computed.
std::unique_ptr<Product> product_of(const Plan& plan, Storage storage, int64_t rows, const Array* tensors,
                                    Parallel parallel, int threads);
std::unique_ptr<Product> vector_product_of(const Plan& plan, Storage storage, const Array* tensors, Parallel parallel,
                                           int threads);

}  // namespace structmat

#include "execute.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <string>

#include "prepared.h"

namespace structmat {

void serially(int64_t count, Body body, void* context) { body(0, count, context); }

namespace {

// The tile that is as wide as the caches allow. Its width changes no result: every vector is computed by itself.
template <class Real>
int64_t tile_columns(const Plan& plan, int64_t rows, int64_t lanes, int threads) {
  const int64_t widest = std::max<int64_t>(lanes, 256 / int64_t(sizeof(Real)));
  int64_t columns = widest;
  const auto too_wide = [&](int64_t c) {
    const int64_t bytes = (plan.rows + plan.terms) * c * int64_t(sizeof(Real));
    return bytes > far_cache || (plan.is_light && bytes > near_cache && c > 2 * lanes) ||
           plan.widest_source * c * int64_t(sizeof(Real)) > near_cache || rows < c * threads;
  };
  while (columns > lanes && too_wide(columns)) columns /= 2;
  return columns;
}

// What all tiles of a call read: tensors as the kernels take them, and weights in panels.
template <class Real>
Prepared<Real> prepared_for(const Plan& plan, Storage storage, bool many, const Array* tensors,
                            const Kernels<Real>& kernels, Scratch& compressed, Scratch& panels, Parallel parallel) {
  Prepared<Real> prepared = prepare<Real>(plan, storage, tensors, kernels, compressed, parallel);
  pack_weights<Real>(prepared, plan, kernels, panels, many, parallel);
  return prepared;
}

template <class Real>
void run_tiles(const Plan& plan, const Batch& batch, const Prepared<Real>& prepared, const Kernels<Real>& kernels,
               int64_t columns, Parallel parallel) {
  struct Context {
    const Plan& plan;
    const Batch& batch;
    const Prepared<Real>& prepared;
    const Kernels<Real>& kernels;
    int64_t columns;
    std::atomic<bool> failed{false};
  } context{plan, batch, prepared, kernels, columns};
  const auto body = [](int64_t begin, int64_t end, void* opaque) {
    Context& c = *static_cast<Context*>(opaque);
    try {
      static thread_local Scratch scratch;
      const int64_t numbers = c.plan.rows * c.columns;
      Real* memory = static_cast<Real*>(
          scratch.reserve(numbers * int64_t(sizeof(Real)) + bytes_beside<Real>(c.plan, c.columns)));
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first = t * c.columns, count = std::min(c.columns, c.batch.rows - first);
        const auto load = c.batch.x_by_features ? c.kernels.load_by_features : c.kernels.load;
        const auto store = c.batch.y_by_features ? c.kernels.store_by_features : c.kernels.store;
        load(c.batch.x_at(first), c.batch.storage, c.batch.x_stride, count, c.plan.in_features,
             memory + c.plan.input * c.columns, c.columns);
        Real* kept = static_cast<Real*>(c.batch.kept);
        if (kept) kept += t * c.plan.kept_rows * c.columns;
        for (size_t i = 0; i < c.plan.instructions.size(); ++i) {
          const Instruction& s = c.plan.instructions[i];
          const Real* from = memory + s.from * c.columns;
          if (s.kind != Instruction::keep)
            run<Real>(s, i, c.prepared, c.plan, c.kernels, from, memory + s.to * c.columns, memory + numbers, c.columns);
          else if (kept)
            c.kernels.copy(from, kept + s.place * c.columns, s.rows, c.columns, false);
        }
        store(memory + c.plan.output * c.columns, c.columns, c.prepared.bias, c.batch.y_at(first), c.batch.storage,
              c.batch.y_stride, count, c.plan.out_features);
      }
    } catch (const std::bad_alloc&) {
      c.failed = true;  // no exception may leave a thread of the pool
    }
  };
  parallel((batch.rows + columns - 1) / columns, body, &context);
  if (context.failed) throw std::bad_alloc();
}

template <class Real>
void execute_as(const Plan& plan, const Batch& batch, const Array* tensors, const Kernels<Real>& kernels,
                Parallel parallel, int threads) {
  static thread_local Scratch compressed, panels;
  const int64_t columns = batch.kept ? shared_columns(plan, batch.rows, kernels.lanes, sizeof(Real))
                                     : tile_columns<Real>(plan, batch.rows, kernels.lanes, threads);
  const Prepared<Real> prepared = prepared_for<Real>(plan, batch.storage, batch.rows >= 2 * columns, tensors,
                                                     kernels, compressed, panels, parallel);
  run_tiles<Real>(plan, batch, prepared, kernels, columns, parallel);
}

template <class Real>
class Tiles : public Product {
 public:
  Tiles(const Plan& plan, Storage storage, int64_t rows, const Array* tensors, const Kernels<Real>& kernels,
        Parallel parallel, int threads)
      : plan_(plan), kernels_(kernels), columns_(tile_columns<Real>(plan, rows, kernels.lanes, threads)),
        prepared_(prepared_for<Real>(plan, storage, true, tensors, kernels, compressed_, panels_, parallel)),
        parallel_(parallel) {}
  void run(const Batch& batch) override {
    run_tiles<Real>(plan_, batch, prepared_, kernels_, columns_, parallel_);
  }

 private:
  const Plan& plan_;
  const Kernels<Real>& kernels_;
  int64_t columns_;
  Scratch compressed_, panels_;
  Prepared<Real> prepared_;
  Parallel parallel_;
};

int number_of(const char* name) {
  for (int i = 0; i < instruction_sets; ++i)
    if (std::string(name) == instruction_set(i).name) return i;
  return instruction_sets - 1;
}

}  // namespace

const InstructionSet& chosen() {
  static const InstructionSet& best = [&]() -> const InstructionSet& {
    const char* cap = std::getenv("STRUCTMAT_ISA");
    int number = cap ? number_of(cap) : instruction_sets - 1;
    const auto serves = [&](const InstructionSet& own) {
      return supported(number) && (!own.emulated || (cap && std::string(cap) == own.name));
    };
    while (number > 0 && !serves(instruction_set(number))) --number;
    return instruction_set(number);
  }();
  return best;
}

int64_t kept_numbers(const Plan& plan, int64_t rows, Storage storage) {
  const bool wide = storage == Storage::f64;
  const int64_t lanes = wide ? chosen().wide->lanes : chosen().single->lanes;
  const int64_t columns = shared_columns(plan, rows, lanes, wide ? 8 : 4);
  return (rows + columns - 1) / columns * columns * plan.kept_rows;
}

void execute(const Plan& plan, const Batch& batch, const Array* tensors, Parallel parallel, int threads) {
  if (batch.rows == 0) return;
  if (runs_by_pairs(plan, batch)) return execute_pairs(plan, batch, tensors, parallel, threads);
  if (batch.storage == Storage::f64)
    execute_as<double>(plan, batch, tensors, *chosen().wide, parallel, threads);
  else
    execute_as<float>(plan, batch, tensors, *chosen().single, parallel, threads);
}

std::unique_ptr<Product> product_of(const Plan& plan, Storage storage, int64_t rows, const Array* tensors,
                                    Parallel parallel, int threads) {
  if (plan.use == Use::vectors) return vector_product_of(plan, storage, tensors, parallel, threads);
  if (storage == Storage::f64)
    return std::make_unique<Tiles<double>>(plan, storage, rows, tensors, *chosen().wide, parallel, threads);
  return std::make_unique<Tiles<float>>(plan, storage, rows, tensors, *chosen().single, parallel, threads);
}

}  // namespace structmat

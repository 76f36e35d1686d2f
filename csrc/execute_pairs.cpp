// Running a plan on tiles of bfloat16 numbers, where all of its instructions can.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

#include "execute.h"
#include "prepared.h"

namespace structmat {
namespace {

typedef uint16_t Bits;

// The contraction that an instruction is, and the number of its weight; a single stage of 4 x 4 blocks is one too.
const Contract* contraction_of(const Instruction& s) {
  if (s.kind == Instruction::contract) return &s.contraction;
  return s.kind == Instruction::quads && s.quads_of.count == 1 ? &s.quads_of.contraction[0] : nullptr;
}

int weight_of(const Instruction& s) { return s.kind == Instruction::contract ? s.tensor : s.quads_of.weight[0]; }

int64_t filled_up(int64_t c) { return (c + pair_depth - 1) / pair_depth * pair_depth; }

// Between the beginning and the end of a thread's products.
class Session {
 public:
  explicit Session(const PairKernels& kernels) : kernels_(kernels) {
    if (kernels_.begin) kernels_.begin();
  }
  ~Session() {
    if (kernels_.end) kernels_.end();
  }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

 private:
  const PairKernels& kernels_;
};

int64_t tile_columns(const Plan& plan, int64_t rows, int threads) {
  int64_t columns = 4 * pair_columns;
  const auto too_wide = [&](int64_t c) {
    return plan.rows * c * int64_t(sizeof(Bits)) > far_cache || rows < c * threads;
  };
  while (columns > pair_columns && too_wide(columns)) columns /= 2;
  return columns;
}

// By the number of the instruction: the weights of a contraction as the kernels read them.
std::vector<const Bits*> weights_of(const Plan& plan, const Array* tensors, const PairKernels& kernels,
                                    Scratch& scratch, Parallel parallel) {
  std::vector<const Bits*> weights(plan.instructions.size(), nullptr);
  Packing<Bits> packing(kernels.pack);
  for (size_t i = 0; i < plan.instructions.size(); ++i) {
    const Instruction& s = plan.instructions[i];
    if (!contraction_of(s)) continue;
    const Contract& c = *contraction_of(s);
    weights[i] = static_cast<const Bits*>(tensors[weight_of(s)].data);
    const Panels panels = kernels.panels(c);
    if (panels.units) packing.add(c, weights[i], &weights[i], panels.units, panels.numbers);
  }
  packing.run(scratch, parallel);
  return weights;
}

}  // namespace

bool runs_by_pairs(const Plan& plan, const Batch& batch) {
  if (batch.storage != Storage::bf16 || batch.rows < fewest_for_pairs || !chosen().pairs) return false;
  for (const Instruction& s : plan.instructions)
    if (!contraction_of(s) && s.kind != Instruction::gather && s.kind != Instruction::copy && s.kind != Instruction::clear)
      return false;
  return true;
}

void execute_pairs(const Plan& plan, const Batch& batch, const Array* tensors, Parallel parallel, int threads) {
  const PairKernels& kernels = *chosen().pairs;
  int64_t deepest = 0;
  for (size_t i = 0; i < plan.sizes.size(); ++i)
    if (tensors[i].count != plan.sizes[i]) throw std::invalid_argument("structmat: a tensor has the wrong size");
  for (const Instruction& s : plan.instructions) {
    if (const Contract* c = contraction_of(s)) deepest = std::max(deepest, filled_up(c->c));
    if (s.kind == Instruction::gather && s.index >= 0)
      check_index(static_cast<const int64_t*>(tensors[s.index].data), s.rows, s.rows);
  }
  static thread_local Scratch panels;
  struct Context {
    const Plan& plan;
    const Batch& batch;
    const Array* tensors;
    const PairKernels& kernels;
    std::vector<const Bits*> weights;
    int64_t columns, deepest;
    std::atomic<bool> failed{false};
  } context{plan,    batch, tensors, kernels, weights_of(plan, tensors, kernels, panels, parallel),
            tile_columns(plan, batch.rows, threads), deepest};
  const auto body = [](int64_t begin, int64_t end, void* opaque) {
    Context& c = *static_cast<Context*>(opaque);
    try {
      static thread_local Scratch scratch;
      const int64_t own = c.plan.rows * c.columns;
      Bits* memory = static_cast<Bits*>(scratch.reserve((own + c.deepest * pair_columns) * int64_t(sizeof(Bits))));
      const Bits* bias =
          c.plan.has_bias ? static_cast<const Bits*>(c.tensors[c.plan.sizes.size() - 1].data) : nullptr;
      const Session session(c.kernels);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first = t * c.columns, count = std::min(c.columns, c.batch.rows - first);
        const auto load = c.batch.x_by_features ? c.kernels.load_by_features : c.kernels.load;
        const auto store = c.batch.y_by_features ? c.kernels.store_by_features : c.kernels.store;
        load(reinterpret_cast<const Bits*>(c.batch.x_at(first)), c.batch.x_stride, count, c.plan.in_features,
             memory + c.plan.input * c.columns, c.columns);
        for (size_t i = 0; i < c.plan.instructions.size(); ++i) {
          const Instruction& s = c.plan.instructions[i];
          const Bits* x = memory + s.from * c.columns;
          Bits* y = memory + s.to * c.columns;
          if (const Contract* stage = contraction_of(s)) {
            c.kernels.contract(*stage, c.weights[i], x, y, memory + own, c.columns, s.add);
          } else if (s.kind == Instruction::copy) {
            c.kernels.copy(x, y, s.rows, c.columns, s.add);
          } else if (s.kind == Instruction::clear) {
            std::memset(y, 0, size_t(s.rows * c.columns) * sizeof(Bits));
          } else {
            const int64_t* index = s.table >= 0 ? c.plan.tables[s.table].data()
                                                : static_cast<const int64_t*>(c.tensors[s.index].data);
            for (int64_t r = 0; r < s.rows; ++r)
              c.kernels.copy(x + index[r] * c.columns, y + r * c.columns, 1, c.columns, s.add);
          }
        }
        store(memory + c.plan.output * c.columns, c.columns, bias, reinterpret_cast<Bits*>(c.batch.y_at(first)),
              c.batch.y_stride, count, c.plan.out_features);
      }
    } catch (const std::bad_alloc&) {
      c.failed = true;
    }
  };
  parallel((batch.rows + context.columns - 1) / context.columns, body, &context);
  if (context.failed) throw std::bad_alloc();
}

}  // namespace structmat

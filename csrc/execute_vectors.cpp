#include <algorithm>
#include <cstring>

#include "execute.h"
#include "prepared.h"

namespace structmat {
namespace {

constexpr int64_t alone = 1 << 15;  // numbers of a weight that one thread reads sooner than several

template <class Real>
struct Vectors {
  Real* memory;  // of the first
  int64_t pitch, count;
};

template <class Real>
struct Task {
  const Kernels<Real>& kernels;
  const Instruction& s;
  const Real* weight;
  const Vectors<Real>& v;
};

template <class Real>
void contract(const Task<Real>& task, Parallel parallel, int threads) {
  const auto body = [](int64_t begin, int64_t end, void* opaque) {
    const Task<Real>& t = *static_cast<const Task<Real>*>(opaque);
    t.kernels.contract_vectors(t.s.contraction, t.weight, t.v.memory + t.s.from, t.v.memory + t.s.to, t.v.pitch,
                               t.v.count, t.s.add, begin, end);
  };
  const Contract& c = task.s.contraction;
  const int64_t units = c.a * ((c.b + unit_lines - 1) / unit_lines);
  if (threads > 1 && units > 1 && c.a * c.b * c.c * c.d > alone)
    parallel(units, body, const_cast<Task<Real>*>(&task));
  else
    body(0, units, const_cast<Task<Real>*>(&task));
}

template <class Real>
void sparse(const Task<Real>& task, const Compressed& matrix, Parallel parallel, int threads) {
  struct Both {
    const Task<Real>& task;
    const Compressed& matrix;
  } both{task, matrix};
  const auto body = [](int64_t begin, int64_t end, void* opaque) {
    const Both& b = *static_cast<const Both*>(opaque);
    const Task<Real>& t = b.task;
    t.kernels.sparse_vectors(b.matrix, t.weight, t.v.memory + t.s.from, t.v.memory + t.s.to, t.v.pitch, t.v.count,
                             t.s.add, begin, end);
  };
  if (threads > 1 && task.s.entries > alone)
    parallel(task.s.rows, body, &both);
  else
    body(0, task.s.rows, &both);
}

template <class Real>
inline void set(Real& to, Real value, bool add) {
  to = add ? to + value : value;
}

// The sums of terms, then their products with the other side: threads share the terms, then the rows.
template <class Real>
void windowed(const Task<Real>& task, const Prepared<Real>& prepared, size_t number, Parallel parallel, int threads) {
  static thread_local Scratch scratch;
  const Instruction& s = task.s;
  struct Both {
    const Task<Real>& task;
    WindowSide read, written;
    const Real *from, *onto, *x;
    Real *terms, *y;
  } both{task, prepared.windows[number].right, prepared.windows[number].left, prepared.learned[s.other],
         prepared.learned[s.tensor], nullptr, nullptr, nullptr};
  if (s.transposed) std::swap(both.read, both.written), std::swap(both.from, both.onto);
  both.terms = static_cast<Real*>(scratch.reserve(s.entries * int64_t(sizeof(Real))));
  const bool together = threads > 1 && s.left + s.right > alone;
  const auto shared = [&](int64_t count, Body body) { together ? parallel(count, body, &both) : body(0, count, &both); };
  for (int64_t v = 0; v < task.v.count; ++v) {
    both.x = task.v.memory + v * task.v.pitch + s.from, both.y = task.v.memory + v * task.v.pitch + s.to;
    shared(s.entries, [](int64_t begin, int64_t end, void* opaque) {
      const Both& b = *static_cast<const Both*>(opaque);
      b.task.kernels.read_vector(b.read, begin, end, b.from, b.x, b.terms);
    });
    shared(s.rows, [](int64_t begin, int64_t end, void* opaque) {
      const Both& b = *static_cast<const Both*>(opaque);
      b.task.kernels.write_vector(b.written, b.task.s.entries, b.onto, b.terms, b.y, begin, end);
    });
  }
}

template <class Real>
void run_one(const Instruction& s, const Prepared<Real>& p, const Plan& plan, const Kernels<Real>& kernels,
             const Real* x, Real* y) {
  switch (s.kind) {
    case Instruction::diagonal: {
      const Real* weight = p.learned[s.tensor];
      for (int64_t i = 0; i < s.rows; ++i) set(y[i], weight[i] * x[i], s.add);
      break;
    }
    case Instruction::activate:
      kernels.activate_vector(s.activation, s.tensor < 0 ? nullptr : p.learned[s.tensor],
                              s.other < 0 ? nullptr : p.learned[s.other], x, y);
      break;
    case Instruction::gather: {
      const int64_t* index = s.table >= 0 ? plan.tables[s.table].data() : p.indices[s.index];
      for (int64_t i = 0; i < s.rows; ++i) set(y[i], x[index[i]], s.add);
      break;
    }
    case Instruction::scatter_add:
      for (int64_t i = 0; i < s.rows; ++i) y[p.indices[s.index][i]] += x[i];
      break;
    case Instruction::copy:
      for (int64_t i = 0; i < s.rows; ++i) set(y[i], x[i], s.add);
      break;
    case Instruction::clear: std::memset(y, 0, size_t(s.rows) * sizeof(Real)); break;
    default: break;  // the others take all vectors at once
  }
}

template <class Real>
void run_vectors(const Plan& plan, const Batch& batch, const Prepared<Real>& prepared, const Kernels<Real>& kernels,
                 Parallel parallel, int threads) {
  static thread_local Scratch scratch;
  Vectors<Real> v;
  // An odd number of cache lines: neighbouring vectors do not share their places in the cache.
  v.pitch = ((plan.rows * int64_t(sizeof(Real)) / alignment + 1) | 1) * alignment / int64_t(sizeof(Real));
  v.count = batch.rows;
  v.memory = static_cast<Real*>(scratch.reserve(v.pitch * v.count * int64_t(sizeof(Real))));
  const Real* x = static_cast<const Real*>(batch.x);
  for (int64_t i = 0; i < v.count; ++i)
    std::copy_n(x + i * batch.x_stride, plan.in_features, v.memory + i * v.pitch + plan.input);
  for (size_t k = 0; k < plan.instructions.size(); ++k) {
    const Instruction& s = plan.instructions[k];
    if (s.kind == Instruction::contract) {
      contract<Real>({kernels, s, prepared.learned[s.tensor], v}, parallel, threads);
    } else if (s.kind == Instruction::sparse) {
      const Rows& r = prepared.rows[k];
      sparse<Real>({kernels, s, prepared.values[k], v}, {r.start, r.column}, parallel, threads);
    } else if (s.kind == Instruction::windowed) {
      windowed<Real>({kernels, s, nullptr, v}, prepared, k, parallel, threads);
    } else {
      for (int64_t i = 0; i < v.count; ++i)
        run_one<Real>(s, prepared, plan, kernels, v.memory + i * v.pitch + s.from, v.memory + i * v.pitch + s.to);
    }
  }
  Real* y = static_cast<Real*>(batch.y);
  for (int64_t i = 0; i < v.count; ++i) {
    const Real* from = v.memory + i * v.pitch + plan.output;
    Real* to = y + i * batch.y_stride;
    if (prepared.bias)
      for (int64_t k = 0; k < plan.out_features; ++k) to[k] = from[k] + prepared.bias[k];
    else
      std::copy_n(from, plan.out_features, to);
  }
}

template <class Real>
void execute_as(const Plan& plan, const Batch& batch, const Array* tensors, const Kernels<Real>& kernels,
                Parallel parallel, int threads) {
  static thread_local Scratch compressed;
  const Prepared<Real> prepared = prepare<Real>(plan, batch.storage, tensors, kernels, compressed, parallel);
  run_vectors<Real>(plan, batch, prepared, kernels, parallel, threads);
}

template <class Real>
class VectorProduct : public Product {
 public:
  VectorProduct(const Plan& plan, Storage storage, const Array* tensors, const Kernels<Real>& kernels,
                Parallel parallel, int threads)
      : plan_(plan), kernels_(kernels),
        prepared_(prepare<Real>(plan, storage, tensors, kernels, compressed_, parallel)), parallel_(parallel),
        threads_(threads) {}
  void run(const Batch& batch) override { run_vectors<Real>(plan_, batch, prepared_, kernels_, parallel_, threads_); }

 private:
  const Plan& plan_;
  const Kernels<Real>& kernels_;
  Scratch compressed_;
  Prepared<Real> prepared_;
  Parallel parallel_;
  int threads_;
};

}  // namespace

void execute_vectors(const Plan& plan, const Batch& batch, const Array* tensors, Parallel parallel, int threads) {
  if (batch.rows == 0) return;
  if (batch.storage == Storage::f64)
    execute_as<double>(plan, batch, tensors, *chosen().wide, parallel, threads);
  else
    execute_as<float>(plan, batch, tensors, *chosen().single, parallel, threads);
}

std::unique_ptr<Product> vector_product_of(const Plan& plan, Storage storage, const Array* tensors, Parallel parallel,
                                           int threads) {
  if (storage == Storage::f64)
    return std::make_unique<VectorProduct<double>>(plan, storage, tensors, *chosen().wide, parallel, threads);
  return std::make_unique<VectorProduct<float>>(plan, storage, tensors, *chosen().single, parallel, threads);
}

}  // namespace structmat

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

// y[(start + i) mod size] += left[i] * (the sum over j of right[j] x[(from + j) mod length]).
template <class Real>
void rank_one(const Real* left, const int64_t* to, int64_t size, const Real* right, const int64_t* from, int64_t length,
              const Real* x, Real* y) {
  Real sum = 0;
  const int64_t before = std::min(from[1], length - from[0]), above = std::min(to[1], size - to[0]);
  for (int64_t j = 0; j < before; ++j) sum += right[j] * x[from[0] + j];
  for (int64_t j = before; j < from[1]; ++j) sum += right[j] * x[j - before];
  for (int64_t i = 0; i < above; ++i) y[to[0] + i] += left[i] * sum;
  for (int64_t i = above; i < to[1]; ++i) y[i - above] += left[i] * sum;
}

template <class Real>
void run_one(const Instruction& s, size_t number, const Prepared<Real>& p, const Plan& plan, const Kernels<Real>& kernels,
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
    case Instruction::windowed:
      for (int64_t t = 0; t < s.entries; ++t) {
        const int64_t *w = p.indices[s.index] + 4 * t, *offset = p.offsets[number].data() + 2 * t;
        const Real *left = p.learned[s.tensor] + offset[0], *right = p.learned[s.other] + offset[1];
        if (w[1] == 0 || w[3] == 0) continue;
        if (s.transposed)
          rank_one(right, w + 2, s.width, left, w, s.height, x, y);
        else
          rank_one(left, w, s.height, right, w + 2, s.width, x, y);
      }
      break;
    default: break;  // the others take all vectors at once
  }
}

template <class Real>
void execute_as(const Plan& plan, const Batch& batch, const Array* tensors, const Kernels<Real>& kernels,
                Parallel parallel, int threads) {
  static thread_local Scratch compressed, scratch;
  const Prepared<Real> prepared = prepare<Real>(plan, batch.storage, tensors, kernels, compressed, parallel);
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
    } else {
      for (int64_t i = 0; i < v.count; ++i)
        run_one<Real>(s, k, prepared, plan, kernels, v.memory + i * v.pitch + s.from, v.memory + i * v.pitch + s.to);
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

}  // namespace

void execute_vectors(const Plan& plan, const Batch& batch, const Array* tensors, Parallel parallel, int threads) {
  if (batch.rows == 0) return;
  if (batch.storage == Storage::f64)
    execute_as<double>(plan, batch, tensors, *chosen().wide, parallel, threads);
  else
    execute_as<float>(plan, batch, tensors, *chosen().single, parallel, threads);
}

}  // namespace structmat

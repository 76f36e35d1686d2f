#include "recur.h"

#include <stdexcept>

#include "prepared.h"

namespace structmat {
namespace {

constexpr int64_t alone = 1 << 13;  // numbers of a state that one thread makes sooner than several

template <class Real>
void recur_as(const Plan& plan, const Sequence& q, const Array* tensors, const Kernels<Real>& kernels,
              Parallel parallel, int threads) {
  static thread_local Scratch scratch;
  const int64_t wide = gates_of(q.cell) * q.size;
  const std::unique_ptr<Product> product = product_of(plan, q.storage, q.rows, tensors, parallel, threads);
  struct Step {
    const Sequence& q;
    const Kernels<Real>& kernels;
    int64_t wide;
    const Real *x, *before, *s;
    int64_t before_row;
    Real *memory, *after;
  } step{q, kernels, wide, nullptr, static_cast<const Real*>(q.start), nullptr, q.start_row, static_cast<Real*>(q.memory),
         nullptr};
  Real* s = static_cast<Real*>(scratch.reserve(q.rows * wide * int64_t(sizeof(Real))));
  step.s = s;
  const auto body = [](int64_t begin, int64_t end, void* opaque) {
    const Step& t = *static_cast<const Step*>(opaque);
    for (int64_t i = begin; i < end; ++i)
      t.kernels.cell(t.q.cell, t.x + i * t.q.x_row, t.s + i * t.wide, t.before + i * t.before_row,
                     t.memory ? t.memory + i * t.q.size : nullptr, t.after + i * t.q.y_row, t.q.size);
  };
  for (int64_t number = 0; number < q.times; ++number) {
    const int64_t time = q.backwards ? q.times - 1 - number : number;
    product->run(Batch{step.before, step.before_row, s, wide, q.rows, q.storage});
    step.x = static_cast<const Real*>(q.x) + time * q.x_time;
    step.after = static_cast<Real*>(q.y) + time * q.y_time;
    if (threads > 1 && q.rows * q.size > alone)
      parallel(q.rows, body, &step);
    else
      body(0, q.rows, &step);
    step.before = step.after, step.before_row = q.y_row;
  }
}

}  // namespace

void recur(const Plan& plan, const Sequence& q, const Array* tensors, Parallel parallel, int threads) {
  if (plan.in_features != q.size || plan.out_features != gates_of(q.cell) * q.size)
    throw std::invalid_argument("structmat: the state's matrix has another shape than the gates");
  if (q.rows == 0 || q.times == 0) return;
  if (q.storage == Storage::f64)
    recur_as<double>(plan, q, tensors, *chosen().wide, parallel, threads);
  else
    recur_as<float>(plan, q, tensors, *chosen().single, parallel, threads);
}

}  // namespace structmat

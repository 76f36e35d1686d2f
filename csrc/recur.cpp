#include "recur.h"

#include <algorithm>
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
  const int64_t keeps = q.kept ? kept_of(q.cell) * q.size : 0;
  struct Step {
    const Sequence& q;
    const Kernels<Real>& kernels;
    int64_t wide, keeps;
    const Real *x, *before, *s;
    int64_t before_row;
    Real *memory, *after, *kept;
  } step{q,
         kernels,
         wide,
         keeps,
         nullptr,
         static_cast<const Real*>(q.start),
         nullptr,
         q.start_row,
         static_cast<Real*>(q.memory),
         nullptr,
         nullptr};
  Real* s = static_cast<Real*>(scratch.reserve(q.rows * wide * int64_t(sizeof(Real))));
  step.s = s;
  const auto body = [](int64_t begin, int64_t end, void* opaque) {
    const Step& t = *static_cast<const Step*>(opaque);
    for (int64_t i = begin; i < end; ++i)
      t.kernels.cell(t.q.cell, t.x + i * t.q.x_row, t.s + i * t.wide, t.before + i * t.before_row,
                     t.memory ? t.memory + i * t.q.size : nullptr, t.after + i * t.q.y_row,
                     t.keeps ? t.kept + i * t.keeps : nullptr, t.q.size);
  };
  for (int64_t number = 0; number < q.times; ++number) {
    const int64_t time = q.backwards ? q.times - 1 - number : number;
    product->run(Batch{step.before, step.before_row, s, wide, q.rows, q.storage});
    step.x = static_cast<const Real*>(q.x) + time * q.x_time;
    step.after = static_cast<Real*>(q.y) + time * q.y_time;
    step.kept = keeps ? static_cast<Real*>(q.kept) + time * q.rows * keeps : nullptr;
    if (threads > 1 && q.rows * q.size > alone)
      parallel(q.rows, body, &step);
    else
      body(0, q.rows, &step);
    step.before = step.after, step.before_row = q.y_row;
  }
}

template <class Real>
void recur_back_as(const Plan& plan, const SequenceBack& q, const Array* tensors, const Kernels<Real>& kernels,
                   Parallel parallel, int threads) {
  static thread_local Scratch scratch;
  const int64_t wide = gates_of(q.cell) * q.size, keeps = kept_of(q.cell) * q.size, whole = q.rows * q.size;
  const std::unique_ptr<Product> product = product_of(plan, q.storage, q.rows, tensors, parallel, threads);
  Real* through = static_cast<Real*>(scratch.reserve(whole * int64_t(sizeof(Real))));
  Real* grad_start = static_cast<Real*>(q.grad_start);
  std::fill_n(through, whole, Real(0));
  std::fill_n(grad_start, whole, Real(0));
  struct Step {
    const SequenceBack& q;
    const Kernels<Real>& kernels;
    int64_t wide, keeps, memory_row;
    const Real *through, *kept, *before, *memory, *after, *grad;
    Real *direct, *gx, *gs;
  } step{q,       kernels, wide,    keeps,   q.size,  through, nullptr,
         nullptr, nullptr, nullptr, nullptr, q.cell == Cell::gru ? grad_start : nullptr, nullptr, nullptr};
  const auto body = [](int64_t begin, int64_t end, void* opaque) {
    const Step& t = *static_cast<const Step*>(opaque);
    Real* grad_memory = static_cast<Real*>(t.q.grad_memory);
    const auto row = [](auto* p, int64_t at) { return p ? p + at : nullptr; };
    for (int64_t i = begin; i < end; ++i) {
      const int64_t own = i * t.q.size;
      t.kernels.cell_back(t.q.cell, row(t.kept, i * t.keeps), t.before + own, row(t.memory, i * t.memory_row),
                          t.after + own, t.grad + i * t.q.grad_row, t.through + own, row(t.direct, own),
                          row(grad_memory, own), t.gx + i * t.wide, row(t.gs, i * t.wide), t.q.size);
    }
  };
  const Real *y = static_cast<const Real*>(q.y), *kept = static_cast<const Real*>(q.kept);
  for (int64_t number = q.times; number-- > 0;) {
    const int64_t time = q.backwards ? q.times - 1 - number : number, previous = q.backwards ? time + 1 : time - 1;
    step.kept = kept ? kept + time * q.rows * keeps : nullptr;
    step.before = number ? y + previous * whole : static_cast<const Real*>(q.start);
    if (q.cell == Cell::lstm) {  // what was kept of the time before ends with the memory then
      step.memory = number ? kept + previous * q.rows * keeps + 4 * q.size : static_cast<const Real*>(q.memory);
      step.memory_row = number ? keeps : q.size;
    }
    step.after = y + time * whole;
    step.grad = static_cast<const Real*>(q.grad) + time * q.grad_time;
    step.gx = static_cast<Real*>(q.grad_x) + time * q.rows * wide;
    step.gs = q.grad_s ? static_cast<Real*>(q.grad_s) + time * q.rows * wide : nullptr;
    if (threads > 1 && whole > alone)
      parallel(q.rows, body, &step);
    else
      body(0, q.rows, &step);
    product->run(Batch{step.gs ? step.gs : step.gx, wide, through, q.size, q.rows, q.storage});
  }
  for (int64_t i = 0; i < whole; ++i) grad_start[i] += through[i];
}

}  // namespace

void recur_back(const Plan& plan, const SequenceBack& q, const Array* tensors, Parallel parallel, int threads) {
  if (plan.out_features != q.size || plan.in_features != gates_of(q.cell) * q.size)
    throw std::invalid_argument("structmat: the state's matrix has another shape than the gates");
  if (q.rows == 0) return;
  if (q.storage == Storage::f64)
    recur_back_as<double>(plan, q, tensors, *chosen().wide, parallel, threads);
  else
    recur_back_as<float>(plan, q, tensors, *chosen().single, parallel, threads);
}

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

// The cells of recurrent nets: what the gates of one row make of its state, and the way back. For the instruction set that
// a source is compiled for; functions are those of activations.h.
#pragma once

#include "activations.h"
#include "kernels.h"
#include "vectors.h"

namespace structmat {
namespace STRUCTMAT_ISA {

template <class Real>
inline void put_some(Real* p, V<Real> v, int64_t count) {
  if (count >= Vector<Real>::lanes)
    put(p, v);
  else
    put_first(p, v, count);
}

// Gates in PyTorch's order: i, f, g, o for an LSTM, r, z, n for a GRU. What is kept follows them: the memory after, or
// what the state's matrix puts out for n.
template <class Real>
void cell(Cell kind, const Real* x, const Real* s, const Real* before, Real* memory, Real* after, Real* kept,
          int64_t size) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t k = 0; k < size; k += n) {
    const int64_t count = size - k;
    const auto hold = [&](int64_t number, V<Real> value) { put_some(kept + number * size + k, value, count); };
    const auto gate = [&](int64_t number) {
      return some_of(x + number * size + k, count) + some_of(s + number * size + k, count);
    };
    V<Real> next = {};
    switch (kind) {
      case Cell::lstm: {
        const V<Real> in = logistic<Real>(gate(0)), keep = logistic<Real>(gate(1));
        const V<Real> fresh = hyperbolic_tangent<Real>(gate(2)), out = logistic<Real>(gate(3));
        const V<Real> held = keep * some_of(memory + k, count) + in * fresh;
        put_some(memory + k, held, count);
        if (kept) hold(0, in), hold(1, keep), hold(2, fresh), hold(3, out), hold(4, held);
        next = out * hyperbolic_tangent<Real>(held);
        break;
      }
      case Cell::gru: {
        const V<Real> reset = logistic<Real>(gate(0)), update = logistic<Real>(gate(1));
        const V<Real> own = some_of(s + 2 * size + k, count);
        const V<Real> fresh = hyperbolic_tangent<Real>(some_of(x + 2 * size + k, count) + reset * own);
        if (kept) hold(0, reset), hold(1, update), hold(2, fresh), hold(3, own);
        next = fresh + update * (some_of(before + k, count) - fresh);
        break;
      }
      case Cell::tanh: next = hyperbolic_tangent<Real>(gate(0)); break;
      case Cell::relu: {
        const V<Real> sum = gate(0);
        next = sum < 0 ? V<Real>{} : sum;
        break;
      }
    }
    put_some(after + k, next, count);
  }
}

// From the gradient of a state, the sum of `grad`, `through` and `direct`, to those of the gates of the input (`gx`) and
// of the state's matrix (`gs`; where it is null it is the same). `direct` and `grad_memory` change into what goes to the
// state and the memory before without the matrix; cells without use null for them.
template <class Real>
void cell_back(Cell kind, const Real* kept, const Real* before, const Real* memory, const Real* after, const Real* grad,
               const Real* through, Real* direct, Real* grad_memory, Real* gx, Real* gs, int64_t size) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t k = 0; k < size; k += n) {
    const int64_t count = size - k;
    const auto value = [&](int64_t number) { return some_of(kept + number * size + k, count); };
    const auto slope = [](V<Real> v) { return v * (1 - v); };
    V<Real> g = some_of(grad + k, count) + some_of(through + k, count);
    switch (kind) {
      case Cell::lstm: {
        const V<Real> in = value(0), keep = value(1), fresh = value(2), out = value(3);
        const V<Real> shown = hyperbolic_tangent<Real>(value(4));
        const V<Real> held = some_of(grad_memory + k, count) + g * out * (1 - shown * shown);
        put_some(grad_memory + k, held * keep, count);
        put_some(gx + k, held * fresh * slope(in), count);
        put_some(gx + size + k, held * some_of(memory + k, count) * slope(keep), count);
        put_some(gx + 2 * size + k, held * in * (1 - fresh * fresh), count);
        put_some(gx + 3 * size + k, g * shown * slope(out), count);
        break;
      }
      case Cell::gru: {
        const V<Real> reset = value(0), update = value(1), fresh = value(2), own = value(3);
        g += some_of(direct + k, count);
        put_some(direct + k, g * update, count);
        const V<Real> of_fresh = g * (1 - update) * (1 - fresh * fresh);
        const V<Real> of_reset = of_fresh * own * slope(reset);
        const V<Real> of_update = g * (some_of(before + k, count) - fresh) * slope(update);
        put_some(gx + k, of_reset, count), put_some(gs + k, of_reset, count);
        put_some(gx + size + k, of_update, count), put_some(gs + size + k, of_update, count);
        put_some(gx + 2 * size + k, of_fresh, count), put_some(gs + 2 * size + k, of_fresh * reset, count);
        break;
      }
      case Cell::tanh: {
        const V<Real> y = some_of(after + k, count);
        put_some(gx + k, g * (1 - y * y), count);
        break;
      }
      case Cell::relu: put_some(gx + k, some_of(after + k, count) > 0 ? g : V<Real>{}, count); break;
    }
  }
}

}  // namespace STRUCTMAT_ISA
}  // namespace structmat

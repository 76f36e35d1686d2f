// The cells of recurrent nets: what the gates of one row make of its state. For the instruction set that a source is
// compiled for; functions are those of activations.h.
#pragma once

#include <cstring>

#include "activations.h"
#include "kernels.h"
#include "vectors.h"

namespace structmat {
namespace STRUCTMAT_ISA {

// So many of a register's numbers, the others zero; and back.
template <class Real>
inline V<Real> some(const Real* p, int64_t count) {
  if (count >= Vector<Real>::lanes) return at(p);
  V<Real> r = {};
  std::memcpy(&r, p, size_t(count) * sizeof(Real));
  return r;
}

template <class Real>
inline void put_some(Real* p, V<Real> v, int64_t count) {
  if (count >= Vector<Real>::lanes)
    put(p, v);
  else
    std::memcpy(p, &v, size_t(count) * sizeof(Real));
}

// Gates in PyTorch's order: i, f, g, o for an LSTM, r, z, n for a GRU.
template <class Real>
void cell(Cell kind, const Real* x, const Real* s, const Real* before, Real* memory, Real* after, int64_t size) {
  constexpr int n = Vector<Real>::lanes;
  for (int64_t k = 0; k < size; k += n) {
    const int64_t count = size - k;
    const auto gate = [&](int64_t number) {
      return some(x + number * size + k, count) + some(s + number * size + k, count);
    };
    V<Real> next = {};
    switch (kind) {
      case Cell::lstm: {
        const V<Real> in = logistic<Real>(gate(0)), keep = logistic<Real>(gate(1));
        const V<Real> held = keep * some(memory + k, count) + in * hyperbolic_tangent<Real>(gate(2));
        put_some(memory + k, held, count);
        next = logistic<Real>(gate(3)) * hyperbolic_tangent<Real>(held);
        break;
      }
      case Cell::gru: {
        const V<Real> reset = logistic<Real>(gate(0)), update = logistic<Real>(gate(1));
        const V<Real> own = some(s + 2 * size + k, count);
        const V<Real> fresh = hyperbolic_tangent<Real>(some(x + 2 * size + k, count) + reset * own);
        next = fresh + update * (some(before + k, count) - fresh);
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

}  // namespace STRUCTMAT_ISA
}  // namespace structmat

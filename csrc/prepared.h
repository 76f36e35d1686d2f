// What the passes forwards and backwards share: tensors as the kernels read them, and one instruction at work.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

#include "execute.h"
#include "plan.h"
#include "runs.h"

namespace structmat {

constexpr int64_t alignment = 64;
constexpr int64_t near_cache = 96 << 10;  // bytes of what is read in no order: beyond the L1 cache, since wide tiles pay
constexpr int64_t pack_alone = 1 << 15;   // numbers that one thread packs sooner than several
constexpr int64_t far_cache = 1 << 20;   // bytes of a tile's memory: an L2 cache

// The columns of tiles on the way back of a plan with activations, and of all tiles from which values are kept: what lies
// in a tile fits an L2 cache (values have a gradient too, but never all at a time), and there is work for two threads. The
// number of threads has no influence.
inline int64_t shared_columns(const Plan& plan, int64_t rows, int64_t lanes, int64_t bytes) {
  int64_t columns = std::max<int64_t>(lanes, 256 / bytes);
  while (columns > lanes && (plan.volume * columns * bytes > 2 * far_cache || rows < 2 * columns)) columns /= 2;
  return columns;
}

// Memory that is kept from call to call, one of each thread: fresh pages cost more than the work of a small layer.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  void* reserve(int64_t bytes) {
    if (bytes > size_) {
      release();
      memory_ = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
      if (!memory_) throw std::bad_alloc();
      size_ = bytes;
    }
    return memory_;
  }
  void release() {
    std::free(memory_);
    memory_ = nullptr, size_ = 0;
  }

 private:
  void* memory_ = nullptr;
  int64_t size_ = 0;
};

// A sparse matrix as rows of entries, in memory that the caller holds. Entries that are sorted by place (as they are
// made) need no copy of the values.
struct Rows {
  int32_t *start = nullptr, *column = nullptr;
  std::vector<int64_t> order;  // of the values; empty where they are in order

  static int64_t numbers(const Instruction& s) { return s.rows + 1 + s.entries; }  // that `start` and `column` hold
  int32_t length(int64_t row) const { return start[row + 1] - start[row]; }
};

// Sorted places, row by row: threads take ranges of rows. False if they are not sorted, or out of range.
inline bool compress_sorted(const Instruction& s, const int64_t* places, Rows& r, Parallel parallel) {
  struct Work {
    const int64_t *places, *end;
    Rows& rows;
    int64_t height, width;
    std::atomic<bool> failed{false};
  } work{places, places + s.entries, r, s.height, s.width};
  if (s.entries && (places[0] < 0 || work.end[-1] >= s.height * s.width)) return false;
  const auto body = [](int64_t begin, int64_t end, void* opaque) {
    Work& w = *static_cast<Work*>(opaque);
    const int64_t *at = std::lower_bound(w.places, w.end, begin * w.width), *first = at;
    for (int64_t i = begin; i < end; ++i) {
      w.rows.start[i] = int32_t(at - w.places);
      const int64_t* near = w.end - at < w.width ? w.end : at + w.width;
      const int64_t* next = std::lower_bound(at, near, (i + 1) * w.width);
      if (next == near) next = std::lower_bound(near, w.end, (i + 1) * w.width);  // places may stand more than once
      int32_t* column = w.rows.column + (at - w.places);
      for (int64_t k = 0; k < next - at; ++k) column[k] = int32_t(at[k] - i * w.width);
      at = next;
    }
    // What was found in this way is right if all of it is sorted, up to where the next range begins.
    int64_t backwards = at == std::lower_bound(w.places, w.end, end * w.width) ? 0 : -1;
    for (const int64_t* k = first == w.places ? first + 1 : first; k < at; ++k) backwards |= k[0] - k[-1];
    if (backwards < 0) w.failed = true;
  };
  if (s.entries < pack_alone)
    body(0, s.height, &work);
  else
    parallel(s.height, body, &work);
  r.start[s.height] = int32_t(s.entries);
  return !work.failed && std::lower_bound(places, work.end, int64_t(0)) == places &&
         std::lower_bound(places, work.end, s.height * s.width) == work.end;
}

inline void compress(const Instruction& s, const int64_t* places, Rows& r, Parallel parallel) {
  if (!s.transposed && compress_sorted(s, places, r, parallel)) return;
  const int64_t size = s.height * s.width, entries = s.entries;
  for (int64_t k = 0; k < entries; ++k)
    if (places[k] < 0 || places[k] >= size)
      throw std::invalid_argument("structmat: a place of a sparse matrix is out of range");
  std::fill_n(r.start, s.rows + 1, 0);
  std::vector<int32_t> own(entries), other(entries);
  for (int64_t k = 0; k < entries; ++k) {
    const int64_t row = places[k] / s.width, column = places[k] - row * s.width;
    own[k] = int32_t(s.transposed ? column : row), other[k] = int32_t(s.transposed ? row : column);
    ++r.start[own[k] + 1];
  }
  for (int64_t i = 0; i < s.rows; ++i) r.start[i + 1] += r.start[i];
  std::vector<int32_t> next(r.start, r.start + s.rows);
  r.order.resize(entries);
  for (int64_t k = 0; k < entries; ++k) {
    const int32_t at = next[own[k]]++;
    r.column[at] = other[k];
    r.order[at] = k;
  }
}

// What all tiles of a call share: tensors as the kernels read them.
template <class Real>
struct Prepared {
  std::vector<const Real*> learned;
  std::vector<const int64_t*> indices;
  // By the number of the instruction:
  std::vector<Rows> rows;                     // of sparse ones
  std::vector<const Real*> values;            // of sparse ones, in the order of the rows
  std::vector<Windows> windows;               // of windowed ones
  std::vector<std::array<const Real*, Quads::most>> panels;  // of contractions and quads whose weights are packed
  std::vector<std::vector<Real>> owned;
  const Real* bias = nullptr;
};

inline void check_index(const int64_t* index, int64_t count, int64_t size) {
  for (int64_t i = 0; i < count; ++i)
    if (index[i] < 0 || index[i] >= size) throw std::invalid_argument("structmat: an index is out of range");
}

// Sparse matrices and windows are brought into memory that is used again at the next call.
template <class Real>
Prepared<Real> prepare(const Plan& plan, Storage storage, const Array* tensors, const Kernels<Real>& kernels,
                       Scratch& compressed, Parallel parallel) {
  Prepared<Real> p;
  const size_t count = plan.sizes.size();
  p.learned.assign(count, nullptr), p.indices.assign(count, nullptr);
  const bool direct = storage == (sizeof(Real) == 4 ? Storage::f32 : Storage::f64);
  p.owned.reserve(count + plan.instructions.size());
  for (size_t i = 0; i < count; ++i) {
    if (tensors[i].count != plan.sizes[i]) throw std::invalid_argument("structmat: a tensor has the wrong size");
    if (plan.is_index[i]) {
      p.indices[i] = static_cast<const int64_t*>(tensors[i].data);
    } else if (direct) {
      p.learned[i] = static_cast<const Real*>(tensors[i].data);
    } else {
      p.owned.emplace_back(plan.sizes[i]);
      kernels.widen(tensors[i].data, storage, p.owned.back().data(), plan.sizes[i]);
      p.learned[i] = p.owned.back().data();
    }
  }
  if (plan.has_bias) p.bias = p.learned[count - 1];
  const size_t instructions = plan.instructions.size();
  p.rows.resize(instructions), p.windows.resize(instructions), p.values.assign(instructions, nullptr);
  p.panels.resize(instructions, {});
  const bool by_vectors = plan.use == Use::vectors;
  int64_t sparse = 0, windowed = 0;  // bytes
  for (const Instruction& s : plan.instructions) {
    if (s.kind == Instruction::sparse) sparse += Rows::numbers(s) * int64_t(sizeof(int32_t));
    if (s.kind == Instruction::windowed)
      windowed += by_vectors ? Windows::beginnings(s.entries) * int64_t(sizeof(int64_t))
                             : Windows::runs(s.entries) * int64_t(sizeof(Run));
  }
  char* room = sparse + windowed ? static_cast<char*>(compressed.reserve(windowed + sparse)) : nullptr;
  int32_t* memory = reinterpret_cast<int32_t*>(room + windowed);
  for (size_t i = 0; i < instructions; ++i) {
    const Instruction& s = plan.instructions[i];
    if (s.kind == Instruction::gather && s.index >= 0) check_index(p.indices[s.index], s.rows, s.rows);
    if (s.kind == Instruction::scatter_add) check_index(p.indices[s.index], s.rows, s.rows);
    if (s.kind == Instruction::windowed) {
      const int64_t* table = p.indices[s.index];
      Windows& made = p.windows[i];
      if (by_vectors) {
        int64_t* to = reinterpret_cast<int64_t*>(room);
        made.left = side_of(table, s.entries, s.height, s.left, to);
        made.right = side_of(table + 2, s.entries, s.width, s.right, to + s.entries);
        room += Windows::beginnings(s.entries) * int64_t(sizeof(int64_t));
      } else {
        Run* to = reinterpret_cast<Run*>(room);
        made.rows = runs_of(table, s.entries, s.height, s.left, to, to + 4 * s.entries);
        made.columns = runs_of(table + 2, s.entries, s.width, s.right, to + 2 * s.entries, to + 4 * s.entries);
        room += Windows::runs(s.entries) * int64_t(sizeof(Run));
      }
    }
    if (s.kind != Instruction::sparse) continue;
    Rows& r = p.rows[i];
    r.start = memory, r.column = memory + s.rows + 1;
    memory += Rows::numbers(s);
    compress(s, p.indices[s.index], r, parallel);
    p.values[i] = p.learned[s.tensor];
    if (r.order.empty()) continue;
    std::vector<Real> values(s.entries);
    for (int64_t k = 0; k < s.entries; ++k) values[k] = p.learned[s.tensor][r.order[k]];
    p.owned.push_back(std::move(values));
    p.values[i] = p.owned.back().data();
  }
  return p;
}

// Weights that are to be brought into panels, shared between threads by units of a kernel's own.
template <class Number>
class Packing {
 public:
  typedef void (*Kernel)(const Contract& stage, const Number* weight, Number* panels, int64_t begin, int64_t end);
  explicit Packing(Kernel kernel) : kernel_(kernel) {}

  // `panels` is set to where so many numbers will lie.
  void add(const Contract& stage, const Number* weight, const Number** panels, int64_t units, int64_t numbers) {
    jobs_.push_back({&stage, weight, panels, numbers_, units_, units_ + units});
    numbers_ += numbers, units_ += units;
  }

  void run(Scratch& scratch, Parallel parallel) {
    if (jobs_.empty()) return;
    memory_ = static_cast<Number*>(scratch.reserve(numbers_ * int64_t(sizeof(Number))));
    for (const Job& job : jobs_) *job.panels = memory_ + job.place;
    const auto body = [](int64_t begin, int64_t end, void* opaque) {
      const Packing& p = *static_cast<const Packing*>(opaque);
      for (const Job& job : p.jobs_) {
        const int64_t first = std::max(begin, job.first) - job.first, last = std::min(end, job.last) - job.first;
        if (first < last) p.kernel_(*job.stage, job.weight, p.memory_ + job.place, first, last);
      }
    };
    if (numbers_ < pack_alone)
      body(0, units_, this);
    else
      parallel(units_, body, this);
  }

 private:
  struct Job {
    const Contract* stage;
    const Number* weight;
    const Number** panels;
    int64_t place, first, last;  // where the panels begin; units
  };
  Kernel kernel_;
  std::vector<Job> jobs_;
  int64_t numbers_ = 0, units_ = 0;
  Number* memory_ = nullptr;
};

// Weights as panels, in `scratch`: of all instructions that can't do without, and if `many` columns share the work, of
// all that are faster with them.
template <class Real>
void pack_weights(Prepared<Real>& p, const Plan& plan, const Kernels<Real>& kernels, Scratch& scratch, bool many,
                  Parallel parallel) {
  Packing<Real> packing(kernels.pack);
  const auto note = [&](const Contract& stage, int tensor, const Real** panels) {
    if (stage.d == 1) {
      *panels = p.learned[tensor];
      return;
    }
    const int64_t a = stage.stride_a ? stage.a : 1;
    const int64_t tall = (stage.b + panel_rows - 1) / panel_rows;
    packing.add(stage, p.learned[tensor], panels, a * ((stage.d + pack_together - 1) / pack_together) * tall,
                a * stage.b * stage.c * stage.d);
  };
  for (size_t i = 0; i < plan.instructions.size(); ++i) {
    const Instruction& s = plan.instructions[i];
    if (s.packs && many) note(s.contraction, s.tensor, &p.panels[i][0]);
    if (s.kind == Instruction::quads)
      for (int k = 0; k < s.quads_of.count; ++k)
        note(s.quads_of.contraction[k], s.quads_of.weight[k], &p.panels[i][k]);
  }
  packing.run(scratch, parallel);
}

// The side of a windowed matrix that reads, and the one that writes.
template <class Real>
struct Sides {
  const Runs *read, *written;
  const Real *from, *onto;  // their contents

  Sides(const Instruction& s, const Prepared<Real>& p, size_t number)
      : read(&p.windows[number].columns), written(&p.windows[number].rows), from(p.learned[s.other]),
        onto(p.learned[s.tensor]) {
    if (s.transposed) std::swap(read, written), std::swap(from, onto);
  }
};

// What an instruction may use beside the rows of its values: `rows` rows of a tile, or one for each term of a windowed
// matrix, and room for its runs, of which each side has at most two a term.
template <class Real>
int64_t bytes_beside(const Plan& plan, int64_t columns, int64_t rows = 0) {
  return std::max(rows, plan.terms) * columns * int64_t(sizeof(Real)) + 4 * plan.terms * int64_t(sizeof(int32_t));
}

template <class Real>
int32_t* room_for_runs(Real* beside, const Plan& plan, int64_t columns) {
  return reinterpret_cast<int32_t*>(beside + plan.terms * columns);
}

// Runs one instruction, `number` in the plan, on rows of a tile: from x to y.
template <class Real>
inline void run(const Instruction& s, size_t number, const Prepared<Real>& p, const Plan& plan, const Kernels<Real>& k,
                const Real* x, Real* y, Real* beside, int64_t columns) {
  switch (s.kind) {
    case Instruction::contract:
      if (p.panels[number][0])
        k.contract_packed(s.contraction, p.panels[number][0], x, y, columns, s.add);
      else
        k.contract(s.contraction, p.learned[s.tensor], x, y, columns, s.add);
      break;
    case Instruction::quads: k.quads(s.quads_of, p.panels[number].data(), x, y, columns); break;
    case Instruction::radix: k.radix(s.stages, p.learned.data(), x, y, columns); break;
    case Instruction::diagonal: k.diagonal(p.learned[s.tensor], x, y, s.rows, columns, s.add); break;
    case Instruction::gather:
      k.gather(s.table >= 0 ? plan.tables[s.table].data() : p.indices[s.index], x, y, s.rows, columns, s.add);
      break;
    case Instruction::scatter_add: k.scatter_add(p.indices[s.index], x, y, s.rows, columns); break;
    case Instruction::activate:
      k.activate(s.activation, s.tensor < 0 ? nullptr : p.learned[s.tensor], s.other < 0 ? nullptr : p.learned[s.other], x,
                 y, columns);
      break;
    case Instruction::keep: break;  // who runs the plan does that
    case Instruction::copy: k.copy(x, y, s.rows, columns, s.add); break;
    case Instruction::clear: std::memset(y, 0, size_t(s.rows) * columns * sizeof(Real)); break;
    case Instruction::sparse: {
      const Compressed matrix{p.rows[number].start, p.rows[number].column};
      k.sparse(matrix, p.values[number], x, y, s.rows, columns, s.add);
      break;
    }
    case Instruction::windowed: {
      const Sides<Real> sides(s, p, number);
      std::memset(beside, 0, size_t(s.entries) * columns * sizeof(Real));
      int32_t* room = room_for_runs(beside, plan, columns);
      k.read_windows(sides.read->data(), sides.read->size(), sides.from, x, beside, columns, room);
      k.write_windows(sides.written->data(), sides.written->size(), sides.onto, beside, y, columns, room);
      break;
    }
  }
}

}  // namespace structmat

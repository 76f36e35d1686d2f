#include "backward.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <vector>

#include "prepared.h"

namespace structmat {
namespace {

// Sums are kept for parts of the batch, so that these can be worked on at the same time. How many there are depends on
// sizes only.
constexpr int64_t part_rows = 128, most_parts = 8;
constexpr int64_t most_bytes = 64 << 20;  // of the sums of all parts together, unless one has as much
constexpr int64_t at_once = 1 << 14;      // numbers that one task of the end takes
constexpr int64_t shared_cache = 6 << 20;  // bytes of a tile's memory: of what cores share

template <class Real>
struct Pass {
  const BackwardPlan& plan;
  const BackwardBatch& batch;
  const Prepared<Real>& prepared;
  const Kernels<Real>& kernels;
  int64_t columns, parts;
  Real* sums;  // of all parts
  std::atomic<bool> failed{false};

  int64_t tiles() const { return (batch.rows + columns - 1) / columns; }
};

// Where the rows of a tile lie.
template <class Real>
struct TileRows {
  Real* memory;
  const Real* kept;
  int64_t columns;

  const Real* at(int64_t row) const {
    if (row < 0) return nullptr;
    return row < kept_from ? memory + row * columns : kept + (row - kept_from) * columns;
  }
};

// The instruction of a step backwards.
template <class Real>
void run_back(const Step& step, const Pass<Real>& pass, const TileRows<Real>& rows, Real* sums, Real* scratch) {
  Real* memory = rows.memory;
  const Kernels<Real>& k = pass.kernels;
  const Prepared<Real>& p = pass.prepared;
  const Instruction& s = step.what;
  const int64_t columns = pass.columns;
  const Real* x = step.weighs ? rows.at(s.from) : nullptr;
  const Real* gy = memory + step.to * columns;
  Real* gx = step.from >= 0 ? memory + step.from * columns : nullptr;
  const auto direct = [&](int tensor) {
    const int64_t place = pass.plan.place[tensor];
    return place >= 0 ? sums + place : nullptr;
  };
  switch (s.kind) {
    case Instruction::contract: {
      const Contract& c = s.contraction;
      if (step.weighs)
        k.contract_sums(c, sums_of(c), x, gy, step.sums[0] >= 0 ? sums + step.sums[0] : direct(s.tensor), scratch, columns);
      if (gx)
        k.contract({c.a, c.c, c.b, c.d, c.stride_a, c.stride_c, c.stride_b, c.stride_d}, p.learned[s.tensor], gy, gx,
                   columns, step.add);
      break;
    }
    case Instruction::radix: {
      Real* own[Radix::most];
      for (int i = 0; i < Radix::most; ++i) own[i] = step.sums[i] >= 0 ? sums + step.sums[i] : nullptr;
      k.radix_back(s.stages, p.learned.data(), x, gy, gx, own, columns, step.add);
      break;
    }
    case Instruction::diagonal:
      if (step.weighs) k.diagonal_sums(x, gy, direct(s.tensor), s.rows, columns);
      if (gx) k.diagonal(p.learned[s.tensor], gy, gx, s.rows, columns, step.add);
      break;
    case Instruction::gather:
      if (s.table >= 0)
        k.gather(pass.plan.plan.tables[s.table].data(), gy, gx, s.rows, columns, step.add);
      else
        k.scatter_add(p.indices[s.index], gy, gx, s.rows, columns);
      break;
    case Instruction::scatter_add: k.gather(p.indices[s.index], gy, gx, s.rows, columns, step.add); break;
    case Instruction::activate:
      k.activate_back(s.activation, s.tensor < 0 ? nullptr : p.learned[s.tensor],
                      s.other < 0 ? nullptr : p.learned[s.other], rows.at(s.from), gy, gx,
                      s.tensor < 0 ? nullptr : direct(s.tensor), s.other < 0 ? nullptr : direct(s.other), columns,
                      step.add);
      break;
    case Instruction::copy: k.copy(gy, gx, s.rows, columns, step.add); break;
    case Instruction::clear:
    case Instruction::keep:
    case Instruction::quads: break;  // plans for derivatives hold none of these
    case Instruction::sparse: {
      const Rows& r = p.rows[step.number];
      const Compressed matrix{r.start, r.column};
      k.sparse_back(matrix, p.values[step.number], x, gy, gx, step.weighs ? sums + step.sums[0] : nullptr, s.rows,
                    columns);
      break;
    }
    case Instruction::windowed: {
      const Sides<Real> sides(s, p, step.number);
      Real *read_sums = direct(s.other), *written_sums = direct(s.tensor);
      if (s.transposed) std::swap(read_sums, written_sums);
      const Run *read = sides.read->data(), *written = sides.written->data();
      const int64_t reads = sides.read->size(), writes = sides.written->size();
      int32_t* room = room_for_runs(scratch, pass.plan.plan, columns);
      const size_t between = size_t(s.entries) * columns * sizeof(Real);
      if (written_sums) {
        std::memset(scratch, 0, between);
        k.read_windows(read, reads, sides.from, x, scratch, columns, room);
        k.window_sums(written, writes, scratch, gy, written_sums, columns, room);
      }
      if (!read_sums && !gx) break;
      std::memset(scratch, 0, between);
      k.read_windows(written, writes, sides.onto, gy, scratch, columns, room);
      if (read_sums) k.window_sums(read, reads, scratch, x, read_sums, columns, room);
      if (gx) k.write_windows(read, reads, sides.from, scratch, gx, columns, room);
      break;
    }
  }
}

template <class Real>
void run_tile(const Pass<Real>& pass, int64_t tile, Real* memory, Real* sums) {
  const BackwardBatch& b = pass.batch;
  const Plan& plan = pass.plan.plan;
  const int64_t columns = pass.columns, first = tile * columns, count = std::min(columns, b.rows - first);
  const int64_t size = bytes_of(b.storage);
  Real* scratch = memory + pass.plan.rows * columns;
  const TileRows<Real> rows{memory, static_cast<const Real*>(b.kept) + (b.kept ? tile * plan.kept_rows * columns : 0),
                            columns};
  for (const Step& s : pass.plan.steps) {
    switch (s.kind) {
      case Step::load_input:
        pass.kernels.load(static_cast<const char*>(b.x) + first * b.x_stride * size, b.storage, b.x_stride, count,
                          plan.in_features, memory + s.what.to * columns, columns);
        break;
      case Step::load_gradient: {
        Real* to = memory + s.to * columns;
        pass.kernels.load(static_cast<const char*>(b.grad) + first * b.grad_stride * size, b.storage, b.grad_stride,
                          count, plan.out_features, to, columns);
        const int64_t bias = plan.has_bias ? pass.plan.place.back() : -1;
        if (bias >= 0) pass.kernels.row_sums(to, sums + bias, plan.out_features, columns);
        break;
      }
      case Step::forward:
        run<Real>(s.what, s.number, pass.prepared, plan, pass.kernels, rows.at(s.what.from), memory + s.what.to * columns,
                  scratch, columns);
        break;
      case Step::clear: std::memset(memory + s.from * columns, 0, size_t(s.rows) * columns * sizeof(Real)); break;
      case Step::backward: run_back<Real>(s, pass, rows, sums, scratch); break;
      case Step::store_gradient:
        pass.kernels.store(memory + s.from * columns, columns, nullptr,
                           static_cast<char*>(b.grad_x) + first * plan.in_features * size, b.storage, plan.in_features,
                           count, plan.in_features);
        break;
    }
  }
}

template <class Real>
void run_parts(int64_t begin, int64_t end, void* opaque) {
  Pass<Real>& pass = *static_cast<Pass<Real>*>(opaque);
  try {
    static thread_local Scratch scratch;
    const int64_t bytes = pass.plan.rows * pass.columns * int64_t(sizeof(Real));
    Real* memory =
        static_cast<Real*>(scratch.reserve(bytes + bytes_beside<Real>(pass.plan.plan, pass.columns, block_width)));
    for (int64_t part = begin; part < end; ++part) {
      Real* sums = pass.sums + part * pass.plan.total;
      std::fill_n(sums, pass.plan.total, Real(0));  // none where no tensor's gradient is wanted
      const int64_t tiles = pass.tiles(), last = tiles * (part + 1) / pass.parts;
      for (int64_t tile = tiles * part / pass.parts; tile < last; ++tile) run_tile<Real>(pass, tile, memory, sums);
    }
  } catch (const std::bad_alloc&) {
    pass.failed = true;  // no exception may leave a thread of the pool
  }
}

// ------------------------------------------------------------------------------------------------ the sums of all parts

template <class Real>
struct Task {
  const Sums* from;
  const Rows* rows;  // of the entries of a sparse matrix
  const Real* sums;
  Real* onto;
  int64_t begin, end;  // numbers, or lines
  bool add;
};

template <class Real>
inline void set(Real& to, Real value, bool add) {
  to = add ? to + value : value;
}

template <class Real>
void settle_groups(const Task<Real>& t, const Real* sums) {
  const Radix& s = t.from->stages;
  const int k = t.from->stage, bit = s.bit[k], size = 1 << s.count;
  const int64_t distance = s.lowest << bit, across = s.transposed[k] ? 2 * distance : distance;
  const int64_t offsets[] = {0, across, 3 * distance - across, 3 * distance};
  for (int64_t group = t.begin; group < t.end; ++group) {
    const int64_t hi = group / s.lowest, lo = group % s.lowest;
    const Real* from = sums + group * 2 * size;
    for (int g = 0; g < size; ++g) {
      if (g & (1 << bit)) continue;
      const int64_t block = hi * (size >> (bit + 1)) + (g >> (bit + 1));
      Real* to = t.onto + block * 4 * distance + (g & ((1 << bit) - 1)) * s.lowest + lo;
      for (int i = 0; i < 4; ++i) set(to[offsets[i]], *from++, t.add);
    }
  }
}

template <class Real>
void settle(const Task<Real>& t) {
  const Real* sums = t.sums + t.from->first;
  if (t.from->order == Sums::entries && !t.rows->order.empty()) {
    for (int64_t k = t.begin; k < t.end; ++k) set(t.onto[t.rows->order[k]], sums[k], t.add);
    return;
  }
  if (t.from->order == Sums::groups) return settle_groups<Real>(t, sums);
  if (t.from->order != Sums::blocks) {
    for (int64_t k = t.begin; k < t.end; ++k) set(t.onto[k], sums[k], t.add);
    return;
  }
  const Contract& c = t.from->contraction;
  const BlockSums shape = sums_of(c);
  const bool along_c = shape.along == BlockSums::c;
  const int64_t deep = c.stride_d ? c.d : 1, length = along_c ? c.c : c.b;
  const int64_t along = along_c ? c.stride_c : c.stride_b, across = along_c ? c.stride_b : c.stride_c;
  for (int64_t line = t.begin; line < t.end; ++line) {
    const int64_t a = line / shape.lines, own = line % shape.lines, block = shape.lines * shape.width;
    const Real* from = sums + a * deep * block + own * shape.width;
    Real* to = t.onto + a * c.stride_a + own * across;
    if (deep == 1) {
      for (int64_t w = 0; w < length; ++w) set(to[w * along], from[w], t.add);
      continue;
    }
    for (int64_t first = 0; first < length; first += 16)  // numbers that share cache lines
      for (int64_t w = first; w < std::min(first + 16, length); ++w)
        for (int64_t d = 0; d < deep; ++d) set(to[w * along + d], from[d * block + w], t.add);
  }
}

// Adds the sums of all parts, and brings them into the order of the tensors.
template <class Real>
void gather_sums(const Pass<Real>& pass, void* const* gradients, Parallel parallel) {
  const BackwardPlan& plan = pass.plan;
  struct Shared {
    Real* sums;
    int64_t total, parts;
  } shared{pass.sums, plan.total, pass.parts};
  if (plan.total * pass.parts < pack_alone) parallel = serially;
  if (pass.parts > 1)
    parallel((plan.total + at_once - 1) / at_once, [](int64_t begin, int64_t end, void* opaque) {
      const Shared& s = *static_cast<const Shared*>(opaque);
      const int64_t last = std::min(end * at_once, s.total);
      for (int64_t part = 1; part < s.parts; ++part) {
        const Real* other = s.sums + part * s.total;
        for (int64_t i = begin * at_once; i < last; ++i) s.sums[i] += other[i];
      }
    }, &shared);
  const bool direct = pass.batch.storage == (sizeof(Real) == 4 ? Storage::f32 : Storage::f64);
  std::vector<std::vector<Real>> wide(plan.plan.sizes.size());
  // A tensor that several instructions read has several sums: they follow one another.
  std::vector<size_t> seen(plan.plan.sizes.size(), 0);
  std::vector<std::vector<Task<Real>>> rounds;
  for (const Sums& s : plan.sums) {
    if (!direct && wide[s.tensor].empty()) wide[s.tensor].resize(plan.plan.sizes[s.tensor]);
    Task<Real> t{&s, nullptr, pass.sums, direct ? static_cast<Real*>(gradients[s.tensor]) : wide[s.tensor].data(), 0, 0,
                 seen[s.tensor] > 0};
    if (s.order == Sums::entries) t.rows = &pass.prepared.rows[s.number];
    int64_t units = s.count, step = at_once;
    if (s.order == Sums::blocks) {
      const BlockSums shape = sums_of(s.contraction);
      units = shape.lines * (s.contraction.stride_a ? s.contraction.a : 1);
      step = std::max<int64_t>(1, at_once / (s.count / units));
    } else if (s.order == Sums::groups) {
      units = s.stages.rows >> s.stages.count;
      step = std::max<int64_t>(1, at_once / (s.count / units));
    } else if (t.rows && !t.rows->order.empty()) {
      step = std::max<int64_t>(units, 1);
    }
    const size_t round = seen[s.tensor]++;
    if (rounds.size() <= round) rounds.resize(round + 1);
    for (; t.begin < units; t.begin = t.end) {
      t.end = std::min(t.begin + step, units);
      rounds[round].push_back(t);
    }
  }
  for (std::vector<Task<Real>>& tasks : rounds)
    parallel(int64_t(tasks.size()), [](int64_t begin, int64_t end, void* opaque) {
      const Task<Real>* all = static_cast<const Task<Real>*>(opaque);
      for (int64_t i = begin; i < end; ++i) settle<Real>(all[i]);
    }, tasks.data());
  for (size_t i = 0; i < wide.size(); ++i)
    if (!wide[i].empty()) pass.kernels.narrow(wide[i].data(), pass.batch.storage, gradients[i], int64_t(wide[i].size()));
}

// Wide tiles, even beyond the cache of one core: weights and their sums are read and written once for each tile, and the
// lanes of sums are summed as often.
template <class Real>
int64_t tile_columns(const BackwardPlan& plan, int64_t rows, int64_t lanes) {
  int64_t columns = std::max<int64_t>(lanes, 256 / int64_t(sizeof(Real)));
  while (columns > lanes && (plan.rows * columns * int64_t(sizeof(Real)) > shared_cache || rows <= columns / 2))
    columns /= 2;
  return columns;
}

template <class Real>
void execute_as(const BackwardPlan& plan, const BackwardBatch& batch, const Array* tensors, void* const* gradients,
                const Kernels<Real>& kernels, Parallel parallel) {
  static thread_local Scratch compressed;
  const Prepared<Real> prepared = prepare<Real>(plan.plan, batch.storage, tensors, kernels, compressed, parallel);
  const bool activated = plan.plan.has_activations;
  const int64_t columns = activated ? shared_columns(plan.plan, batch.rows, kernels.lanes, sizeof(Real))
                                    : tile_columns<Real>(plan, batch.rows, kernels.lanes);
  const int64_t fitting = most_bytes / std::max<int64_t>(1, plan.total * int64_t(sizeof(Real)));
  const int64_t parts = std::max<int64_t>(1, std::min({batch.rows / (activated ? columns : part_rows), most_parts, fitting}));
  static thread_local Scratch scratch;
  const int64_t bytes = parts * plan.total * int64_t(sizeof(Real));
  Pass<Real> pass{plan, batch, prepared, kernels, columns, parts, static_cast<Real*>(scratch.reserve(bytes))};
  parallel(parts, run_parts<Real>, &pass);
  if (pass.failed) throw std::bad_alloc();
  gather_sums<Real>(pass, gradients, parallel);
  if (bytes > most_bytes) scratch.release();
}

}  // namespace

void execute_backward(const BackwardPlan& plan, const BackwardBatch& batch, const Array* tensors,
                      void* const* gradients, Parallel parallel) {
  if (batch.storage == Storage::f64)
    execute_as<double>(plan, batch, tensors, gradients, *chosen().wide, parallel);
  else
    execute_as<float>(plan, batch, tensors, gradients, *chosen().single, parallel);
}

}  // namespace structmat

#include "pooled.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <vector>

#include "prepared.h"

namespace structmat {
namespace {

constexpr int64_t quick = 4;             // factors that are multiplied before numbers are brought near one again
constexpr int64_t fewest_units = 8;      // pieces of work that a layer is cut into, if its batch allows it
constexpr int64_t most_parts = 16;       // sums of the gradients of weights, each of a part of the work
constexpr int64_t parts_bytes = 4 << 20;  // of all of them together, unless two take more
constexpr int64_t tile_bytes = 1 << 20;  // of what a piece of work holds: an L2 cache

constexpr int64_t rows_at_once = 12;     // of a factor, between which memory is asked for
constexpr int64_t line = 64;             // bytes

// A product of two others, or a factor. The products of a window form a tree, the same as that of the reference: the first
// half of the factors times the second, and again.
struct Node {
  int64_t first = -1, second = -1;
  bool rescaled = false;
};

// `rescaled`: numbers are brought near one on the way; `last`: the product of all of them too.
std::vector<Node> tree_of(int64_t window, bool rescaled, bool last) {
  std::vector<Node> nodes(window);
  std::vector<int64_t> current(window), next;
  for (int64_t k = 0; k < window; ++k) current[k] = k;
  for (int64_t factors = 2; current.size() > 1; factors *= 2) {
    const size_t half = current.size() / 2;
    next.clear();
    for (size_t i = 0; i < half; ++i) {
      next.push_back(int64_t(nodes.size()));
      nodes.push_back({current[i], current[half + i], false});
    }
    if (current.size() % 2) next.push_back(current.back());
    current.swap(next);
    if (factors < quick || current.size() == 1) continue;
    for (const int64_t n : current) nodes[n].rescaled = rescaled;
    factors = 1;
  }
  nodes[current[0]].rescaled = last;
  return nodes;
}

// The columns of a tile. They follow from sizes alone, so that no sum depends on the number of threads.
int64_t columns_of(const PoolLayer& s, int64_t nodes, int64_t lanes, int64_t bytes) {
  const int64_t most = widest_row / bytes;
  int64_t columns = lanes;
  while (columns < most && columns < s.batch) columns *= 2;
  const auto tiles = [&](int64_t c) { return (s.batch + c - 1) / c; };
  if (columns > 4 * lanes && tiles(columns) * columns > tiles(columns / 2) * (columns / 2)) columns /= 2;
  while (columns > 4 * lanes && (s.windows * tiles(columns) < fewest_units ||
                                 (s.window * s.in + nodes * s.out) * columns * bytes > tile_bytes))
    columns /= 2;
  return columns;
}

template <class Real>
Real two_to(int64_t exponent) { return std::ldexp(Real(1), int(exponent)); }

// Weights with the largest near one, and the exponent of the power of two that they were divided by.
template <class Real>
int64_t exponent_of(const PoolKernels<Real>& pool, int64_t lanes, const Real* weight, int64_t count) {
  Real tops[widest_row / sizeof(Real)] = {}, top = 0;
  pool.column_tops(weight, count / lanes, lanes, true, tops);
  for (int64_t l = 0; l < lanes; ++l) top = std::max(top, tops[l]);
  for (int64_t i = count / lanes * lanes; i < count; ++i) top = std::max(top, std::abs(weight[i]));
  return top > 0 && top <= std::numeric_limits<Real>::max() ? std::ilogb(top) : 0;
}

// Whether numbers are brought near one by powers of two on the way.
bool rescales(const PoolLayer& layer) {
  return layer.semiring == Semiring::scaled || layer.semiring == Semiring::normalized;
}

// What all threads share.
template <class Real>
struct Work {
  const PoolLayer& layer;
  const Kernels<Real>& kernels;
  const PoolKernels<Real>& pool;
  std::vector<Node> nodes;
  bool four;  // windows of four have kernels of their own
  int64_t columns, tiles;
  const Real* weight;
  int64_t exponent = 0;
  Real* z = nullptr;          // forwards
  void* z_scale = nullptr;
  const Real* held = nullptr;  // backwards
  const void* held_scale = nullptr;
  const Real* grad = nullptr;
  Real *grad_x = nullptr, *sums = nullptr;
  int64_t parts = 0, width = 0;
  bool own = false;  // no two windows share a matrix
  std::atomic<bool> failed{false};

  Work(const PoolLayer& given, const Kernels<Real>& table, const PoolKernels<Real>& own_table)
      : layer(given), kernels(table), pool(own_table), nodes(tree_of(given.window, rescales(given), given.semiring == Semiring::scaled)),
        four(given.window == 4) {
    columns = columns_of(layer, four ? 4 : int64_t(nodes.size()), kernels.lanes, sizeof(Real));
    tiles = (layer.batch + columns - 1) / columns;
    for (int64_t i = 0; i < layer.windows * layer.window; ++i) {
      if (layer.child[i] < -1 || layer.child[i] >= layer.locations)
        throw std::invalid_argument("structmat: a window reads a location that does not exist");
      if (layer.child[i] >= 0 && (layer.slot[i] < 0 || layer.slot[i] >= layer.copies))
        throw std::invalid_argument("structmat: a window reads a matrix that does not exist");
    }
  }

  // Divides the weights by their power of two, into `memory` if that is not one.
  void divide(Scratch& memory) {
    const int64_t count = layer.copies * layer.out * layer.in;
    weight = static_cast<const Real*>(layer.weight);
    if (!rescales(layer)) return;
    exponent = exponent_of(pool, kernels.lanes, weight, count);
    if (exponent == 0) return;
    Real* made = static_cast<Real*>(memory.reserve(count * int64_t(sizeof(Real))));
    const auto [half, rest] = halves();
    for (int64_t i = 0; i < count; ++i) made[i] = weight[i] * half * rest;
    weight = made;
  }
  // 2^-exponent as two factors, since one of that size may be no number.
  std::pair<Real, Real> halves() const {
    const int64_t half = (-exponent) >> 1;
    return {two_to<Real>(half), two_to<Real>(-exponent - half)};
  }
};

// One piece of work, a window of a tile, in memory of one thread.
template <class Real>
class Piece {
  typedef typename PoolKernels<Real>::Integer Integer;

 public:
  Piece(const Work<Real>& work, Scratch& scratch, bool backwards)
      : w_(work), s_(work.layer), k_(work.kernels), pool_(work.pool), columns_(work.columns) {
    const int64_t nodes = w_.four ? 4 : int64_t(w_.nodes.size());
    const int64_t rows = s_.window * s_.in + (nodes + 1) * s_.out + s_.window + nodes + 3 +
                         (backwards ? s_.in + block_width : 0) + (backwards && normalized() ? s_.out : 0);
    char* memory = static_cast<char*>(scratch.reserve(rows * columns_ * int64_t(sizeof(Real)) + columns_ * 16));
    const auto take = [&](int64_t count) {
      Real* own = reinterpret_cast<Real*>(memory);
      memory += count * columns_ * int64_t(sizeof(Real));
      return own;
    };
    x_ = take(s_.window * s_.in), y_ = take(nodes * s_.out), z_ = take(s_.out);
    factors_ = take(s_.window), node_factors_ = take(nodes);
    top_ = take(1), shift_ = take(1), last_ = take(1);
    if (backwards) d_ = take(s_.in), turned_ = take(block_width);
    if (backwards && normalized()) held_ = take(s_.out);
    sum_ = reinterpret_cast<int64_t*>(memory), exponents_ = reinterpret_cast<Integer*>(memory + columns_ * 8);
    read_.resize(s_.window);
  }

  void forward(int64_t unit) {
    place(unit);
    convolve();
    const bool whole = count_ == columns_;
    const bool lowers = s_.semiring == Semiring::scaled && s_.lowers;
    Real* target = w_.z + window_ * s_.out * s_.batch + first_;
    Real* to = whole && !lowers ? target : z_;
    const int64_t pitch = to == z_ ? columns_ : s_.batch, apart = s_.out * columns_;
    if (s_.semiring == Semiring::log) {
      pool_.log_products(y_, s_.window, apart, shift_, to, pitch, s_.out, columns_);
    } else if (normalized()) {
      const Real* made = product();
      pool_.powers(top_, last_, exponents_, columns_);
      pool_.normalize(made, last_, to, pitch, s_.out, columns_);
    } else if (w_.four) {
      const bool scaled = s_.semiring == Semiring::scaled;
      pool_.multiply_four(y_, apart, scaled ? z_ : to, scaled ? columns_ : pitch, s_.out, columns_, scaled ? top_ : nullptr);
      if (scaled) {
        pool_.powers(top_, last_, exponents_, columns_);
        add_exponents();
        pool_.scale_columns(z_, last_, to, pitch, s_.out, columns_);
      }
    } else {
      multiply_tree();
      const Real* made = last_product();
      if (lowers)
        std::memcpy(z_, made, apart * sizeof(Real));
      else
        k_.store_by_features(made, columns_, nullptr, target, s_.storage, s_.batch, count_, s_.out);
      to = lowers ? z_ : target;
    }
    if (lowers) lower(z_, sum_);
    if (to == z_) k_.store_by_features(z_, columns_, nullptr, target, s_.storage, s_.batch, count_, s_.out);
    if (s_.semiring == Semiring::scaled)
      std::memcpy(static_cast<int64_t*>(w_.z_scale) + window_ * s_.batch + first_, sum_, count_ * sizeof(int64_t));
    if (normalized())
      std::memcpy(static_cast<Real*>(w_.z_scale) + window_ * s_.batch + first_, last_, count_ * sizeof(Real));
  }

  // `sums` are those of the part that the unit belongs to.
  void backward(int64_t unit, Real* sums) {
    place(unit);
    convolve();
    const int64_t apart = s_.out * columns_;
    const Real* g = gradient();
    if (s_.semiring == Semiring::log) {
      for (int64_t k = 0; k < s_.window; ++k) pool_.log_back(g, y_ + k * apart, apart);
    } else if (w_.four) {
      const bool scaled = s_.semiring == Semiring::scaled;
      if (scaled) held_factor();
      pool_.multiply_four_back(g, scaled ? last_ : nullptr, y_, apart, s_.out, columns_);
    } else {
      multiply_tree();
      const int64_t nodes = int64_t(w_.nodes.size());
      std::memcpy(y_ + (nodes - 1) * apart, g, apart * sizeof(Real));
      for (int64_t n = nodes - 1; n >= 0; --n) {
        const Node& node = w_.nodes[n];
        Real* own = y_ + n * apart;
        if (node.rescaled) pool_.scale_columns(own, node_factors_ + n * columns_, own, columns_, s_.out, columns_);
        if (node.first >= 0) pool_.multiply_back(own, y_ + node.first * apart, y_ + node.second * apart, apart);
      }
    }
    for (int64_t k = 0; k < s_.window; ++k) {
      const int64_t edge = window_ * s_.window + k;
      if (s_.child[edge] < 0) continue;
      const Real* gy = y_ + k * apart;
      const int64_t slot = s_.slot[edge];
      if (sums)
        k_.contract_sums(stage(), {BlockSums::c, s_.out, w_.width, s_.out * w_.width}, read_[k], gy,
                         sums + slot * s_.out * w_.width, turned_, columns_);
      if (w_.grad_x) back_to_input(k, s_.child[edge], gy, w_.weight + slot * s_.out * s_.in);
    }
  }

 private:
  Contract stage() const { return {1, s_.out, s_.in, 1, 0, s_.in, 1, 0}; }
  bool normalized() const { return s_.semiring == Semiring::normalized; }
  const Real* last_product() const { return y_ + (int64_t(w_.nodes.size()) - 1) * s_.out * columns_; }

  // Of all factors, with the tops of its columns.
  const Real* product() {
    if (w_.four) {
      pool_.multiply_four(y_, s_.out * columns_, z_, columns_, s_.out, columns_, top_);
      return z_;
    }
    multiply_tree();
    pool_.column_tops(last_product(), s_.out, columns_, true, top_);
    return last_product();
  }

  void place(int64_t unit) {
    window_ = unit / w_.tiles, first_ = unit % w_.tiles * columns_;
    count_ = std::min(columns_, s_.batch - first_);
  }

  // The factors of the window, from what its locations hold.
  void convolve() {
    std::fill_n(sum_, columns_, 0);
    std::fill_n(shift_, columns_, Real(0));
    for (int64_t k = 0; k < s_.window; ++k) {
      const int64_t edge = window_ * s_.window + k, child = s_.child[edge];
      Real* y = y_ + k * s_.out * columns_;
      if (child < 0) {
        std::fill_n(y, s_.out * columns_, Real(1));
        continue;
      }
      Real* own = x_ + k * s_.in * columns_;
      const Real* x = static_cast<const Real*>(s_.x) + child * s_.in * s_.batch;
      if (s_.batch != columns_) {
        k_.load_by_features(x + first_, s_.storage, s_.batch, count_, s_.in, own, columns_);
        x = own;
      }
      read_[k] = lifted(k, x, own);
      if (s_.semiring == Semiring::scaled)
        for (int64_t b = 0; b < count_; ++b)
          sum_[b] += w_.exponent + (s_.x_scale ? s_.x_scale[child * s_.batch + first_ + b] : 0);
      const Real* weight = w_.weight + s_.slot[edge] * s_.out * s_.in;
      for (int64_t row = 0; row < s_.out; row += rows_at_once) {
        const int64_t rows = std::min(rows_at_once, s_.out - row);
        fetch(edge + 1, row, rows);
        k_.contract({1, rows, s_.in, 1, 0, s_.in, 1, 0}, weight + row * s_.in, read_[k], y + row * columns_, columns_, false);
      }
    }
  }

  // Asks for what the next factor is made of, a part with some rows of this one: a window is read once, and in an order
  // that the processor does not foresee.
  void fetch(int64_t edge, int64_t row, int64_t rows) const {
    if (s_.batch != columns_ || edge >= s_.windows * s_.window || s_.child[edge] < 0) return;
    const int64_t bytes = s_.in * s_.batch * int64_t(sizeof(Real));
    const char* x = static_cast<const char*>(s_.x) + s_.child[edge] * bytes;
    for (int64_t at = bytes * row / s_.out / line * line; at < bytes * (row + rows) / s_.out; at += line)
      __builtin_prefetch(x + at, 0, 2);
  }

  // What is multiplied by the weights, in `own` if it is not what was read.
  const Real* lifted(int64_t k, const Real* x, Real* own) {
    const bool logs = s_.semiring == Semiring::log;
    if (s_.semiring == Semiring::plain || !(logs || s_.lifts)) return x;
    pool_.column_tops(x, s_.in, columns_, s_.lifts, top_);
    if (!s_.lifts) {
      pool_.exponentials(x, top_, own, s_.in, columns_);
      for (int64_t b = 0; b < columns_; ++b) shift_[b] += top_[b];
      return own;
    }
    Real* factor = factors_ + k * columns_;
    pool_.powers(top_, factor, exponents_, columns_);
    Integer any = 0;
    for (int64_t b = 0; b < columns_; ++b) any |= exponents_[b];
    if (!any) return x;  // numbers near one need no other scale
    pool_.scale_columns(x, factor, own, columns_, s_.in, columns_);
    if (logs)
      for (int64_t b = 0; b < columns_; ++b) shift_[b] += Real(exponents_[b]) * Real(0.69314718055994530942);
    else
      add_exponents();
    return own;
  }

  void add_exponents() {
    for (int64_t b = 0; b < columns_; ++b) sum_[b] += exponents_[b];
  }

  void multiply_tree() {
    const int64_t apart = s_.out * columns_;
    for (int64_t n = 0; n < int64_t(w_.nodes.size()); ++n) {
      const Node& node = w_.nodes[n];
      Real* own = y_ + n * apart;
      if (node.first >= 0) pool_.multiply(y_ + node.first * apart, y_ + node.second * apart, own, apart);
      if (!node.rescaled) continue;
      Real* factor = node_factors_ + n * columns_;
      pool_.column_tops(own, s_.out, columns_, true, top_);
      pool_.powers(top_, factor, exponents_, columns_);
      add_exponents();
      pool_.scale_columns(own, factor, own, columns_, s_.out, columns_);
    }
  }

  // z times 2^scale, in four exact steps: one power of that size may be no number.
  void lower(Real* z, const int64_t* scale) {
    const int64_t bound = sizeof(Real) == 8 ? 2100 : 290;
    for (int step = 0; step < 4; ++step) {
      std::fill_n(top_, columns_, Real(1));
      for (int64_t b = 0; b < count_; ++b) {
        const int64_t all = std::max(-bound, std::min(bound, scale[b])), quarter = all >> 2;
        top_[b] = two_to<Real>(step < 3 ? quarter : all - 3 * quarter);
      }
      pool_.scale_columns(z, top_, z, columns_, s_.out, columns_);
    }
  }

  // Numbers of the outcome's shape as a tile, in `own` if they do not lie as one.
  const Real* tile(const Real* all, Real* own) {
    const Real* from = all + window_ * s_.out * s_.batch + first_;
    if (s_.batch == columns_) return from;
    k_.load_by_features(from, s_.storage, s_.batch, count_, s_.out, own, columns_);
    return own;
  }

  // The gradient of the outcome, or of what was normalized, as a tile.
  const Real* gradient() {
    const Real* g = tile(w_.grad, z_);
    const int64_t at = window_ * s_.batch + first_;
    if (s_.semiring == Semiring::scaled && s_.lowers) {
      if (g != z_) std::memcpy(z_, g, s_.out * columns_ * sizeof(Real));
      lower(z_, static_cast<const int64_t*>(w_.held_scale) + at);
      return z_;
    }
    if (!normalized()) return g;
    std::fill_n(last_, columns_, Real(1));
    std::memcpy(last_, static_cast<const Real*>(w_.held_scale) + at, count_ * sizeof(Real));
    pool_.normalize_back(g, tile(w_.held, held_), last_, z_, s_.out, columns_);
    return z_;
  }

  // By which power of two the outcome was multiplied: what its scale has more than the factors have.
  void held_factor() {
    const int64_t* held = static_cast<const int64_t*>(w_.held_scale) + window_ * s_.batch + first_;
    std::fill_n(last_, columns_, Real(1));
    for (int64_t b = 0; b < count_; ++b) last_[b] = power(held[b] - sum_[b]);
  }

  // 2^-exponent, written as bits.
  static Real power(int64_t exponent) {
    const Integer bits = sizeof(Real) == 8 ? Integer((1023 - exponent) << 52) : Integer((127 - exponent) << 23);
    Real made;
    std::memcpy(&made, &bits, sizeof made);
    return made;
  }

  void back_to_input(int64_t k, int64_t child, const Real* gy, const Real* weight) {
    Real* target = w_.grad_x + child * s_.in * s_.batch + first_;
    const bool logs = s_.semiring == Semiring::log, lifts = s_.lifts && s_.semiring != Semiring::plain;
    const bool direct = s_.batch == columns_ && !logs && !lifts;
    Real* to = direct ? target : d_;
    k_.contract({1, s_.in, s_.out, 1, 0, 1, s_.in, 0}, weight, gy, to, columns_, false);
    if (logs && lifts) pool_.keep_positive(read_[k], d_, s_.in * columns_);
    if (lifts) pool_.scale_columns(d_, factors_ + k * columns_, d_, columns_, s_.in, columns_);
    if (logs && !lifts) pool_.multiply(d_, read_[k], d_, s_.in * columns_);
    if (!direct) k_.store_by_features(d_, columns_, nullptr, target, s_.storage, s_.batch, count_, s_.in);
  }

  const Work<Real>& w_;
  const PoolLayer& s_;
  const Kernels<Real>& k_;
  const PoolKernels<Real>& pool_;
  int64_t columns_, window_ = 0, first_ = 0, count_ = 0;
  Real *x_, *y_, *z_, *factors_, *node_factors_, *top_, *shift_, *last_, *d_ = nullptr, *turned_ = nullptr,
      *held_ = nullptr;
  int64_t* sum_;
  Integer* exponents_;
  std::vector<const Real*> read_;  // what each factor was made of
};

template <class Real, class Body>
void share(Work<Real>& work, int64_t count, Parallel parallel, const Body& body) {
  struct Context {
    Work<Real>& work;
    const Body& body;
  } context{work, body};
  parallel(
      count,
      [](int64_t begin, int64_t end, void* opaque) {
        Context& c = *static_cast<Context*>(opaque);
        try {
          c.body(begin, end);
        } catch (const std::bad_alloc&) {
          c.work.failed = true;  // no exception may leave a thread of the pool
        }
      },
      &context);
  if (work.failed) throw std::bad_alloc();
}

Scratch& memory_of_thread() {
  static thread_local Scratch scratch;
  return scratch;
}

template <class Real>
void forward_as(const PoolLayer& layer, const Kernels<Real>& kernels, const PoolKernels<Real>& pool, void* z, void* z_scale, Parallel parallel) {
  static thread_local Scratch divided;
  Work<Real> work(layer, kernels, pool);
  work.divide(divided);
  work.z = static_cast<Real*>(z), work.z_scale = z_scale;
  share(work, layer.windows * work.tiles, parallel, [&](int64_t begin, int64_t end) {
    Piece<Real> piece(work, memory_of_thread(), false);
    for (int64_t unit = begin; unit < end; ++unit) piece.forward(unit);
  });
}

template <class Real>
void backward_as(const PoolLayer& layer, const Kernels<Real>& kernels, const PoolKernels<Real>& pool,
                 const void* z, const void* z_scale, const void* grad, void* grad_x, void* grad_weight, Parallel parallel) {
  static thread_local Scratch divided, sums;
  Work<Real> work(layer, kernels, pool);
  work.divide(divided);
  work.held = static_cast<const Real*>(z), work.held_scale = z_scale, work.grad = static_cast<const Real*>(grad), work.grad_x = static_cast<Real*>(grad_x);
  const int64_t units = layer.windows * work.tiles;
  std::vector<int64_t> uses(layer.copies);
  for (int64_t i = 0; i < layer.windows * layer.window; ++i)
    if (layer.child[i] >= 0) ++uses[layer.slot[i]];
  work.own = layer.windows >= fewest_units && *std::max_element(uses.begin(), uses.end()) <= 1;
  work.width = (layer.in + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
  const int64_t matrix = layer.out * work.width, all = layer.copies * matrix;
  work.parts = work.own ? layer.windows : std::min(units, most_parts);
  while (!work.own && work.parts > 2 && work.parts * all * int64_t(sizeof(Real)) > parts_bytes) work.parts /= 2;
  if (grad_weight)
    work.sums = static_cast<Real*>(sums.reserve((work.own ? 1 : work.parts) * all * int64_t(sizeof(Real))));
  share(work, work.parts, parallel, [&](int64_t begin, int64_t end) {
    Piece<Real> piece(work, memory_of_thread(), true);
    for (int64_t part = begin; part < end; ++part) {
      Real* own = work.sums && !work.own ? work.sums + part * all : work.sums;
      if (own && !work.own) std::fill_n(own, all, Real(0));
      if (own && work.own)
        for (int64_t i = part * layer.window; i < (part + 1) * layer.window; ++i)
          if (layer.child[i] >= 0) std::fill_n(own + layer.slot[i] * matrix, matrix, Real(0));
      for (int64_t unit = units * part / work.parts; unit < units * (part + 1) / work.parts; ++unit)
        piece.backward(unit, own);
    }
  });
  if (!grad_weight) return;
  const auto [half, rest] = work.halves();
  share(work, layer.copies, parallel, [&, half = half, rest = rest](int64_t begin, int64_t end) {
    for (int64_t row = begin * layer.out; row < end * layer.out; ++row) {
      Real* to = static_cast<Real*>(grad_weight) + row * layer.in;
      const Real* from = work.sums + row * work.width;
      const int64_t parts = work.own ? 1 : work.parts;
      const bool used = uses[row / layer.out] > 0;
      for (int64_t j = 0; j < layer.in; ++j) to[j] = used ? from[j] : Real(0);
      for (int64_t part = 1; used && part < parts; ++part)
        for (int64_t j = 0; j < layer.in; ++j) to[j] += from[part * all + j];
      for (int64_t j = 0; j < layer.in; ++j) to[j] = to[j] * half * rest;
    }
  });
}

}  // namespace

void pool_forward(const PoolLayer& layer, void* z, void* z_scale, Parallel parallel) {
  if (layer.batch == 0) return;
  if (layer.storage == Storage::f64)
    forward_as<double>(layer, *chosen().wide, *chosen().wide_pool, z, z_scale, parallel);
  else
    forward_as<float>(layer, *chosen().single, *chosen().single_pool, z, z_scale, parallel);
}

void pool_backward(const PoolLayer& layer, const void* z, const void* z_scale, const void* grad, void* grad_x,
                   void* grad_weight, Parallel parallel) {
  if (layer.storage == Storage::f64)
    backward_as<double>(layer, *chosen().wide, *chosen().wide_pool, z, z_scale, grad, grad_x, grad_weight, parallel);
  else
    backward_as<float>(layer, *chosen().single, *chosen().single_pool, z, z_scale, grad, grad_x, grad_weight, parallel);
}

}  // namespace structmat

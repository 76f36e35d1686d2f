// The operators that do whole layers at once.
#include "torch_layers.h"

#include "convolve.h"
#include "kept_plans.h"
#include "pages.h"
#include "pooled.h"
#include "recur.h"
#include "torch_tensors.h"

namespace structmat {
namespace operators {
namespace {

// Of the states of a recurrent net.
Storage state_storage(int32_t dtype) {
  const Storage storage = storage_of(dtype);
  if (bytes_of(storage) < 4) throw std::invalid_argument("structmat: states are float32 or float64");
  return storage;
}

// Of what multiplies so many states.
std::shared_ptr<const Plan> state_plan(const std::string& text, int64_t rows, Storage storage) {
  return runs_by_vectors(rows, storage) ? vector_plan_of(text) : plan_of(text);
}

void read_kind(int64_t kind, Cell* cell, bool* backwards) {
  if (kind < 0 || kind > 7) throw std::invalid_argument("structmat: there is no such cell");
  *cell = Cell(kind % 4), *backwards = kind >= 4;
}

// A layer of a convolutional arithmetic circuit: x (locations, in, batch), its scale (locations, batch) or empty, the
// weights (copies, out, in), and the index (2, windows, window) of locations and matrices. `kind` is the semiring, plus 4
// if x holds plain numbers, plus 8 if the outcome is to.
PoolLayer layer_of(Tensor x, Tensor x_scale, Tensor weight, Tensor index, int64_t kind) {
  const Shape in(x), matrices(weight), places(index);
  if (in.dim != 3 || matrices.dim != 3 || places.dim != 3 || places.sizes[0] != 2 || kind < 0 || kind > 15)
    throw std::invalid_argument("structmat: x, weights and index of a layer have three axes");
  PoolLayer layer{};
  layer.windows = places.sizes[1], layer.window = places.sizes[2];
  layer.locations = in.sizes[0], layer.in = in.sizes[1], layer.batch = in.sizes[2];
  layer.copies = matrices.sizes[0], layer.out = matrices.sizes[1];
  if (layer.windows < 1 || layer.window < 1 || layer.in < 1 || layer.out < 1 || layer.copies < 1)
    throw std::invalid_argument("structmat: a layer has an axis of size 0");
  layer.semiring = Semiring(kind % 4), layer.lifts = kind & 4, layer.lowers = kind & 8;
  layer.storage = storage_of(in.dtype);
  if (bytes_of(layer.storage) < 4) throw std::invalid_argument("structmat: layers are float32 or float64");
  layer.x = checked(x, in.dtype, {-1, -1, -1});
  layer.x_scale = static_cast<int64_t*>(checked(x_scale, torch.i64, {layer.locations, layer.batch}, true));
  layer.weight = checked(weight, in.dtype, {-1, -1, layer.in});
  layer.child = static_cast<int64_t*>(checked(index, torch.i64, {2, -1, -1}));
  layer.slot = layer.child + layer.windows * layer.window;
  return layer;
}

// What is held of each window and sample beside the outcome, if the semiring holds anything.
void* held_of(const PoolLayer& layer, Tensor tensor, int32_t dtype) {
  if (layer.semiring != Semiring::scaled && layer.semiring != Semiring::normalized) return nullptr;
  return checked(tensor, layer.semiring == Semiring::scaled ? torch.i64 : dtype, {layer.windows, layer.batch});
}

}  // namespace

// convolve(Tensor x, Tensor[] tensors, Tensor(a!) y, str steps) -> ()
//
// Images x (count, channels, height, width) and y, contiguous; the kernels of all steps, or in three tensors their entries
// (float values, int32 beginnings of the rows and columns), and, where there is one more tensor, a bias for the last.
void convolve(Tensor x, List list, Tensor y, Text text) {
  const Shape in(x), out(y);
  const Storage storage = storage_of(in.dtype);
  if (bytes_of(storage) < 4) throw std::invalid_argument("structmat: images are float32 or float64");
  std::vector<Convolution> steps = convolutions_of(read(text));
  if (in.dim != 4) throw std::invalid_argument("structmat: images have four axes");
  const std::vector<Owned> owned = items(list);
  size_t kernels = 0;
  for (const Convolution& step : steps) kernels += size_t(step.tensors());
  if (owned.size() != kernels && owned.size() != kernels + 1)
    throw std::invalid_argument("structmat: the number of tensors is wrong");
  Images images{in.sizes[0], in.sizes[2], in.sizes[3], nullptr, nullptr, nullptr, storage};
  images.x = checked(x, in.dtype, {-1, steps[0].in, -1, -1});
  int64_t height = images.height, width = images.width;
  const Owned* own = owned.data();
  for (Convolution& step : steps) {
    if (step.by_entries) {
      const int64_t count = Shape(own[0].get()).count;
      step.weight = checked(own[0].get(), in.dtype, {count});
      step.start = static_cast<const int32_t*>(checked(own[1].get(), torch.i32, {step.out + 1}));
      step.column = static_cast<const int32_t*>(checked(own[2].get(), torch.i32, {count}));
      check_entries(step, count);
    } else {
      const int64_t tall = step.height.kernel, wide = step.width.kernel;
      step.weight = checked(own[0].get(), in.dtype, {step.out, step.in / step.groups, tall, wide});
    }
    own += step.tensors();
    height = step.height.places(height), width = step.width.places(width);
    if (height < 1 || width < 1) throw std::invalid_argument("structmat: the images are too small for a kernel");
  }
  if (owned.size() > kernels) images.bias = checked(owned.back().get(), in.dtype, {steps.back().out});
  images.y = checked(y, in.dtype, {images.count, steps.back().out, height, width});
  convolve(steps, images, in_parallel, thread_count());
}

// recur(Tensor x, Tensor start, Tensor(a!) memory, Tensor(b!) y, Tensor[] tensors, str program, int kind) -> ()
//
// x (times, rows, gates * size), start (rows, size), memory (rows, size) contiguous or without entries where the cell has
// none, y (times, rows, size); last axes contiguous. `kind` is the cell, plus 4 if the last time is read first.
// recur_keeping has a tensor `kept` (times, rows, kept_of(cell) * size) more, which is written for the way back.
void recur(Tensor x, Tensor start, Tensor memory, Tensor y, List list, Text text, int64_t kind, Tensor kept) {
  const Shape in(x), from(start), held(memory), out(y);
  Sequence q{};
  q.storage = state_storage(in.dtype);
  read_kind(kind, &q.cell, &q.backwards);
  if (in.dim != 3 || from.dim != 2 || out.dim != 3)
    throw std::invalid_argument("structmat: gates and outcomes have three axes, a state has two");
  q.times = in.sizes[0], q.rows = in.sizes[1], q.size = from.sizes[1];
  const bool has_memory = q.cell == Cell::lstm;
  const auto fits = [&](const Shape& own, int64_t width) {
    const int64_t d = own.dim;
    return own.dtype == in.dtype && own.sizes[d - 2] == q.rows && own.sizes[d - 1] == width &&
           (d == 2 || own.sizes[0] == q.times) && (own.strides[d - 1] == 1 || width == 1 || own.count == 0);
  };
  if (!fits(in, gates_of(q.cell) * q.size) || !fits(from, q.size) || !fits(out, q.size) ||
      (has_memory && (held.dim != 2 || !fits(held, q.size) || !held.is_contiguous())))
    throw std::invalid_argument("structmat: gates, states and outcomes do not fit together");
  const auto plan = state_plan(read(text), q.rows, q.storage);
  const std::vector<Owned> owned = items(list);
  const std::vector<Array> arrays = arrays_of(owned, *plan, in.dtype);
  q.x = data_of(x), q.x_time = in.strides[0], q.x_row = in.strides[1];
  q.start = data_of(start), q.start_row = from.strides[0];
  q.memory = has_memory ? data_of(memory) : nullptr;
  q.y = data_of(y), q.y_time = out.strides[0], q.y_row = out.strides[1];
  if (kept) q.kept = checked(kept, in.dtype, {q.times, q.rows, kept_of(q.cell) * q.size}, true);
  recur(*plan, q, arrays.data(), in_parallel, thread_count());
}

// recur_backward(Tensor kept, Tensor start, Tensor memory, Tensor y, Tensor grad, Tensor(a!) grad_memory,
//   Tensor(b!) grad_x, Tensor(c!) grad_s, Tensor(d!) grad_start, Tensor[] tensors, str program, int kind) -> ()
//
// Of recur_keeping, contiguous but for `grad` (of y; last axis contiguous), with the program of the transposed matrix;
// memories have no entries where the cell has none, and grad_s has none where it is grad_x.
void recur_backward(Tensor kept, Tensor start, Tensor memory, Tensor y, Tensor grad, Tensor grad_memory, Tensor grad_x,
                    Tensor grad_s, Tensor grad_start, List list, Text text, int64_t kind) {
  const Shape out(y), from(grad);
  SequenceBack q{};
  q.storage = state_storage(out.dtype);
  read_kind(kind, &q.cell, &q.backwards);
  if (out.dim != 3) throw std::invalid_argument("structmat: outcomes have three axes");
  q.times = out.sizes[0], q.rows = out.sizes[1], q.size = out.sizes[2];
  const int64_t wide = gates_of(q.cell) * q.size;
  const std::vector<int64_t> state{q.rows, q.size}, gates{q.times, q.rows, wide};
  const auto only = [&](Cell cell, Tensor tensor, const std::vector<int64_t>& sizes) {
    return q.cell == cell ? checked(tensor, out.dtype, sizes) : nullptr;
  };
  q.y = checked(y, out.dtype, {q.times, q.rows, q.size}), q.start = checked(start, out.dtype, state);
  q.kept = kept_of(q.cell) ? checked(kept, out.dtype, {q.times, q.rows, kept_of(q.cell) * q.size})
                                      : nullptr;
  q.memory = only(Cell::lstm, memory, state), q.grad_memory = only(Cell::lstm, grad_memory, state);
  q.grad_x = checked(grad_x, out.dtype, gates), q.grad_s = only(Cell::gru, grad_s, gates);
  q.grad_start = checked(grad_start, out.dtype, state);
  bool fits = from.dim == 3 && from.dtype == out.dtype && (from.strides[2] == 1 || q.size == 1 || from.count == 0);
  for (int i = 0; fits && i < 3; ++i) fits = from.sizes[i] == out.sizes[i];
  if (!fits) throw std::invalid_argument("structmat: a gradient has another shape or dtype than its states");
  q.grad = data_of(grad), q.grad_time = from.strides[0], q.grad_row = from.strides[1];
  const auto plan = state_plan(read(text), q.rows, q.storage);
  const std::vector<Owned> owned = items(list);
  recur_back(*plan, q, arrays_of(owned, *plan, out.dtype).data(), in_parallel, thread_count());
}

void pool_layer(Tensor x, Tensor x_scale, Tensor weight, Tensor index, Tensor z, Tensor z_scale, int64_t kind) {
  const PoolLayer layer = layer_of(x, x_scale, weight, index, kind);
  const int32_t dtype = Shape(x).dtype;
  void* to = checked(z, dtype, {layer.windows, layer.out, layer.batch});
  use_large_pages(to, layer.windows * layer.out * layer.batch * bytes_of(layer.storage));
  pool_forward(layer, to, held_of(layer, z_scale, dtype), in_parallel);
}

void pool_layer_backward(Tensor x, Tensor x_scale, Tensor weight, Tensor index, Tensor z, Tensor z_scale, Tensor grad,
                         Tensor grad_x, Tensor grad_weight, int64_t kind) {
  const PoolLayer layer = layer_of(x, x_scale, weight, index, kind);
  const int32_t dtype = Shape(x).dtype;
  const std::vector<int64_t> sizes{layer.windows, layer.out, layer.batch};
  const void* made = layer.semiring == Semiring::normalized ? checked(z, dtype, sizes) : nullptr;
  void* lower = checked(grad_x, dtype, {layer.locations, layer.in, layer.batch}, true);
  void* weights = checked(grad_weight, dtype, {layer.copies, layer.out, layer.in}, true);
  if (lower) use_large_pages(lower, Shape(x).count * bytes_of(layer.storage));
  pool_backward(layer, made, held_of(layer, z_scale, dtype), checked(grad, dtype, sizes), lower, weights, in_parallel);
}

}  // namespace operators
}  // namespace structmat

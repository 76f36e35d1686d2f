// The operators of the library, registered with the PyTorch that is loaded.
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "backward.h"
#include "execute.h"
#include "kept_plans.h"
#include "libtorch.h"
#include "pages.h"
#include "pooled.h"
#include "recur.h"

namespace {

using structmat::Array;
using structmat::BackwardBatch;
using structmat::Batch;
using structmat::in_parallel;
using structmat::List;
using structmat::load_symbols;
using structmat::Owned;
using structmat::Plan;
using structmat::require;
using structmat::Storage;
using structmat::Tensor;
using structmat::Text;
using structmat::thread_count;
using structmat::torch;
using structmat::Value;

Storage storage_of(int32_t dtype) {
  if (dtype == torch.f32) return Storage::f32;
  if (dtype == torch.f64) return Storage::f64;
  if (dtype == torch.bf16) return Storage::bf16;
  if (dtype == torch.f16) return Storage::f16;
  throw std::invalid_argument("structmat: inputs are float32, float64, bfloat16 or float16");
}

// Sizes and strides of a tensor in the memory of the CPU.
struct Shape {
  int64_t dim, count, *sizes, *strides;
  int32_t dtype;

  explicit Shape(Tensor tensor) {
    int32_t device, layout;
    require(torch.get_device_type(tensor, &device));
    require(torch.get_layout(tensor, &layout));
    if (device != torch.cpu || layout != torch.strided)
      throw std::invalid_argument("structmat: a tensor is not an ordinary one in the memory of the CPU");
    require(torch.get_dim(tensor, &dim));
    require(torch.get_numel(tensor, &count));
    require(torch.get_sizes(tensor, &sizes));
    require(torch.get_strides(tensor, &strides));
    require(torch.get_dtype(tensor, &dtype));
  }

  bool is_contiguous() const {
    int64_t step = 1;
    for (int64_t i = dim - 1; i >= 0; --i) {
      if (sizes[i] != 1 && strides[i] != step && count > 0) return false;
      step *= sizes[i];
    }
    return true;
  }

  // Whether it has two axes, and is contiguous along the first alone.
  bool by_features() const { return dim == 2 && strides[0] == 1 && strides[1] != 1 && sizes[1] > 1; }

  // The distance of neighbouring features of such a tensor.
  int64_t feature_stride(int64_t features) const {
    if (sizes[1] != features)
      throw std::invalid_argument("structmat: rows must have shape (..., " + std::to_string(features) + ")");
    return strides[1];
  }

  // All leading axes together.
  int64_t rows() const {
    int64_t product = 1;
    for (int64_t i = 0; i + 1 < dim; ++i) product *= sizes[i];
    return product;
  }

  // The distance of neighbouring rows of a tensor (..., features).
  int64_t row_stride(int64_t features) const {
    if (dim < 1 || sizes[dim - 1] != features || (strides[dim - 1] != 1 && features > 1 && count > 0))
      throw std::invalid_argument("structmat: rows must have shape (..., " + std::to_string(features) +
                                  "), each of them contiguous");
    int64_t stride = features, next = -1;
    if (rows() == 0) return stride;
    for (int64_t i = dim - 2; i >= 0; --i) {
      if (sizes[i] == 1) continue;
      if (next < 0) stride = strides[i];
      else if (strides[i] != next)
        throw std::invalid_argument("structmat: the rows of the input must lie at equal distances");
      next = strides[i] * sizes[i];
    }
    return stride;
  }
};

std::string read(Text text) {
  const char* characters;
  size_t length;
  require(torch.text_data(text, &characters));
  require(torch.text_length(text, &length));
  return std::string(characters, length);
}

void* data_of(Tensor tensor) {
  void* data;
  require(torch.get_data_ptr(tensor, &data));
  return data;
}

std::vector<Owned> items(List list) {
  size_t count;
  require(torch.list_size(list, &count));
  std::vector<Owned> owned;
  owned.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    Value item;
    require(torch.list_get(list, i, &item));
    Tensor tensor;
    std::memcpy(&tensor, &item, sizeof tensor);
    owned.emplace_back(tensor);
  }
  return owned;
}

// What a program reads, as it needs it.
std::vector<Array> arrays_of(const std::vector<Owned>& tensors, const Plan& plan, int32_t dtype) {
  if (tensors.size() != plan.sizes.size()) throw std::invalid_argument("structmat: the number of tensors is wrong");
  std::vector<Array> arrays(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Shape shape(tensors[i].get());
    if (shape.dtype != (plan.is_index[i] ? torch.i64 : dtype))
      throw std::invalid_argument("structmat: a tensor has another dtype than the input");
    if (!shape.is_contiguous()) throw std::invalid_argument("structmat: a tensor is not contiguous");
    arrays[i] = {data_of(tensors[i].get()), shape.count};
  }
  return arrays;
}

// multiply(Tensor x, Tensor[] tensors, str program) -> Tensor
//
// With `kept`, what the program says to keep for the way back comes out too, and small batches run on tiles as well.
Tensor multiply(Tensor x, List list, Text text, Tensor* kept = nullptr) {
  const std::string words = read(text);
  const Shape shape(x);
  const Storage storage = storage_of(shape.dtype);
  const bool by_vectors = structmat::runs_by_vectors(shape.rows(), storage) && !kept;
  const auto held = by_vectors ? structmat::vector_plan_of(words) : structmat::plan_of(words);
  const Plan& plan = *held;
  const int64_t x_stride = shape.row_stride(plan.in_features);
  std::vector<int64_t> sizes(shape.sizes, shape.sizes + shape.dim), dense(shape.dim, 1);
  sizes.back() = plan.out_features;
  for (size_t i = sizes.size() - 1; i > 0; --i) dense[i - 1] = dense[i] * sizes[i];
  const std::vector<Owned> owned = items(list);
  const std::vector<Array> arrays = arrays_of(owned, plan, shape.dtype);
  Tensor made;
  require(torch.empty_strided(shape.dim, sizes.data(), dense.data(), shape.dtype, torch.cpu, -1, &made));
  Owned y(made), values;
  Batch batch{data_of(x), x_stride, data_of(made), plan.out_features, shape.rows(), storage};
  if (kept) {
    const int64_t count = structmat::kept_numbers(plan, batch.rows, storage), step = 1;
    require(torch.empty_strided(1, &count, &step, shape.dtype, torch.cpu, -1, &made));
    values.reset(made);
    batch.kept = count ? data_of(made) : nullptr;
  }
  structmat::use_large_pages(batch.y, batch.rows * plan.out_features * structmat::bytes_of(storage));
  (by_vectors ? structmat::execute_vectors : structmat::execute)(plan, batch, arrays.data(), in_parallel, thread_count());
  if (kept) *kept = values.release();
  return y.release();
}

// multiply_into(Tensor x, Tensor[] tensors, Tensor(a!) y, str program) -> ()
//
// Both x and y are of two axes, one of which is contiguous.
void multiply_into(Tensor x, List list, Tensor y, Text text) {
  const auto held = structmat::plan_of(read(text));
  const Plan& plan = *held;
  const Shape from(x), to(y);
  if (to.dim != 2 || from.dim != 2 || to.rows() != from.rows() || to.dtype != from.dtype)
    throw std::invalid_argument("structmat: the outcome has another number of rows, or another dtype, than the input");
  const std::vector<Owned> owned = items(list);
  const std::vector<Array> arrays = arrays_of(owned, plan, from.dtype);
  Batch batch{data_of(x), 0, data_of(y), 0, from.rows(), storage_of(from.dtype)};
  batch.x_by_features = from.by_features(), batch.y_by_features = to.by_features();
  batch.x_stride = batch.x_by_features ? from.feature_stride(plan.in_features) : from.row_stride(plan.in_features);
  batch.y_stride = batch.y_by_features ? to.feature_stride(plan.out_features) : to.row_stride(plan.out_features);
  structmat::use_large_pages(batch.y, to.count * structmat::bytes_of(batch.storage));
  structmat::execute(plan, batch, arrays.data(), in_parallel, thread_count());
}

// multiply_backward(Tensor x, Tensor grad, Tensor[] tensors, Tensor(a!) grad_x, Tensor(b!)[] grads, str program) -> ()
//
// Gradients have the number of entries of what they belong to, and are contiguous; one without entries is not wanted.
// With `kept`, what `multiply` put out so: values that are not made again.
void multiply_backward(Tensor x, Tensor grad, List list, Tensor grad_x, List grads, Text text, Tensor kept = nullptr) {
  const std::string words = read(text);
  const auto held = structmat::plan_of(words);
  const Plan& plan = *held;
  const Shape shape(x), upper(grad), lower(grad_x);
  BackwardBatch batch{};
  batch.storage = storage_of(shape.dtype), batch.rows = shape.rows();
  batch.x = data_of(x), batch.x_stride = shape.row_stride(plan.in_features);
  batch.grad = data_of(grad), batch.grad_stride = upper.row_stride(plan.out_features);
  if (upper.rows() != batch.rows || upper.dtype != shape.dtype)
    throw std::invalid_argument("structmat: the gradient has another number of rows, or another dtype, than the input");
  const std::vector<Owned> owned = items(list), outcomes = items(grads);
  const std::vector<Array> arrays = arrays_of(owned, plan, shape.dtype);
  if (outcomes.size() != owned.size()) throw std::invalid_argument("structmat: the number of gradients is wrong");
  structmat::Wanted wanted;
  if (kept) {
    const Shape own(kept);
    if (own.count != structmat::kept_numbers(plan, batch.rows, batch.storage) || own.dtype != shape.dtype || !own.is_contiguous())
      throw std::invalid_argument("structmat: other values were kept than the program says");
    wanted.kept = own.count > 0;
    batch.kept = wanted.kept ? data_of(kept) : nullptr;
  }
  const auto outcome = [&](Tensor tensor, const Shape& own, int64_t count) -> void* {
    if (own.count == 0) return nullptr;
    if (own.count != count || own.dtype != shape.dtype || !own.is_contiguous())
      throw std::invalid_argument("structmat: a gradient has another size or dtype than its tensor, or is not contiguous");
    return data_of(tensor);
  };
  batch.grad_x = outcome(grad_x, lower, shape.count);
  if (batch.grad_x) structmat::use_large_pages(batch.grad_x, shape.count * structmat::bytes_of(batch.storage));
  wanted.input = batch.grad_x != nullptr;
  std::vector<void*> places;
  for (size_t i = 0; i < outcomes.size(); ++i) {
    places.push_back(outcome(outcomes[i].get(), Shape(outcomes[i].get()), plan.sizes[i]));
    wanted.tensors.push_back(places.back() != nullptr);
  }
  structmat::execute_backward(*structmat::backward_plan_of(words, wanted), batch, arrays.data(), places.data(), in_parallel);
}

// recur(Tensor x, Tensor start, Tensor(a!) memory, Tensor(b!) y, Tensor[] tensors, str program, int kind) -> ()
//
// x (times, rows, gates * size), start (rows, size), memory (rows, size) contiguous or without entries where the cell has
// none, y (times, rows, size); last axes contiguous. `kind` is the cell, plus 4 if the last time is read first.
void recur(Tensor x, Tensor start, Tensor memory, Tensor y, List list, Text text, int64_t kind) {
  const Shape in(x), from(start), held(memory), out(y);
  if (kind < 0 || kind > 7) throw std::invalid_argument("structmat: there is no such cell");
  structmat::Sequence q{};
  q.cell = structmat::Cell(kind % 4), q.backwards = kind >= 4;
  q.storage = storage_of(in.dtype);
  if (structmat::bytes_of(q.storage) < 4) throw std::invalid_argument("structmat: states are float32 or float64");
  if (in.dim != 3 || from.dim != 2 || out.dim != 3)
    throw std::invalid_argument("structmat: gates and outcomes have three axes, a state has two");
  q.times = in.sizes[0], q.rows = in.sizes[1], q.size = from.sizes[1];
  const bool has_memory = q.cell == structmat::Cell::lstm;
  const auto fits = [&](const Shape& own, int64_t width) {
    const int64_t d = own.dim;
    return own.dtype == in.dtype && own.sizes[d - 2] == q.rows && own.sizes[d - 1] == width &&
           (d == 2 || own.sizes[0] == q.times) && (own.strides[d - 1] == 1 || width == 1 || own.count == 0);
  };
  if (!fits(in, structmat::gates_of(q.cell) * q.size) || !fits(from, q.size) || !fits(out, q.size) ||
      (has_memory && (held.dim != 2 || !fits(held, q.size) || !held.is_contiguous())))
    throw std::invalid_argument("structmat: gates, states and outcomes do not fit together");
  const std::string words = read(text);
  const auto plan =
      structmat::runs_by_vectors(q.rows, q.storage) ? structmat::vector_plan_of(words) : structmat::plan_of(words);
  const std::vector<Owned> owned = items(list);
  const std::vector<Array> arrays = arrays_of(owned, *plan, in.dtype);
  q.x = data_of(x), q.x_time = in.strides[0], q.x_row = in.strides[1];
  q.start = data_of(start), q.start_row = from.strides[0];
  q.memory = has_memory ? data_of(memory) : nullptr;
  q.y = data_of(y), q.y_time = out.strides[0], q.y_row = out.strides[1];
  structmat::recur(*plan, q, arrays.data(), in_parallel, thread_count());
}

// Checks that a tensor is contiguous and has these sizes (-1: any), and hands out its data; null if it is empty and may be.
void* checked(Tensor tensor, int32_t dtype, const std::vector<int64_t>& sizes, bool may_be_empty = false) {
  const Shape shape(tensor);
  if (may_be_empty && shape.count == 0) return nullptr;
  bool fits = shape.dtype == dtype && shape.dim == int64_t(sizes.size()) && shape.is_contiguous();
  for (int64_t i = 0; fits && i < shape.dim; ++i) fits = sizes[i] < 0 || sizes[i] == shape.sizes[i];
  if (!fits) throw std::invalid_argument("structmat: a tensor of a layer has another shape or dtype than the layer");
  return data_of(tensor);
}

// A layer of a convolutional arithmetic circuit: x (locations, in, batch), its scale (locations, batch) or empty, the
// weights (copies, out, in), and the index (2, windows, window) of locations and matrices. `kind` is the semiring, plus 4
// if x holds plain numbers, plus 8 if the outcome is to.
structmat::PoolLayer layer_of(Tensor x, Tensor x_scale, Tensor weight, Tensor index, int64_t kind) {
  const Shape in(x), matrices(weight), places(index);
  if (in.dim != 3 || matrices.dim != 3 || places.dim != 3 || places.sizes[0] != 2 || kind < 0 || kind % 4 > 2 || kind > 15)
    throw std::invalid_argument("structmat: x, weights and index of a layer have three axes");
  structmat::PoolLayer layer{};
  layer.windows = places.sizes[1], layer.window = places.sizes[2];
  layer.locations = in.sizes[0], layer.in = in.sizes[1], layer.batch = in.sizes[2];
  layer.copies = matrices.sizes[0], layer.out = matrices.sizes[1];
  if (layer.windows < 1 || layer.window < 1 || layer.in < 1 || layer.out < 1 || layer.copies < 1)
    throw std::invalid_argument("structmat: a layer has an axis of size 0");
  layer.semiring = structmat::Semiring(kind % 4), layer.lifts = kind & 4, layer.lowers = kind & 8;
  layer.storage = storage_of(in.dtype);
  if (structmat::bytes_of(layer.storage) < 4) throw std::invalid_argument("structmat: layers are float32 or float64");
  layer.x = checked(x, in.dtype, {-1, -1, -1});
  layer.x_scale = static_cast<int64_t*>(checked(x_scale, torch.i64, {layer.locations, layer.batch}, true));
  layer.weight = checked(weight, in.dtype, {-1, -1, layer.in});
  layer.child = static_cast<int64_t*>(checked(index, torch.i64, {2, -1, -1}));
  layer.slot = layer.child + layer.windows * layer.window;
  return layer;
}

void pool_layer(Tensor x, Tensor x_scale, Tensor weight, Tensor index, Tensor z, Tensor z_scale, int64_t kind) {
  const structmat::PoolLayer layer = layer_of(x, x_scale, weight, index, kind);
  void* to = checked(z, Shape(x).dtype, {layer.windows, layer.out, layer.batch});
  void* scale = nullptr;
  if (layer.semiring == structmat::Semiring::scaled) scale = checked(z_scale, torch.i64, {layer.windows, layer.batch});
  structmat::use_large_pages(to, layer.windows * layer.out * layer.batch * structmat::bytes_of(layer.storage));
  structmat::pool_forward(layer, to, static_cast<int64_t*>(scale), in_parallel);
}

void pool_layer_backward(Tensor x, Tensor x_scale, Tensor weight, Tensor index, Tensor z_scale, Tensor grad,
                         Tensor grad_x, Tensor grad_weight, int64_t kind) {
  const structmat::PoolLayer layer = layer_of(x, x_scale, weight, index, kind);
  const int32_t dtype = Shape(x).dtype;
  const void* scale = nullptr;
  if (layer.semiring == structmat::Semiring::scaled) scale = checked(z_scale, torch.i64, {layer.windows, layer.batch});
  void* lower = checked(grad_x, dtype, {layer.locations, layer.in, layer.batch}, true);
  void* weights = checked(grad_weight, dtype, {layer.copies, layer.out, layer.in}, true);
  if (lower) structmat::use_large_pages(lower, Shape(x).count * structmat::bytes_of(layer.storage));
  structmat::pool_backward(layer, static_cast<const int64_t*>(scale),
                           checked(grad, dtype, {layer.windows, layer.out, layer.batch}), lower, weights, in_parallel);
}

// Takes what the dispatcher hands over, in the order of the schema.
class Arguments {
 public:
  explicit Arguments(const Value* stack) : stack_(stack) {}
  void* next() {
    void* handle;
    std::memcpy(&handle, stack_++, sizeof handle);
    return handle;
  }
  int64_t number() {
    int64_t own;
    std::memcpy(&own, stack_++, sizeof own);
    return own;
  }

 private:
  const Value* stack_;
};

struct DeleteList {
  void operator()(void* list) const { torch.delete_list(list); }
};
struct DeleteText {
  void operator()(void* text) const { torch.delete_text(text); }
};
typedef std::unique_ptr<void, DeleteList> OwnedList;
typedef std::unique_ptr<void, DeleteText> OwnedText;

void multiply_boxed(Value* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  const Owned x(given.next());
  const OwnedList tensors(given.next());
  const OwnedText text(given.next());
  const Tensor y = multiply(x.get(), tensors.get(), text.get());  // an exception becomes a RuntimeError of Python
  std::memcpy(&stack[0], &y, sizeof y);
}

void multiply_keeping_boxed(Value* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  const Owned x(given.next());
  const OwnedList tensors(given.next());
  const OwnedText text(given.next());
  Tensor kept;
  const Tensor y = multiply(x.get(), tensors.get(), text.get(), &kept);
  std::memcpy(&stack[0], &y, sizeof y);
  std::memcpy(&stack[1], &kept, sizeof kept);
}

void multiply_into_boxed(Value* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  const Owned x(given.next());
  const OwnedList tensors(given.next());
  const Owned y(given.next());
  const OwnedText text(given.next());
  multiply_into(x.get(), tensors.get(), y.get(), text.get());
}

void multiply_backward_boxed(Value* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  const Owned x(given.next()), grad(given.next());
  const OwnedList tensors(given.next());
  const Owned grad_x(given.next());
  const OwnedList grads(given.next());
  const OwnedText text(given.next());
  multiply_backward(x.get(), grad.get(), tensors.get(), grad_x.get(), grads.get(), text.get());
}

void multiply_backward_kept_boxed(Value* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  const Owned x(given.next()), kept(given.next()), grad(given.next());
  const OwnedList tensors(given.next());
  const Owned grad_x(given.next());
  const OwnedList grads(given.next());
  const OwnedText text(given.next());
  multiply_backward(x.get(), grad.get(), tensors.get(), grad_x.get(), grads.get(), text.get(), kept.get());
}

void recur_boxed(Value* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  const Owned x(given.next()), start(given.next()), memory(given.next()), y(given.next());
  const OwnedList tensors(given.next());
  const OwnedText text(given.next());
  recur(x.get(), start.get(), memory.get(), y.get(), tensors.get(), text.get(), given.number());
}

void pool_layer_boxed(Value* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  const Owned x(given.next()), x_scale(given.next()), weight(given.next()), index(given.next()), z(given.next()),
      z_scale(given.next());
  pool_layer(x.get(), x_scale.get(), weight.get(), index.get(), z.get(), z_scale.get(), given.number());
}

void pool_layer_backward_boxed(Value* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  const Owned x(given.next()), x_scale(given.next()), weight(given.next()), index(given.next()), z_scale(given.next()),
      grad(given.next()), grad_x(given.next()), grad_weight(given.next());
  pool_layer_backward(x.get(), x_scale.get(), weight.get(), index.get(), z_scale.get(), grad.get(), grad_x.get(),
                      grad_weight.get(), given.number());
}

}  // namespace

extern "C" {

// Registers the operators with the PyTorch that is loaded. Returns null, or why it could not.
__attribute__((visibility("default"))) const char* structmat_register(const char* libtorch, uint64_t version) {
  static std::string problem;
  try {
    problem = load_symbols(libtorch);
    if (!problem.empty()) return problem.c_str();
    void *library, *kernels;
    require(torch.init_library("structmat", __FILE__, __LINE__, &library));
    require(torch.define(library, "multiply(Tensor x, Tensor[] tensors, str program) -> Tensor"));
    require(torch.define(library,
                         "multiply_backward(Tensor x, Tensor grad, Tensor[] tensors, Tensor(a!) grad_x, "
                         "Tensor(b!)[] grads, str program) -> ()"));
    require(torch.define(library, "multiply_into(Tensor x, Tensor[] tensors, Tensor(a!) y, str program) -> ()"));
    require(torch.define(library, "multiply_keeping(Tensor x, Tensor[] tensors, str program) -> (Tensor, Tensor)"));
    require(torch.define(library,
                         "multiply_backward_kept(Tensor x, Tensor kept, Tensor grad, Tensor[] tensors, "
                         "Tensor(a!) grad_x, Tensor(b!)[] grads, str program) -> ()"));
    require(torch.define(library,
                         "recur(Tensor x, Tensor start, Tensor(a!) memory, Tensor(b!) y, Tensor[] tensors, str program, "
                         "int kind) -> ()"));
    require(torch.define(library,
                         "pool_layer(Tensor x, Tensor x_scale, Tensor weight, Tensor index, Tensor(a!) z, "
                         "Tensor(b!) z_scale, int kind) -> ()"));
    require(torch.define(library,
                         "pool_layer_backward(Tensor x, Tensor x_scale, Tensor weight, Tensor index, Tensor z_scale, "
                         "Tensor grad, Tensor(a!) grad_x, Tensor(b!) grad_weight, int kind) -> ()"));
    require(torch.init_impl("structmat", "CPU", __FILE__, __LINE__, &kernels));
    require(torch.implement(kernels, "multiply", multiply_boxed, version));
    require(torch.implement(kernels, "multiply_into", multiply_into_boxed, version));
    require(torch.implement(kernels, "multiply_backward", multiply_backward_boxed, version));
    require(torch.implement(kernels, "multiply_keeping", multiply_keeping_boxed, version));
    require(torch.implement(kernels, "multiply_backward_kept", multiply_backward_kept_boxed, version));
    require(torch.implement(kernels, "recur", recur_boxed, version));
    require(torch.implement(kernels, "pool_layer", pool_layer_boxed, version));
    require(torch.implement(kernels, "pool_layer_backward", pool_layer_backward_boxed, version));
    return nullptr;
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
}
}

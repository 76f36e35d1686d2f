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
#include "torch_layers.h"
#include "torch_standing.h"
#include "torch_tensors.h"

namespace {

using structmat::Array;
using structmat::arrays_of;
using structmat::BackwardBatch;
using structmat::Batch;
using structmat::data_of;
using structmat::in_parallel;
using structmat::items;
using structmat::List;
using structmat::load_symbols;
using structmat::Owned;
using structmat::Plan;
using structmat::read;
using structmat::require;
using structmat::Shape;
using structmat::Storage;
using structmat::storage_of;
using structmat::Tensor;
using structmat::Text;
using structmat::thread_count;
using structmat::torch;
using structmat::Value;

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

void stand_boxed(Value* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  const OwnedList tensors(given.next());
  const OwnedText text(given.next());
  const int64_t number = structmat::operators::stand(tensors.get(), text.get());
  std::memcpy(&stack[0], &number, sizeof number);
}

void fall_boxed(Value* stack, uint64_t, uint64_t) { structmat::operators::fall(Arguments(stack).number()); }

void multiply_standing_boxed(Value* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  const Owned x(given.next());
  const Tensor y = structmat::operators::multiply_standing(x.get(), given.number());
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
  structmat::operators::recur(x.get(), start.get(), memory.get(), y.get(), tensors.get(), text.get(), given.number());
}

void recur_keeping_boxed(Value* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  const Owned x(given.next()), start(given.next()), memory(given.next()), y(given.next()), kept(given.next());
  const OwnedList tensors(given.next());
  const OwnedText text(given.next());
  structmat::operators::recur(x.get(), start.get(), memory.get(), y.get(), tensors.get(), text.get(), given.number(), kept.get());
}

void recur_backward_boxed(Value* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  const Owned kept(given.next()), start(given.next()), memory(given.next()), y(given.next()), grad(given.next()),
      grad_memory(given.next()), grad_x(given.next()), grad_s(given.next()), grad_start(given.next());
  const OwnedList tensors(given.next());
  const OwnedText text(given.next());
  structmat::operators::recur_backward(kept.get(), start.get(), memory.get(), y.get(), grad.get(), grad_memory.get(), grad_x.get(),
                 grad_s.get(), grad_start.get(), tensors.get(), text.get(), given.number());
}

void convolve_boxed(Value* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  const Owned x(given.next());
  const OwnedList tensors(given.next());
  const Owned y(given.next());
  const OwnedText text(given.next());
  structmat::operators::convolve(x.get(), tensors.get(), y.get(), text.get());
}

void pool_layer_boxed(Value* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  const Owned x(given.next()), x_scale(given.next()), weight(given.next()), index(given.next()), z(given.next()),
      z_scale(given.next());
  structmat::operators::pool_layer(x.get(), x_scale.get(), weight.get(), index.get(), z.get(), z_scale.get(), given.number());
}

void pool_layer_backward_boxed(Value* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  const Owned x(given.next()), x_scale(given.next()), weight(given.next()), index(given.next()), z(given.next()),
      z_scale(given.next()), grad(given.next()), grad_x(given.next()), grad_weight(given.next());
  structmat::operators::pool_layer_backward(x.get(), x_scale.get(), weight.get(), index.get(), z.get(), z_scale.get(), grad.get(),
                                            grad_x.get(), grad_weight.get(), given.number());
}

}  // namespace

extern "C" {

// Registers the operators with the PyTorch that is loaded. Returns null, or why it could not.
__attribute__((visibility("default"))) const char* structmat_register(const char* libtorch, uint64_t version) {
  static std::string problem;
  try {
    problem = load_symbols(libtorch);
    if (!problem.empty()) return problem.c_str();
    void *library, *kernels, *everywhere;
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
    require(torch.define(library, "stand(Tensor[] tensors, str program) -> int"));
    require(torch.define(library, "fall(int number) -> ()"));
    require(torch.define(library, "multiply_standing(Tensor x, int number) -> Tensor"));
    require(torch.define(library,
                         "recur(Tensor x, Tensor start, Tensor(a!) memory, Tensor(b!) y, Tensor[] tensors, str program, "
                         "int kind) -> ()"));
    require(torch.define(library,
                         "recur_keeping(Tensor x, Tensor start, Tensor(a!) memory, Tensor(b!) y, Tensor(c!) kept, "
                         "Tensor[] tensors, str program, int kind) -> ()"));
    require(torch.define(library,
                         "recur_backward(Tensor kept, Tensor start, Tensor memory, Tensor y, Tensor grad, "
                         "Tensor(a!) grad_memory, Tensor(b!) grad_x, Tensor(c!) grad_s, Tensor(d!) grad_start, "
                         "Tensor[] tensors, str program, int kind) -> ()"));
    require(torch.define(library, "convolve(Tensor x, Tensor[] tensors, Tensor(a!) y, str steps) -> ()"));
    require(torch.define(library,
                         "pool_layer(Tensor x, Tensor x_scale, Tensor weight, Tensor index, Tensor(a!) z, "
                         "Tensor(b!) z_scale, int kind) -> ()"));
    require(torch.define(library,
                         "pool_layer_backward(Tensor x, Tensor x_scale, Tensor weight, Tensor index, Tensor z, "
                         "Tensor z_scale, Tensor grad, Tensor(a!) grad_x, Tensor(b!) grad_weight, int kind) -> ()"));
    require(torch.init_impl("structmat", "CompositeExplicitAutograd", __FILE__, __LINE__, &everywhere));
    require(torch.implement(everywhere, "stand", stand_boxed, version));  // there may be no tensor to choose by
    require(torch.implement(everywhere, "fall", fall_boxed, version));
    require(torch.init_impl("structmat", "CPU", __FILE__, __LINE__, &kernels));
    require(torch.implement(kernels, "multiply", multiply_boxed, version));
    require(torch.implement(kernels, "multiply_into", multiply_into_boxed, version));
    require(torch.implement(kernels, "multiply_backward", multiply_backward_boxed, version));
    require(torch.implement(kernels, "multiply_keeping", multiply_keeping_boxed, version));
    require(torch.implement(kernels, "multiply_backward_kept", multiply_backward_kept_boxed, version));
    require(torch.implement(kernels, "multiply_standing", multiply_standing_boxed, version));
    require(torch.implement(kernels, "recur", recur_boxed, version));
    require(torch.implement(kernels, "recur_keeping", recur_keeping_boxed, version));
    require(torch.implement(kernels, "recur_backward", recur_backward_boxed, version));
    require(torch.implement(kernels, "convolve", convolve_boxed, version));
    require(torch.implement(kernels, "pool_layer", pool_layer_boxed, version));
    require(torch.implement(kernels, "pool_layer_backward", pool_layer_backward_boxed, version));
    return nullptr;
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
}
}

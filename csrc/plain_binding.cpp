// The same work for callers that hand over addresses: how Python calls it where the loaded PyTorch lacks what the
// operators need. Threads are started for each call.
#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "backward.h"
#include "execute.h"
#include "kept_plans.h"
#include "pages.h"

namespace {

thread_local std::string problem;
thread_local int wanted_threads = 1;

void in_threads(int64_t count, structmat::Body body, void* context) {
  const int64_t threads = count < wanted_threads ? count : wanted_threads;
  if (threads <= 1) return body(0, count, context);
  std::vector<std::thread> others;
  others.reserve(size_t(threads - 1));
  for (int64_t t = 1; t < threads; ++t)
    others.emplace_back([=] { body(count * t / threads, count * (t + 1) / threads, context); });
  body(0, count / threads, context);
  for (std::thread& other : others) other.join();
}

std::vector<structmat::Array> arrays_of(const void* const* data, const int64_t* counts, int64_t number) {
  std::vector<structmat::Array> arrays(number);
  for (int64_t i = 0; i < number; ++i) arrays[i] = {data[i], counts[i]};
  return arrays;
}

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("structmat: ") + what);
}

template <class Work>
const char* guarded(int threads, const Work& work) {
  wanted_threads = threads;
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
}

}  // namespace

extern "C" {

// Rows of x times the program, into y: null, or why not. Layouts as in `Batch`, tensors as the program numbers them.
__attribute__((visibility("default"))) const char* structmat_multiply(
    const char* text, const void* x, int64_t x_stride, int x_by_features, void* y, int64_t y_stride, int y_by_features,
    int64_t rows, int storage, const void* const* tensors, const int64_t* counts, int64_t number, int threads) {
  return guarded(threads, [&] {
    const structmat::Batch batch{x,    x_stride, y, y_stride, rows, structmat::Storage(storage), x_by_features != 0,
                                 y_by_features != 0};
    const bool by_vectors =
        structmat::runs_by_vectors(rows, batch.storage) && !batch.x_by_features && !batch.y_by_features;
    const auto plan = by_vectors ? structmat::vector_plan_of(text) : structmat::plan_of(text);
    require(number == int64_t(plan->sizes.size()), "the number of tensors is wrong");
    const auto arrays = arrays_of(tensors, counts, number);
    structmat::use_large_pages(y, rows * plan->out_features * structmat::bytes_of(batch.storage));
    (by_vectors ? structmat::execute_vectors : structmat::execute)(*plan, batch, arrays.data(), in_threads, threads);
  });
}

// Gradients, of which those are not wanted whose address is null: null, or why not.
__attribute__((visibility("default"))) const char* structmat_multiply_backward(
    const char* text, const void* x, int64_t x_stride, const void* grad, int64_t grad_stride, void* grad_x, int64_t rows,
    int storage, const void* const* tensors, const int64_t* counts, void* const* gradients, int64_t number, int threads) {
  return guarded(threads, [&] {
    structmat::Wanted wanted;
    wanted.input = grad_x != nullptr;
    for (int64_t i = 0; i < number; ++i) wanted.tensors.push_back(gradients[i] != nullptr);
    const auto plan = structmat::plan_of(text);
    require(number == int64_t(plan->sizes.size()), "the number of tensors is wrong");
    const auto arrays = arrays_of(tensors, counts, number);
    const structmat::BackwardBatch batch{x,      x_stride, grad, grad_stride,
                                         grad_x, rows,     structmat::Storage(storage)};
    if (grad_x) structmat::use_large_pages(grad_x, rows * plan->in_features * structmat::bytes_of(batch.storage));
    structmat::execute_backward(*structmat::backward_plan_of(text, wanted), batch, arrays.data(), gradients, in_threads);
  });
}

__attribute__((visibility("default"))) const char* structmat_instruction_set() { return structmat::chosen().name; }

__attribute__((visibility("default"))) int structmat_supported(int number, const char** name) {
  if (number < 0 || number >= structmat::instruction_sets) return -1;
  *name = structmat::instruction_set(number).name;
  return structmat::supported(number) ? 1 : 0;
}
}

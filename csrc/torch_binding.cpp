// The operator structmat::multiply, registered through the C functions that libtorch exports. No header of PyTorch is
// needed, so one build serves every version of Python, and every version of PyTorch that has these functions.
#include <dlfcn.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "execute.h"

namespace {

using structmat::Array;
using structmat::Batch;
using structmat::Plan;
using structmat::Storage;

typedef uint64_t Value;  // one slot of the dispatcher's stack
typedef void* Tensor;
typedef void* List;
typedef void* Text;
typedef int32_t Code;  // 0 is success

struct Torch {
  Code (*get_data_ptr)(Tensor, void**);
  Code (*get_dim)(Tensor, int64_t*);
  Code (*get_numel)(Tensor, int64_t*);
  Code (*get_sizes)(Tensor, int64_t**);
  Code (*get_strides)(Tensor, int64_t**);
  Code (*get_dtype)(Tensor, int32_t*);
  Code (*get_device_type)(Tensor, int32_t*);
  Code (*empty_strided)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Tensor*);
  Code (*delete_tensor)(Tensor);
  Code (*list_size)(List, size_t*);
  Code (*list_get)(List, size_t, Value*);
  Code (*delete_list)(List);
  Code (*text_length)(Text, size_t*);
  Code (*text_data)(Text, const char**);
  Code (*delete_text)(Text);
  Code (*parallel_for)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
  Code (*num_threads)(uint32_t*);
  Code (*init_library)(const char*, const char*, uint32_t, void**);
  Code (*init_impl)(const char*, const char*, const char*, uint32_t, void**);
  Code (*define)(void*, const char*);
  Code (*implement)(void*, const char*, void (*)(Value*, uint64_t, uint64_t), uint64_t);
  int32_t f32, f64, bf16, f16, i64, cpu;
} torch;

std::string load_symbols(const char* library) {
  void* handle = dlopen(library, RTLD_NOW | RTLD_NOLOAD);
  if (!handle) return std::string("libtorch is not loaded from ") + library;
  std::string missing;
  const auto find = [&](const char* name, auto& function) {
    void* found = dlsym(handle, name);
    if (!found) missing += std::string(missing.empty() ? "" : ", ") + name;
    std::memcpy(&function, &found, sizeof found);
  };
  find("aoti_torch_get_data_ptr", torch.get_data_ptr);
  find("aoti_torch_get_dim", torch.get_dim);
  find("aoti_torch_get_numel", torch.get_numel);
  find("aoti_torch_get_sizes", torch.get_sizes);
  find("aoti_torch_get_strides", torch.get_strides);
  find("aoti_torch_get_dtype", torch.get_dtype);
  find("aoti_torch_get_device_type", torch.get_device_type);
  find("aoti_torch_empty_strided", torch.empty_strided);
  find("aoti_torch_delete_tensor_object", torch.delete_tensor);
  find("torch_list_size", torch.list_size);
  find("torch_list_get_item", torch.list_get);
  find("torch_delete_list", torch.delete_list);
  find("torch_string_length", torch.text_length);
  find("torch_string_c_str", torch.text_data);
  find("torch_delete_string", torch.delete_text);
  find("torch_parallel_for", torch.parallel_for);
  find("torch_get_num_threads", torch.num_threads);
  find("aoti_torch_library_init_def", torch.init_library);
  find("aoti_torch_library_init_impl", torch.init_impl);
  find("aoti_torch_library_def", torch.define);
  find("torch_library_impl", torch.implement);
  int32_t (*constant)() = nullptr;
  const struct {
    const char* name;
    int32_t* value;
  } constants[] = {{"aoti_torch_dtype_float32", &torch.f32},   {"aoti_torch_dtype_float64", &torch.f64},
                   {"aoti_torch_dtype_bfloat16", &torch.bf16}, {"aoti_torch_dtype_float16", &torch.f16},
                   {"aoti_torch_dtype_int64", &torch.i64},     {"aoti_torch_device_type_cpu", &torch.cpu}};
  for (const auto& c : constants) {
    find(c.name, constant);
    if (constant) *c.value = constant();
  }
  return missing.empty() ? "" : "libtorch lacks " + missing;
}

void require(Code code) {
  if (code) throw std::runtime_error("structmat: a call of libtorch failed");
}

struct Delete {
  void operator()(void* tensor) const { torch.delete_tensor(tensor); }
};
typedef std::unique_ptr<void, Delete> Owned;  // a tensor that is released at the end of the scope

void in_parallel(int64_t count, structmat::Body body, void* context) {
  require(torch.parallel_for(0, count, 1, body, context));
}

// Plans by their text: a text is read once.
const Plan& plan_of(const char* text, size_t length) {
  static std::mutex mutex;
  static std::unordered_map<std::string, std::unique_ptr<Plan>> plans;
  const std::string key(text, length);
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Plan>& plan = plans[key];
  if (!plan) {
    try {
      plan = std::make_unique<Plan>(structmat::make_plan(key));
    } catch (...) {
      plans.erase(key);
      throw;
    }
  }
  return *plan;
}

Storage storage_of(int32_t dtype) {
  if (dtype == torch.f32) return Storage::f32;
  if (dtype == torch.f64) return Storage::f64;
  if (dtype == torch.bf16) return Storage::bf16;
  if (dtype == torch.f16) return Storage::f16;
  throw std::invalid_argument("structmat: inputs are float32, float64, bfloat16 or float16");
}

void require_cpu(Tensor tensor) {
  int32_t device;
  require(torch.get_device_type(tensor, &device));
  if (device != torch.cpu) throw std::invalid_argument("structmat: a tensor is not in the memory of the CPU");
}

// The distance of neighbouring rows of a tensor (..., features), all leading axes taken together.
int64_t row_stride(int64_t dim, const int64_t* sizes, const int64_t* strides) {
  int64_t stride = sizes[dim - 1], next = -1;
  for (int64_t i = dim - 2; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (next < 0) stride = strides[i];
    else if (strides[i] != next)
      throw std::invalid_argument("structmat: the rows of the input must lie at equal distances");
    next = strides[i] * sizes[i];
  }
  return stride;
}

// multiply(Tensor x, Tensor[] tensors, str program) -> Tensor
Tensor multiply(Tensor x, List list, Text text) {
  const char* characters;
  size_t length, count;
  require(torch.text_data(text, &characters));
  require(torch.text_length(text, &length));
  const Plan& plan = plan_of(characters, length);

  int64_t dim, *sizes, *strides;
  int32_t dtype;
  require(torch.get_dim(x, &dim));
  require(torch.get_sizes(x, &sizes));
  require(torch.get_strides(x, &strides));
  require(torch.get_dtype(x, &dtype));
  require_cpu(x);
  if (dim < 1 || sizes[dim - 1] != plan.in_features || (strides[dim - 1] != 1 && plan.in_features > 1))
    throw std::invalid_argument("structmat: the input must have shape (..., in_features), its rows contiguous");
  std::vector<int64_t> shape(sizes, sizes + dim), dense(dim, 1);
  shape[dim - 1] = plan.out_features;
  for (int64_t i = dim - 1; i > 0; --i) dense[i - 1] = dense[i] * shape[i];
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < dim; ++i) rows *= sizes[i];

  require(torch.list_size(list, &count));
  if (count != plan.sizes.size()) throw std::invalid_argument("structmat: the number of tensors is wrong");
  std::vector<Owned> owned;
  owned.reserve(count);
  std::vector<Array> arrays(count);
  for (size_t i = 0; i < count; ++i) {
    Value item;
    require(torch.list_get(list, i, &item));
    Tensor tensor;
    std::memcpy(&tensor, &item, sizeof tensor);
    owned.emplace_back(tensor);
    int32_t own;
    void* data;
    require(torch.get_dtype(tensor, &own));
    require_cpu(tensor);
    if (own != (plan.is_index[i] ? torch.i64 : dtype))
      throw std::invalid_argument("structmat: a tensor has another dtype than the input");
    require(torch.get_data_ptr(tensor, &data));
    require(torch.get_numel(tensor, &arrays[i].count));
    arrays[i].data = data;
  }

  Tensor y;
  require(torch.empty_strided(dim, shape.data(), dense.data(), dtype, torch.cpu, -1, &y));
  try {
    Batch batch;
    void* data;
    require(torch.get_data_ptr(x, &data));
    batch.x = data, batch.x_stride = rows ? row_stride(dim, sizes, strides) : plan.in_features;
    require(torch.get_data_ptr(y, &batch.y));
    batch.y_stride = plan.out_features, batch.rows = rows, batch.storage = storage_of(dtype);
    uint32_t threads = 1;
    require(torch.num_threads(&threads));
    structmat::execute(plan, batch, arrays.data(), in_parallel, int(threads));
  } catch (...) {
    torch.delete_tensor(y);
    throw;
  }
  return y;
}

void multiply_boxed(Value* stack, uint64_t, uint64_t) {
  Tensor x;
  List list;
  Text text;
  std::memcpy(&x, &stack[0], sizeof x);
  std::memcpy(&list, &stack[1], sizeof list);
  std::memcpy(&text, &stack[2], sizeof text);
  struct Release {
    Tensor x;
    List list;
    Text text;
    ~Release() { torch.delete_tensor(x), torch.delete_list(list), torch.delete_text(text); }
  } release{x, list, text};
  const Tensor y = multiply(x, list, text);  // an exception becomes a RuntimeError of Python
  std::memcpy(&stack[0], &y, sizeof y);
}

}  // namespace

extern "C" {

// Registers the operator with the PyTorch that is loaded. Returns null, or why it could not.
__attribute__((visibility("default"))) const char* structmat_register(const char* libtorch, uint64_t version) {
  static std::string problem;
  try {
    problem = load_symbols(libtorch);
    if (!problem.empty()) return problem.c_str();
    void *library, *kernels;
    require(torch.init_library("structmat", __FILE__, __LINE__, &library));
    require(torch.define(library, "multiply(Tensor x, Tensor[] tensors, str program) -> Tensor"));
    require(torch.init_impl("structmat", "CPU", __FILE__, __LINE__, &kernels));
    require(torch.implement(kernels, "multiply", multiply_boxed, version));
    return nullptr;
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
}

__attribute__((visibility("default"))) const char* structmat_instruction_set() { return structmat::chosen().name; }

__attribute__((visibility("default"))) int structmat_supported(int number, const char** name) {
  if (number < 0 || number >= structmat::instruction_sets) return -1;
  *name = structmat::instruction_set(number).name;
  return structmat::supported(number) ? 1 : 0;
}
}

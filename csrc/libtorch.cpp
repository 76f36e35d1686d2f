#include "libtorch.h"

#include <dlfcn.h>

#include <cstring>
#include <stdexcept>

namespace structmat {

Torch torch;

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
  find("aoti_torch_get_layout", torch.get_layout);
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
                   {"aoti_torch_dtype_int64", &torch.i64},     {"aoti_torch_dtype_int32", &torch.i32},
                   {"aoti_torch_device_type_cpu", &torch.cpu},
                   {"aoti_torch_layout_strided", &torch.strided}};
  for (const auto& c : constants) {
    find(c.name, constant);
    if (constant) *c.value = constant();
  }
  return missing.empty() ? "" : "libtorch lacks " + missing;
}

void require(Code code) {
  if (code) throw std::runtime_error("structmat: a call of libtorch failed");
}

void in_parallel(int64_t count, Body body, void* context) {
  require(torch.parallel_for(0, count, 1, body, context));
}

int thread_count() {
  uint32_t threads = 1;
  require(torch.num_threads(&threads));
  return int(threads);
}

}  // namespace structmat

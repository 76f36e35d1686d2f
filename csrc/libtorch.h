// The C functions that libtorch exports, found in the library that is loaded. No header of PyTorch is needed, so one build
// serves every version of Python, and every version of PyTorch that has these functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "execute.h"

namespace structmat {

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
  Code (*get_layout)(Tensor, int32_t*);
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
  int32_t f32, f64, bf16, f16, i32, i64, cpu, strided;
};

extern Torch torch;  // empty until it is loaded

// What the library of that path lacks, or nothing.
std::string load_symbols(const char* library);

// Throws std::runtime_error for a call that failed.
void require(Code code);

// The threads of PyTorch, and how many it would use.
void in_parallel(int64_t count, Body body, void* context);
int thread_count();

struct Delete {
  void operator()(void* tensor) const { torch.delete_tensor(tensor); }
};
typedef std::unique_ptr<void, Delete> Owned;  // a tensor that is released at the end of the scope

}  // namespace structmat

// Tensors, lists and texts of PyTorch as the operators read them.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "execute.h"
#include "libtorch.h"

namespace structmat {

inline Storage storage_of(int32_t dtype) {
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

inline std::string read(Text text) {
  const char* characters;
  size_t length;
  require(torch.text_data(text, &characters));
  require(torch.text_length(text, &length));
  return std::string(characters, length);
}

inline void* data_of(Tensor tensor) {
  void* data;
  require(torch.get_data_ptr(tensor, &data));
  return data;
}

inline std::vector<Owned> items(List list) {
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
inline std::vector<Array> arrays_of(const std::vector<Owned>& tensors, const Plan& plan, int32_t dtype) {
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

// Checks that a tensor is contiguous and has these sizes (-1: any), and hands out its data; null if it is empty and may be.
inline void* checked(Tensor tensor, int32_t dtype, const std::vector<int64_t>& sizes, bool may_be_empty = false) {
  const Shape shape(tensor);
  if (may_be_empty && shape.count == 0) return nullptr;
  bool fits = shape.dtype == dtype && shape.dim == int64_t(sizes.size()) && shape.is_contiguous();
  for (int64_t i = 0; fits && i < shape.dim; ++i) fits = sizes[i] < 0 || sizes[i] == shape.sizes[i];
  if (!fits) throw std::invalid_argument("structmat: a tensor of a layer has another shape or dtype than the layer");
  return data_of(tensor);
}

}  // namespace structmat

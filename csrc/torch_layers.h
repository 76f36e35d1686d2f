// The operators that do whole layers at once; torch_binding.cpp says their schemas.
#pragma once

#include "libtorch.h"

namespace structmat {
namespace operators {

void recur(Tensor x, Tensor start, Tensor memory, Tensor y, List list, Text text, int64_t kind, Tensor kept = nullptr);
void recur_backward(Tensor kept, Tensor start, Tensor memory, Tensor y, Tensor grad, Tensor grad_memory, Tensor grad_x,
                    Tensor grad_s, Tensor grad_start, List list, Text text, int64_t kind);
void convolve(Tensor x, List list, Tensor y, Text text);
void pool_layer(Tensor x, Tensor x_scale, Tensor weight, Tensor index, Tensor z, Tensor z_scale, int64_t kind);
void pool_layer_backward(Tensor x, Tensor x_scale, Tensor weight, Tensor index, Tensor z, Tensor z_scale, Tensor grad,
                         Tensor grad_x, Tensor grad_weight, int64_t kind);

}  // namespace operators
}  // namespace structmat

// Products with tensors that stand: they are read and prepared once, for many calls with a few rows.
#pragma once

#include "libtorch.h"

namespace structmat {
namespace operators {

// stand(Tensor[] tensors, str program) -> int
//
// A number for multiply_standing, until `fall` is called with it. All learned tensors are float32, or all float64.
// Contents of tensors without fractions, such as places, may be read once: whoever writes to them stands anew.
int64_t stand(List tensors, Text program);
void fall(int64_t number);

// multiply_standing(Tensor x, int number) -> Tensor
//
// As `multiply`, for fewer rows than a tile wants (`runs_by_vectors`).
Tensor multiply_standing(Tensor x, int64_t number);

}  // namespace operators
}  // namespace structmat

#include "torch_standing.h"

#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "kept_plans.h"
#include "pages.h"
#include "torch_tensors.h"

namespace structmat {
namespace operators {
namespace {

// What was prepared from tensors as they were then, for so many threads.
struct Ready {
  std::shared_ptr<const Plan> plan;
  std::vector<Array> arrays;
  int32_t dtype;
  Storage storage;
  int threads;
  std::unique_ptr<Product> product;
};

class Standing {
 public:
  Standing(std::vector<Owned> tensors, std::string words) : tensors_(std::move(tensors)), words_(std::move(words)) {}

  // Made anew where a tensor lies elsewhere than it did: `share_memory_`, `tensor.data = ...` and the like move it. Who
  // runs what was made before still holds it.
  std::shared_ptr<const Ready> ready() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!ready_ || ready_->threads != thread_count() || !stands()) ready_ = prepared();
    return ready_;
  }

 private:
  bool stands() const {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const Shape shape(tensors_[i].get());
      const Array& known = ready_->arrays[i];
      if (shape.count != known.count || data_of(tensors_[i].get()) != known.data || !shape.is_contiguous() ||
          shape.dtype != (ready_->plan->is_index[i] ? torch.i64 : ready_->dtype))
        return false;
    }
    return true;
  }

  std::shared_ptr<const Ready> prepared() const {
    const auto made = std::make_shared<Ready>();
    made->plan = vector_plan_of(words_);
    if (tensors_.size() != made->plan->sizes.size())
      throw std::invalid_argument("structmat: the number of tensors is wrong");
    made->dtype = torch.f32;
    for (size_t i = 0; i < tensors_.size(); ++i)
      if (!made->plan->is_index[i]) made->dtype = Shape(tensors_[i].get()).dtype;
    made->storage = storage_of(made->dtype);
    if (!runs_by_vectors(1, made->storage))
      throw std::invalid_argument("structmat: standing tensors are float32 or float64");
    made->arrays = arrays_of(tensors_, *made->plan, made->dtype);
    made->threads = thread_count();
    made->product = product_of(*made->plan, made->storage, 1, made->arrays.data(), in_parallel, made->threads);
    return made;
  }

  const std::vector<Owned> tensors_;
  const std::string words_;
  std::mutex mutex_;
  std::shared_ptr<const Ready> ready_;
};

std::mutex all_mutex;

std::unordered_map<int64_t, std::shared_ptr<Standing>>& all() {
  static auto* const kept = new std::unordered_map<int64_t, std::shared_ptr<Standing>>;  // tensors outlive the library
  return *kept;
}

}  // namespace

int64_t stand(List tensors, Text program) {
  static int64_t last = 0;
  const auto made = std::make_shared<Standing>(items(tensors), read(program));
  made->ready();
  const std::lock_guard<std::mutex> lock(all_mutex);
  all().emplace(++last, made);
  return last;
}

void fall(int64_t number) {
  std::shared_ptr<Standing> found;  // released after the lock
  const std::lock_guard<std::mutex> lock(all_mutex);
  const auto at = all().find(number);
  if (at == all().end()) return;
  found = std::move(at->second);
  all().erase(at);
}

Tensor multiply_standing(Tensor x, int64_t number) {
  std::shared_ptr<Standing> standing;
  {
    const std::lock_guard<std::mutex> lock(all_mutex);
    const auto at = all().find(number);
    if (at == all().end()) throw std::invalid_argument("structmat: there is no such product");
    standing = at->second;
  }
  const std::shared_ptr<const Ready> ready = standing->ready();
  const Plan& plan = *ready->plan;
  const Shape shape(x);
  const int64_t rows = shape.rows(), x_stride = shape.row_stride(plan.in_features);
  if (shape.dtype != ready->dtype || !runs_by_vectors(rows, ready->storage))
    throw std::invalid_argument("structmat: rows are of another dtype than the tensors, or too many");
  constexpr int64_t most = 8;  // axes for which nothing is allocated
  int64_t room[2 * most];
  std::vector<int64_t> more(shape.dim > most ? 2 * shape.dim : 0);
  int64_t *sizes = more.empty() ? room : more.data(), *strides = sizes + shape.dim;
  std::copy_n(shape.sizes, shape.dim, sizes);
  sizes[shape.dim - 1] = plan.out_features;
  for (int64_t i = shape.dim - 1, step = 1; i >= 0; step *= sizes[i--]) strides[i] = step;
  Tensor made;
  require(torch.empty_strided(shape.dim, sizes, strides, shape.dtype, torch.cpu, -1, &made));
  Owned y(made);
  ready->product->run(Batch{data_of(x), x_stride, data_of(made), plan.out_features, rows, ready->storage});
  return y.release();
}

}  // namespace operators
}  // namespace structmat

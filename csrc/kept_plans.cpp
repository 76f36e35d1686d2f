#include "kept_plans.h"

#include <mutex>
#include <unordered_map>

namespace structmat {
namespace {

constexpr size_t most = 4096;  // of each kind; when there are more, all are made anew as they are needed

template <class Made>
class Kept {
 public:
  template <class Make>
  std::shared_ptr<const Made> get(const std::string& key, const Make& make) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = plans_.find(key);
    if (found != plans_.end()) return found->second;
    auto made = std::make_shared<const Made>(make());
    if (plans_.size() >= most) plans_.clear();  // who runs one still holds it
    plans_.emplace(key, made);
    return made;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<std::string, std::shared_ptr<const Made>> plans_;
};

}  // namespace

std::shared_ptr<const Plan> plan_of(const std::string& text) {
  static Kept<Plan> kept;
  return kept.get(text, [&] { return make_plan(text); });
}

std::shared_ptr<const Plan> vector_plan_of(const std::string& text) {
  static Kept<Plan> kept;
  return kept.get(text, [&] { return make_plan(text, Use::vectors); });
}

std::shared_ptr<const BackwardPlan> backward_plan_of(const std::string& text, const Wanted& wanted) {
  static Kept<BackwardPlan> kept;
  std::string key = std::string(wanted.input ? "x" : "-") + (wanted.kept ? "k " : " ");
  for (char tensor : wanted.tensors) key += tensor ? 'x' : '-';
  return kept.get(key + " " + text, [&] { return make_backward_plan(text, wanted); });
}

}  // namespace structmat

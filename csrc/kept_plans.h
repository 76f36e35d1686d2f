// Plans by the text they are made from: made once, and kept while they are not too many.
#pragma once

#include <memory>
#include <string>

#include "backward_plan.h"
#include "plan.h"

namespace structmat {

// Throw std::invalid_argument for a text that is no program.
std::shared_ptr<const Plan> plan_of(const std::string& text);
std::shared_ptr<const Plan> vector_plan_of(const std::string& text);
std::shared_ptr<const BackwardPlan> backward_plan_of(const std::string& text, const Wanted& wanted);

}  // namespace structmat

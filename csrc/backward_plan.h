// The gradients of a program: its instructions, as far as derivatives need their outcomes, and then their transposes in
// reverse order, laid out in the memory of a tile.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plan.h"

namespace structmat {

// What gradients are asked for: of the input, and of each tensor (the bias is the last).
struct Wanted {
  bool input = false;
  std::vector<char> tensors;
  bool kept = false;  // whether the values that the program says to keep are at hand, and need not be made again
};

// Rows from here on are those of values that were kept: they are read where they were kept.
constexpr int64_t kept_from = int64_t(1) << 48;

struct Step {
  enum Kind { load_input, load_gradient, forward, clear, backward, store_gradient } kind;
  Instruction what{};       // with the rows of its values, where they are kept
  int number = -1;          // of the instruction in the plan
  int64_t from = -1, to = -1;  // rows of the gradients of what it reads and of what it writes; -1 where none is wanted
  int64_t rows = 0;         // to clear
  bool add = false;         // to the gradient of what it reads
  bool weighs = false;      // whether gradients of its weights are wanted
  int64_t sums[Radix::most] = {-1, -1, -1};  // where those are summed, if not at their tensor's own place
};

// Where gradients of a tensor are summed while tiles pass by: in the order of the tensor (`direct`), of the blocks that
// a matrix product makes (`blocks`), of the groups of a stage of 2 x 2 blocks (`groups`), or of a sparse matrix's rows
// (`entries`).
struct Sums {
  enum Order { direct, blocks, groups, entries } order;
  int tensor;
  int64_t first, count;  // in the memory of all sums
  int number = -1;       // of the instruction
  Contract contraction{};
  Radix stages{};
  int stage = 0;         // which of them
};

struct BackwardPlan {
  Plan plan;  // every value has rows of its own there
  Wanted wanted;
  std::vector<Step> steps;
  std::vector<Sums> sums;
  std::vector<int64_t> place;  // of every tensor: where its direct sums begin, or -1
  int64_t rows = 0;            // of the memory of a tile
  int64_t total = 0;           // numbers that are summed
};

// Throws std::invalid_argument.
BackwardPlan make_backward_plan(const std::string& text, const Wanted& wanted);

}  // namespace structmat

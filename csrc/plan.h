// A program, read from its text and laid out: which instruction reads and writes which rows of a tile's memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace structmat {

struct Instruction {
  enum Kind { contract, radix, quads, diagonal, gather, scatter_add, copy, clear, sparse, windowed, activate, keep } kind;
  int64_t from = 0, to = 0;  // first rows, in the memory of a tile
  int64_t rows = 0;          // of the outcome (of the source where it is scattered)
  bool add = false;
  int tensor = -1, other = -1, index = -1;  // numbers of tensors; `index` holds integers
  Contract contraction{};
  Activate activation{};
  Radix stages{};
  Quads quads_of{};
  bool packs = false;  // a contraction that is faster from panels, if many columns share them
  bool transposed = false, inverse = false;
  int64_t height = 0, width = 0, entries = 0;  // of a sparse or windowed matrix; `entries` counts terms there
  int64_t left = 0, right = 0;                 // numbers that the windows of all terms hold
  int table = -1;                              // of a fixed index
  int64_t skip = 0, kept = 0;                  // an interpolation: columns of the identity, and of the weight
  int64_t place = 0;                           // first row of what is kept for the way back
};

// A range of rows that holds one value.
struct Slot {
  int64_t first, rows;
};

// What a plan is for: tiles, where stages of small blocks are put together in registers; derivatives, for which every
// value keeps rows of its own and no stage works in place; or a few vectors, each by itself, where every stage stands
// alone. But for derivatives, rows are used again once nothing reads them any more.
enum class Use { tiles, derivatives, vectors };

struct Plan {
  Use use = Use::tiles;
  int64_t in_features = 0, out_features = 0;
  int64_t rows = 0;    // of the memory of a tile
  int64_t terms = 0;   // of the windowed matrix that has most; what comes between its sides needs as many rows beside
  int64_t input = 0, output = 0;
  int64_t tensors = 0;  // how many the program reads
  bool has_bias = false;
  std::vector<Instruction> instructions;
  std::vector<std::vector<int64_t>> tables;
  std::vector<int64_t> sizes;    // of every tensor, as the program needs it
  std::vector<char> is_index;    // whether a tensor holds integers
  bool is_light = false;         // whether it reads few weights for each row: narrow tiles cost little then
  int64_t widest_source = 0;     // rows of the widest matrix whose columns are read in no order
  bool has_activations = false;
  int64_t volume = 0;            // rows of all values together
  int64_t kept_rows = 0;         // of values that are kept for the way back, if there will be one
  std::vector<Slot> slots;       // what the values lie in, in the order in which they come up
};

// Where so many rows fit below, between or above what is in use; sorts what it is given.
int64_t lowest_gap(std::vector<Slot>& used, int64_t rows);

// Reads the text that structmat.kernels.text writes. Throws std::invalid_argument.
Plan make_plan(const std::string& text, Use use = Use::tiles);

}  // namespace structmat

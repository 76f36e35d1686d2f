// The kernels of one instruction set: what runs on a tile, a block of the batch with the batch innermost.
//
// A tile holds `columns` vectors of the batch; number r of the vectors is row r, `columns` contiguous numbers. All
// kernels work on whole rows: lanes beyond the end of the batch hold zeros and are never written back. No kernel
// allocates, and none knows of PyTorch.
#pragma once

#include <cstdint>
#include <type_traits>

namespace structmat {

// How numbers lie in memory outside of the tiles.
enum class Storage : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

inline int64_t bytes_of(Storage storage) { return storage == Storage::f64 ? 8 : storage == Storage::f32 ? 4 : 2; }

// y[a, b, d] (+)= sum over c of w[a, b, c, d] x[a, c, d], the weight with any strides (0 where an axis is shared).
struct Contract {
  int64_t a, b, c, d;
  int64_t stride_a, stride_b, stride_c, stride_d;
};

// Up to three stages of 2 x 2 blocks that act on the same groups of 2^count rows, one after the other in registers.
// Group g is that of rows (g / lowest) * 2^count * lowest + g mod lowest, and on from there at distances of `lowest`.
struct Radix {
  static constexpr int most = 3;
  int count;                    // stages
  int64_t rows, lowest;         // rows in all; distance of neighbours in a group
  int bit[most];                // which bit of the group's index a stage mixes
  bool transposed[most];
  int weight[most];             // numbers of the tensors
};

// Up to two stages of 4 x 4 blocks that act on the same groups of 4^count rows, one after the other in registers. Groups
// as above, with digits of base 4 in place of bits.
struct Quads {
  static constexpr int most = 2;
  int count;
  int64_t rows, lowest;
  int digit[most];  // which digit of the index a stage mixes
  bool by_rows;     // how the matrices of digit 0 lie, where `lowest` is 1: as in the tensor, which needs no packing then
  Contract contraction[most];
  int weight[most];
};

// How weights are packed (panels.h): rows b of a panel; matrices of neighbouring d that are packed at a time.
constexpr int64_t panel_rows = 16, pack_together = 16;

constexpr int64_t unit_lines = 16;  // lines b of a contraction with a few vectors that one thread takes at a time

constexpr int64_t widest_row = 512;  // bytes of a row of a tile, at most
constexpr int64_t block_width = 64;  // rows of a tile that are transposed at once

// Gradients of a contraction's weights as products of matrices: blocks (a, d) of so many lines, each of `width` numbers
// that run along b or c, filled up to whole registers. Small blocks have none of this: each number is summed by itself.
struct BlockSums {
  enum Along { none, b, c } along;
  int64_t lines, width;
  int64_t count;  // numbers in all
};
BlockSums sums_of(const Contract& stage);

// Which number of a tensor belongs to a row: number (row / inner) mod count.
struct Spread {
  int64_t inner = 1, count = 1;
};

// y = f(x + bias), row by row; a rectifier multiplies what is negative by a slope.
struct Activate {
  enum Kind { identity, relu, tanh, sigmoid, silu, gelu, gelu_tanh, rectifier } kind = identity;
  int64_t rows = 0;
  Spread bias, slope;
};
constexpr int activations = 8;

// Whether the derivative is found from the value of an activation, so that its argument need not be kept.
constexpr bool by_value(Activate::Kind kind) { return kind <= Activate::sigmoid; }

// A matrix by its entries, row by row, in the compressed form.
struct Compressed {
  const int32_t* start;   // rows + 1
  const int32_t* column;  // of every entry
};

// Rows that one term of a windowed matrix covers, one after the other: a window is one run, or two where it passes the end.
struct Run {
  int64_t first, last;  // one beyond the last
  int64_t content;      // where the numbers of its rows begin
  int64_t term;
};

// One side of a windowed matrix as it stands: location and width of a term, and four numbers on those of the next; where
// the contents of each begin; how many rows the side has.
struct WindowSide {
  const int64_t *windows, *beginnings;
  int64_t size;
};

// Kinds of recurrent nets; `gates_of` of them are as wide as the state.
enum class Cell : int { lstm = 0, gru = 1, tanh = 2, relu = 3 };
constexpr int64_t gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }
// What is kept of a state for the way back is so many times as wide.
constexpr int64_t kept_of(Cell cell) { return cell == Cell::lstm ? 5 : cell == Cell::gru ? 4 : 0; }

template <class Real>
struct Kernels {
  // Vectors first .. first + count of the batch into a tile; `count` may be less than `columns`.
  void (*load)(const void* x, Storage storage, int64_t stride, int64_t count, int64_t features, Real* tile,
               int64_t columns);
  // Back, with the bias (features numbers, or null) added.
  void (*store)(const Real* tile, int64_t columns, const Real* bias, void* y, Storage storage, int64_t stride,
                int64_t count, int64_t features);
  // The same where the batch is innermost outside of the tiles too: `stride` leads from one feature to the next.
  void (*load_by_features)(const void* x, Storage storage, int64_t stride, int64_t count, int64_t features, Real* tile,
                           int64_t columns);
  void (*store_by_features)(const Real* tile, int64_t columns, const Real* bias, void* y, Storage storage,
                            int64_t stride, int64_t count, int64_t features);
  void (*contract)(const Contract& stage, const Real* weight, const Real* x, Real* y, int64_t columns, bool add);
  void (*radix)(const Radix& stage, const Real* const* tensors, const Real* x, Real* y, int64_t columns);  // x may be y
  // Units begin .. end of the weights as panels, of a * ceil(d / pack_together) * ceil(b / panel_rows) units (a = 1 where
  // a is shared); and what reads panels.
  void (*pack)(const Contract& stage, const Real* weight, Real* panels, int64_t begin, int64_t end);
  void (*contract_packed)(const Contract& stage, const Real* panels, const Real* x, Real* y, int64_t columns, bool add);
  void (*quads)(const Quads& stage, const Real* const* panels, const Real* x, Real* y, int64_t columns);  // x may be y
  void (*diagonal)(const Real* weight, const Real* x, Real* y, int64_t rows, int64_t columns, bool add);
  // Row i of y (+)= row index[i] of x.
  void (*gather)(const int64_t* index, const Real* x, Real* y, int64_t rows, int64_t columns, bool add);
  // Row index[i] of y += row i of x.
  void (*scatter_add)(const int64_t* index, const Real* x, Real* y, int64_t rows, int64_t columns);
  void (*copy)(const Real* x, Real* y, int64_t rows, int64_t columns, bool add);
  void (*sparse)(const Compressed& matrix, const Real* values, const Real* x, Real* y, int64_t rows, int64_t columns,
                 bool add);
  // The two sides of a windowed matrix (windows.h), runs in the order of their first rows: row t of z += content times row
  // of x, for all runs of term t; row of y += content times row t of z. `room` holds two numbers for each run.
  void (*read_windows)(const Run* runs, int64_t count, const Real* contents, const Real* x, Real* z, int64_t columns,
                       int32_t* room);
  void (*write_windows)(const Run* runs, int64_t count, const Real* contents, const Real* z, Real* y, int64_t columns,
                        int32_t* room);

  // A few vectors, each contiguous, `pitch` numbers apart (vector_kernels.h). Units begin .. end of the outcome, of
  // a * ceil(b / unit_lines); rows begin .. end of it.
  void (*contract_vectors)(const Contract& stage, const Real* weight, const Real* x, Real* y, int64_t pitch,
                           int64_t vectors, bool add, int64_t begin, int64_t end);
  void (*sparse_vectors)(const Compressed& matrix, const Real* values, const Real* x, Real* y, int64_t pitch,
                         int64_t vectors, bool add, int64_t begin, int64_t end);
  // Of one vector: the sums of terms begin .. end; rows begin .. end of the outcome, of all terms.
  void (*read_vector)(const WindowSide& side, int64_t begin, int64_t end, const Real* contents, const Real* x, Real* z);
  void (*write_vector)(const WindowSide& side, int64_t terms, const Real* contents, const Real* z, Real* y, int64_t begin,
                       int64_t end);

  // What follows goes backwards: from the gradient of a stage's outcome to that of its input (where `gx` is not null,
  // added to it or not), and to the sums over all columns that are the gradients of its weights (where they are not
  // null, always added). No row has more than `widest_row` bytes.

  // sums[a, b, c, d] += sum over columns of gy[a, b, d] x[a, c, d], in the order of the tensor if `shape.along` is none,
  // else in blocks; `scratch` has room for `block_width` rows.
  void (*contract_sums)(const Contract& stage, const BlockSums& shape, const Real* x, const Real* gy, Real* sums,
                        Real* scratch, int64_t columns);
  // `sums` of each stage hold group after group, pair after pair of rows in it, and four numbers of each.
  void (*radix_back)(const Radix& stage, const Real* const* tensors, const Real* x, const Real* gy, Real* gx,
                     Real* const* sums, int64_t columns, bool add);
  void (*diagonal_sums)(const Real* x, const Real* gy, Real* sums, int64_t rows, int64_t columns);
  // Adds to gx; `sums` in the order of the compressed form.
  void (*sparse_back)(const Compressed& matrix, const Real* values, const Real* x, const Real* gy, Real* gx, Real* sums,
                      int64_t rows, int64_t columns);
  // The sum over all columns of row t of z times each row that a run of term t covers, added to the number of `sums` that
  // is the place of the row's content.
  void (*window_sums)(const Run* runs, int64_t count, const Real* z, const Real* rows, Real* sums, int64_t columns,
                      int32_t* room);
  // sums[i] += the sum of row i.
  void (*row_sums)(const Real* rows, Real* sums, int64_t count, int64_t columns);

  // Biases and slopes may be null; x may be y. Backwards x is the value of the activation where `by_value` says so, else
  // its argument without the bias; gx may be gy.
  void (*activate)(const Activate& stage, const Real* bias, const Real* slope, const Real* x, Real* y, int64_t columns);
  void (*activate_vector)(const Activate& stage, const Real* bias, const Real* slope, const Real* x, Real* y);
  void (*activate_back)(const Activate& stage, const Real* bias, const Real* slope, const Real* x, const Real* gy,
                        Real* gx, Real* bias_sums, Real* slope_sums, int64_t columns, bool add);

  // One row of a recurrent net (cells.h): the gates are x + s, of the input and of the state; `before` and `after` are the
  // state, `memory` that of an LSTM, which changes in place; `kept` may be null. And the way back.
  void (*cell)(Cell kind, const Real* x, const Real* s, const Real* before, Real* memory, Real* after, Real* kept,
               int64_t size);
  void (*cell_back)(Cell kind, const Real* kept, const Real* before, const Real* memory, const Real* after,
                    const Real* grad, const Real* through, Real* direct, Real* grad_memory, Real* gx, Real* gs,
                    int64_t size);

  // y[i][p] = sum over k of w[i * depth + k] x[shifts[k] + p], for p below count rounded up to whole registers, which x and
  // the lines of y, `pitch` numbers apart, have room for.
  void (*convolve)(const Real* w, int64_t lines, int64_t depth, const int64_t* shifts, const Real* x, Real* y,
                   int64_t pitch, int64_t count);
  // The same with the entries of w alone, each with its shift; those of line i begin at start[i].
  void (*convolve_sparse)(const int32_t* start, const Real* values, const int32_t* shifts, int64_t lines, const Real* x,
                          Real* y, int64_t pitch, int64_t count);

  // Numbers of any storage as Real, and back.
  void (*widen)(const void* from, Storage storage, Real* to, int64_t count);
  void (*narrow)(const Real* from, Storage storage, void* to, int64_t count);
  int64_t lanes;  // numbers in one vector register
};

// What layers of convolutional arithmetic circuits do on tiles beside products of matrices (pooling.cpp says what each is).
template <class Real>
struct PoolKernels {
  typedef typename std::conditional<sizeof(Real) == 4, int32_t, int64_t>::type Integer;
  void (*column_tops)(const Real* x, int64_t rows, int64_t columns, bool of_sizes, Real* top);
  void (*powers)(const Real* top, Real* factor, Integer* exponent, int64_t columns);
  void (*scale_columns)(const Real* x, const Real* factor, Real* y, int64_t pitch, int64_t rows, int64_t columns);
  void (*multiply)(const Real* a, const Real* b, Real* y, int64_t count);
  void (*multiply_back)(const Real* gy, Real* a, Real* b, int64_t count);
  void (*multiply_four)(const Real* y, int64_t apart, Real* z, int64_t pitch, int64_t rows, int64_t columns, Real* top);
  void (*multiply_four_back)(const Real* gz, const Real* factor, Real* y, int64_t apart, int64_t rows, int64_t columns);
  void (*exponentials)(const Real* x, const Real* top, Real* y, int64_t rows, int64_t columns);
  void (*log_products)(const Real* y, int64_t window, int64_t apart, const Real* shift, Real* z, int64_t pitch,
                       int64_t rows, int64_t columns);
  void (*log_back)(const Real* gz, Real* y, int64_t count);
  void (*keep_positive)(const Real* x, Real* y, int64_t count);
  void (*normalize)(const Real* x, Real* factor, Real* z, int64_t pitch, int64_t rows, int64_t columns);
  void (*normalize_back)(const Real* gz, const Real* z, const Real* factor, Real* g, int64_t rows, int64_t columns);
};

// Tiles of bfloat16 numbers, for processors that multiply pairs of them and sum in float32 (bfloat16.cpp). All that a stage
// puts out is rounded to bfloat16, as by PyTorch's own products.
constexpr int64_t pair_columns = 32;      // the columns of a tile are a multiple of this
constexpr int64_t pair_depth = 32;        // rows of x: what a product reads is filled up to a multiple of this
constexpr int64_t fewest_for_pairs = 16;  // rows of a batch: fewer leave most of a tile empty

// What a contraction's weights take as panels: units of packing, and numbers. None where they are read as they are.
struct Panels {
  int64_t units, numbers;
};

struct PairKernels {
  void (*load)(const uint16_t* x, int64_t stride, int64_t count, int64_t features, uint16_t* tile, int64_t columns);
  void (*store)(const uint16_t* tile, int64_t columns, const uint16_t* bias, uint16_t* y, int64_t stride, int64_t count,
                int64_t features);
  void (*load_by_features)(const uint16_t* x, int64_t stride, int64_t count, int64_t features, uint16_t* tile,
                           int64_t columns);
  void (*store_by_features)(const uint16_t* tile, int64_t columns, const uint16_t* bias, uint16_t* y, int64_t stride,
                            int64_t count, int64_t features);
  Panels (*panels)(const Contract& stage);
  // Units begin .. end of them.
  void (*pack)(const Contract& stage, const uint16_t* weight, uint16_t* packed, int64_t begin, int64_t end);
  // The weight as panels where there are any; `scratch`, on a line of the cache, has room for `pair_columns` columns of
  // c rows, filled up.
  void (*contract)(const Contract& stage, const uint16_t* weight, const uint16_t* x, uint16_t* y, uint16_t* scratch,
                   int64_t columns, bool add);
  void (*copy)(const uint16_t* x, uint16_t* y, int64_t rows, int64_t columns, bool add);
  // What a thread does before the first of these products, and after the last; null for nothing.
  void (*begin)() = nullptr;
  void (*end)() = nullptr;
};

// What matrix registers do by themselves; all else is that of the kernels for pairs.
struct MatrixKernels {
  Panels (*panels)(const Contract& stage);
  void (*pack)(const Contract& stage, const uint16_t* weight, uint16_t* packed, int64_t begin, int64_t end);
  void (*contract)(const Contract& stage, const uint16_t* weight, const uint16_t* x, uint16_t* y, uint16_t* scratch,
                   int64_t columns, bool add);
  void (*begin)();
  void (*end)();
};

// Null where the compiler knew no such instructions: pairs in vector registers (AVX512_BF16), and in the matrix registers
// of AMX, which the machine has or the library emulates.
const PairKernels* pair_kernels();
const MatrixKernels* amx_kernels();
const MatrixKernels* emulated_amx_kernels();

// Whether the processor multiplies bfloat16 numbers in matrix registers, and the system lets this process use them: Linux
// wants to be asked, since it keeps room for their contents from then on. Of a processor with AVX-512.
bool amx_permitted();

struct InstructionSet {
  const char* name;
  const Kernels<float>* single;
  const Kernels<double>* wide;
  const PairKernels* pairs = nullptr;
  bool emulated = false;  // for tests alone: never chosen but by its own name
  const PoolKernels<float>* single_pool = nullptr;
  const PoolKernels<double>* wide_pool = nullptr;
};

// What this build holds, from the plainest to the widest; `supported` asks the machine.
constexpr int instruction_sets = 6;
const InstructionSet& instruction_set(int number);
bool supported(int number);

}  // namespace structmat

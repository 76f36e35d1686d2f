// Products of tiles of bfloat16 numbers in matrix registers (AMX): sums of 16 x 16 float32 numbers, to which one
// instruction adds the product of 16 x 32 weights and 32 rows of x, as pairs, of 16 columns. `Registers` has these
// instructions: those of the processor (amx.cpp), or their emulation (emulated_amx.h).
#pragma once

#include "pairs.h"

namespace structmat {
namespace STRUCTMAT_ISA {

constexpr int64_t register_rows = 16;    // of a matrix register, of 64 bytes each
constexpr int64_t packed_together = 32;  // matrices of neighbouring d that are packed at a time

// Of weights: 16 rows, 32 columns.
constexpr int64_t weight_rows = register_rows, weight_columns = pair_depth, weight_block = weight_rows * weight_columns;

inline int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Whether the matrix registers serve. One of their instructions takes 16 cycles, full or not, and does the work of 256
// of those for pairs, which take as many cycles or half of them. From 16 rows and 16 columns on it does that of 64 at
// least, since 17 rows fill little more than half of two registers, and 33 columns likewise. With less the gain is lost
// again to the way of the sums through memory, which takes as long for few columns as for many.
inline bool fills_registers(const Contract& s) { return s.b >= weight_rows && s.c >= weight_columns / 2; }

// Weights in blocks of one register, whose rows lie `row` numbers apart, blocks of further columns `deep`, of further
// rows `tall`.
struct Blocks {
  int64_t row, deep, tall;
};

inline Panels register_panels(const Contract& s) {
  if (s.stride_c == 1 && s.stride_d == 0 && s.b % weight_rows == 0 && s.c % weight_columns == 0) return {0, 0};
  const int64_t a = s.stride_a ? s.a : 1, d = s.stride_d ? s.d : 1, tall = parts(s.b, weight_rows);
  return {a * parts(d, packed_together) * tall, a * d * tall * parts(s.c, weight_columns) * weight_block};
}

// One block of weights at `from` for each of the matrices first .. first + 32, a number apart, to blocks `matrix` apart;
// rows and columns from `height` and `width` on are zero.
inline void pack_together_by_lines(const Contract& s, const Bits* from, int64_t height, int64_t width, Bits* to,
                                   int64_t matrix) {
  const __m512i zero = _mm512_setzero_si512();
  for (int64_t i = 0; i < weight_rows; ++i) {
    __m512i low[16], high[16];
#pragma GCC unroll 16
    for (int q = 0; q < 16; ++q) {
      const Bits* own = from + i * s.stride_b + 2 * q * s.stride_c;
      const __m512i one = i < height && 2 * q < width ? line(own) : zero;
      const __m512i two = i < height && 2 * q + 1 < width ? line(own + s.stride_c) : zero;
      low[q] = _mm512_unpacklo_epi16(one, two), high[q] = _mm512_unpackhi_epi16(one, two);
    }
    turn(low), turn(high);
#pragma GCC unroll 16
    for (int q = 0; q < 16; ++q) {
      const int64_t d = q / 4 * 8 + q % 4;
      _mm512_storeu_si512(to + d * matrix + i * weight_columns, low[q]);
      _mm512_storeu_si512(to + (d + 4) * matrix + i * weight_columns, high[q]);
    }
  }
}

// Panels hold matrix after matrix, of each the blocks of the first 16 rows, one after the other, and so on; filled up
// with zeros.
inline void pack_registers(const Contract& s, const Bits* weight, Bits* packed, int64_t begin, int64_t end) {
  const int64_t d = s.stride_d ? s.d : 1, groups = parts(d, packed_together), tall = parts(s.b, weight_rows);
  const int64_t deep = parts(s.c, weight_columns), matrix = tall * deep * weight_block;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t a = unit / (groups * tall), first = unit / tall % groups * packed_together, b = unit % tall;
    const int64_t count = d - first < packed_together ? d - first : packed_together;
    const int64_t height = s.b - b * weight_rows < weight_rows ? s.b - b * weight_rows : weight_rows;
    for (int64_t k = 0; k < deep; ++k) {
      const int64_t width = s.c - k * weight_columns < weight_columns ? s.c - k * weight_columns : weight_columns;
      const Bits* from = weight + a * s.stride_a + first * s.stride_d + b * weight_rows * s.stride_b +
                         k * weight_columns * s.stride_c;
      Bits* to = packed + (a * d + first) * matrix + (b * deep + k) * weight_block;
      if (s.stride_d == 1 && count == packed_together) {
        pack_together_by_lines(s, from, height, width, to, matrix);
        continue;
      }
      for (int64_t m = 0; m < count; ++m) {
        Bits* own = to + m * matrix;
        if (height < weight_rows || width < weight_columns) std::memset(own, 0, weight_block * sizeof *own);
        for (int64_t i = 0; i < height; ++i)
          for (int64_t j = 0; j < width; ++j)
            own[i * weight_columns + j] = from[m * s.stride_d + i * s.stride_b + j * s.stride_c];
      }
    }
  }
}

// `count` blocks of rows of the outcome, of `rows` rows that there are, times `deep` blocks of columns.
template <class Registers, int count>
void registers_of_rows(const Bits* w, const Blocks& blocks, int64_t deep, const __m512i* pairs, Bits* y, int64_t pitch,
                       int64_t rows, bool add) {
  static_assert(count == 1 || count == 2, "four registers of sums, two of weights, two of pairs");
  constexpr int64_t line_bytes = 64, both = 2 * line_bytes;
  alignas(64) float sums[count * register_rows][2][register_rows];  // of the low columns, and of the high ones
  const auto each_sum = [&](auto load_or_store) {
    load_or_store(std::integral_constant<int, 0>(), sums[0][0]);
    load_or_store(std::integral_constant<int, 1>(), sums[0][1]);
    if constexpr (count == 2) {
      load_or_store(std::integral_constant<int, 2>(), sums[register_rows][0]);
      load_or_store(std::integral_constant<int, 3>(), sums[register_rows][1]);
    }
  };
  if (add) {
    for (int64_t i = 0; i < count * register_rows; ++i) {
      const __m512i before = i < rows ? line(y + i * pitch) : _mm512_setzero_si512();
      _mm512_store_ps(sums[i][0], widen_low(before));
      _mm512_store_ps(sums[i][1], widen_high(before));
    }
    each_sum([](auto number, const float* from) { Registers::template load<number>(from, both); });
  } else {
    each_sum([](auto number, const float*) { Registers::template clear<number>(); });
  }
  for (int64_t k = 0; k < deep; ++k, w += blocks.deep, pairs += pair_depth) {
    Registers::template load<6>(pairs, both);
    Registers::template load<4>(w, blocks.row * int64_t(sizeof *w));
    Registers::template multiply<0, 4, 6>();
    Registers::template load<7>(pairs + 1, both);
    Registers::template multiply<1, 4, 7>();
    if constexpr (count == 2) {
      Registers::template load<5>(w + blocks.tall, blocks.row * int64_t(sizeof *w));
      Registers::template multiply<2, 5, 6>();
      Registers::template multiply<3, 5, 7>();
    }
  }
  each_sum([](auto number, float* to) { Registers::template store<number>(to, both); });
  const Rounding rounding;
  for (int64_t i = 0; i < rows; ++i)
    rounding.put(y + i * pitch, _mm512_load_ps(sums[i][0]), _mm512_load_ps(sums[i][1]));
}

template <class Registers>
void contract_in_registers(const Contract& s, const Bits* weight, const Bits* x, Bits* y, Bits* scratch,
                           int64_t columns, bool add) {
  __m512i* pairs = reinterpret_cast<__m512i*>(scratch);
  const bool packed = register_panels(s).units > 0;
  const int64_t pitch = s.d * columns, deep = parts(s.c, weight_columns);
  const Blocks blocks = packed ? Blocks{weight_columns, weight_block, deep * weight_block}
                               : Blocks{s.stride_b, weight_columns, weight_rows * s.stride_b};
  const int64_t matrix = parts(s.b, weight_rows) * blocks.tall;
  const int64_t step_a = !s.stride_a ? 0 : packed ? matrix * (s.stride_d ? s.d : 1) : s.stride_a;
  for (int64_t a = 0; a < s.a; ++a)
    for (int64_t p = 0; p < pitch; p += lanes) {
      const Bits* w = weight + a * step_a + (s.stride_d ? p / columns * matrix : 0);
      pair_up(x + a * s.c * pitch + p, pitch, s.c, deep * weight_columns, pairs);
      Bits* to = y + a * s.b * pitch + p;
      for (int64_t b = 0; b < s.b; b += 2 * weight_rows, w += 2 * blocks.tall) {
        const int64_t left = s.b - b, rows = left < 2 * weight_rows ? left : 2 * weight_rows;
        const auto kernel = rows > weight_rows ? registers_of_rows<Registers, 2> : registers_of_rows<Registers, 1>;
        kernel(w, blocks, deep, pairs, to + b * pitch, pitch, rows, add);
      }
    }
}

// The kernels as the executor takes them: blocks that fill no register stay with pairs in vector registers.
template <class Registers>
struct AmxKernels {
  static Panels panels(const Contract& s) {
    return fills_registers(s) ? register_panels(s) : pair_kernels()->panels(s);
  }
  static void pack(const Contract& s, const Bits* weight, Bits* packed, int64_t begin, int64_t end) {
    (fills_registers(s) ? pack_registers : pair_kernels()->pack)(s, weight, packed, begin, end);
  }
  static void contract(const Contract& s, const Bits* weight, const Bits* x, Bits* y, Bits* scratch, int64_t columns,
                       bool add) {
    const auto kernel = fills_registers(s) ? contract_in_registers<Registers> : pair_kernels()->contract;
    kernel(s, weight, x, y, scratch, columns, add);
  }
  // Known to the compiler: no code of this source may run to ask what the machine has.
  static constexpr MatrixKernels all = {panels, pack, contract, Registers::configure, Registers::release};
};

}  // namespace STRUCTMAT_ISA
}  // namespace structmat

// What csrc/emulated_amx.h says of the matrix registers, checked. With an argument: one thing that it must refuse.
#include "emulated_amx.h"

#include <cstdio>
#include <string>

using structmat::AmxConfiguration;
using structmat::EmulatedAmx;

namespace {

int failures = 0;

void expect(const char* what, float found, float wanted) {
  uint32_t one, two;
  std::memcpy(&one, &found, sizeof one), std::memcpy(&two, &wanted, sizeof two);  // so that zeros have signs
  if (one == two) return;
  std::printf("%s: %a instead of %a\n", what, found, wanted);
  ++failures;
}

uint16_t half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return uint16_t(bits >> 16);
}

// Sums of one row and one column, in register 0; weights in 1, pairs in 2, `depth` of them.
AmxConfiguration small(int depth) {
  AmxConfiguration c;
  std::memset(c.rows, 0, sizeof c.rows), std::memset(c.row_bytes, 0, sizeof c.row_bytes);
  c.rows[0] = 1, c.row_bytes[0] = 4, c.rows[1] = 1, c.row_bytes[1] = uint16_t(4 * depth);
  c.rows[2] = uint8_t(depth), c.row_bytes[2] = 4;
  return c;
}

// before + the sum of left[i] right[i].
float product(float before, std::initializer_list<float> left, std::initializer_list<float> right) {
  uint16_t a[32], b[32];
  int count = 0;
  for (float value : left) a[count++] = half(value);
  count = 0;
  for (float value : right) b[count++] = half(value);
  EmulatedAmx registers;
  registers.configure(small(count / 2));
  registers.load(0, &before, 4), registers.load(1, a, 64), registers.load(2, b, 4);
  registers.multiply(0, 1, 2);
  float found;
  registers.store(0, &found, 4);
  registers.release();
  return found;
}

void check() {
  const float large = 0x1p24f, tiny = 0x1p-130f, small_one = 0x1p-70f;
  expect("a product", product(1, {2, 3}, {5, 7}), 32);
  // Two ones, summed first, are not lost to 2^24; nor one after 2^24 - 2^24 among the even columns.
  expect("pairs are summed before they are added", product(large, {1, 1}, {1, 1}), large + 2);
  expect("even and odd columns apart", product(0, {large, 1, -large, 0}, {1, 1, 1, 0}), 1);
  expect("in order of the depth", product(0, {1, 0, large, 0, -large, 0}, {1, 0, 1, 0, 1, 0}), 0);
  expect("one rounding of product and sum", product(0, {1, 0, 0x1.02p0f, 0}, {-0x1.04p0f, 0, 0x1.02p0f, 0}), 0x1p-14f);
  expect("subnormal factors", product(0, {tiny, 0}, {large, 0}), 0);
  expect("subnormal sums before", product(tiny, {0, 0}, {0, 0}), 0);
  expect("subnormal products", product(0, {small_one, 0}, {small_one, 0}), 0);

  // Configured to 3 rows of 8 bytes: what lies beyond becomes zero, and stays in memory as it was.
  AmxConfiguration part;
  part.rows[0] = 3, part.row_bytes[0] = 8;
  float from[16][16], to[16][16] = {};
  for (auto& row : from)
    for (float& value : row) value = 1;
  EmulatedAmx registers;
  registers.configure(AmxConfiguration());
  registers.load(0, from, 64);
  registers.configure(part);
  registers.store(0, to, 64);
  expect("configuring clears", to[0][0], 0);
  registers.load(0, from, 64), registers.store(0, to, 64);
  expect("within", to[2][1], 1), expect("bytes beyond", to[2][2], 0), expect("rows beyond", to[3][0], 0);
  registers.clear(0), registers.store(0, to, 64);
  expect("cleared", to[2][1], 0);
  registers.release();
}

void misuse(const std::string& what) {
  static EmulatedAmx registers;
  AmxConfiguration c = small(4);
  if (what == "palette") c.palette = 2;
  if (what == "rows") c.rows[0] = 17;
  if (what == "bytes") c.row_bytes[1] = 65;
  if (what == "half") c.rows[3] = 1;
  if (what == "shape") c.rows[2] = 3;
  if (what != "unconfigured") registers.configure(c);
  if (what == "unused") registers.clear(5);
  if (what == "same") registers.multiply(0, 0, 2);
  registers.multiply(0, 1, 2);
  if (what != "left on") registers.release();
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1)
    misuse(arguments[1]);
  else
    check();
  return failures != 0;
}

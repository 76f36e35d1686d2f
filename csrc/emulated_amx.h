// The matrix registers of AMX as its reference describes them, for machines that lack them: tests run the kernels of
// amx.h over these. What the processor refuses ends the process.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace structmat {

// What configures the registers: their rows, and the bytes of each row.
struct AmxConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(AmxConfiguration) == 64, "as the instruction reads it");

// Those of one thread. Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, LDTILECFG to
// TDPBF16PS.
class EmulatedAmx {
 public:
  static constexpr int count = 8, most_rows = 16, most_bytes = 64;

  EmulatedAmx() = default;
  EmulatedAmx(const EmulatedAmx&) = delete;
  EmulatedAmx& operator=(const EmulatedAmx&) = delete;
  ~EmulatedAmx() {
    if (is_configured_) refuse();  // they are not to be left on
  }

  void configure(const AmxConfiguration& wanted) {
    if (wanted.palette != 1) refuse();
    for (int r = 0; r < 16; ++r) {
      const bool is_none = wanted.rows[r] == 0 && wanted.row_bytes[r] == 0;
      if (r >= count ? !is_none : wanted.rows[r] > most_rows || wanted.row_bytes[r] > most_bytes) refuse();
      if ((wanted.rows[r] == 0) != (wanted.row_bytes[r] == 0)) refuse();
    }
    configuration_ = wanted, is_configured_ = true;
    std::memset(bytes_, 0, sizeof bytes_);
  }

  void release() {
    is_configured_ = false;
    std::memset(bytes_, 0, sizeof bytes_);
  }

  void clear(int r) {
    check(r);
    std::memset(bytes_[r], 0, sizeof bytes_[r]);
  }

  // Rows of memory `stride` bytes apart; what is beyond the configured rows and bytes becomes zero.
  void load(int r, const void* from, int64_t stride) {
    clear(r);
    for (int i = 0; i < rows(r); ++i)
      std::memcpy(bytes_[r][i], static_cast<const char*>(from) + i * stride, row_bytes(r));
  }

  void store(int r, void* to, int64_t stride) const {
    check(r);
    for (int i = 0; i < rows(r); ++i) std::memcpy(static_cast<char*>(to) + i * stride, bytes_[r][i], row_bytes(r));
  }

  // sum += a b, in float32, of pairs of bfloat16 numbers: products with even columns of `a` and those with odd ones are
  // summed by themselves, each with one rounding, then together, then to what was there. Subnormal numbers are zero,
  // before and after each step, whatever the rounding and the flags of the thread.
  void multiply(int sum, int a, int b) {
    check(sum), check(a), check(b);
    if (sum == a || sum == b || a == b) refuse();
    if (rows(sum) != rows(a) || row_bytes(sum) != row_bytes(b) || row_bytes(a) != 4 * rows(b)) refuse();
    if (row_bytes(sum) % 4 || row_bytes(a) % 4) refuse();
    const int columns = row_bytes(sum) / 4;
    for (int m = 0; m < rows(sum); ++m) {
      float parts[most_bytes / 4][2] = {}, row[most_bytes / 4] = {};
      for (int k = 0; k < rows(b); ++k)
        for (int n = 0; n < columns; ++n)
          for (int part = 0; part < 2; ++part)
            parts[n][part] = flushed(std::fmaf(wide(a, m, 2 * k + part), wide(b, k, 2 * n + part), parts[n][part]));
      std::memcpy(row, bytes_[sum][m], row_bytes(sum));
      for (int n = 0; n < columns; ++n) row[n] = flushed(flushed(row[n]) + flushed(parts[n][0] + parts[n][1]));
      std::memset(bytes_[sum][m], 0, most_bytes);
      std::memcpy(bytes_[sum][m], row, row_bytes(sum));
    }
    for (int m = rows(sum); m < most_rows; ++m) std::memset(bytes_[sum][m], 0, most_bytes);
  }

 private:
  [[noreturn]] static void refuse() { std::abort(); }
  void check(int r) const {
    if (!is_configured_ || r < 0 || r >= count || rows(r) == 0) refuse();
  }
  int rows(int r) const { return configuration_.rows[r]; }
  int row_bytes(int r) const { return configuration_.row_bytes[r]; }

  float wide(int r, int row, int column) const {
    uint16_t half;
    std::memcpy(&half, &bytes_[r][row][2 * column], sizeof half);
    const uint32_t bits = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return flushed(value);
  }

  static float flushed(float value) {
    return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
  }

  AmxConfiguration configuration_;
  bool is_configured_ = false;
  unsigned char bytes_[count][most_rows][most_bytes] = {};
};

}  // namespace structmat

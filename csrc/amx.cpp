// The kernels of amx.h, with the registers of the processor where the compiler knows them, and with emulated ones.
#include "kernels.h"

#if defined(__AVX512BF16__)

#define STRUCTMAT_ISA isa_amx
#include "amx.h"
#include "emulated_amx.h"

namespace structmat {
namespace isa_amx {

constexpr AmxConfiguration whole;  // all registers, each of 16 rows of 64 bytes

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)

// By instructions of our own: the compiler's take no template's numbers, and those of GCC 12 do not say that they read
// memory, so that it may write there later.
struct ProcessorRegisters {
  static void configure() { asm volatile("ldtilecfg %0" ::"m"(whole)); }
  static void release() { asm volatile("tilerelease"); }
  template <int number>
  static void clear() {
    asm volatile("tilezero %%tmm%c0" ::"i"(number));
  }
  template <int number>
  static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(number) : "memory");
  }
  template <int number>
  static void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(number) : "memory");
  }
  template <int sum, int a, int b>
  static void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
  }
};

#endif

struct EmulatedRegisters {
  static EmulatedAmx& own() {
    static thread_local EmulatedAmx registers;
    return registers;
  }
  static void configure() { own().configure(whole); }
  static void release() { own().release(); }
  template <int number>
  static void clear() {
    own().clear(number);
  }
  template <int number>
  static void load(const void* from, int64_t stride) {
    own().load(number, from, stride);
  }
  template <int number>
  static void store(void* to, int64_t stride) {
    own().store(number, to, stride);
  }
  template <int sum, int a, int b>
  static void multiply() {
    own().multiply(sum, a, b);
  }
};

}  // namespace isa_amx

const MatrixKernels* emulated_amx_kernels() { return &isa_amx::AmxKernels<isa_amx::EmulatedRegisters>::all; }

}  // namespace structmat

#endif

namespace structmat {

#if defined(__AVX512BF16__) && defined(__AMX_TILE__) && defined(__AMX_BF16__)
const MatrixKernels* amx_kernels() { return &isa_amx::AmxKernels<isa_amx::ProcessorRegisters>::all; }
#else
const MatrixKernels* amx_kernels() { return nullptr; }
#endif

#if !defined(__AVX512BF16__)
const MatrixKernels* emulated_amx_kernels() { return nullptr; }
#endif

}  // namespace structmat

// Whether this process may use the matrix registers of AMX.
#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace structmat {

#if defined(__x86_64__) && defined(__linux__)

bool amx_permitted() {
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24, states = 3u << 17;  // of leaf 7; of XCR0
  constexpr long request_permission = 0x1023, tile_data = 18;                      // of arch_prctl
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & amx_bf16) || !(d & amx_tile)) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & states) == states && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

#else

bool amx_permitted() { return false; }

#endif

}  // namespace structmat

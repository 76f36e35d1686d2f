// Which instruction sets this build holds, and which the machine has.
#include "kernels.h"

namespace structmat {

#define STRUCTMAT_DECLARE(set)      \
  namespace set {                   \
  const Kernels<float>* single();   \
  const Kernels<double>* wide();    \
  }
STRUCTMAT_DECLARE(isa_base)
#if defined(__x86_64__)
STRUCTMAT_DECLARE(isa_avx2)
STRUCTMAT_DECLARE(isa_avx512)
#endif

#if defined(__x86_64__)
namespace {

// Kernels for pairs whose products are those of matrix registers; null where there are none.
const PairKernels* with(const MatrixKernels* matrices, PairKernels& made) {
  if (!matrices || !pair_kernels()) return nullptr;
  made = *pair_kernels();
  made.panels = matrices->panels, made.pack = matrices->pack, made.contract = matrices->contract;
  made.begin = matrices->begin, made.end = matrices->end;
  return &made;
}

}  // namespace
#endif

const InstructionSet& instruction_set(int number) {
#if defined(__x86_64__)
  static PairKernels matrices, emulated;
#endif
  static const InstructionSet all[] = {
      {"base", isa_base::single(), isa_base::wide()},
#if defined(__x86_64__)
      {"avx2", isa_avx2::single(), isa_avx2::wide()},
      {"avx512", isa_avx512::single(), isa_avx512::wide()},
      {"avx512_bf16", isa_avx512::single(), isa_avx512::wide(), pair_kernels()},
      {"amx", isa_avx512::single(), isa_avx512::wide(), with(amx_kernels(), matrices)},
      {"amx_emulated", isa_avx512::single(), isa_avx512::wide(), with(emulated_amx_kernels(), emulated), true},
#else
      {"avx2", isa_base::single(), isa_base::wide()},
      {"avx512", isa_base::single(), isa_base::wide()},
      {"avx512_bf16", isa_base::single(), isa_base::wide()},
      {"amx", isa_base::single(), isa_base::wide()},
      {"amx_emulated", isa_base::single(), isa_base::wide(), nullptr, true},
#endif
  };
  return all[number];
}

bool supported(int number) {
#if defined(__x86_64__)
  if (number == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (number == 2) return has_avx512;
  const bool has_pairs = has_avx512 && pair_kernels() && __builtin_cpu_supports("avx512bf16");
  if (number == 3) return has_pairs;
  if (number == 4) {
    static const bool granted = has_pairs && amx_kernels() && amx_permitted();
    return granted;
  }
  if (number == 5) return has_pairs;
#endif
  return number == 0;
}

}  // namespace structmat

// Which instruction sets this build holds, and which the machine has.
#include "kernels.h"

namespace structmat {

#define STRUCTMAT_DECLARE(set)               \
  namespace set {                            \
  const Kernels<float>* single();            \
  const Kernels<double>* wide();             \
  const PoolKernels<float>* single_pool();   \
  const PoolKernels<double>* wide_pool();    \
  }
STRUCTMAT_DECLARE(isa_base)
#if defined(__x86_64__)
STRUCTMAT_DECLARE(isa_avx2)
STRUCTMAT_DECLARE(isa_avx512)
#endif

namespace {

struct Tables {
  const Kernels<float>* single;
  const Kernels<double>* wide;
  const PoolKernels<float>* single_pool;
  const PoolKernels<double>* wide_pool;
};
#define STRUCTMAT_TABLES(set) Tables{set::single(), set::wide(), set::single_pool(), set::wide_pool()}

}  // namespace

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
  const auto of = [](const char* name, const Tables& set, const PairKernels* pairs = nullptr, bool emulated = false) {
    return InstructionSet{name, set.single, set.wide, pairs, emulated, set.single_pool, set.wide_pool};
  };
  static const InstructionSet all[] = {
      of("base", STRUCTMAT_TABLES(isa_base)),
#if defined(__x86_64__)
      of("avx2", STRUCTMAT_TABLES(isa_avx2)),
      of("avx512", STRUCTMAT_TABLES(isa_avx512)),
      of("avx512_bf16", STRUCTMAT_TABLES(isa_avx512), pair_kernels()),
      of("amx", STRUCTMAT_TABLES(isa_avx512), with(amx_kernels(), matrices)),
      of("amx_emulated", STRUCTMAT_TABLES(isa_avx512), with(emulated_amx_kernels(), emulated), true),
#else
      of("avx2", STRUCTMAT_TABLES(isa_base)),
      of("avx512", STRUCTMAT_TABLES(isa_base)),
      of("avx512_bf16", STRUCTMAT_TABLES(isa_base)),
      of("amx", STRUCTMAT_TABLES(isa_base)),
      of("amx_emulated", STRUCTMAT_TABLES(isa_base), nullptr, true),
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

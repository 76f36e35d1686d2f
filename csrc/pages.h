// Fresh memory for large outcomes.
#pragma once

#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace structmat {

constexpr int64_t large_outcome = 32 << 20;  // bytes from which the C library takes fresh pages for every allocation

// Asks for pages of 2 MB where an outcome is that large: the first touch of 8192 pages of 4 KB can take longer than the
// product. STRUCTMAT_LARGE_PAGES=0 turns it off, for machines whose memory is in too many pieces.
inline void use_large_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  static const bool wanted = [] {
    const char* set = std::getenv("STRUCTMAT_LARGE_PAGES");
    return !(set && set[0] == '0' && set[1] == 0);
  }();
  if (!wanted || bytes < large_outcome) return;
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + uintptr_t(bytes)) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace structmat

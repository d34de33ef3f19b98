// Chooses the kernels for the processor this runs on.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace tangelo::cpu {
namespace {

const Kernels* best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const char* asked = std::getenv("TANGELO_CPU_KERNELS");
  if (asked != nullptr && std::strcmp(asked, "generic") == 0) return &generic_kernels;
  if (asked != nullptr && std::strcmp(asked, "avx2") == 0 && avx2) return &avx2_kernels;
  if (asked != nullptr && std::strcmp(asked, "avx512") == 0 && avx512) return &avx512_kernels;
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return &avx512_bf16_kernels;
  if (avx512) return &avx512_kernels;
  if (avx2) return &avx2_kernels;
#endif
  return &generic_kernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const chosen = best();
  return *chosen;
}

}  // namespace tangelo::cpu

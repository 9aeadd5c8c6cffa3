// Which levels this build has and this processor runs.
#include "kernels.h"

namespace mtllm::cpu {

const Kernels* kernels_of(int level) {
  if (level == 0) return &kernels_baseline();
#if MTLLM_X86
  // A processor with AVX2 and FMA has F16C.
  if (level == 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &kernels_avx2();
  if (level == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return &kernels_avx512();
#endif
  return nullptr;
}

}  // namespace mtllm::cpu

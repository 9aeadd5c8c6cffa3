#include "levels.h"

#define MTLLM_JOIN(left, right) left##right
#define MTLLM_TABLE(level) MTLLM_JOIN(kernels_, level)

namespace mtllm::cpu {

const Kernels& MTLLM_TABLE(MTLLM_LEVEL)() {
  static constexpr Kernels kernels{&MTLLM_LEVEL::pool, &MTLLM_LEVEL::span_sums, &MTLLM_LEVEL::backward,
                                   &MTLLM_LEVEL::rms_norm, &MTLLM_LEVEL::rms_norm_backward, &MTLLM_LEVEL::rope,
                                   &MTLLM_LEVEL::swiglu, &MTLLM_LEVEL::swiglu_backward, &MTLLM_LEVEL::attention};
  return kernels;
}

}  // namespace mtllm::cpu

// The one file that knows Python: addresses and sizes in, a status out. Arguments stand in the order of the headers.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include "mtllm/norm_pool.h"

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

mtllm::Status norm_pool_forward(int dtype, std::uintptr_t hidden_states, std::int64_t row_stride, std::uintptr_t weight,
                                bool weight_is_float32, std::uintptr_t cu_seqlens, std::uintptr_t pooled,
                                std::uintptr_t normed_mean, std::uintptr_t partial, std::int64_t num_tokens,
                                std::int64_t num_sentences, std::int64_t width, std::int64_t chunk, float eps, int pooling,
                                int device, std::uintptr_t stream) {
  return mtllm::norm_pool_forward(static_cast<mtllm::DType>(dtype), pointer<void>(hidden_states), row_stride,
                                  pointer<void>(weight), weight_is_float32, pointer<std::int32_t>(cu_seqlens),
                                  pointer<void>(pooled), pointer<float>(normed_mean), pointer<float>(partial), num_tokens,
                                  num_sentences, width, chunk, eps, static_cast<mtllm::Pooling>(pooling), device,
                                  pointer<CUstream_st>(stream));
}

mtllm::Status norm_pool_backward(int dtype, std::uintptr_t grad_pooled, std::uintptr_t hidden_states,
                                 std::int64_t row_stride, std::uintptr_t weight, bool weight_is_float32,
                                 std::uintptr_t cu_seqlens, std::uintptr_t grad_hidden, std::int64_t num_tokens,
                                 std::int64_t num_sentences, std::int64_t width, std::int64_t chunk, float eps, int pooling,
                                 int device, std::uintptr_t stream) {
  return mtllm::norm_pool_backward(static_cast<mtllm::DType>(dtype), pointer<void>(grad_pooled),
                                   pointer<void>(hidden_states), row_stride, pointer<void>(weight), weight_is_float32,
                                   pointer<std::int32_t>(cu_seqlens), pointer<void>(grad_hidden), num_tokens,
                                   num_sentences, width, chunk, eps, static_cast<mtllm::Pooling>(pooling), device,
                                   pointer<CUstream_st>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.attr("architectures") = MTLLM_ARCHITECTURES;
  module.attr("cuda_version") = CUDART_VERSION;
  module.def("status_message", &mtllm::status_message);
  module.def("norm_pool_forward", &norm_pool_forward);
  module.def("norm_pool_backward", &norm_pool_backward);
}

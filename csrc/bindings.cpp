// The one file that knows Python: addresses and sizes in, a status out. Arguments stand in the order of the headers.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include "mtllm/distillation_loss.h"
#include "mtllm/norm_pool.h"
#include "mtllm/stack_projection.h"

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

mtllm::Status norm_pool_forward(int dtype, std::uintptr_t hidden_states, std::int64_t row_stride, std::uintptr_t weight,
                                bool weight_is_float32, std::uintptr_t cu_seqlens, std::uintptr_t pooled,
                                std::uintptr_t normed_mean, std::uintptr_t partial, std::int64_t num_tokens,
                                std::int64_t num_sentences, std::int64_t width, std::int64_t chunk, float eps, int pooling,
                                std::uintptr_t stream) {
  return mtllm::norm_pool_forward(static_cast<mtllm::DType>(dtype), pointer<void>(hidden_states), row_stride,
                                  pointer<void>(weight), weight_is_float32, pointer<std::int32_t>(cu_seqlens),
                                  pointer<void>(pooled), pointer<float>(normed_mean), pointer<float>(partial), num_tokens,
                                  num_sentences, width, chunk, eps, static_cast<mtllm::Pooling>(pooling),
                                  pointer<CUstream_st>(stream));
}

mtllm::Status norm_pool_backward(int dtype, std::uintptr_t grad_pooled, std::uintptr_t hidden_states,
                                 std::int64_t row_stride, std::uintptr_t weight, bool weight_is_float32,
                                 std::uintptr_t cu_seqlens, std::uintptr_t grad_hidden, std::int64_t num_tokens,
                                 std::int64_t num_sentences, std::int64_t width, std::int64_t chunk, float eps, int pooling,
                                 std::uintptr_t stream) {
  return mtllm::norm_pool_backward(static_cast<mtllm::DType>(dtype), pointer<void>(grad_pooled),
                                   pointer<void>(hidden_states), row_stride, pointer<void>(weight), weight_is_float32,
                                   pointer<std::int32_t>(cu_seqlens), pointer<void>(grad_hidden), num_tokens,
                                   num_sentences, width, chunk, eps, static_cast<mtllm::Pooling>(pooling),
                                   pointer<CUstream_st>(stream));
}

using Address = std::uintptr_t;

mtllm::StackShape stack_shape(std::int64_t num_tokens, std::int64_t width, std::int64_t columns, std::int64_t num_rotated,
                              std::int64_t head_dim, float eps) {
  return {num_tokens, width, columns, num_rotated, head_dim, eps};
}

mtllm::RopeTables rope_tables(Address cos, Address sin, std::int64_t row_stride, bool is_float32, Address position_ids) {
  return {pointer<void>(cos), pointer<void>(sin), row_stride, is_float32, pointer<std::int64_t>(position_ids)};
}

mtllm::Status stack_products(int dtype, Address states, std::int64_t d, Address up_weight, Address up_bias,
                             bool up_bias_is_float32, Address weight, Address residual, Address x, Address raw,
                             Address squares, const mtllm::StackShape& shape, Address stream) {
  return mtllm::stack_products(static_cast<mtllm::DType>(dtype), pointer<void>(states), d, pointer<void>(up_weight),
                               pointer<void>(up_bias), up_bias_is_float32, pointer<void>(weight), pointer<void>(residual),
                               pointer<void>(x), pointer<float>(raw), pointer<float>(squares), shape,
                               pointer<CUstream_st>(stream));
}

mtllm::Status stack_epilogue(int dtype, Address x, Address squares, Address raw, Address bias, Address qkv_bias,
                             const mtllm::RopeTables& rope, Address qkv, Address rstd, const mtllm::StackShape& shape,
                             Address stream) {
  return mtllm::stack_epilogue(static_cast<mtllm::DType>(dtype), pointer<void>(x), pointer<float>(squares),
                               pointer<float>(raw), pointer<float>(bias), pointer<float>(qkv_bias), rope,
                               pointer<void>(qkv), pointer<float>(rstd), shape, pointer<CUstream_st>(stream));
}

mtllm::Status stack_backward(int dtype, Address grad_x, Address grad_qkv, Address x, Address qkv, Address rstd,
                             Address qkv_bias, const mtllm::RopeTables& rope, Address grad_hidden, Address grad_raw,
                             const mtllm::StackShape& shape, Address stream) {
  return mtllm::stack_backward(static_cast<mtllm::DType>(dtype), pointer<void>(grad_x), pointer<void>(grad_qkv),
                               pointer<void>(x), pointer<void>(qkv), pointer<float>(rstd), pointer<float>(qkv_bias), rope,
                               pointer<void>(grad_hidden), pointer<void>(grad_raw), shape,
                               pointer<CUstream_st>(stream));
}

mtllm::SpanSide span_side(int dtype, Address states, std::int64_t row_stride, Address weight, bool weight_is_float32,
                          float eps, Address indices, Address offsets) {
  return {static_cast<mtllm::DType>(dtype), pointer<void>(states), row_stride, pointer<void>(weight), weight_is_float32,
          eps, pointer<std::int64_t>(indices), pointer<std::int64_t>(offsets)};
}

mtllm::LossShape loss_shape(int kind, float beta, std::int64_t width) {
  return {static_cast<mtllm::LossKind>(kind), beta, width};
}

mtllm::Status distillation_spans(const mtllm::SpanSide& student, const mtllm::SpanSide& teacher,
                                 const mtllm::LossShape& shape, Address sums, Address scratch, std::int64_t num_spans,
                                 std::int64_t blocks, Address stream) {
  return mtllm::distillation_spans(student, teacher, shape, pointer<float>(sums), pointer<float>(scratch), num_spans, blocks,
                                   pointer<CUstream_st>(stream));
}

mtllm::Status distillation_backward(const mtllm::SpanSide& student, const mtllm::SpanSide& teacher,
                                    const mtllm::LossShape& shape, Address grad_loss, Address span_scale,
                                    Address grad_pooled, Address cu_seqlens, Address token_offsets, Address token_spans,
                                    Address grad_hidden, Address grad_weight, Address scratch, std::int64_t num_tokens,
                                    std::int64_t num_sentences, std::int64_t chunk, Address stream) {
  return mtllm::distillation_backward(student, teacher, shape, pointer<float>(grad_loss), pointer<float>(span_scale),
                                      pointer<float>(grad_pooled), pointer<std::int32_t>(cu_seqlens),
                                      pointer<std::int64_t>(token_offsets), pointer<std::int64_t>(token_spans),
                                      pointer<void>(grad_hidden), pointer<float>(grad_weight), pointer<float>(scratch),
                                      num_tokens, num_sentences, chunk, pointer<CUstream_st>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.attr("architectures") = MTLLM_ARCHITECTURES;
  module.attr("cuda_version") = CUDART_VERSION;
  module.def("status_message", &mtllm::status_message);
  module.def("norm_pool_forward", &norm_pool_forward);
  module.def("norm_pool_backward", &norm_pool_backward);
  pybind11::class_<mtllm::StackShape>(module, "StackShape", pybind11::module_local());
  pybind11::class_<mtllm::RopeTables>(module, "RopeTables", pybind11::module_local());
  module.def("stack_shape", &stack_shape);
  module.def("rope_tables", &rope_tables);
  module.def("stack_products", &stack_products);
  module.def("stack_epilogue", &stack_epilogue);
  module.def("stack_backward", &stack_backward);
  pybind11::class_<mtllm::SpanSide>(module, "SpanSide", pybind11::module_local());
  pybind11::class_<mtllm::LossShape>(module, "LossShape", pybind11::module_local());
  module.def("span_side", &span_side);
  module.def("loss_shape", &loss_shape);
  module.def("distillation_spans", &distillation_spans);
  module.def("distillation_backward", &distillation_backward);
}

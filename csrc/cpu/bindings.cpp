// The one file of this module that knows Python: addresses and sizes in, a status out, without the interpreter's lock.
#include <pybind11/pybind11.h>

#include "kernels.h"

namespace {

using namespace mtllm::cpu;
using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

States states(int dtype, Address data, std::int64_t row_stride, Address weight, float eps) {
  return {static_cast<DType>(dtype), pointer<void>(data), row_stride, pointer<float>(weight), eps};
}

Sentences sentences(Address ends, std::int64_t count, std::int64_t tokens, std::int64_t width) {
  return {pointer<std::int32_t>(ends), count, tokens, width};
}

Bags bags(Address indices, Address offsets) { return {pointer<std::int64_t>(indices), pointer<std::int64_t>(offsets)}; }

SpanTerm span_term(const States& teacher, const Bags& student_bags, const Bags& teacher_bags, std::int64_t count, int kind,
                   float beta, Address token_offsets, Address token_spans, float scale) {
  return {teacher, student_bags, teacher_bags, count, {static_cast<LossKind>(kind), beta},
          pointer<std::int64_t>(token_offsets), pointer<std::int64_t>(token_spans), scale};
}

Status pool(int level, const States& states, const Sentences& sentences, int pooling, Address mean, Address partial,
            int threads) {
  const Kernels* kernels = kernels_of(level);
  if (!kernels) return kUnsupportedArgument;
  kernels->pool(states, sentences, static_cast<Pooling>(pooling), pointer<float>(mean), pointer<float>(partial), threads);
  return 0;
}

Status span_sums(int level, const States& student, const SpanTerm& spans, std::int64_t width, Address sums, Address partial,
                 Address scratch, int threads) {
  const Kernels* kernels = kernels_of(level);
  if (!kernels) return kUnsupportedArgument;
  kernels->span_sums(student, spans, width, pointer<float>(sums), pointer<double>(partial), pointer<float>(scratch), threads);
  return 0;
}

Status backward(int level, const States& states, const Sentences& sentences, int pooling, Address grad_pooled,
                const SpanTerm* spans, Address grad_hidden, Address grad_weight, Address by_piece, Address scratch,
                int threads) {
  const Kernels* kernels = kernels_of(level);
  if (!kernels) return kUnsupportedArgument;
  kernels->backward(states, sentences, static_cast<Pooling>(pooling), pointer<float>(grad_pooled), spans,
                    pointer<void>(grad_hidden), pointer<float>(grad_weight), pointer<float>(by_piece),
                    pointer<float>(scratch), threads);
  return 0;
}

Heads heads(int dtype, Address data, std::int64_t token_stride, std::int64_t head_stride, std::int64_t tokens,
            std::int64_t count, std::int64_t width) {
  return {static_cast<DType>(dtype), pointer<void>(data), token_stride, head_stride, tokens, count, width};
}

Status rms_norm(int level, const Heads& x, const Heads* residual, Address weight, float eps, Address normed, Address summed,
                Address rstd, int threads) {
  const Kernels* kernels = kernels_of(level);
  if (!kernels) return kUnsupportedArgument;
  kernels->rms_norm(x, residual, pointer<float>(weight), eps, pointer<void>(normed), pointer<void>(summed),
                    pointer<float>(rstd), threads);
  return 0;
}

Status rms_norm_backward(int level, const Heads& grad_normed, const Heads* grad_summed, const Heads& x, Address weight,
                         Address rstd, Address grad, Address grad_weight, int threads) {
  const Kernels* kernels = kernels_of(level);
  if (!kernels) return kUnsupportedArgument;
  kernels->rms_norm_backward(grad_normed, grad_summed, x, pointer<float>(weight), pointer<float>(rstd),
                             pointer<void>(grad), pointer<float>(grad_weight), threads);
  return 0;
}

Status rope(int level, const Heads& x, Address cos, Address sin, std::int64_t table_stride, float sign, Address out,
            std::int64_t out_token_stride, int threads) {
  const Kernels* kernels = kernels_of(level);
  if (!kernels) return kUnsupportedArgument;
  kernels->rope(x, pointer<float>(cos), pointer<float>(sin), table_stride, sign, pointer<void>(out), out_token_stride,
                threads);
  return 0;
}

Status swiglu(int level, const Heads& gate, const Heads& up, Address out, std::int64_t out_stride, int threads) {
  const Kernels* kernels = kernels_of(level);
  if (!kernels) return kUnsupportedArgument;
  kernels->swiglu(gate, up, pointer<void>(out), out_stride, threads);
  return 0;
}

Status swiglu_backward(int level, const Heads& grad, const Heads& gate, const Heads& up, Address grad_gate,
                       std::int64_t gate_stride, Address grad_up, std::int64_t up_stride, int threads) {
  const Kernels* kernels = kernels_of(level);
  if (!kernels) return kUnsupportedArgument;
  kernels->swiglu_backward(grad, gate, up, pointer<void>(grad_gate), gate_stride, pointer<void>(grad_up), up_stride,
                           threads);
  return 0;
}

Status attention(int level, const Heads& q, const Heads& k, const Heads& v, const Sentences& sentences,
                 std::int64_t longest, float scale, Address out, Address scratch, int threads) {
  const Kernels* kernels = kernels_of(level);
  if (!kernels) return kUnsupportedArgument;
  kernels->attention(q, k, v, sentences, longest, scale, pointer<void>(out), pointer<float>(scratch), threads);
  return 0;
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  using Unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
  module.attr("piece_tokens") = kPieceTokens;
  module.attr("piece_spans") = kPieceSpans;
  module.attr("scratch_rows") = kScratchRows;
  module.def("runs", [](int level) { return kernels_of(level) != nullptr; });
  pybind11::class_<States>(module, "States", pybind11::module_local());
  pybind11::class_<Sentences>(module, "Sentences", pybind11::module_local());
  pybind11::class_<Bags>(module, "Bags", pybind11::module_local());
  pybind11::class_<SpanTerm>(module, "SpanTerm", pybind11::module_local());
  module.def("states", &states);
  module.def("sentences", &sentences);
  module.def("bags", &bags);
  module.def("span_term", &span_term);
  pybind11::class_<Heads>(module, "Heads", pybind11::module_local());
  module.def("heads", &heads);
  module.def("rms_norm", &rms_norm, Unlocked());
  module.def("rms_norm_backward", &rms_norm_backward, Unlocked());
  module.def("rope", &rope, Unlocked());
  module.def("swiglu", &swiglu, Unlocked());
  module.def("swiglu_backward", &swiglu_backward, Unlocked());
  module.def("attention_scratch", &attention_scratch);
  module.def("attention", &attention, Unlocked());
  module.def("pool", &pool, Unlocked());
  module.def("span_sums", &span_sums, Unlocked());
  module.def("backward", &backward, Unlocked());
}

"""The CPU path: PyTorch's flash kernel, for short sentences matrix products, on every run of equally long neighbours.

A batch that was sorted by length (``encode`` sorts) has few runs, so few calls; nothing is padded or copied on the
way in. Forward and backward are explicit, hence the same in eager mode and inside a compiled graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mtllm_fast.core import buffers, native_cpu
from mtllm_fast.core.tensors import adjacent_columns, wide_dtype

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
# Up to this length two batched products and a softmax beat the flash kernel, which works on one head's 32 queries at a
# time: 1.4 to 1.6 times at 38 tokens, equal at about 200.
_SHORT = 128
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _equal_length_runs(cu_seqlens: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """(first row, end row, sentences, length) of each run of equally long, non-empty neighbours."""
    bounds = cu_seqlens.tolist()
    start, last = 0, len(bounds) - 1
    while start < last:
        length = bounds[start + 1] - bounds[start]
        end = start + 1
        while end < last and bounds[end + 1] - bounds[end] == length:
            end += 1
        if length:
            yield bounds[start], bounds[end], end - start, length
        start = end


def _as_batch(x_THd: Tensor, count: int, length: int) -> Tensor:
    """Rows of one run as ``[count, H, length, hd]``, a view."""
    return x_THd.unflatten(0, (count, length)).transpose(1, 2)


def forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out ``[T, H, hd]`` and the log-sum-exp of the scores ``[T, H]``; dead-tail rows are zero."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_zeros(q.shape[:2], dtype=wide_dtype(q.dtype))
    for start, end, count, length in _equal_length_runs(cu_seqlens):
        batch = (_as_batch(t[start:end], count, length) for t in (q, k, v))
        out_NHLd, lse_NHL = _FORWARD(*batch, 0.0, False, attn_mask=None, scale=scale)
        out[start:end] = out_NHLd.transpose(1, 2).flatten(0, 1)
        lse[start:end] = lse_NHL.transpose(1, 2).flatten(0, 1)
    return out, lse


def inference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """``forward`` without the log-sum-exp, which only a backward needs."""
    natively = _native_serves(q)
    out = buffers.empty(*q.shape, dtype=q.dtype)
    out[int(cu_seqlens[-1]) :] = 0
    if natively:
        _native(q, k, v, cu_seqlens, scale, out)
    for start, end, count, length in _equal_length_runs(cu_seqlens):
        if natively and length <= _SHORT:
            continue
        q_NHLd, k_NKLd, v_NKLd = (_as_batch(t[start:end], count, length) for t in (q, k, v))
        if length > _SHORT:
            out_NHLd = _FORWARD(q_NHLd, k_NKLd, v_NKLd, 0.0, False, attn_mask=None, scale=scale)[0]
        else:
            out_NHLd = _short(q_NHLd, k_NKLd, v_NKLd, scale)
        out[start:end] = out_NHLd.transpose(1, 2).flatten(0, 1)
    return out


def _native_serves(q: Tensor) -> bool:
    # Half precision keeps the way that the recorded bf16 figures were checked with: as accurate, other last bits.
    return q.dtype == torch.float32 and native_cpu.why_not_cpu(q) is None and q.shape[-1] % 16 == 0


def _native(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, out: Tensor) -> None:
    """The sentences of up to ``_SHORT`` tokens, by the kernel of csrc/cpu/attention.cpp."""
    threads = torch.get_num_threads()
    scratch = buffers.empty(threads, native_cpu.extension().attention_scratch(_SHORT, q.shape[-1]))
    bounds = cu_seqlens.contiguous()
    q, k, v = map(adjacent_columns, (q, k, v))
    sentences = native_cpu.extension().sentences(bounds.data_ptr(), len(bounds) - 1, q.shape[0], q.shape[-1])
    status = native_cpu.extension().attention(
        native_cpu.level(), *map(native_cpu.heads, (q, k, v)), sentences, _SHORT, scale, out.data_ptr(),
        scratch.data_ptr(), threads,
    )  # fmt: skip
    native_cpu.check("varlen_attention", status)


def _short(q_NHLd: Tensor, k_NKLd: Tensor, v_NKLd: Tensor, scale: float) -> Tensor:
    """Attention whose scores fit the cache, at least in float32. A key head's group of queries is one longer query."""
    dtype = wide_dtype(q_NHLd.dtype)
    q_NKGd = q_NHLd.to(dtype).unflatten(1, (k_NKLd.shape[1], -1)).flatten(2, 3).flatten(0, 1)
    k_NKLd, v_NKLd = (t.to(dtype).flatten(0, 1) for t in (k_NKLd, v_NKLd))
    scores = torch.baddbmm(q_NKGd.new_empty(()), q_NKGd, k_NKLd.mT, beta=0, alpha=scale)
    return torch.bmm(torch.softmax(scores, dim=-1), v_NKLd).view(q_NHLd.shape)


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    grads = tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    for start, end, count, length in _equal_length_runs(cu_seqlens):
        batch = (_as_batch(t[start:end], count, length) for t in (grad_out, q, k, v, out))
        lse_NHL = lse[start:end].unflatten(0, (count, length)).transpose(1, 2)
        parts = _BACKWARD(*batch, lse_NHL, 0.0, False, attn_mask=None, scale=scale)
        for grad, part in zip(grads, parts, strict=True):
            grad[start:end] = part.transpose(1, 2).flatten(0, 1)
    return grads[0], grads[1], grads[2]

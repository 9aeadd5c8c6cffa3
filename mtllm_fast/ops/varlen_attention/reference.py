"""The specification: softmax attention, sentence by sentence, in plain torch."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from mtllm_fast.core.tensors import wide_dtype


def varlen_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, scale: float, dropout_p: float = 0.0
) -> Tensor:
    """``softmax(scale * q k^T) v`` within each sentence; the softmax in float32 (float64 for float64 inputs).

    Shapes as in ``varlen_attention``; query head ``h`` reads key/value head ``h // (H / KV)``. Rows of a dead tail
    are zero. Reads ``cu_seqlens`` on the host and forms ``[H, L, L]`` scores: for checking, not for speed.
    """
    groups = q.shape[1] // k.shape[1]
    outputs = []
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        q_HLd = q[start:end].transpose(0, 1)
        k_HLd, v_HLd = (t[start:end].repeat_interleave(groups, dim=1).transpose(0, 1) for t in (k, v))
        scores = q_HLd @ k_HLd.transpose(1, 2) * scale
        dtype = wide_dtype(scores.dtype)
        weights = F.dropout(scores.softmax(-1, dtype=dtype).to(q.dtype), dropout_p)
        outputs.append((weights @ v_HLd).transpose(0, 1))
    outputs.append(q.new_zeros(q.shape[0] - bounds[-1], *q.shape[1:]))
    return torch.cat(outputs)

"""The specification of ``rope`` in plain torch; also what runs on a CPU.

    a' = a cos − b sin      b' = b cos + a sin

of the halves a, b of each head; with -sin for the inverse. Tables of the dtype of the heads are used as they are, so
that nothing is made beside the outputs: in half precision ``a cos`` is rounded, then the sum. Float32 tables of half
heads make everything float32, rounded once. On a CPU this goes block by block of tokens in a core's cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtllm_fast.core.tensors import wide_dtype
from mtllm_fast.ops.rms_norm.reference import token_blocks


def rotate(inputs: list[Tensor], outputs: list[Tensor], cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """q, k and perhaps v -> the same rotated, v copied; all ``[T, heads, hd]``, the tables ``[T, hd]``."""
    half = cos.shape[1] // 2
    dtype = cos.dtype if cos.dtype == inputs[0].dtype else wide_dtype(inputs[0].dtype)
    sign = 1 if inverse else -1
    for source, out in zip(inputs[:2], outputs[:2], strict=True):
        for start, stop in token_blocks(out):
            c, s = (table[start:stop, None, :half].to(dtype) for table in (cos, sin))
            rows = source[start:stop].to(dtype)
            a, b = rows[..., :half], rows[..., half:]
            rotated = out[start:stop] if out.dtype == dtype else torch.empty_like(rows)
            torch.mul(a, c, out=rotated[..., :half]).addcmul_(b, s, value=sign)
            torch.mul(b, c, out=rotated[..., half:]).addcmul_(a, s, value=-sign)
            if out.dtype != dtype:
                out[start:stop] = rotated
    if len(inputs) == 3:
        outputs[2].copy_(inputs[2])

"""The specification of ``swiglu`` in plain torch; also what runs on a CPU.

    out = gate σ(gate) up      dgate = d up σ(gate) (1 + gate (1 − σ(gate)))      dup = d gate σ(gate)

All tensors are ``[T, F]`` and the last ones are written. Computed in float32 (float64 for float64), rounded once. On a
CPU everything is made block by block of rows in a core's cache: memory is read once and written once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mtllm_fast.ops.norm_pool.reference import wide
from mtllm_fast.ops.rms_norm.reference import token_blocks


def forward(gate: Tensor, up: Tensor, out: Tensor) -> None:
    dtype = wide(gate.dtype)
    for start, stop in token_blocks(out):
        # silu into a new tensor, unless ``to`` has made one already
        rows = gate[start:stop].to(dtype)
        activated = F.silu(rows, inplace=rows.dtype != gate.dtype)
        if out.dtype == dtype:
            torch.mul(activated, up[start:stop], out=out[start:stop])
        else:
            out[start:stop] = activated.mul_(up[start:stop])


def backward(grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor) -> None:
    dtype = wide(gate.dtype)
    for start, stop in token_blocks(grad):
        d, g, u = (x[start:stop].to(dtype) for x in (grad, gate, up))
        grad_gate[start:stop] = torch.ops.aten.silu_backward(d * u, g)
        grad_up[start:stop] = F.silu(g).mul_(d)

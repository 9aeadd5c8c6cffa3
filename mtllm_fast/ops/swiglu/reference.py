"""The specification of ``swiglu`` in plain torch; also what runs in float64.

    out = gate σ(gate) up      dgate = d up σ(gate) (1 + gate (1 − σ(gate)))      dup = d gate σ(gate)

All tensors are ``[T, F]`` and the last ones are written. torch's kernels compute in float32 and round their results:
in half precision silu(gate) is rounded, and d up in the backward, as in Hugging Face's layers. No tensor is made: each
output is computed in place, on a CPU block by block of rows in a core's cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtllm_fast.ops.rms_norm.reference import token_blocks

_silu, _silu_backward = torch.ops.aten.silu.out, torch.ops.aten.silu_backward.grad_input


def forward(gate: Tensor, up: Tensor, out: Tensor) -> None:
    for start, stop in token_blocks(out):
        _silu(gate[start:stop], out=out[start:stop]).mul_(up[start:stop])


def backward(grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor) -> None:
    for start, stop in token_blocks(grad):
        d, g, u, dg, du = (x[start:stop] for x in (grad, gate, up, grad_gate, grad_up))
        _silu_backward(torch.mul(d, u, out=dg), g, grad_input=dg)
        _silu(g, out=du).mul_(d)

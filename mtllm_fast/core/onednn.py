"""Matrix products of plain CPU tensors by oneDNN, which also computes what follows while it writes the product.

One pass over memory where PyTorch takes two or three. Half precision on a CPU without instructions for it is multiplied
in float32, weights cast on the way: PyTorch's own loop takes six times as long. In float32 PyTorch multiplies by MKL
where it has it: which of the two is ahead differs from host to host (``benchmarks/results``), and MKL is what the
modules use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def serves(x: Tensor, *weights: Tensor) -> bool:
    """Whether ``linear`` takes these. Whoever calls it has made sure that nobody watches or differentiates the call."""
    if not x.is_cpu or not takes(x.dtype) or torch.is_autocast_enabled("cpu"):
        return False
    return all(w.dtype == x.dtype and w.device == x.device for w in weights)


@cache
def takes(dtype: torch.dtype) -> bool:
    """Whether products of this dtype are left to oneDNN here."""
    if dtype == torch.float32 and torch.backends.mkl.is_available():
        return False
    return product_dtype(dtype) is not None


@cache
def product_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype in which oneDNN multiplies tensors of ``dtype`` on this CPU; None if it does not."""
    if not torch.backends.mkldnn.is_available():
        return None
    native: dict[torch.dtype, Callable[[], bool]] = {
        torch.float32: lambda: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if dtype not in native:
        return None
    return dtype if native[dtype]() else torch.float32


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    times: Tensor | None = None,
    plus: Tensor | None = None,
) -> Tensor:
    """``activation(x Wᵀ + b) * times + plus``, at most one of the three: x ``[T, K]``, weight ``[N, K]`` -> ``[T, N]``.

    ``activation`` is oneDNN's name, ``"none"`` or ``"swish"``. (Its ``"relu"`` makes 0 of NaN.)
    """
    given, dtype = x.dtype, product_dtype(x.dtype)
    if dtype != given:  # asked once: six casts that do nothing take as long as a small product
        x, weight = x.to(dtype), weight.to(dtype)
        bias, times, plus = (None if t is None else t.to(dtype) for t in (bias, times, plus))
    onednn = torch.ops.mkldnn._linear_pointwise
    if plus is not None:
        y = onednn.binary(x, plus, weight, bias, "add")
    elif times is not None:
        y = onednn.binary(x, times, weight, bias, "mul")
    else:
        y = onednn(x, weight, bias, activation, [], None)
    return y if dtype == given else y.to(given)

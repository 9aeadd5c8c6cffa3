"""The model's matrix products and nothing else: the floor of a forward pass on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtllm_fast.bench.measure import timed
from mtllm_fast.bench.peers import Peer, by_length, token_budget_batches
from mtllm_fast.bench.sizes import Stack
from mtllm_fast.bench.workloads import IdArray, Workload
from mtllm_fast.core import onednn

BARE_GEMMS = "bare GEMMs"
Product = Callable[[Tensor, Tensor, Tensor], object]


def model_weights(stack: Stack) -> list[Tensor]:
    """The weights ``[N, K]`` that each token is multiplied by, in the order of the forward."""
    modules = [*stack.encoder.layers.modules(), stack.up_proj, *stack.llm.layers.modules()]
    return [module.weight.detach() for module in modules if isinstance(module, nn.Linear)]


def products(device: torch.device, dtype: torch.dtype) -> dict[str, Product]:
    """Ways to multiply x ``[T, K]`` by a weight ``[N, K]``; the buffer ``[T, N]`` spares a product its allocation."""
    found: dict[str, Product] = {
        "F.linear": lambda x, weight, buffer: F.linear(x, weight),
        "mm into a buffer": lambda x, weight, buffer: torch.mm(x, weight.t(), out=buffer),
    }
    if device.type == "cpu" and onednn.product_dtype(dtype) is not None:
        found["oneDNN"] = lambda x, weight, buffer: onednn.linear(x, weight)
    return found


def bare_gemms(stack: Stack, workload: Workload, batch_tokens: int) -> tuple[Peer, str]:
    """A peer that multiplies every weight by random activations of our own batches' sizes, and the way it multiplies:
    the fastest on this machine, each tried on the largest batch."""
    weights, device, dtype = model_weights(stack), stack.device, stack.dtype
    most = max(batch_tokens, int(workload.lengths.max()))
    generator = torch.Generator(device=device).manual_seed(0)
    inputs = {K: torch.randn(most, K, device=device, dtype=dtype, generator=generator) for K in _widths(weights, 1)}
    buffers = {N: torch.empty(most, N, device=device, dtype=dtype) for N in _widths(weights, 0)}

    def token_counts(texts: Sequence[IdArray]) -> list[int]:
        lengths = [len(text) for text in texts]
        batches = token_budget_batches(lengths, by_length(texts), batch_tokens)
        return [sum(lengths[i] for i in batch) for batch in batches]

    @torch.inference_mode()
    def multiply(product: Product, counts: Sequence[int]) -> None:
        for T in counts:
            for weight in weights:
                N, K = weight.shape
                product(inputs[K][:T], weight, buffers[N][:T])

    ways = products(device, dtype)
    largest = [max(token_counts(workload.ids))]
    seconds = {}
    for name, product in ways.items():
        multiply(product, largest)
        seconds[name] = min(timed(lambda p=product: multiply(p, largest), device) for _ in range(2))  # type: ignore[misc]
    fastest = min(seconds, key=seconds.__getitem__)

    def encode(texts: Sequence[IdArray]) -> Tensor:
        multiply(ways[fastest], token_counts(texts))
        return torch.empty(0)

    return Peer(BARE_GEMMS, encode, workload, same_semantics=False), fastest


def _widths(weights: Sequence[Tensor], dim: int) -> set[int]:
    return {weight.shape[dim] for weight in weights}

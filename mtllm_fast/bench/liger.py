"""The reference with Liger's Triton kernels in its LLM (https://github.com/linkedin/Liger-Kernel)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama import LlamaModel, modeling_llama

from mtllm_fast.bench.peers import BatchForward, masked_mean
from mtllm_fast.bench.sizes import Stack, plain_copy


def why_no_liger(device: torch.device) -> str | None:
    """Why this peer cannot run here, or None if it can."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed (pip install liger-kernel)"
    return None if device.type == "cuda" else "Liger's kernels need a GPU"


@contextmanager
def _module_as_it_was() -> Iterator[None]:
    """Afterwards ``modeling_llama`` has its own functions and classes again: Liger replaces them for every model of the
    process, the reference included."""
    before = {name: getattr(modeling_llama, name) for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(modeling_llama, name, value)


def liger_llm(stack: Stack) -> Any:
    """A ``LlamaModel`` over the stack's own weights whose norms and MLPs are Liger's. RoPE is a global function in
    ``modeling_llama``, which ``liger_forward`` replaces while it runs."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    llm = plain_copy(LlamaModel, stack.llm)
    with _module_as_it_was():
        apply_liger_kernel_to_llama(rope=False, fused_linear_cross_entropy=False, model=llm)
    return llm


def liger_forward(stack: Stack) -> BatchForward:
    """The padded forward, as ``reference_forward``: ids and mask [N, L] -> embeddings [N, D]."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    llm = liger_llm(stack)

    def forward(ids_NL: Tensor, mask_NL: Tensor) -> Tensor:
        encoded = stack.encoder(input_ids=ids_NL, attention_mask=mask_NL).last_hidden_state
        with _module_as_it_was():
            modeling_llama.apply_rotary_pos_emb = liger_rotary_pos_emb
            hidden = llm(inputs_embeds=stack.up_proj(encoded), attention_mask=mask_NL, use_cache=False)
        return masked_mean(hidden.last_hidden_state, mask_NL)

    return forward

"""The library's name among Hugging Face's attention implementations.

``attn_implementation="mtllm_varlen"`` (the default of a stack) lets the packed path choose the best installed
variable-length attention. A tower that is called by itself, padded, uses PyTorch's SDPA under that name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mtllm_fast.models.layers import PACKED_LLMS

if TYPE_CHECKING:
    from mtllm_fast.configuration import MTLLMConfig

DEFAULT_ATTENTION = "mtllm_varlen"

AttentionInterface.register(DEFAULT_ATTENTION, sdpa_attention_forward)
# Without the mask's twin transformers builds no mask at all and padding would be attended to, without a word.
AttentionMaskInterface.register(DEFAULT_ATTENTION, sdpa_mask)


def use_default_attention(config: MTLLMConfig) -> None:
    """Fill in what the user left open. An LLM without packed layers keeps the choice that transformers makes for it."""
    if config._attn_implementation is None:
        config._attn_implementation_internal = DEFAULT_ATTENTION
    towers = [config.nllb_config]
    if config.llm2vec_config.model_type in PACKED_LLMS:
        towers.append(config.llm2vec_config)
    for tower in towers:
        if tower._attn_implementation is None:
            tower._attn_implementation = DEFAULT_ATTENTION

"""The load-time probe: an LLM in a stack must see later tokens and must not react to padding or neighbours.

Both fail without an error when transformers changes how masks are built, and both ruin embeddings. The probe runs
one layer on a handful of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version

from mtllm_fast.core.errors import NotBidirectionalError
from mtllm_fast.models.towers import evaluating, run_llm, run_other_llm
from mtllm_fast.packing import PackedLayout, position_ids_from_cu_seqlens

if TYPE_CHECKING:
    from mtllm_fast.models.modeling import MTLLM

_LENGTHS = (3, 4)


@torch.no_grad()
def check_bidirectional(model: MTLLM) -> None:
    """Raise ``NotBidirectionalError`` unless the stack's LLM is bidirectional and padding-invariant.

    A packed family is probed twice: one layer of this model on packed tokens, and a one-layer miniature of the same
    class as transformers runs it on padded tokens (the way a teacher runs). Any other LLM is probed as it is.
    """
    llm = model.llm2vec
    parameter = next(llm.parameters())
    if parameter.device.type == "meta":
        return
    if not model.packed_llm:
        _check(type(llm).__name__, functools.partial(run_other_llm, llm), llm)
        return
    with evaluating(llm):
        _check(type(llm).__name__, functools.partial(run_llm, llm, num_layers=1), llm)
    _check_family(type(llm), type(llm.config))


def _layout(*lengths: int, device: torch.device) -> PackedLayout:
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    position_ids = position_ids_from_cu_seqlens(cu_seqlens, sum(lengths))
    return PackedLayout(cu_seqlens=cu_seqlens, position_ids=position_ids, max_seqlen=max(lengths))


@functools.cache
def _check_family(llm_class: type[PreTrainedModel], config_class: type[PreTrainedConfig]) -> None:
    """Does the installed transformers honour ``is_causal=False`` for this class, padded?"""
    config = config_class(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=8, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    config.is_causal = False
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would reseed the GPUs too
        miniature = llm_class(config).float().eval()
    _check(llm_class.__name__, functools.partial(run_other_llm, miniature), miniature)


def _check(name: str, run: Callable[[Tensor, PackedLayout], Tensor], llm: PreTrainedModel) -> None:
    weight = next(p for p in llm.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    # Small inputs, as token embeddings are: next to a large residual stream bf16 would round the reaction away.
    tokens = 0.02 * torch.randn(sum(_LENGTHS) + 1, llm.config.hidden_size, generator=generator)
    *x, other = tokens.to(weight.device, weight.dtype).split([*_LENGTHS, 1])
    changed = torch.cat((x[0][:-1], other))  # the first sentence with another last token
    pair = _layout(*_LENGTHS, device=weight.device)
    first, second = run(torch.cat(x), pair).float().split(_LENGTHS)
    first_changed, second_again = run(torch.cat((changed, x[1])), pair).float().split(_LENGTHS)
    alone = run(x[0], _layout(_LENGTHS[0], device=weight.device)).float()

    def difference(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max() / first.abs().max())

    if not bool(first.isfinite().all() and second.isfinite().all()):
        raise NotBidirectionalError(
            f"{name} gives states that are not finite, so it cannot be probed: a weight is NaN or infinite "
            f"(mtllm-fast env --check MODEL names it)"
        )
    moved, leaked = difference(first[0], first_changed[0]), difference(second, second_again)
    reason = f"transformers {transformers_version}, attn_implementation={llm.config._attn_implementation!r}"
    if not moved > 1e-6:
        raise NotBidirectionalError(
            f"{name} is causal: its first token does not react to a change of the last one; "
            f"config.is_causal=False is not honoured ({reason})"
        )
    if not leaked < 0.25 * moved:
        raise NotBidirectionalError(f"{name} mixes the sentences of a batch: packing is ignored ({reason})")
    drift = difference(first, alone)
    if not drift < 64 * torch.finfo(weight.dtype).eps:
        raise NotBidirectionalError(f"{name} depends on padding: alone and in a batch differ by {drift:.1e} ({reason})")

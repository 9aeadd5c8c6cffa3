"""The ways to encode that the benchmark puts side by side. All start from the same token ids in host memory and end
with the embeddings [B, D] on the device in input order; all read the same parameters.

``reference``
    What the published checkpoint's own ``encode`` does: Hugging Face modules, eager, SDPA, batches padded to their
    longest text in input order, mean pooling under the mask.
``reference-sorted``
    The same, batches drawn from the whole set sorted by length (what sentence-transformers does).
``liger``
    ``reference-sorted`` with Liger's Triton kernels for RMSNorm, RoPE and SwiGLU in the LLM (GPU only).
``compiled``
    ``reference-sorted`` under ``torch.compile(dynamic=True)``; compilation happens in the warm-up and is counted apart.
``translate-greedy``, ``translate-beam4`` (together ``translate-test``)
    The same NLLB encoder with a decoder that generates English, then the LLM on the English tokens. Random weights
    never emit ``</s>`` by themselves, so the length is forced: each text's translation is taken to be as long as the
    text, and a batch ends with its longest translation. Batches are sorted by length, which favours this peer.
``ours``
    What ``MTLLM.encode`` does after tokenising: packed batches of similar length under a token budget, CUDA graphs for
    small ones; on a GPU after ``fuse()``, as for inference.
``ours-fp8``
    The same after ``fuse("fp8")`` (compute capability 8.9). Not held to the gate of the others, which it cannot pass,
    but to a cosine; the record has the smallest one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtllm_fast.bench.sizes import Stack, share_tensors
from mtllm_fast.bench.workloads import IdArray, Workload, flat
from mtllm_fast.core.buffers import reused
from mtllm_fast.models.encoding import upload

PAD_ID = 1
TRANSLATE_TEST = ("translate-greedy", "translate-beam4")
PEERS = ("reference", "reference-sorted", "liger", "compiled", *TRANSLATE_TEST, "ours", "ours-fp8")
TRAIN_PEERS = ("reference", "reference-checkpointed", "ours", "ours-checkpointed")

Encode = Callable[[Sequence[IdArray]], Tensor]
BatchForward = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Peer:
    """One way to encode, and the texts on which it is timed."""

    name: str
    encode: Encode
    workload: Workload
    same_semantics: bool = True  # computes the method's embeddings, so it must pass the gate
    min_cosine: float | None = None  # instead of the gate: of every embedding to the truth and to the reference's


def resolve_peers(names: Sequence[str], known: Sequence[str] = PEERS) -> tuple[str, ...]:
    """Peer names in the order of ``known``, ``translate-test`` expanded.

    Raises:
        ValueError: a name that is no peer.
    """
    chosen: set[str] = set()
    for name in names:
        expanded = TRANSLATE_TEST if name == "translate-test" else (name,)
        if not set(expanded) <= set(known):
            also = " or translate-test" if set(TRANSLATE_TEST) <= set(known) else ""
            raise ValueError(f"unknown peer {name!r}; choose from {', '.join(known)}{also}")
        chosen.update(expanded)
    return tuple(name for name in known if name in chosen)


def pad(texts: Sequence[IdArray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask, int64 [N, L] each, on the device."""
    longest = max(len(text) for text in texts)
    ids_NL = np.full((len(texts), longest), PAD_ID, dtype=np.int64)
    mask_NL = np.zeros((len(texts), longest), dtype=np.int64)
    for row, text in enumerate(texts):
        ids_NL[row, : len(text)] = text
        mask_NL[row, : len(text)] = 1
    return torch.from_numpy(ids_NL).to(device), torch.from_numpy(mask_NL).to(device)


def by_length(texts: Sequence[IdArray]) -> IdArray:
    """Indices of the texts, longest first: the largest batch comes first, so memory is reserved once."""
    return np.argsort([-len(text) for text in texts], kind="stable")


def in_input_order(rows: list[Tensor], order: IdArray) -> Tensor:
    """Undo ``order``: row ``i`` of the result belongs to text ``i``."""
    embeddings = torch.cat(rows)
    restored = torch.empty_like(embeddings)
    restored[torch.from_numpy(order).to(embeddings.device)] = embeddings
    return restored


def masked_mean(hidden_NLD: Tensor, mask_NL: Tensor) -> Tensor:
    """``sum_l m_l h_l / sum_l m_l``, [N, D]."""
    mask_NL1 = mask_NL.unsqueeze(-1).to(hidden_NLD.dtype)
    return (hidden_NLD * mask_NL1).sum(1) / mask_NL1.sum(1)


def reference_forward(stack: Stack) -> BatchForward:
    """The padded Hugging Face forward: ids and mask [N, L] -> embeddings [N, D]."""

    def forward(ids_NL: Tensor, mask_NL: Tensor) -> Tensor:
        encoded = stack.encoder(input_ids=ids_NL, attention_mask=mask_NL).last_hidden_state
        hidden = stack.llm(inputs_embeds=stack.up_proj(encoded), attention_mask=mask_NL, use_cache=False)
        return masked_mean(hidden.last_hidden_state, mask_NL)

    return forward


def padded_encode(forward: BatchForward, device: torch.device, batch_size: int, *, sort: bool) -> Encode:
    """Encode in padded batches of ``batch_size`` texts, in input order or sorted by length over the whole set."""

    @torch.inference_mode()
    def encode(texts: Sequence[IdArray]) -> Tensor:
        order = by_length(texts) if sort else np.arange(len(texts))
        batches = [order[start : start + batch_size] for start in range(0, len(texts), batch_size)]
        return in_input_order([forward(*pad([texts[i] for i in batch], device)) for batch in batches], order)

    return encode


def token_budget_batches(lengths: Sequence[int], order: IdArray, batch_tokens: int) -> list[IdArray]:
    """Consecutive runs of ``order`` of at most ``batch_tokens`` tokens each; a longer text gets a batch of its own."""
    batches, start, total = [], 0, 0
    for position, index in enumerate(order):
        if total and total + lengths[index] > batch_tokens:
            batches.append(order[start:position])
            start, total = position, 0
        total += lengths[index]
    return [*batches, order[start:]]


def packed_encode(model: Any, batch_tokens: int) -> Encode:
    """Encode as ``MTLLM.encode`` does: texts of similar length, ``batch_tokens`` real tokens a batch."""
    device = model.device

    def embed(texts: Sequence[IdArray]) -> Tensor:
        packed, cu_seqlens = flat(texts)
        pooled = model.graphs.run(model, packed, cu_seqlens, "pooled", at_once=False)
        if pooled is not None:
            return pooled
        ids_T, cu_seqlens_B = (upload(torch.from_numpy(part), device) for part in (packed, cu_seqlens))
        return model.encode_packed(ids_T, cu_seqlens_B, max(map(len, texts)))

    @torch.no_grad()  # like encode, not inference mode, whose tensors no graph may be captured on
    def encode(texts: Sequence[IdArray]) -> Tensor:
        model.refresh_fused(thorough=True)
        order = by_length(texts)
        batches = token_budget_batches([len(text) for text in texts], order, batch_tokens)
        with reused():
            return in_input_order([embed([texts[i] for i in batch]) for batch in batches], order)

    return encode


def inference_model(stack: Stack) -> Any:
    """The stack's model as it is for inference on its device. Fusing moves parameters, never another peer's tensors."""
    if stack.device.type == "cuda":
        stack.model.fuse()
    return stack.model


def fp8_model(stack: Stack) -> Any:
    """A second model over the same tensors whose LLM multiplies in fp8."""
    config = copy.deepcopy(stack.model.config)
    with torch.device("meta"):
        model = type(stack.model)(config)
    share_tensors(model, stack.model)
    model.eval().fuse("fp8")
    return model


def translate_encode(stack: Stack, translator: Any, batch_size: int, num_beams: int) -> Encode:
    """Translate each batch to English by forced-length generation, then encode the English with the LLM alone."""
    device, vocabulary = stack.device, stack.llm.config.vocab_size
    english_id = stack.encoder.config.vocab_size - 10  # any of the language codes: the weights are random

    def forward(texts: list[IdArray]) -> Tensor:
        ids_NL, mask_NL = pad(texts, device)
        longest = ids_NL.shape[1]
        generated = translator.generate(
            input_ids=ids_NL,
            attention_mask=mask_NL,
            forced_bos_token_id=english_id,
            min_new_tokens=longest,
            max_new_tokens=longest,
            num_beams=num_beams,
            do_sample=False,
        )
        english_NL = generated[:, 1:] % vocabulary  # without the decoder's start token; the LLM has its own ids
        hidden = stack.llm(input_ids=english_NL, attention_mask=mask_NL, use_cache=False).last_hidden_state
        return masked_mean(hidden, mask_NL)

    @torch.inference_mode()
    def encode(texts: Sequence[IdArray]) -> Tensor:
        order = by_length(texts)
        batches = [order[start : start + batch_size] for start in range(0, len(texts), batch_size)]
        return in_input_order([forward([texts[i] for i in batch]) for batch in batches], order)

    return encode

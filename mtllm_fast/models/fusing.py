"""``MTLLM.fuse``: the absorbed first stage for inference, checked when it is built and again whenever it is used.

In 8-bit precision, asked for by name, the LLM's other linear layers are derived with it (``precision.py``).

A composite is derived from parameters, so it must never outlive them: every use compares what it was built from (which
modules and parameters, their storage, version and, where that costs no waiting, a checksum of their bits) and builds it
anew if any of it has changed. It is no parameter and no buffer, so it enters no state dict.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mtllm_fast.core.dispatch import needs_grad
from mtllm_fast.core.errors import TokenizerNotFoundError
from mtllm_fast.models import precision as eight_bits
from mtllm_fast.models.freshness import checksum
from mtllm_fast.models.merging import merge_projections
from mtllm_fast.models.stack import compute_dtype, differentiates, stack_weights, why_not_fusable
from mtllm_fast.models.towers import evaluating, rope_tables, run_encoder
from mtllm_fast.ops.stack_projection import Composite, StackWeights, stack_projection
from mtllm_fast.ops.stack_projection.composite import absorb
from mtllm_fast.ops.varlen_attention.reference import varlen_attention_reference
from mtllm_fast.packing import PackedLayout, pack_token_ids, position_ids_from_cu_seqlens
from mtllm_fast.text.tokenization import tokenize
from mtllm_fast.tiny import article_1

if TYPE_CHECKING:
    from mtllm_fast.models.modeling import MTLLM

logger = logging.getLogger("mtllm_fast")

# A form serves if it errs no more than the modules per element, and at most so many times as much in the attention's
# output, where an error that all tokens share is not averaged away.
ATTENTION_FACTOR = 3.0
_CHECK_TOKENS = 256


@dataclass(frozen=True)
class FuseReport:
    """Which form ``fuse`` took and why; ``print`` it.

    Attributes:
        form: ``"absorbed"``, ``"absorbed + residual"`` or ``"unabsorbed"`` (the modules as they are).
        errors: for the modules and each form tried, the relative error against float64 of (q, k, v) and of the first
            attention's output; empty for float32 and wider models, which need no check.
        released: whether q, k and v of the first layer were moved to the host.
        precision: of the LLM's linear layers, or None for the model's own.
        quantised: how many of them.
        kept: the others that could have been, each with the reason why it is left as it is.
        note: what else there is to know of this precision on this machine.
    """

    form: str
    errors: dict[str, tuple[float, float]]
    released: bool
    precision: str | None = None
    quantised: int = 0
    kept: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def __str__(self) -> str:
        lines = [f"first stage: {self.form}" + (", its q, k and v on the host" if self.released else "")]
        lines += [f"  {name}: q, k, v {qkv:.1e}, attention {out:.1e}" for name, (qkv, out) in self.errors.items()]
        if self.precision is not None:
            lines += [
                f"{self.precision}: {self.quantised} linear layers, {len(self.kept)} left as they are; {self.note}"
            ]
            lines += [f"  {name} {reason}" for name, reason in self.kept.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Fused:
    """A composite (None: no form was accurate enough) and what it was built from."""

    composite: Composite | None
    sources: tuple[_Source, ...]
    report: FuseReport
    device: torch.device
    dtype: torch.dtype
    quantised: eight_bits.Quantised | None


def fuse(model: MTLLM, precision: str | None = None) -> Fused:
    """See ``MTLLM.fuse``."""
    eight_bits.check_precision(precision)
    if reason := why_not_fusable(model):
        raise ValueError(f"the first stage cannot be fused: {reason}")
    if reason := eight_bits.why_not(model, precision):
        raise ValueError(f"precision {precision!r} cannot be used: {reason}")
    device, dtype = model.up_proj.weight.device, model.up_proj.weight.dtype
    if device.type != "cpu":  # there oneDNN's products have epilogues of their own, and weights stay mapped to a file
        merge_projections(model.nllb_encoder)
        if precision is None:  # else every weight is replaced by its twin
            merge_projections(model.llm2vec)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        weights = stack_weights(model).map(lambda tensor: tensor.to(device))
        composite, form, errors = _build(model, weights)
    quantised = None if precision is None else eight_bits.quantise(model, precision)
    replaced = projections(model)
    plain = all(type(module) is nn.Linear for module in replaced)  # PEFT puts new adapters where the base weight is
    released = composite is not None and device.type == "cuda" and plain
    if released:
        for module in replaced:
            module.to("cpu")
    report = FuseReport(form, errors, released)
    if quantised is not None:
        count, note = len(quantised.origins), eight_bits.note(quantised)
        kept = {name: reason for name, (_, reason) in quantised.kept.items()}
        report = replace(report, precision=precision, quantised=count, kept=kept, note=note)
    return Fused(composite, _sources(model), report, device, dtype, quantised)


def unfuse(model: MTLLM, fused: Fused) -> None:
    """Take away what ``fuse`` derived and bring back what it moved to the host."""
    if fused.quantised is not None:
        eight_bits.restore(model, fused.quantised)
    if fused.report.released:
        for module in projections(model):  # whatever has been wrapped around them too
            module.to(fused.device)


def why_not(model: MTLLM, precision: str | None) -> str | None:
    """Why ``fuse`` would refuse this model, or None if it would not."""
    return why_not_fusable(model) or eight_bits.why_not(model, precision)


def why_not_usable(model: MTLLM, fused: Fused, encoded_Td: Tensor) -> str | None:
    """What the caller wants of the fused model that only the modules can give, or None."""
    if model.training or differentiates(model, encoded_Td):
        return "gradients"
    if fused.quantised is not None and torch.is_grad_enabled() and needs_grad(*model.llm2vec.parameters()):
        return "gradients"
    derived = fused.composite is not None or fused.quantised is not None
    if derived and fused.dtype != compute_dtype(encoded_Td):
        return f"another precision than that of {fused.dtype} weights"  # it was checked in its own
    return None


def is_fresh(model: MTLLM, fused: Fused, thorough: bool) -> bool:
    """Whether nothing that ``fuse`` derived weights from has changed. ``thorough``: read device memory too."""
    if why_not_fusable(model) is not None:
        return False
    if fused.quantised is not None and not eight_bits.is_fresh(model, fused.quantised, thorough):
        return False
    now = _sources(model, thorough)
    return len(now) == len(fused.sources) and all(map(_Source.is_same, now, fused.sources))


def projections(model: MTLLM) -> list[nn.Module]:
    """The modules that a composite replaces."""
    attn = model.llm2vec.layers[0].self_attn
    return [attn.q_proj, attn.k_proj, attn.v_proj]


class _Source(NamedTuple):
    """What is known of one tensor that a composite was built from."""

    identity: tuple[Any, ...]
    """Its modules and itself, storage, version, dtype, device, shape."""
    sample: int | None
    bits: int | None
    """Checksums of a sample and of all of its memory; None where reading it would wait or take too long."""

    def is_same(self, before: _Source) -> bool:
        pairs = ((self.sample, before.sample), (self.bits, before.bits))
        return self.identity == before.identity and all(now is None or now == then for now, then in pairs)


def _sources(model: MTLLM, thorough: bool = True) -> tuple[_Source, ...]:
    """In-place edits through ``.data`` (PEFT merges so) leave no trace but the bits.

    All of them are compared where that is little beside a forward: on a CPU, and on a GPU once per ``encode``. Of what
    lies on the host of a model on a GPU (50 MB at 8B, as long to read as one sentence takes) a sample is compared.
    """
    modules = tuple((id(module), *getattr(module, "merged_adapters", ())) for module in projections(model))
    on_cpu = model.up_proj.weight.device.type == "cpu"
    found = []
    for t in stack_weights(model).tensors():
        version = None if t.is_inference() else t._version
        identity = (modules, id(t), t.data_ptr(), version, t.dtype, t.device, tuple(t.shape))
        on_host = t.device.type == "cpu"
        whole = on_cpu or (thorough and not on_host)
        found.append(_Source(identity, checksum(t, 64) if on_host else None, checksum(t) if whole else None))
    return tuple(found)


def _build(model: MTLLM, weights: StackWeights) -> tuple[Composite | None, str, dict[str, tuple[float, float]]]:
    wide = absorb(weights)
    dtype = weights.up.dtype
    if wide.weight.dtype == dtype:
        return wide, "absorbed", {}
    states = _encoder_states(model)
    calibration, sample = states[: len(states) // 2], states[len(states) // 2 :]
    mean = calibration.mean(0, dtype=wide.weight.dtype)
    check = _Check(model, weights, sample[:_CHECK_TOKENS])
    errors = {"modules": check.error(None)}
    for form, residual in (("absorbed", False), ("absorbed + residual", True)):
        composite = wide.rounded(dtype, mean, residual=residual)
        errors[form] = check.error(composite)
        if errors[form][0] <= errors["modules"][0] and errors[form][1] <= ATTENTION_FACTOR * errors["modules"][1]:
            return composite, form, errors
        logger.warning("fuse: %s errs by %.1e (attention %.1e), the modules by %.1e (%.1e); trying the next safer form",
                       form, *errors[form], *errors["modules"])  # fmt: skip
    return None, "unabsorbed", errors


class _Check:
    """The error of a form on states of the encoder, taken as one sentence, against float64."""

    def __init__(self, model: MTLLM, weights: StackWeights, states: Tensor) -> None:
        self.weights, self.states = weights, states
        positions = torch.arange(len(states), device=states.device)
        self.rope = rope_tables(model.llm2vec, states, positions)
        rope = [table.double() for table in self.rope]
        self.truth = stack_projection(states.double(), weights.double(), *rope, form="unabsorbed")[1:]
        self.attended = self._attend(self.truth)

    def error(self, composite: Composite | None) -> tuple[float, float]:
        """Of the modules if ``composite`` is None."""
        form = "unabsorbed" if composite is None else "absorbed"
        qkv = stack_projection(self.states, self.weights, *self.rope, composite=composite, form=form)[1:]
        worst = max(_relative(a, b) for a, b in zip(qkv, self.truth, strict=True))
        return worst, _relative(self._attend(qkv), self.attended)

    def _attend(self, qkv: Sequence[Tensor]) -> Tensor:
        bounds = torch.tensor([0, len(self.states)], dtype=torch.int32)
        q, k, v = (t.double() for t in qkv)
        return varlen_attention_reference(q, k, v, bounds, scale=q.shape[-1] ** -0.5)


def _relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def _encoder_states(model: MTLLM) -> Tensor:
    device = model.up_proj.weight.device
    inputs = pack_token_ids(_calibration_ids(model))
    ids, cu_seqlens = (inputs[name].to(device) for name in ("input_ids", "cu_seqlens"))
    longest = int(cu_seqlens.diff().max())
    positions = position_ids_from_cu_seqlens(cu_seqlens, len(ids))
    layout = PackedLayout(cu_seqlens=cu_seqlens, position_ids=positions, max_seqlen=longest)
    with evaluating(model):
        return run_encoder(model.nllb_encoder, ids, layout)


def _calibration_ids(model: MTLLM) -> list[list[int]]:
    """Token ids of a text that comes with the package in many languages; without a tokenizer random ones."""
    try:
        tokenizer = model._find_tokenizer(local_files_only=True)
    except TokenizerNotFoundError:
        generator = torch.Generator().manual_seed(0)
        size = model.nllb_encoder.embed_tokens.num_embeddings
        return torch.randint(4, size, (16, 48), generator=generator).tolist()
    languages, texts = zip(*[*article_1().items()][::3], strict=True)
    tokenized = tokenize(tokenizer, texts, languages, 256)
    return [part.tolist() for part in np.split(tokenized.ids, tokenized.offsets[1:-1])]

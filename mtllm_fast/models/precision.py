"""Opt-in 8-bit products of the LLM's linear layers in inference: ``MTLLM.fuse(precision=...)``.

Each layer gets a *twin*, its weight quantised per output channel, and ``linear()`` multiplies by the twin whatever it
quantises per token. Left alone: the encoder, the up-projection, the first layer's q, k and v (one error there is the
same for all tokens, and they are 0.4 % of the work), norms, attention, pooling. A twin is derived from parameters: it
enters no state dict, and each use of the model compares what the twins were made from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mtllm_fast.core import int8
from mtllm_fast.core.checks import check_choice
from mtllm_fast.core.devices import compute_capability
from mtllm_fast.models.freshness import Sample
from mtllm_fast.models.plain import TWIN, Rows8, is_hooked, why_not_linear
from mtllm_fast.ops.quantize_rows import quantize_rows

if TYPE_CHECKING:
    from mtllm_fast.models.modeling import MTLLM

PRECISIONS = ("fp8", "int8", "fp8-emulated")
_Place = tuple[str, str, str]
"""Number of the layer, block, name."""
_FIRST_STAGE = tuple(("self_attn", name) for name in ("q_proj", "k_proj", "v_proj"))
_OTHER_PLACES = (("self_attn", "o_proj"), *(("mlp", name) for name in ("gate_proj", "up_proj", "down_proj")))
_PLACES = _FIRST_STAGE + _OTHER_PLACES
_GROUPS = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))


class _Derived:
    """A twin is never changed, so copies of a model share it; a pickled model goes without and makes it anew."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Derived:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (_nothing, ())


def _nothing() -> None:
    return None


def rows8(x: Tensor | Rows8) -> Rows8:
    """x in 8 bits, if it is not already."""
    return x if isinstance(x, Rows8) else Rows8(*quantize_rows(x), x.dtype)


class Fp8Twin(_Derived):
    """``scale_x (q_x q_wᵀ) scale_wᵀ + bias`` by ``torch._scaled_mm``: e4m3 in, the dtype of x out.

    With fast accumulation: Hopper's tensor cores then keep the sum over K in their own accumulators, of fewer bits than
    float32, instead of adding to float32 every 128 products. Its error is small beside that of 3 bits of mantissa in
    the operands, and without it the tensor cores wait for the additions (not measured; with it, docs/h200.md).
    """

    joint: tuple[Fp8Twin, tuple[Fp8Twin, ...]] | None = None
    reads_rows8 = True

    def __init__(self, module: nn.Linear) -> None:
        self.weight, scale = quantize_rows(module.weight.detach())
        self.scale = scale.t()
        self.bias = None if module.bias is None else module.bias.detach().clone()
        self.nbytes = self.weight.nbytes + self.scale.nbytes

    @classmethod
    def lay_side_by_side(cls, twins: list[Any]) -> None:
        """Make the twins of modules with the same input parts of one, which ``joint_twin`` finds."""
        biases = [twin.bias for twin in twins]
        if len({type(twin) for twin in twins}) > 1 or len({bias is None for bias in biases}) > 1:
            return
        whole = object.__new__(type(twins[0]))
        whole.weight = torch.cat([twin.weight for twin in twins])
        whole.scale = torch.cat([twin.scale for twin in twins], 1)
        whole.bias = None if biases[0] is None else torch.cat(biases)
        whole.nbytes = sum(twin.nbytes for twin in twins)
        sizes = [twin.weight.shape[0] for twin in twins]
        for twin, weight, scale in zip(twins, whole.weight.split(sizes), whole.scale.split(sizes, 1), strict=True):
            twin.weight, twin.scale, twin.joint = weight, scale, (whole, tuple(twins))

    def __call__(self, x: Tensor | Rows8) -> Tensor:
        q, scale, dtype = rows8(x)
        if q.shape[0] == 0:  # torch refuses the scales of no rows
            return q.new_empty(0, self.weight.shape[0], dtype=dtype)
        return torch._scaled_mm(
            q, self.weight.t(), scale, self.scale, bias=self.bias, out_dtype=dtype, use_fast_accum=True
        )


class EmulatedFp8Twin(Fp8Twin):
    """The same numbers, multiplied in float32 on any device: what fp8 costs in accuracy, not what it gains in time."""

    def __call__(self, x: Tensor | Rows8) -> Tensor:
        q, scale, dtype = rows8(x)
        y = (q.float() @ self.weight.float().t()) * scale * self.scale
        return (y if self.bias is None else y + self.bias).to(dtype)


class Int8Twin(_Derived):
    """``x wᵀ + bias`` in 8-bit integers on a CPU."""

    def __init__(self, module: nn.Linear) -> None:
        self.weight = int8.Int8Weight(module.weight)
        self.bias = None if module.bias is None else module.bias.detach().clone()
        self.nbytes = self.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        y = self.weight.multiply(x)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)


_TWINS: dict[str, type[Fp8Twin] | type[Int8Twin]] = {
    "fp8": Fp8Twin,
    "int8": Int8Twin,
    "fp8-emulated": EmulatedFp8Twin,
}


class _Known(NamedTuple):
    """What is known of one tensor, or that there is none."""

    name: str
    tensor: Tensor | None
    pointer: int
    version: int | None

    @classmethod
    def of(cls, name: str, tensor: Tensor | None) -> _Known:
        if tensor is None:
            return cls(name, None, 0, None)
        version = None if tensor.is_inference() else tensor._version
        return cls(name, tensor, tensor.data_ptr(), version)


class _Origin(NamedTuple):
    """What a twin was made from."""

    module: nn.Module
    tensors: tuple[_Known, ...]

    @classmethod
    def of(cls, module: nn.Module) -> _Origin:
        return cls(module, tuple(_Known.of(*item) for item in module._parameters.items()))

    def is_same(self, module: nn.Module) -> bool:
        """Identities, storage, versions."""
        if module is not self.module or is_hooked(module):
            return False
        found = module._parameters
        for name, tensor, pointer, version in self.tensors:
            if found.get(name) is not tensor:
                return False
            if tensor is None:
                continue
            if tensor.data_ptr() != pointer or (version is not None and tensor._version != version):
                return False
        return True


@dataclass
class Quantised:
    """The twins of a model: in which precision, what of, and which layers have none and why."""

    precision: str
    origins: dict[_Place, _Origin]
    kept: dict[str, tuple[nn.Module, str]]
    """By name: the module, and why it has no twin."""
    released: torch.device | None
    """Where the replaced weights were, if they were moved to the host."""
    sample: Sample | None = None
    """Of the weights on the host: edits through ``.data`` leave no other trace."""

    @property
    def nbytes(self) -> int:
        return sum(origin.module.__dict__[TWIN].nbytes for origin in self.origins.values())


def check_precision(precision: str | None) -> None:
    if precision is not None:
        check_choice("fuse", "precision", precision, PRECISIONS)


def why_not(model: MTLLM, precision: str | None) -> str | None:
    """Why this model cannot be run in ``precision`` here, or None if it can."""
    if precision is None:
        return None
    device, dtype = model.up_proj.weight.device, model.up_proj.weight.dtype
    if reason := why_not_here(precision, device, dtype):
        return reason
    reasons = [_why_not_layer(module, precision, device, dtype) for _, module in _linears(model)]
    return None if None in reasons else f"none of the LLM's linear layers can be quantised: the first {reasons[0]}"


def why_not_here(precision: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no model of this dtype can be run in ``precision`` on this device, or None."""
    if dtype == torch.float64:
        return "the model is float64"
    if precision == "int8":
        return f"int8 runs on a CPU, the model is on {device}" if device.type != "cpu" else int8.why_not_available()
    if precision == "fp8-emulated":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"fp8 needs an NVIDIA GPU, the model is on {device}; 'fp8-emulated' predicts its accuracy anywhere"
    if compute_capability(device.index) < (8, 9):
        return f"fp8 needs compute capability 8.9, this GPU has {'.'.join(map(str, compute_capability(device.index)))}"
    if not hasattr(torch, "_scaled_mm"):
        return "this PyTorch has no torch._scaled_mm"
    return None if dtype == torch.bfloat16 else f"fp8 multiplies into bfloat16, the model is {str(dtype)[6:]}"


def _why_not_layer(module: nn.Module, precision: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := why_not_linear(module):
        return reason
    weight: Any = module.weight
    if weight.is_meta:
        return "is not loaded"
    if weight.device != device or weight.dtype != dtype:
        return f"is {str(weight.dtype)[6:]} on {weight.device}"
    if precision == "fp8" and (module.in_features % 16 or module.out_features % 16):
        return f"is {module.out_features} by {module.in_features}, and fp8 needs multiples of 16"
    return None


def quantise(model: MTLLM, precision: str) -> Quantised:
    """Give every layer that can have one its twin; ask ``why_not`` first.

    On a GPU each weight goes to the host as its twin is made: at most one layer is there twice.
    """
    device, dtype = model.up_proj.weight.device, model.up_proj.weight.dtype
    released = device if device.type == "cuda" and precision == "fp8" else None
    quantised = Quantised(precision, {}, {}, released)
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for place, module in _linears(model):
                if reason := _why_not_layer(module, precision, device, dtype):
                    quantised.kept[_name(place)] = (module, reason)
                else:
                    _give_twin(quantised, place, module)
            _lay_side_by_side(model)
            tensors = (known.tensor for origin in quantised.origins.values() for known in origin.tensors)
            quantised.sample = Sample(tensor for tensor in tensors if tensor is not None)
    except BaseException:  # out of memory, interrupted: no model is left half in one precision
        restore(model, quantised)
        raise
    return quantised


def _name(place: _Place) -> str:
    return "llm2vec.layers." + ".".join(place)


def _give_twin(quantised: Quantised, place: _Place, module: nn.Module) -> None:
    twin = _TWINS[quantised.precision](module)  # type: ignore[arg-type]
    if quantised.released is not None:
        module.to("cpu")
    module.__dict__[TWIN] = twin  # nn.Module keeps what is set here out of parameters, buffers and state dicts
    quantised.origins[place] = _Origin.of(module)


def _lay_side_by_side(model: MTLLM) -> None:
    """Let one product compute q, k and v, and one gate and up. At most one group is in memory twice."""
    for layer in model.llm2vec.layers:
        for block, names in _GROUPS:
            twins = [getattr(getattr(layer, block), name).__dict__.get(TWIN) for name in names]
            if all(isinstance(twin, Fp8Twin) for twin in twins):
                Fp8Twin.lay_side_by_side(twins)


def restore(model: MTLLM, quantised: Quantised) -> None:
    """Take the twins away and bring the weights back."""
    for origin in quantised.origins.values():
        origin.module.__dict__.pop(TWIN, None)
    for module in model.llm2vec.modules():  # copies of layers have them too, in whatever place
        module.__dict__.pop(TWIN, None)
    if quantised.released is None:
        return
    for place, module in _linears(model):
        if place in quantised.origins:
            module.to(quantised.released)  # whatever has been wrapped around it too


def note(quantised: Quantised) -> str:
    """For the report: memory, and what this machine lacks."""
    where = "the weights they replace are on the host" if quantised.released else "beside the weights they replace"
    memory = f"{quantised.nbytes / 2**20:,.1f} MiB, {where}"
    if quantised.precision == "fp8-emulated":
        return f"{memory}; emulated: the accuracy of fp8, not its speed"
    if quantised.precision == "int8" and int8.activation_bits() < 8:
        return f"{memory}; activations in 7 bits: this CPU has no VNNI"
    return memory


def is_fresh(model: MTLLM, quantised: Quantised, thorough: bool) -> bool:
    """Whether nothing that the twins were made from has changed.

    A sample of the weights is compared where it is little beside a forward: on a CPU, and once per ``encode``.
    """
    sample = thorough or model.up_proj.weight.device.type == "cpu"
    origins = quantised.origins
    for place, module in _linears(model):
        origin = origins.get(place)
        same = origin.is_same(module) if origin is not None else quantised.kept.get(_name(place), (None,))[0] is module
        if not same:
            return False
    return not sample or quantised.sample is None or quantised.sample.unchanged()


def _linears(model: MTLLM) -> Iterator[tuple[_Place, nn.Module]]:
    """The linear layers that may have a twin. By way of ``_modules``: this runs on every forward."""
    for number, layer in model.llm2vec.layers._modules.items():
        blocks = layer._modules
        for block, name in _OTHER_PLACES if number == "0" else _PLACES:
            yield (number, block, name), blocks[block]._modules[name]

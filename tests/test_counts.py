"""The work of the 8B stack, counted on tensors without data: launches, and the bytes between the products."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaModel

from mtllm_fast.bench import counting, sizes
from mtllm_fast.core.registered import DECLARED
from mtllm_fast.models.layers import to_packed_layers
from mtllm_fast.models.merging import merge_projections
from mtllm_fast.models.towers import run_llm
from mtllm_fast.ops.stack_projection import Composite
from mtllm_fast.packing import PackedLayout

TOKENS, LENGTH = 4096, 512
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")
ATTENTION = "mtllm_fast::varlen_attention_cpu"


class Counter(counting._Counter):
    """Launches and bytes by op, without the parameters that torch's own ops read: no token adds to those."""

    def __init__(self, parameters: set[int]) -> None:
        super().__init__()
        self.parameters = parameters
        self.by_op: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        launches, moved = self.launches, self.bytes
        out = super().__torch_dispatch__(func, types, args, kwargs)
        entry = self.by_op.setdefault(func._schema.name, [0, 0])
        entry[0] += self.launches - launches
        if self.bytes > moved and func._schema.name not in DECLARED:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            moved += sum(tensor.nbytes for tensor in tensors if id(tensor) in self.parameters)
        entry[1] += self.bytes - moved
        return out

    def between_products(self) -> int:
        return sum(moved for name, (_, moved) in self.by_op.items() if name not in (*PRODUCTS, ATTENTION))


def stack_of_8b(residual: bool = False):
    """The 8B stack as it is after ``fuse()`` on a GPU, and its composite, which no values could be checked against."""
    model = sizes.make_stack("8b", torch.device("meta"), torch.bfloat16, 0).model
    merge_projections(model)
    columns = sum(getattr(model.llm2vec.layers[0].self_attn, f"{name}_proj").out_features for name in "qkv")
    shape = columns, model.config.nllb_config.d_model
    weight, rest = (torch.empty(shape, device="meta", dtype=torch.bfloat16) for _ in range(2))
    composite = Composite(weight, torch.empty(columns, device="meta"), residual=rest if residual else None)
    model.composite = lambda states: composite
    return model, composite


def encode(model) -> None:
    ids = torch.zeros(TOKENS, dtype=torch.int64, device="meta")
    cu_seqlens = torch.zeros(TOKENS // LENGTH + 1, dtype=torch.int32, device="meta")
    model.encode_packed(ids, cu_seqlens, LENGTH)


@pytest.fixture(scope="module")
def counted():
    """``encode_packed`` of the 8B stack as it runs after ``fuse()`` on a GPU."""
    model, _ = stack_of_8b()
    counter = Counter({id(parameter) for parameter in model.parameters()})
    with torch.no_grad(), counter:
        encode(model)
    return counter


def peak(model) -> int:
    """Bytes that live at once at most while it encodes, its weights included."""
    tracker = MemTracker()
    tracker.track_external(model)
    with torch.no_grad(), tracker:
        encode(model)
    return tracker.get_tracker_snapshot("peak")[torch.device("meta")]["Total"]


def test_no_weight_is_held_twice():
    """Peak memory of the fused model: at most 1.02 of the parameters' and the activations' of the plain one.

    The larger composite is counted, though q, k and v of the first layer, which it replaces, go to the host.
    """
    plain = sizes.make_stack("8b", torch.device("meta"), torch.bfloat16, 0).model
    fused, composite = stack_of_8b(residual=True)
    derived = sum(t.nbytes for t in (composite.weight, composite.bias, composite.residual) if t is not None)
    weights = sum(parameter.nbytes for parameter in plain.parameters())
    allowed = 1.02 * peak(plain)
    assert weights < peak(fused) + derived <= allowed


def test_launches_of_encode(counted):
    """At most 410; the reference makes 1466."""
    assert counted.launches <= 410, counted.by_op
    assert counted.by_op["aten::mm"][0] <= 32 * 3 + 12 * 2
    assert "aten::mul" not in counted.by_op or counted.by_op["aten::mul"][0] <= 4


def test_bytes_between_the_products_of_a_layer(counted):
    """At most 168 KiB per token and layer of the LLM; the reference moves 576.

    Norms 16 and 32, rotation 20, gate 84; and 8 for the residual that the last product of a layer adds onto.
    """
    moved = {name: counted.by_op[f"mtllm_fast::{name}"][1] for name in ("rms_norm", "rope", "swiglu")}
    accumulated = TOKENS * 4096 * 2 * 32
    assert 150 < (sum(moved.values()) + accumulated) / TOKENS / 32 / 1024 <= 168, moved
    whole = counted.between_products() / TOKENS / 1024
    assert whole <= 168 * 32 + 36 * 12, (
        counted.by_op
    )  # the encoder's layers: as many as Hugging Face's in one pass each


def lora_layers(count: int):
    """A PEFT-wrapped LLM of 8B layers in training, its bases merged."""
    options = {"is_causal": False, "use_cache": False, "num_hidden_layers": count, "dtype": torch.bfloat16}
    with torch.device("meta"):
        llm = LlamaModel(LlamaConfig(**{**sizes.SHAPES["8b"].llm, **options})).to(torch.bfloat16).requires_grad_(False)
    llm.config._attn_implementation = "sdpa"
    to_packed_layers(llm.layers)
    merge_projections(llm)
    adapters = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=r".*_proj")
    return peft.inject_adapter_in_model(adapters, llm).to(torch.bfloat16).train()


def step(layers: int) -> tuple[int, int, float]:
    """Launches on the device of the forward and of the backward, and KiB per token that the backward keeps."""
    llm = lora_layers(layers)
    layout = PackedLayout(
        cu_seqlens=torch.zeros(TOKENS // LENGTH + 1, dtype=torch.int32, device="meta"),
        position_ids=torch.zeros(TOKENS, dtype=torch.int64, device="meta"),
        max_seqlen=LENGTH,
    )
    x = torch.empty(TOKENS, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    forward, backward = Counter(set()), Counter(set())
    with forward, saved_tensors_hooks(keep, lambda tensor: tensor):
        y = run_llm(llm, x, layout)
    with backward:
        y.backward(torch.empty_like(y))
    for parameter in llm.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    on_the_host = forward.by_op["aten::randint"][0]  # the seeds of dropout
    saved = sum(size for size, _ in kept.values()) / TOKENS / 1024
    return forward.launches - on_the_host, backward.launches, saved


def test_a_training_step_of_a_lora_layer():
    """At most 14 launches forward, 24 backward and 95 KiB per token kept; PEFT's modules take 88, 112 and 262."""
    forward, backward, saved = (after - before for before, after in zip(step(2), step(3), strict=True))
    assert forward <= 14
    assert backward <= 24
    assert saved <= 95


def test_every_op_declares_what_its_kernels_do():
    for op in torch._C._dispatch_get_all_op_names():
        name, _, overload = op.partition(".")
        if name.startswith("mtllm_fast::") and not overload and "varlen_attention" not in name:
            assert name in DECLARED, name

"""``MTLLM.fuse(precision=...)``: what it computes, what it leaves alone, and every way for a twin to go stale."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import peft
import pytest
import torch
from stacks import CPU_SCALES_ROWS, LORA, NEEDS_ROW_SCALES, batch, new_stack, with_lora
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mtllm_fast import MTLLM
from mtllm_fast.models import precision as precision_module
from mtllm_fast.models.linear import joint_product
from mtllm_fast.models.plain import TWIN, is_linear
from mtllm_fast.testing.tolerance import relative_error
from mtllm_fast.tiny import article_1

ON_A_CPU = ["int8", "fp8-emulated"]
QUANTISED = 4 + 7  # of the two layers: all but the first one's q, k and v


def quantised_stack(precision: str = "int8", family: str = "llama", **options) -> MTLLM:
    model = new_stack(family, up_proj_bias=True, **options).eval()
    model.fuse(precision)
    return model


@torch.no_grad()
def outputs(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    return model(**(inputs or batch())).pooler_output


def twins(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if module.__dict__.get(TWIN) is not None}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", ON_A_CPU)
def test_small_stacks_stay_close(precision: str, dtype: torch.dtype, family: str) -> None:
    model = new_stack(family, dtype=dtype, up_proj_bias=True).eval()
    plain = outputs(model)
    report = model.fuse(precision)
    assert (report.precision, report.quantised, report.kept) == (precision, QUANTISED, {})
    close = torch.cosine_similarity(outputs(model).double(), plain.double())
    assert close.min() > {"int8": 0.9999, "fp8-emulated": 0.9995}[precision]
    assert close.max() < 1 - 1e-7, "the twins must be used"
    model.unfuse()
    assert torch.equal(outputs(model), plain)


@pytest.mark.parametrize(("precision", "closest"), [("int8", 0.9997), ("fp8-emulated", 0.998)])
def test_the_tiny_model_in_many_languages(precision: str, closest: float) -> None:
    model = MTLLM.from_pretrained("tiny")
    languages, texts = zip(*article_1().items(), strict=True)
    plain = model.encode(texts, languages)
    model.fuse(precision)
    assert torch.cosine_similarity(model.encode(texts, languages), plain).min() > closest


@pytest.mark.skipif(not CPU_SCALES_ROWS, reason=NEEDS_ROW_SCALES)
def test_fp8_end_to_end_with_the_products_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_module, "why_not_here", lambda *_: None)
    emulated = outputs(quantised_stack("fp8-emulated", dtype=torch.bfloat16))
    assert relative_error(outputs(quantised_stack("fp8", dtype=torch.bfloat16)), emulated) < 1e-2


@torch.no_grad()
def test_projections_of_one_input_are_one_product() -> None:
    model = quantised_stack("fp8-emulated", dtype=torch.bfloat16)
    layer = model.llm2vec.layers[1]
    attention, mlp = layer.self_attn, layer.mlp
    for modules in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
        x = torch.randn(5, modules[0].in_features, dtype=torch.bfloat16)
        alone = [module.__dict__[TWIN](x) for module in modules]
        whole = joint_product(modules, x)
        assert torch.equal(whole, torch.cat(alone, 1))
        del modules[-1].__dict__[TWIN]  # as a wrapper that hides it would
        assert joint_product(modules, x) is None
    first = model.llm2vec.layers[0].self_attn  # the composite's
    assert joint_product((first.q_proj, first.k_proj, first.v_proj), x) is None


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_what_twins_read_is_rounded_where_it_is_made(family: str) -> None:
    """One pass each: norm (and sum) or gate with the rounding. Only attention's output takes a pass of its own."""
    model = quantised_stack("fp8-emulated", family=family)
    with Recorded() as recorded:
        outputs(model)
    assert recorded.calls["quantize_rows"] == QUANTISED - 4, "of 2 o, 2 gate and up, 2 down, 1 q, k and v"
    assert recorded.calls["swiglu"] == 0
    second_layer(model).mlp.down_proj.register_forward_hook(lambda *_: None)
    with Recorded() as recorded:
        outputs(model)
    assert recorded.calls["swiglu"] == 1, "a hooked module reads states"


class Recorded(TorchDispatchMode):
    """How often each op of ours was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name().partition("::")[2].partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_which_layers_have_a_twin() -> None:
    model = quantised_stack()
    first = {"self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    second = first | {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
    expected = {f"llm2vec.layers.{i}.{name}" for i, names in ((0, first), (1, second)) for name in names}
    assert twins(model) == expected
    model.unfuse()
    assert not twins(model)
    model.fuse()
    assert not twins(model), "opt-in"


def test_results_do_not_depend_on_the_batch() -> None:
    model = quantised_stack()
    together = outputs(model, **batch((9, 4, 6), left=()))
    alone = outputs(model, **{name: value[1:2, :4] for name, value in batch((9, 4, 6), left=()).items()})
    # Nothing but float32's order of addition before the rounding, which may tip a value over to the next integer.
    assert relative_error(alone[0], together[1]) < 1e-3


@pytest.mark.parametrize("precision", ON_A_CPU)
def test_saved_bit_for_bit_while_quantised(precision: str, tmp_path) -> None:
    model, plain = quantised_stack(precision), new_stack(up_proj_bias=True).eval()
    expected = plain.state_dict()
    for _ in range(2):
        found = model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        model.unfuse()
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in plain.named_buffers()]
    model.fuse(precision)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(MTLLM.from_pretrained(tmp_path)), outputs(plain))


def second_layer(model: nn.Module) -> nn.Module:
    return model.llm2vec.layers[1]


def in_place(model: MTLLM) -> None:
    with torch.no_grad():
        second_layer(model).mlp.up_proj.weight.mul_(3)


def through_data(model: MTLLM) -> None:
    second_layer(model).mlp.up_proj.weight.data.mul_(3)


def assign_data(model: MTLLM) -> None:
    weight = second_layer(model).mlp.down_proj.weight
    weight.data = weight.data.flip(0)


def replace_a_parameter(model: MTLLM) -> None:
    second_layer(model).self_attn.v_proj.weight = nn.Parameter(second_layer(model).self_attn.v_proj.weight.detach() * 4)


def replace_a_module(model: MTLLM) -> None:
    second_layer(model).mlp.down_proj = copy.deepcopy(second_layer(model).mlp.down_proj)
    nn.init.normal_(second_layer(model).mlp.down_proj.weight, std=0.5)


def replace_a_layer(model: MTLLM) -> None:
    model.llm2vec.layers[1] = copy.deepcopy(model.llm2vec.layers[0])


def load_into_a_module(model: MTLLM) -> None:
    mlp = second_layer(model).mlp
    mlp.load_state_dict({name: value.flip(0) for name, value in mlp.state_dict().items()})


def load_other(model: MTLLM) -> None:
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})


def hook(model: MTLLM) -> None:
    second_layer(model).mlp.down_proj.register_forward_hook(lambda module, args, out: out * 4)


def merge_and_unload(model: MTLLM) -> None:
    """Adds to ``weight.data`` and puts the same modules back: neither an identity nor a version tells."""
    assert with_lora(model).merge_and_unload() is model


def optimizer_step(model: MTLLM) -> None:
    model.train()
    model(**batch()).pooler_output.square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    model.zero_grad()
    model.eval()


STALE = [
    in_place, through_data, assign_data, replace_a_parameter, replace_a_module, replace_a_layer, load_into_a_module,
    load_other, hook, merge_and_unload, optimizer_step,
]  # fmt: skip


@pytest.mark.parametrize("change", STALE, ids=lambda change: change.__name__)
def test_a_changed_weight_is_never_stale(change) -> None:
    model = quantised_stack()
    before = outputs(model)
    change(model)
    after = outputs(model)
    model.unfuse()
    assert not twins(model)
    exact = outputs(model)
    assert relative_error(exact, before) > 2e-2, "the change had no effect"
    assert relative_error(after, exact) < 1e-2


def test_a_rebuild_keeps_the_precision() -> None:
    model = quantised_stack("fp8-emulated")
    in_place(model)
    outputs(model)
    assert model._fused.report.precision == "fp8-emulated"
    assert len(twins(model)) == QUANTISED


def test_adapters_are_left_alone_and_counted() -> None:
    model = new_stack(up_proj_bias=True).eval()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=r".*llm2vec.*down_proj")).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    plain = outputs(wrapped)
    report = model.fuse("int8")
    assert report.quantised == QUANTISED - 2
    assert set(report.kept.values()) == {"is a Linear of peft"}
    assert sorted(report.kept) == [f"llm2vec.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert "9 linear layers, 2 left as they are" in str(report)
    assert "llm2vec.layers.0.mlp.down_proj is a Linear of peft" in str(report)
    assert relative_error(outputs(wrapped), plain) < 1e-2


@torch.no_grad()
def test_adapters_on_a_part_of_a_group_leave_the_rest_in_8_bits() -> None:
    model = new_stack(up_proj_bias=True).eval()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=r".*llm2vec.*(q|v|gate)_proj")).eval()
    assert model.fuse("fp8-emulated").quantised == QUANTISED - 4, "q and v of the second layer, gate of both"
    with Recorded() as recorded:
        outputs(wrapped)
    assert recorded.calls["quantize_rows"] == 7, "of 2 o, 2 up, 2 down, 1 k"
    merged = wrapped.merge_and_unload()
    outputs(merged)
    assert len(twins(model)) == QUANTISED, "what had an adapter is a Linear again"


@pytest.mark.parametrize("precision", [None, "int8", "fp8-emulated"])
def test_a_hooked_activation_is_called(precision: str | None) -> None:
    model = new_stack(up_proj_bias=True).eval()
    model.fuse(precision)
    plain = outputs(model)
    second_layer(model).mlp.act_fn.register_forward_hook(lambda module, args, out: out * 4)
    assert relative_error(outputs(model), plain) > 1e-2


def test_parts_of_a_fused_model() -> None:
    model = quantised_stack()
    with pytest.raises(ValueError, match="unfuse\\(\\) that model first"):
        MTLLM.from_encoder_and_llm(model.nllb_encoder, copy.deepcopy(model.llm2vec))
    tower = pickle.loads(pickle.dumps(model.llm2vec))
    assert is_linear(tower.layers[1].mlp.down_proj)
    model.llm2vec.layers[0] = copy.deepcopy(model.llm2vec.layers[1])
    outputs(model)
    model.unfuse()
    assert not twins(model)


@torch.no_grad()
def test_a_compiled_model() -> None:
    torch.compiler.reset()
    model = quantised_stack("fp8-emulated")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(**batch()).pooler_output, outputs(model)) < 1e-5


def test_adapters_on_every_layer_leave_nothing_to_quantise(caplog: pytest.LogCaptureFixture) -> None:
    model = quantised_stack()
    wrapped = with_lora(model).eval()
    found = outputs(wrapped)
    assert model._fused is None
    assert "none of the LLM's linear layers can be quantised: the first is a Linear of peft" in caplog.text
    with wrapped.disable_adapter():
        assert relative_error(outputs(wrapped), found) > 1e-3
    with pytest.raises(ValueError, match="precision 'int8' cannot be used: none of"):
        model.fuse("int8")
    assert LORA  # the regular expression names every layer that could have a twin


@pytest.mark.parametrize(
    ("precision", "options", "message"),
    [
        ("int4", {}, "precision must be one of 'fp8', 'int8', 'fp8-emulated', got 'int4'"),
        ("fp8", {}, "'fp8' cannot be used: fp8 needs an NVIDIA GPU, the model is on cpu; 'fp8-emulated' predicts"),
        ("fp8-emulated", {"dtype": torch.float64}, "'fp8-emulated' cannot be used: the model is float64"),
        ("int8", {"family": "gpt2"}, "GPT2Model has no packed layers"),
    ],
)
def test_what_cannot_be_had_says_why(precision: str, options: dict, message: str) -> None:
    model = new_stack(**options).eval()
    with pytest.raises(ValueError, match=message):
        model.fuse(precision)
    assert model._fused is None
    assert not twins(model)


def test_reasons_of_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, here = torch.device("cuda", 0), precision_module.why_not_here
    assert here("int8", gpu, torch.bfloat16) == "int8 runs on a CPU, the model is on cuda:0"
    monkeypatch.setattr(precision_module, "compute_capability", lambda index: (8, 0))
    assert here("fp8", gpu, torch.bfloat16) == "fp8 needs compute capability 8.9, this GPU has 8.0"
    monkeypatch.setattr(precision_module, "compute_capability", lambda index: (9, 0))
    assert here("fp8", gpu, torch.bfloat16) is None
    assert here("fp8", gpu, torch.float32) == "fp8 multiplies into bfloat16, the model is float32"
    odd = nn.Linear(24, 32, dtype=torch.bfloat16)
    assert "is 32 by 24, and fp8 needs" in precision_module._why_not_layer(
        odd, "fp8", odd.weight.device, torch.bfloat16
    )
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "without oneDNN" in here("int8", torch.device("cpu"), torch.float32)


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_stack(up_proj_bias=True).eval()
    plain = outputs(model)
    give, given = precision_module._give_twin, []

    def fail_after_three(*arguments) -> None:
        if len(given) == 3:
            raise torch.OutOfMemoryError("full")
        given.append(give(*arguments))

    monkeypatch.setattr(precision_module, "_give_twin", fail_after_three)
    with pytest.raises(torch.OutOfMemoryError):
        model.fuse("int8")
    assert not twins(model)
    assert torch.equal(outputs(model), plain)


def test_gradients_and_autocast_go_back_to_the_modules(caplog: pytest.LogCaptureFixture) -> None:
    model, plain = quantised_stack(), new_stack(up_proj_bias=True).eval()
    for parameter in [*model.nllb_encoder.parameters(), *model.up_proj.parameters()]:
        parameter.requires_grad_(False)
    for parameter in model.llm2vec.layers[0].parameters():
        parameter.requires_grad_(False)
    model(**batch()).pooler_output.square().mean().backward()
    assert second_layer(model).mlp.down_proj.weight.grad is not None
    assert "asked for gradients" in caplog.text
    model.fuse("int8")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(outputs(model), outputs(plain))
    assert "another precision" in caplog.text
    assert not twins(model)
    model.fuse("int8")
    assert not twins(model.train())


def test_moving_and_casting_drop_the_twins() -> None:
    model = quantised_stack()
    assert not twins(model.to(torch.bfloat16))
    model.fuse("int8")
    assert not twins(model.to("meta"))


def test_copies_and_pickles_are_their_own() -> None:
    model = quantised_stack()
    expected = outputs(model)
    twin = copy.deepcopy(model)
    in_place(twin)
    assert relative_error(outputs(twin), expected) > 1e-2
    assert torch.equal(outputs(model), expected)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(outputs(loaded), expected)
    assert twins(loaded) == twins(model)

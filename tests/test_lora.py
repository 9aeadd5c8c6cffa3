"""``lora_group``: PEFT's modules against one call of the op, and everything that must stay with the modules."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from mtllm_fast.models.lora import lora_group, why_not_lora_group
from mtllm_fast.ops.lora_linear.masks import draw_seed, keep_masks, kept_scale
from mtllm_fast.testing.tolerance import assert_as_accurate

NAMES = ("q", "k", "v")


class Attention(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (
            nn.Linear(24, 40, bias=bias),
            nn.Linear(24, 16, bias=False),
            nn.Linear(24, 16, bias=bias),
        )


def wrapped(dtype=torch.float32, adapters=None, bias=False, targets=NAMES, **options) -> peft.PeftModel:
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options}
    config = peft.LoraConfig(target_modules=list(targets), **options)
    model = peft.get_peft_model(Attention(bias).to(dtype), config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapters or dtype)
    return model


def projections(model: nn.Module) -> tuple[nn.Module, ...]:
    inner = model.base_model.model if isinstance(model, peft.PeftModel) else model
    return tuple(getattr(inner, name) for name in NAMES)


def results(model, outputs, x) -> dict[str, torch.Tensor]:
    trained = {"x": x, **{name: p for name, p in model.named_parameters() if p.requires_grad}}
    grads = torch.autograd.grad(
        sum((y.double() * y.detach().double().cos()).sum() for y in outputs), [*trained.values()]
    )
    named = {f"y{g}": y.detach() for g, y in enumerate(outputs)}
    return named | dict(zip(trained, grads, strict=True))


def states(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(30, 24, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def compare(make, dtype=torch.float32, prepare=lambda model: None, merged=False) -> None:
    """The group against PEFT's own modules, within the error rule."""
    found = []
    for double, fast in ((False, True), (False, False), (True, False)):
        model = make().train()
        x = states(dtype)
        if double:
            model, x = model.double(), x.detach().double().requires_grad_()
        prepare(model)
        modules = projections(model)
        weight = torch.cat([getattr(m, "base_layer", m).weight for m in modules]).detach() if merged else None
        outputs = lora_group(modules, x, weight) if fast else [module(x) for module in modules]
        assert outputs is not None, why_not_lora_group(modules, x)
        found.append(results(model, outputs, x))
    assert_as_accurate(*found)


@pytest.mark.parametrize(
    ("dtype", "adapters"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("merged", [False, True])
def test_pefts_numbers(dtype, adapters, merged):
    compare(lambda: wrapped(dtype, adapters), dtype, merged=merged)


@pytest.mark.parametrize(
    "options",
    [
        {"targets": ("q", "v")},
        {"bias": True},
        {"use_rslora": True},
        {"rank_pattern": {"q": 2}, "alpha_pattern": {"v": 3}},
    ],
    ids=str,
)
def test_ranks_scalings_biases_and_projections_without_an_adapter(options):
    compare(lambda: wrapped(**options))


def test_dropout_follows_pefts_law_with_masks_of_its_own():
    model = wrapped(lora_dropout=0.5).train()
    modules, x = projections(model), states()
    torch.manual_seed(7)
    outputs = lora_group(modules, x)
    torch.manual_seed(7)
    seed = draw_seed()
    for g, (module, y) in enumerate(zip(modules, outputs, strict=True)):
        mask = keep_masks(seed, 3, slice(0, x.shape[0]), x.shape[1], 0.5, x.device)[g] * kept_scale(0.5)
        module.lora_dropout["default"].register_forward_hook(lambda m, args, out, mask=mask: args[0] * mask)
        torch.testing.assert_close(y, module(x), rtol=1e-5, atol=1e-5)
    model.eval()
    assert "is not the usual one" in why_not_lora_group(modules, x), "hooked now"


def test_evaluation_has_no_dropout():
    model = wrapped(lora_dropout=0.5).eval()
    x = states()
    for y, module in zip(lora_group(projections(model), x), projections(model), strict=True):
        torch.testing.assert_close(y, module(x), rtol=1e-5, atol=1e-5)


def test_another_adapter_can_be_active():
    def make():
        model = wrapped()
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=[*NAMES], init_lora_weights=False))
        return model

    compare(make, prepare=lambda model: model.set_adapter("second"))


def test_one_merged_module_is_a_plain_projection():
    def prepare(model):
        model.base_model.model.k.merge()
        model.base_model.model.k.requires_grad_(False)

    compare(wrapped, prepare=prepare)


def test_autocast_casts_x():
    model, x = wrapped(torch.bfloat16, torch.float32), states()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = lora_group(projections(model), x)
        expected = [module(x) for module in projections(model)]
    for y, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(y, other, rtol=3e-2, atol=3e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert "base weight is in another dtype" in why_not_lora_group(projections(wrapped()), x)


def several_active(model):
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=[*NAMES]))
    model.base_model.set_adapter(["default", "second"])


def switched_off_while_merged(model):
    model.merge_adapter()
    for module in projections(model):
        module.enable_adapters(False)


def other_dropout(model):
    projections(model)[0].lora_dropout["default"].p = 0.2


@pytest.mark.parametrize(
    ("model", "change", "reason"),
    [
        (lambda: wrapped(use_dora=True), None, "has a variant of LoRA"),
        (wrapped, several_active, "has several active adapters"),
        (wrapped, switched_off_while_merged, "has a merged adapter that is switched off"),
        (wrapped, lambda model: model.merge_adapter(), "no adapter is active"),
        (wrapped, lambda model: [m.enable_adapters(False) for m in projections(model)], "no adapter is active"),
        (Attention, lambda model: model.requires_grad_(False), "no adapter is active"),
        (lambda: wrapped(bias=True, targets=("q", "v"), lora_bias=True), None, "has an adapter with a bias"),
        (wrapped, lambda model: projections(model)[1].base_layer.weight.requires_grad_(), "a base is trained"),
        (wrapped, lambda model: projections(model)[1].register_forward_hook(print), "is hooked"),
        (wrapped, lambda model: projections(model)[1].lora_A["default"].register_forward_hook(print), "is hooked"),
        (wrapped, lambda model: model.base_model.model.q.lora_A.to(torch.bfloat16), "differ in their dtype"),
        (lambda: wrapped(lora_dropout=0.1), other_dropout, "differ in their dropout"),
        (lambda: wrapped(torch.bfloat16), None, "base weight is in another dtype"),
    ],
)  # fmt: skip
def test_everything_else_stays_with_the_modules(model, change, reason):
    model = model().train()
    if change is not None:
        change(model)
    modules, x = projections(model), states()
    assert reason in why_not_lora_group(modules, x)
    assert lora_group(modules, x) is None


def test_other_shapes_and_uncast_inputs():
    modules = projections(wrapped())
    assert "x must be [T, K], got [1, 30, 24]" in why_not_lora_group(modules, states()[None])
    modules = projections(wrapped(torch.bfloat16, torch.float32))
    for module in modules:
        module.cast_input_dtype_enabled = False
    assert "told not to cast" in why_not_lora_group(modules, states(torch.bfloat16))

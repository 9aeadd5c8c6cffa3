"""Merged projections: the same parameters and files as before, one product, and every way in which a merge ends."""

from __future__ import annotations

import copy
import io

import peft
import pytest
import torch
from safetensors.torch import load_model, save_model
from stacks import LLMS, LORA, batch, new_encoder, new_llm, new_stack, with_lora
from torch import nn
from torch.nn import functional as F

from mtllm_fast import MTLLM
from mtllm_fast.bench.counting import peak_bytes
from mtllm_fast.models.merging import is_merged, merge_projections, merged, split_projections
from mtllm_fast.testing.tolerance import assert_as_accurate

PACKED = ("llama", "mistral", "qwen2", "qwen3")


def attention(bias: bool = False, **options) -> nn.ModuleDict:
    torch.manual_seed(0)
    sizes = {"q_proj": 32, "k_proj": 16, "v_proj": 16}
    return nn.ModuleDict({name: nn.Linear(24, size, bias=bias, **options) for name, size in sizes.items()})


def projections(module: nn.Module, names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")) -> list[nn.Module]:
    return [getattr(module, name) for name in names]


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def biggest_group(model: MTLLM) -> int:
    mlp, attn = model.llm2vec.layers[0].mlp, model.llm2vec.layers[0].self_attn
    groups = (projections(mlp, ("gate_proj", "up_proj")), projections(attn))
    return max(sum(module.weight.nbytes for module in group) for group in groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [*PACKED, "nllb"])
@torch.no_grad()
def test_one_product_is_as_accurate_as_the_modules(family, dtype):
    tower = new_encoder().get_encoder() if family == "nllb" else new_llm(family).base_model
    layer = tower.to(dtype).layers[1]
    groups = {"qkv": projections(layer.self_attn)}
    if family != "nllb":
        groups["gate/up"] = projections(layer.mlp, ("gate_proj", "up_proj"))
    assert all(merged(modules) is None for modules in groups.values())
    assert merge_projections(tower).merged == 2 * len(groups)
    for modules in groups.values():
        whole = merged(modules)
        assert (whole.bias is not None) == (modules[0].bias is not None)
        x = torch.randn(11, modules[0].in_features, dtype=dtype)
        truth = [F.linear(*(t.double() for t in (x, m.weight, m.bias) if t is not None)) for m in modules]
        plain = [module(x) for module in modules]
        fast = F.linear(x, whole.weight, whole.bias).split(whole.sizes, -1)
        assert_as_accurate(*(dict(zip("qkv", outputs, strict=False)) for outputs in (fast, plain, truth)))


@pytest.mark.parametrize("family", LLMS)
def test_parameters_stay_what_they_were(family):
    model, twin = new_stack(family), new_stack(family)
    parameters, before = dict(model.named_parameters()), values(model)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    report = merge_projections(model)
    assert report.merged >= 2
    assert not report.skipped
    assert is_merged(model)
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert all(parameter.grad.eq(1).all() and parameter.is_leaf for parameter in parameters.values())
    assert_same(values(model), before)
    assert torch.equal(model(**batch()).pooler_output, twin(**batch()).pooler_output)

    places = [parameter.data_ptr() for parameter in parameters.values()]
    assert merge_projections(model) == report
    assert places == [parameter.data_ptr() for parameter in parameters.values()]

    split_projections(model)
    assert not is_merged(model)
    assert all(parameter.untyped_storage().nbytes() == parameter.nbytes for parameter in model.parameters())
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert_same(values(model), before)


def test_a_merged_weight_is_the_live_parameters():
    module = attention(bias=True)
    merge_projections(module)
    with torch.no_grad():
        whole = merged([*module.values()])
        module.k_proj.weight.fill_(3)
        module.v_proj.bias.data.fill_(5)
        module.q_proj.load_state_dict({"weight": torch.full((32, 24), 7.0), "bias": torch.zeros(32)})
    assert whole.weight[:32].eq(7).all()
    assert whole.weight[32:48].eq(3).all()
    assert whole.bias[48:].eq(5).all()


def test_a_state_dict_still_shares_the_parameters_memory():
    module = attention()
    merge_projections(module)
    version = module.k_proj.weight._version
    module.state_dict()["k_proj.weight"].zero_()
    assert module.k_proj.weight.eq(0).all()
    assert module.k_proj.weight._version > version
    assert module.state_dict(keep_vars=True)["k_proj.weight"] is module.k_proj.weight
    with torch.inference_mode():
        assert_same(module.state_dict(), values(module))


def test_a_state_dict_of_memory_that_may_be_freed_is_not_touched():
    """FSDP frees its flat parameters by resizing their storage, and a slice of it would not notice."""
    module = attention()
    merge_projections(module)
    flatten(module)
    flat = module.k_proj.weight.untyped_storage()
    assert flat.resizable()
    assert all(tensor.untyped_storage()._cdata == flat._cdata for tensor in module.state_dict().values())


@pytest.mark.parametrize("shards", [None, "100KB"])
def test_saved_files_are_those_of_the_model_before(tmp_path, shards):
    model = new_stack("qwen2")
    options = {"max_shard_size": shards} if shards else {}
    model.save_pretrained(tmp_path / "before", **options)
    merge_projections(model)
    assert peak_bytes(lambda: model.save_pretrained(tmp_path / "merged", **options)) < biggest_group(model)
    files = sorted(file.name for file in (tmp_path / "before").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "merged").iterdir())
    assert len(files) > (3 if shards else 1)
    for name in files:
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "before" / name).read_bytes(), name
    assert is_merged(model)
    assert_same(values(MTLLM.from_pretrained(tmp_path / "merged")), values(model))


def test_other_ways_to_save(tmp_path):
    module, other = attention(bias=True), attention(bias=True)
    merge_projections(module)
    merge_projections(other.requires_grad_(False))
    nn.init.ones_(other.q_proj.weight)
    save_model(module, tmp_path / "model.safetensors")
    load_model(other, tmp_path / "model.safetensors")
    assert_same(values(other), values(module))
    assert is_merged(other)
    file = io.BytesIO()
    torch.save(module.state_dict()["k_proj.weight"], file)
    assert file.tell() < 2500 + module.k_proj.weight.nbytes
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert_same(values(torch.load(file, weights_only=False)), values(module))


def trained(model: nn.Module, steps: int = 3) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(**batch()).pooler_output.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return values(model)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_training_is_bit_for_bit_that_of_the_split_model(family):
    model = new_stack(family).train()
    merge_projections(model)
    assert_same(trained(model), trained(new_stack(family).train()))
    assert is_merged(model)


@pytest.mark.parametrize("merge_first", [True, False])
def test_base_weights_of_adapters(merge_first):
    model = new_stack()
    if merge_first:
        merge_projections(model)
    wrapped = with_lora(model)
    if not merge_first:
        merge_projections(wrapped)
    assert is_merged(wrapped)
    wrapped_modules = projections(model.llm2vec.layers[0].self_attn)
    assert merged(wrapped_modules) is None
    whole = merged([module.base_layer for module in wrapped_modules])  # frozen, so even where gradients are recorded
    assert not whole.weight.requires_grad
    ours, plain = trained(wrapped), trained(with_lora(new_stack()))  # one product for three: other rounding
    assert ours.keys() == plain.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-5, msg=name)
    assert is_merged(wrapped)
    assert is_merged(wrapped.merge_and_unload())


def cast(model):
    model.to(torch.bfloat16)


def move_one(model):
    model.llm2vec.layers[1].self_attn.k_proj.to(torch.float64).to(torch.float32)


def assign_state_dict(model):
    model.load_state_dict(values(model), assign=True)


def merge_safely(model):
    peft.get_peft_model(model, peft.LoraConfig(target_modules=LORA)).merge_and_unload(safe_merge=True)


def replace_a_parameter(model):
    projection = model.llm2vec.layers[0].mlp.up_proj
    projection.weight = nn.Parameter(projection.weight.detach().clone())


@pytest.mark.parametrize("end", [cast, move_one, assign_state_dict, merge_safely, replace_a_parameter])
def test_what_replaces_the_memory_ends_the_merge(end):
    model = new_stack("qwen2")
    merge_projections(model)
    end(model)
    assert not is_merged(model)
    assert not merge_projections(model).skipped
    assert is_merged(model)
    expected = new_stack("qwen2")
    assert_same(values(model), values(expected.to(torch.bfloat16) if end is cast else expected))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: copy.deepcopy({"module": module})["module"]])
def test_a_copy_is_whole_and_takes_no_more_memory(copied):
    model = new_stack()
    merge_projections(model)
    twin = copied(model)
    assert_same(values(twin), values(model))
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in twin.parameters()}
    assert sum(storages.values()) == sum(p.nbytes for p in model.parameters())
    nn.init.zeros_(twin.llm2vec.layers[0].self_attn.k_proj.weight)
    assert model.llm2vec.layers[0].self_attn.k_proj.weight.any()


def test_sharing_with_other_processes():
    module = attention().share_memory()
    report = merge_projections(module)  # would take the parameters out of what the processes share
    assert list(report.skipped.values()) == ["they are shared with other processes"]
    module = attention()
    merge_projections(module)
    before = values(module)
    module.share_memory()
    assert all(parameter.is_shared() for parameter in module.parameters())
    assert all(tensor.is_shared() for tensor in module.state_dict().values())
    assert_same(values(module), before)


@pytest.mark.parametrize("step", ["merge", "split", "cast", "fuse"])
def test_memory(step):
    """No step holds more than one group twice, and nothing of before stays alive."""
    model = new_stack(up_proj_bias=True).eval()
    total = peak_bytes(lambda: copy.deepcopy(model).fuse() if step == "fuse" else copy.deepcopy(model))

    def run() -> None:
        twin = copy.deepcopy(model)  # the profiler knows the end of what was allocated before its eyes only
        merge_projections(twin)
        if step == "split":
            split_projections(twin)
        elif step == "cast":
            twin.to(torch.bfloat16)
            torch.empty(total // 8)  # fits where the other half was
        elif step == "fuse":
            twin.fuse()

    assert peak_bytes(run) <= total + biggest_group(model) + 4096


@torch.no_grad()
def test_a_fused_model_notices_the_move():
    model = new_stack(up_proj_bias=True).eval()
    model.fuse()
    before = model(**batch()).pooler_output
    composite = model._fused.composite
    merge_projections(model)
    assert torch.equal(model(**batch()).pooler_output, before)
    assert model._fused.composite is not composite
    model.unfuse()
    assert is_merged(model)


def flatten(module):
    flat = torch.zeros(4096)
    for parameter in module.parameters():
        parameter.data = flat[: parameter.numel()].view_as(parameter)


def test_gradients_and_autocast_need_the_parameters():
    module = attention(bias=True)
    merge_projections(module)
    modules = [*module.values()]
    assert merged(modules) is None
    with torch.inference_mode():
        assert merged(modules) is not None
        with torch.autocast("cpu", torch.bfloat16):
            assert merged(modules) is None
    module.requires_grad_(False)
    assert merged(modules) is not None
    module.v_proj.bias.requires_grad_(True)
    assert merged(modules) is None


def test_merging_in_inference_mode_leaves_parameters_that_train():
    module = attention()
    with torch.inference_mode():
        merge_projections(module)
    module.k_proj(torch.ones(2, 24)).sum().backward()
    assert module.k_proj.weight.grad is not None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_graph_calls_the_modules(backend):
    module, twin = attention(), attention()
    merge_projections(module)

    def project(x):
        modules = [*module.values()]
        assert merged(modules) is None
        return torch.cat([projection(x) for projection in modules], -1)

    x = torch.randn(3, 24)
    y = torch.compile(project, backend=backend, fullgraph=True)(x)
    assert torch.equal(y, torch.cat([projection(x) for projection in twin.values()], -1))
    y.square().sum().backward()
    assert all(projection.weight.grad.any() for projection in module.values())


@torch.no_grad()
def test_models_without_data_can_be_merged_and_counted():
    module = attention(device="meta")
    assert merged([*module.values()]) is None
    assert merge_projections(module).merged == 1
    assert merged([*module.values()]).weight.shape == (64, 24)
    assert all(tensor.is_meta for tensor in module.state_dict().values())

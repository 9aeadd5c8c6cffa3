"""The model on a GPU: the reference cases, encode, the fused stage, fp8, training. The ops' own tests run there too."""

from __future__ import annotations

import copy

import pytest
import torch
from reference import DTYPES, load_case, pack
from stacks import batch, new_stack
from torch import nn

from mtllm_fast import MTLLM
from mtllm_fast.core import native
from mtllm_fast.models import stack
from mtllm_fast.models.precision import EmulatedFp8Twin, Fp8Twin
from mtllm_fast.testing.tolerance import relative_error

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["forward-small", "forward-single-and-full", "forward-gqa", "forward-larger"])
@pytest.mark.parametrize("fused", [False, True])
def test_forward_cases(name, mode, fused):
    case = load_case(name)
    model = MTLLM.from_pretrained(case.checkpoint, dtype=DTYPES[mode], device_map="cuda")
    if fused:
        model.fuse()
    mask = case.inputs["attention_mask"].bool()
    with torch.no_grad():
        padded = model(**{key: value.to(GPU) for key, value in case.inputs.items()})
        packed = pack(**case.inputs)
        pooled = model.encode_packed(packed["input_ids"].to(GPU), packed["cu_seqlens"].to(GPU), packed["max_seqlen"])
    case.check(mode, last_hidden=padded.last_hidden_state.cpu()[mask], pooled_mean=pooled.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encode_equals_the_cpu(dtype):
    texts = ["Habari ya dunia", "Wie geht's?", "", "word " * 600]
    model = MTLLM.from_pretrained("tiny", dtype=dtype)
    expected = model.encode(texts, "swh_Latn", convert_to_numpy=True)
    found = copy.deepcopy(model).encode(texts, "swh_Latn", convert_to_numpy=True, device="cuda")
    assert relative_error(torch.from_numpy(found), torch.from_numpy(expected)) < (
        2e-2 if dtype == torch.bfloat16 else 1e-5
    )


def test_fusing_releases_what_it_replaced_and_brings_it_back():
    model = new_stack("llama", dtype=torch.bfloat16).to(GPU).eval()
    inputs = {name: value.to(GPU) for name, value in batch().items()}
    attn = model.llm2vec.layers[0].self_attn
    with torch.no_grad():
        plain = model(**inputs).pooler_output
        assert model.fuse().released
        assert {attn.q_proj.weight.device.type, attn.k_proj.weight.device.type} == {"cpu"}
        assert relative_error(model(**inputs).pooler_output, plain) < 3e-2
        attn.q_proj.weight.data.mul_(2)
        changed = model(**inputs).pooler_output
        model.unfuse()
        assert attn.q_proj.weight.is_cuda
        assert relative_error(model(**inputs).pooler_output, changed) < 3e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_absorbed_training_equals_the_modules(dtype, monkeypatch):
    model = new_stack("llama", dtype=dtype).to(GPU).train()
    model.nllb_encoder.eval()
    inputs = {name: value.to(GPU) for name, value in batch((90, 40, 60), left=()).items()}
    results = []
    for even in (0, float("inf")):
        monkeypatch.setattr(stack, "break_even_tokens", lambda *sizes, even=even: even)
        model.zero_grad()
        model(**inputs).pooler_output.float().square().mean().backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if "up_proj" in name})
    for name, grad in results[0].items():
        assert relative_error(grad, results[1][name]) < (1e-4 if dtype == torch.float32 else 5e-2), name


def test_the_extension_serves_this_gpu():
    assert native.why_not_built() is None
    assert native.why_not_cuda(torch.empty(1, device=GPU)) is None


def on_fp8(model: MTLLM) -> MTLLM:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    return model.to(GPU, torch.bfloat16).eval()


def test_fp8_products_are_the_emulated_ones():
    torch.manual_seed(0)
    for bias in (True, False):
        module = nn.Linear(4096, 1024, bias=bias, dtype=torch.bfloat16)
        model = on_fp8(new_stack("llama"))
        module.to(model.device)
        for rows in (1, 7, 300, 1000):  # row-wise products have read past the end where rows are no multiple of a tile
            x = torch.randn(rows, 4096, device=GPU).mul_(torch.logspace(-3, 2, rows, device=GPU)[:, None]).bfloat16()
            assert relative_error(Fp8Twin(module)(x), EmulatedFp8Twin(module)(x)) < 1e-2
        assert Fp8Twin(module)(x[:0]).shape == (0, 1024)
        x[3, 5] = float("nan")
        y = Fp8Twin(module)(x)
        assert y[3].isnan().all()
        assert y[4:].isfinite().all()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_fp8_of_a_whole_model(family):
    model = on_fp8(new_stack(family))
    inputs = {name: value.to(GPU) for name, value in batch().items()}
    with torch.no_grad():
        plain = model(**inputs).pooler_output
        emulated_report = model.fuse("fp8-emulated")
        emulated = model(**inputs).pooler_output
        report = model.fuse("fp8")
        found = model(**inputs).pooler_output
        assert (report.quantised, report.kept) == (emulated_report.quantised, {}) == (11, {})
        assert relative_error(found, emulated) < 1e-2
        assert torch.cosine_similarity(found.double(), plain.double()).min() > 0.999
        model.unfuse()
        assert torch.equal(model(**inputs).pooler_output, plain)
    assert all(parameter.is_cuda for parameter in model.parameters())


def test_fp8_takes_less_memory_and_saves_the_same(tmp_path):
    model = on_fp8(MTLLM.from_pretrained("tiny"))
    before = {name: value.cpu() for name, value in model.state_dict().items()}
    model.fuse()
    model.unfuse()  # cuBLAS has its workspace now
    start = torch.cuda.memory_allocated()
    model.fuse()
    absorbed = torch.cuda.memory_allocated()
    model.fuse("fp8")
    weights = sum(before[f"llm2vec.layers.{'.'.join(place)}.weight"].nbytes for place in model._fused.quantised.origins)
    assert torch.cuda.memory_allocated() < absorbed - weights / 3, "fp8 takes the place of twice its bytes"
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].cpu(), value) for name, value in before.items())
    model.save_pretrained(tmp_path)
    saved = MTLLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(saved[name], value) for name, value in before.items())
    model.unfuse()
    assert torch.cuda.memory_allocated() <= start * 1.01


def test_a_changed_weight_under_fp8_is_seen():
    model = on_fp8(new_stack("llama"))
    model.fuse("fp8")
    inputs = {name: value.to(GPU) for name, value in batch().items()}
    with torch.no_grad():
        before = model(**inputs).pooler_output
        model.llm2vec.layers[1].mlp.down_proj.weight.mul_(-3)
        after = model(**inputs).pooler_output
        model.unfuse()
        assert relative_error(after, model(**inputs).pooler_output) < 5e-2
        assert relative_error(after, before) > 5e-2


def test_a_compiled_fp8_model():
    torch.compiler.reset()
    model = on_fp8(new_stack("llama"))
    model.fuse("fp8")
    inputs = {name: value.to(GPU) for name, value in batch().items()}
    with torch.no_grad():
        expected = model(**inputs).pooler_output
        assert relative_error(torch.compile(model, fullgraph=True)(**inputs).pooler_output, expected) < 2e-2

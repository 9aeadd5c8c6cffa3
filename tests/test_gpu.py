"""The model on a GPU: the reference cases, encode, the fused stage, training. The ops' own tests run there too."""

from __future__ import annotations

import copy

import pytest
import torch
from reference import DTYPES, load_case, pack
from stacks import batch, new_stack

from mtllm_fast import MTLLM
from mtllm_fast.core import native
from mtllm_fast.models import stack
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

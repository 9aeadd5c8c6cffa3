"""``varlen_attention``: every backend that runs here against the float64 reference, forward and backward."""

from __future__ import annotations

import pytest
import torch

from mtllm_fast import varlen_attention
from mtllm_fast.core.errors import UnsupportedBackendError
from mtllm_fast.ops.varlen_attention import api, cpu, schema

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
FACTOR = {torch.float32: 4.0, torch.float16: 1.5, torch.bfloat16: 1.5}


def _inputs(lengths, heads, kv_heads, head_dim, dtype, device="cpu", tail=0, requires_grad=False):
    generator = torch.Generator().manual_seed(len(lengths) + head_dim)
    total = sum(lengths) + tail

    def draw(count):
        x = torch.randn(total, count, head_dim, generator=generator).to(device, dtype)
        return x.requires_grad_(requires_grad)

    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    return draw(heads), draw(kv_heads), draw(kv_heads), cu_seqlens


def _run(q, k, v, cu_seqlens, lengths, backend, grad=None, tail=0):
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out = varlen_attention(q, k, v, cu_seqlens, max(lengths, default=0), dead_tail=tail > 0, backend=backend)
    grad = torch.ones_like(out) if grad is None else grad.to(out)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def _backends(device):
    return ["sdpa"] if device == "cpu" else [n for n in api.BACKENDS.why_not if n != "reference"]


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[5, 5, 1, 9], [1], [63, 2, 130], [7, 0, 3]])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (8, 2, 64), (2, 1, 128)])
def test_forward_and_backward_within_the_error_rule(lengths, heads, kv_heads, head_dim, dtype, device):
    q, k, v, cu = _inputs(lengths, heads, kv_heads, head_dim, dtype, device)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    truth = _run(*(t.double() for t in (q, k, v)), cu, lengths, "reference", grad)
    plain = _run(q, k, v, cu, lengths, "reference", grad)
    # The gradients of q and k cancel to zero in a one-token sentence: rounding there is relative to what cancelled.
    floor = max(2e-6, torch.finfo(dtype).eps) * max(float(t.norm()) for t in truth)
    for backend in _backends(device):
        if api.explain(q, k, backend=backend).chosen is None:
            continue  # a library that is not installed; the test below fixes what must be there
        got = _run(q, k, v, cu, lengths, backend, grad)
        with torch.no_grad():  # on the CPU an implementation of its own
            got.append(varlen_attention(q, k, v, cu, max(lengths), backend=backend))
        expected = zip(("out", "dq", "dk", "dv", "inference"), got, [*plain, plain[0]], [*truth, truth[0]], strict=True)
        for name, x, p, t in expected:
            bound = FACTOR[dtype] * (p.double() - t).norm() + floor
            assert (x.double() - t).norm() <= bound, (backend, name)


@pytest.mark.gpu
def test_a_flash_kernel_serves_half_precision_on_a_gpu():
    q, k, _, _ = _inputs([5], 4, 4, 64, torch.bfloat16, "cuda")
    assert api.explain(q, k).chosen in ("flash_attn", "torch_varlen")


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dead_tail_is_zero_and_gets_no_gradient(device, dtype):
    lengths = [3, 4]
    q, k, v, cu = _inputs(lengths, 4, 2, 16, dtype, device, tail=5)
    for backend in ("auto", *_backends(device), "reference"):
        if api.explain(q, k, backend=backend).chosen is None:
            continue
        out, *grads = _run(q, k, v, cu, lengths, backend, tail=5)
        assert not out[7:].any()
        assert not any(grad[7:].any() for grad in grads)


def test_no_token_and_no_sentence():
    q, k, v, cu = _inputs([], 4, 2, 16, torch.float32)
    assert varlen_attention(q, k, v, cu, 0).shape == (0, 4, 16)


def test_a_sentence_does_not_depend_on_its_neighbours():
    q, k, v, cu = _inputs([6, 9, 6], 4, 2, 16, torch.float32)
    out = varlen_attention(q, k, v, cu, 9)
    alone = varlen_attention(q[6:15], k[6:15], v[6:15], torch.tensor([0, 9], dtype=torch.int32), 9)
    assert torch.equal(out[6:15], alone)


def test_runs_of_equal_length_are_batched():
    runs = list(cpu._equal_length_runs(torch.tensor([0, 4, 8, 8, 11, 14], dtype=torch.int32)))
    assert runs == [(0, 8, 2, 4), (8, 14, 2, 3)]


def test_opcheck():
    q, k, v, cu = _inputs([3, 3, 5], 4, 2, 16, torch.float32, requires_grad=True)
    torch.library.opcheck(schema.varlen_attention_cpu, (q, k, v, cu, 0.25))
    out, lse = cpu.forward(q.detach(), k.detach(), v.detach(), cu, 0.25)
    args = tuple(t.detach() for t in (torch.randn_like(out), q, k, v, out, lse))
    torch.library.opcheck(
        schema.varlen_attention_cpu_backward, (*args, cu, 0.25), test_utils=("test_schema", "test_faketensor")
    )


def test_compiles_without_breaks_or_recompiles():
    torch._dynamo.reset()
    compiled = torch.compile(varlen_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([3, 5], [9, 2, 2], [30, 1, 1, 1]):
            q, k, v, cu = _inputs(lengths, 4, 2, 16, torch.float32)
            want = varlen_attention(q, k, v, cu, max(lengths))
            # An eager call without gradients computes short sentences in another order of summation.
            torch.testing.assert_close(compiled(q, k, v, cu, max(lengths)), want, rtol=1e-5, atol=1e-6)


def test_dropout_on_the_cpu_takes_the_reference():
    q, k, v, cu = _inputs([40], 2, 2, 16, torch.float32)
    chosen = api.explain(q, k, dropout_p=0.5)
    assert chosen.chosen == "reference"
    assert "dropout" in str(chosen)
    assert not torch.equal(varlen_attention(q, k, v, cu, 40, dropout_p=0.5), varlen_attention(q, k, v, cu, 40))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.randn(4, 2, 16)}, ValueError, r"k must be \[5, KV, 16\], got \[4, 2, 16\]"),
        ({"v": torch.randn(5, 1, 16)}, ValueError, r"v must be \[5, 2, 16\]"),
        ({"q": torch.randn(5, 3, 16)}, ValueError, "3 query heads must be a multiple of the 2"),
        ({"q": torch.randn(5, 4, 16).half()}, TypeError, "one dtype"),
        ({"cu_seqlens": torch.tensor([0, 5])}, TypeError, "cu_seqlens must be int32"),
        ({"backend": "flash_attn"}, UnsupportedBackendError, "tensors are on cpu"),
        ({"backend": "magic"}, UnsupportedBackendError, "there is no backend 'magic'"),
    ],
)
def test_bad_input_is_named(change, error, message):
    q, k, v, cu = _inputs([5], 4, 2, 16, torch.float32)
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens": cu, "max_seqlen": 5} | change
    with pytest.raises(error, match=message):
        varlen_attention(**arguments)

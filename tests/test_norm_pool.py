"""``norm_pool``: every backend against float64, its corners, and its contract with autograd, compile and autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mtllm_fast.core import native_cpu
from mtllm_fast.core.errors import UnsupportedBackendError
from mtllm_fast.ops import explain
from mtllm_fast.ops.norm_pool import chunks, norm_pool, schema
from mtllm_fast.testing.inputs import ODD_LENGTHS, cu_seqlens_of, packed_states
from mtllm_fast.testing.poison import poisoned_memory
from mtllm_fast.testing.tolerance import INTERPRETED_RULES, RULES, assert_as_accurate

EPS = 1e-5
BACKENDS = ["reference", "cpu", "triton", "cuda"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(hidden: Tensor, weight: Tensor, lengths: tuple[int, ...], eps: float, pooling: str) -> Tensor:
    """What Hugging Face's modules and a loop over sentences make of it, in the dtype of ``hidden``."""
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    normed = (weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(hidden.dtype)).to(hidden.dtype)
    rows = []
    for b, length in enumerate(lengths):
        sentence = normed[sum(lengths[:b]) :][:length]
        if length == 0:
            rows.append(sentence.sum(0))
        else:
            rows.append({"mean": sentence.mean(0), "cls": sentence[0], "eos": sentence[-1]}[pooling])
    return torch.stack(rows)


def run(function, hidden: Tensor, weight: Tensor, *arguments: object, **keywords: object) -> dict[str, Tensor]:
    """Output and gradients of ``function(hidden, weight, ...)`` for a fixed random gradient."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    pooled = function(hidden, weight, *arguments, **keywords)
    grad = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1)).to(pooled)
    grads = torch.autograd.grad(pooled, (hidden, weight), grad)
    return {"pooled": pooled, "grad of hidden_states": grads[0], "grad of weight": grads[1]}


def check(
    backend: str,
    device: torch.device,
    *,
    lengths: tuple[int, ...] = ODD_LENGTHS,
    width: int = 128,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    pooling: str = "mean",
    eps: float = EPS,
    dead_tail: int = 0,
    row_stride: int | None = None,
) -> None:
    """Output and gradients of one backend keep the error rule, with fresh memory and unused input full of NaN."""
    hidden = packed_states(lengths, width, dtype=dtype, device=device, dead_tail=dead_tail, row_stride=row_stride)
    weight = (1 + torch.randn(width, generator=torch.Generator().manual_seed(2)) / 4).to(device, weight_dtype or dtype)
    cu_seqlens = cu_seqlens_of(lengths, device)
    options = {"eps": eps, "pooling": pooling}
    with poisoned_memory():
        fast = run(norm_pool, hidden, weight, cu_seqlens, **options, backend=backend)
    tokens = hidden[: sum(lengths)]
    same_dtype = run(plain, tokens, weight, lengths, **options)
    truth = run(plain, tokens.double(), weight.double(), lengths, **options)
    tail = fast["grad of hidden_states"][sum(lengths) :]
    assert torch.equal(tail, torch.zeros_like(tail)), "tokens that belong to no sentence have a gradient"
    fast["grad of hidden_states"] = fast["grad of hidden_states"][: sum(lengths)]
    interpreted = backend == "triton" and device.type == "cpu"
    assert_as_accurate(fast, same_dtype, truth, INTERPRETED_RULES if interpreted else RULES)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("pooling", ["mean", "cls", "eos"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(backend: str, pooling: str, dtype: torch.dtype, device: torch.device) -> None:
    check(backend, device, dtype=dtype, pooling=pooling)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("width", [1, 41, 2000, 4096])
def test_widths(backend: str, width: int, device: torch.device) -> None:
    # At width 1 every normed value is near one and the gradient is a tiny difference, unless eps is large.
    check(backend, device, width=width, lengths=(3, 0, 17), eps=0.5 if width == 1 else EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 1024, 2047, 2048, 4096, 5120, 8192, 16384])
def test_every_compiled_shape(backend: str, width: int, dtype: torch.dtype, device: torch.device) -> None:
    check(backend, device, width=width, dtype=dtype, lengths=(700, *ODD_LENGTHS), dead_tail=5)
    check(backend, device, width=width, dtype=dtype, row_stride=width + 1, pooling="eos")


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_strided_rows_and_a_dead_tail(backend: str, device: torch.device) -> None:
    check(backend, device, row_stride=135, dead_tail=70)
    check(backend, device, row_stride=136, dead_tail=3, pooling="cls", dtype=torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_eps_may_be_zero(backend: str, device: torch.device) -> None:
    check(backend, device, eps=0.0, dead_tail=2)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_strided_columns(backend: str, device: torch.device) -> None:
    hidden = packed_states((3, 5), 16, device=device)
    arguments = (torch.ones(16, device=device), cu_seqlens_of((3, 5), device))
    transposed = hidden.t().contiguous().t()
    assert transposed.stride(1) != 1
    expected = norm_pool(hidden, *arguments, eps=EPS, backend=backend)
    assert torch.equal(norm_pool(transposed, *arguments, eps=EPS, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("pooling", ["mean", "cls", "eos"])
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0), (1,), (0, 1, 0)], ids=str)
@pytest.mark.parametrize("dead_tail", [0, 9])
def test_empty_batches(
    backend: str, pooling: str, lengths: tuple[int, ...], dead_tail: int, device: torch.device
) -> None:
    if lengths:
        check(backend, device, lengths=lengths, pooling=pooling, dead_tail=dead_tail, width=16)
        return
    hidden = packed_states((), 16, dead_tail=dead_tail, device=device)
    result = run(norm_pool, hidden, torch.ones(16, device=device), cu_seqlens_of((), device), eps=EPS, backend=backend)
    assert [list(tensor.shape) for tensor in result.values()] == [[0, 16], [dead_tail, 16], [16]]
    assert all(torch.equal(tensor, torch.zeros_like(tensor)) for tensor in result.values())


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_one_long_sentence_and_many_short_ones(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(backend, device, lengths=(1100,), width=16)
    if backend == "triton":
        from mtllm_fast.ops.norm_pool import triton_backend

        monkeypatch.setattr(triton_backend, "SENTENCES", 16)  # so that few sentences take several steps of the search
    check(backend, device, lengths=tuple(i % 7 for i in range(50)), width=16, dead_tail=1)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
def test_weight_of_another_dtype(backend: str, weight_dtype: torch.dtype, device: torch.device) -> None:
    check(backend, device, dtype=torch.bfloat16, weight_dtype=weight_dtype)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_only_what_needs_a_gradient_gets_one(backend: str, device: torch.device) -> None:
    cu_seqlens = cu_seqlens_of((4, 7), device)
    hidden, weight = packed_states((4, 7), 16, device=device), torch.ones(16, device=device)
    both = run(norm_pool, hidden, weight, cu_seqlens, eps=EPS, backend=backend)
    for wanted, frozen in (("hidden_states", weight), ("weight", hidden)):
        leaf = (hidden if frozen is weight else weight).detach().requires_grad_()
        pair = (leaf, weight) if frozen is weight else (hidden, leaf)
        pooled = norm_pool(*pair, cu_seqlens, eps=EPS, backend=backend)
        grad = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1)).to(pooled)
        assert torch.equal(torch.autograd.grad(pooled, leaf, grad)[0], both[f"grad of {wanted}"])


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_results_repeat_and_do_not_depend_on_neighbours(backend: str, device: torch.device) -> None:
    lengths = (40, 3, 100)
    hidden, weight = packed_states(lengths, 64, device=device), torch.ones(64, device=device)
    options = {"eps": EPS, "backend": backend}
    first, second = (run(norm_pool, hidden, weight, cu_seqlens_of(lengths, device), **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    moved = torch.cat([hidden[40:], torch.ones_like(hidden[:40])])
    assert torch.equal(norm_pool(moved, weight, cu_seqlens_of((3, 100, 40), device), **options)[1], first["pooled"][2])


def test_the_slots_of_sentences_never_overlap() -> None:
    generator = torch.Generator().manual_seed(0)
    for chunk in (8, 16, 64):
        lengths = torch.randint(0, 200, (50,), generator=generator).tolist()
        cu_seqlens = cu_seqlens_of(lengths).tolist()
        slots = [
            cu_seqlens[b] // chunk + b + i for b, length in enumerate(lengths) for i in range(-(-length // chunk) or 1)
        ]
        assert slots == sorted(set(slots))
        assert slots[-1] < chunks.num_slots(sum(lengths), len(lengths), chunk)


def test_gradcheck() -> None:
    hidden = packed_states((3, 0, 4), 5, dtype=torch.float64, dead_tail=0).requires_grad_()
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    for pooling in ("mean", "cls", "eos"):

        def pool(h: Tensor, w: Tensor, pooling: str = pooling) -> Tensor:
            return norm_pool(h, w, cu_seqlens_of((3, 0, 4)), eps=EPS, pooling=pooling)

        assert torch.autograd.gradcheck(pool, (hidden, weight))


def test_second_gradient_is_refused() -> None:
    hidden = packed_states((3, 4), 5).requires_grad_()
    pooled = norm_pool(hidden, torch.ones(5), cu_seqlens_of((3, 4)), eps=EPS)
    (grad,) = torch.autograd.grad(pooled.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("grads", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_opcheck(grads: tuple[bool, bool], device: torch.device) -> None:
    hidden = packed_states((3, 0, 9), 16, device=device, dead_tail=2).nan_to_num().requires_grad_(grads[0])
    weight = torch.ones(16, device=device, requires_grad=grads[1])
    cu_seqlens = cu_seqlens_of((3, 0, 9), device)
    torch.library.opcheck(schema.forward_op, (hidden, weight, cu_seqlens, EPS, "mean", grads[1], "auto"))
    tensors = (torch.randn(3, 16, device=device), hidden.detach(), weight.detach(), cu_seqlens)
    torch.library.opcheck(schema.backward_op, (*tensors, EPS, "mean", "auto"))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_compiles_once_for_all_batches(backend: str, device: torch.device) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def pool(hidden: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
        return 2 * norm_pool(hidden, weight, cu_seqlens, eps=EPS, backend=backend)

    graphs = []
    for lengths in ((3, 4), (5, 0, 9), (2, 3, 4, 5), (1, 300)):
        hidden, weight = packed_states(lengths, 16, device=device), torch.ones(16, device=device)
        compiled = run(pool, hidden, weight, cu_seqlens_of(lengths, device))
        eager = run(
            lambda *a: 2 * norm_pool(*a, eps=EPS, backend=backend), hidden, weight, cu_seqlens_of(lengths, device)
        )
        assert all(torch.equal(compiled[name], eager[name]) for name in eager)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 4, "another batch must not recompile"


def test_whoever_watches_sees_the_op() -> None:
    hidden, weight, cu_seqlens = packed_states((3, 4), 16), torch.ones(16), cu_seqlens_of((3, 4))
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Spy():
        norm_pool(hidden, weight, cu_seqlens, eps=EPS)
        run(norm_pool, hidden, weight, cu_seqlens, eps=EPS)
    assert seen.count(schema.forward_op) == 2
    assert schema.backward_op in seen

    with torch._subclasses.FakeTensorMode() as mode:
        fake = norm_pool(*(mode.from_tensor(tensor) for tensor in (hidden, weight, cu_seqlens)), eps=EPS)
        assert isinstance(fake, torch._subclasses.FakeTensor)
    assert norm_pool(hidden.to("meta"), weight.to("meta"), cu_seqlens.to("meta"), eps=EPS).shape == (2, 16)


def test_autocast_changes_nothing(device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = packed_states((30, 4), 64, device=device, dtype=dtype), torch.ones(64, device=device)
        expected = run(norm_pool, hidden, weight, cu_seqlens_of((30, 4), device), eps=EPS)
        with torch.autocast(device.type, torch.bfloat16):
            found = run(norm_pool, hidden, weight, cu_seqlens_of((30, 4), device), eps=EPS)
        assert all(found[name].dtype == expected[name].dtype for name in found)
        assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("trained", ["hidden_states", "weight"])
def test_inference_tensors_can_feed_a_trained_layer(trained: str, device: torch.device) -> None:
    with torch.inference_mode():
        tensors = {
            "hidden_states": packed_states((3, 4), 16, device=device),
            "weight": torch.ones(16, device=device),
            "cu_seqlens": cu_seqlens_of((3, 4), device),
        }
    leaf = tensors[trained] = tensors[trained].clone().requires_grad_()
    norm_pool(**tensors, eps=EPS).sum().backward()
    assert leaf.grad is not None
    with torch.inference_mode():
        assert norm_pool(**tensors, eps=EPS).is_inference()


HIDDEN, WEIGHT, CU_SEQLENS = torch.ones(7, 16), torch.ones(16), torch.tensor([0, 3, 7], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": torch.ones(8)}, ValueError, r"norm_pool: weight must be \[16\], got \[8\]"),
        ({"hidden_states": torch.ones(1, 7, 16)}, ValueError, r"hidden_states must be \[T, D\], got \[1, 7, 16\]"),
        ({"hidden_states": [[1.0]]}, TypeError, "hidden_states must be a tensor, got list"),
        ({"hidden_states": HIDDEN.int()}, TypeError, "hidden_states must be float32 or .*, got int32"),
        ({"cu_seqlens": CU_SEQLENS.long()}, TypeError, "cu_seqlens must be int32, got int64"),
        ({"cu_seqlens": CU_SEQLENS[:0]}, ValueError, r"cu_seqlens must be \[B\+1\] and start with 0, got an empty"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on cpu like hidden_states, got meta"),
        ({"pooling": "max"}, ValueError, "pooling must be one of 'mean', 'cls', 'eos', got 'max'"),
        (
            {"backend": "cutlass"},
            UnsupportedBackendError,
            "no backend 'cutlass'; there are auto, cuda, triton, cpu, reference",
        ),
        ({"backend": "cuda"}, UnsupportedBackendError, "backend 'cuda' .* on cpu. What would work: .*reference"),
    ],
)
def test_bad_input(changes: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"hidden_states": HIDDEN, "weight": WEIGHT, "cu_seqlens": CU_SEQLENS, "eps": EPS, **changes}
    with pytest.raises(error, match=message):
        norm_pool(**arguments)


def test_kernels_refuse_what_they_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UnsupportedBackendError, match=r"the states are float64\. What would work: reference"):
        norm_pool(HIDDEN.double(), WEIGHT.double(), CU_SEQLENS, eps=EPS, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UnsupportedBackendError, match="TRITON_INTERPRET=1 is not set"):
        norm_pool(HIDDEN, WEIGHT, CU_SEQLENS, eps=EPS, backend="triton")
    monkeypatch.setattr(native_cpu, "_load", lambda: (None, "the CPU extension was not built: no compiler"))
    explanation = explain("norm_pool", HIDDEN, WEIGHT, CU_SEQLENS, eps=EPS)
    assert explanation.chosen == "reference"
    assert str(explanation).splitlines()[1:] == [
        "  cuda: no: the tensors are on cpu",
        "  triton: no: the tensors are on the CPU and TRITON_INTERPRET=1 is not set",
        "  cpu: no: the CPU extension was not built: no compiler",
        "  reference: chosen",
    ]
    assert explain("norm_pool", HIDDEN, WEIGHT, CU_SEQLENS, eps=EPS, backend="cuda").chosen is None

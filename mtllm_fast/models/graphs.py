"""CUDA graphs for small batches of ``encode``: one launch in place of a thousand.

A batch of few tokens costs the GPU little more than reading the weights once (8B in bf16: 3.3 ms at 4.3 TB/s), and the
host several times as long to launch its kernels (docs/h200.md). A graph is recorded once per *shape*, a batch rounded
up to a bucket of tokens, of sentences and of the longest sentence, and replayed for every batch that fits. What
rounding adds belongs to no sentence: empty sentences after the last one, and a dead tail of tokens that nothing reads.

Graphs read the parameters' live memory, so edits in place show. Before every replay the addresses of all tensors are
compared with those at the capture, and during it their layouts and the modules (``inspection.py``): whatever has moved,
been replaced or been fused drops all graphs and the result.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtllm_fast.core.dispatch import watched
from mtllm_fast.models.inputs import PackedInputs
from mtllm_fast.models.inspection import Inspection, inspect
from mtllm_fast.models.plain import is_rms_norm
from mtllm_fast.models.towers import ATTENTION_BACKENDS, reserve_positions
from mtllm_fast.packing import PackedLayout, position_ids_from_cu_seqlens

if TYPE_CHECKING:
    from mtllm_fast.models.modeling import MTLLM

logger = logging.getLogger("mtllm_fast")

# Multiples of 128, the rows of a large product's tiles. Between 256 and 512, where products begin to cost more than
# reading the weights, a step less saves a quarter of the time; above 1024 tokens the launches hide behind the work.
TOKENS = (128, 256, 384, 512, 768, 1024)
SENTENCES = (1, 8, 64, 512)
# More than there are shapes (38), so that a process that embeds batches of every size never captures one twice.
MAX_GRAPHS = 48


class Shape(NamedTuple):
    """What one graph takes: so many tokens and sentences, none longer than ``longest``."""

    tokens: int
    sentences: int
    longest: int


def bucket(tokens: int, sentences: int, longest: int) -> Shape | None:
    """The smallest shape that takes such a batch; None if it is too large for a graph.

    >>> bucket(40, 1, 40), bucket(300, 9, 70)
    (Shape(tokens=128, sentences=1, longest=128), Shape(tokens=384, sentences=64, longest=128))
    """
    if tokens > TOKENS[-1] or sentences > SENTENCES[-1]:
        return None
    rows = TOKENS[bisect_left(TOKENS, tokens)]
    # Attention launches blocks for so many queries of every sentence; two classes keep the number of graphs small.
    bound = TOKENS[0] if longest <= TOKENS[0] else rows
    return Shape(rows, SENTENCES[bisect_left(SENTENCES, sentences)], bound)


class Captured(NamedTuple):
    """``replay()`` computes ``output`` again from what the static inputs hold now."""

    replay: Callable[[], None]
    output: Tensor


class CudaBackend:
    """Captures on one device, into one pool of memory that all graphs share, since they never run side by side."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # A pool ends with its last graph, so it belongs to this object, which ends with them too.
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = _capture_stream(device)
        self._done = torch.cuda.Event()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Work on static memory, ordered on the device after that of the turn before, whatever stream that was on."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)

    def upload(self, host: Tensor, static: Tensor) -> None:
        static.copy_(host.pin_memory(), non_blocking=True)

    def capture(self, forward: Callable[[], Tensor]) -> Captured:
        graph = torch.cuda.CUDAGraph()
        caller = torch.cuda.current_stream()
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):  # on leaving, the caller's stream is current even if the capture fails
            for _ in range(2):  # compiles kernels and makes the libraries' handles, which a capture must not
                forward()
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                output = forward()
        caller.wait_stream(self._stream)
        return Captured(graph.replay, output)

    def wait(self) -> None:
        """Until the device has finished the last turn."""
        self._done.synchronize()


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace (32 MiB on Hopper) for every stream that it has ever seen."""
    return torch.cuda.Stream(device)


BACKENDS: dict[str, Any] = {"cuda": CudaBackend}
"""By type of device; made with the device."""

_CAPTURING = threading.Lock()  # a process may capture one graph at a time


class _Graph(NamedTuple):
    static: Tensor
    captured: Captured


class GraphCache:
    """The graphs of one model, the least recently used dropped first.

    Thread-safe: a batch waits until the one before it is enqueued (tens of microseconds), or captured. Waiting, rather
    than running eagerly when another thread is busy, keeps an embedding's bits from depending on the load.
    """

    def __init__(self, max_graphs: int = MAX_GRAPHS) -> None:
        self._max_graphs = max_graphs
        self._lock = threading.RLock()  # the forward may unfuse the model, which releases
        self._graphs: OrderedDict[tuple[Any, ...], _Graph] = OrderedDict()
        self._seen: set[tuple[Any, ...]] = set()
        self._backend: Any = None
        self._inspected: Inspection | None = None
        self._failure: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model, or a pickled one, has graphs of its own."""
        return type(self), (self._max_graphs,)

    def __len__(self) -> int:
        return len(self._graphs)

    def release(self) -> None:
        """Drop all graphs and their memory, once the device has finished with them."""
        with self._lock:
            if self._backend is not None:
                self._backend.wait()
            self._graphs.clear()
            self._seen.clear()
            self._backend = self._inspected = self._failure = None

    def why_not(self, model: MTLLM) -> str | None:
        """Why batches of this model run without graphs, or None if small ones can have them."""
        return _why_not(model) or self._failure or inspect(model).reason

    def run(self, model: MTLLM, ids: np.ndarray, cu_seqlens: np.ndarray, output: str, at_once: bool) -> Tensor | None:
        """``model.pooled``, or ``model.hidden`` for ``output="tokens"``, of a packed batch; None: run it eagerly.

        A shape is captured when it comes the second time, since a capture costs as much as many batches; ``at_once``:
        the first time, and a capture that fails raises.
        """
        lengths = np.diff(cu_seqlens)
        shape = bucket(len(ids), len(lengths), int(lengths.max(initial=0)))
        if shape is None or _why_not(model) is not None:
            return None
        with self._lock:
            if self._failure is not None:
                return None
            reserve_positions(model.nllb_encoder, TOKENS[-1])  # a table that grows in a later batch would move
            key = (shape, output, *_baked_in(model))
            host = torch.from_numpy(_padded(shape, ids, cu_seqlens))
            rows = len(lengths) if output == "pooled" else len(ids)
            if key in self._graphs and self._inspected is not None and self._inspected.reads_alike(model):
                states = self._replayed(model, key, host, rows, at_once)
                if self._inspected.holds(model):  # looked at while the device works, since it takes as long as a layer
                    return states
            if self._inspected is None or not self._inspected.holds(model):
                inspected = inspect(model)
                if inspected.reason is not None:
                    return None
                if self._inspected is None or not inspected.is_same(self._inspected):
                    self.release()
                self._inspected = inspected
            if not (at_once or key in self._graphs or key in self._seen):
                self._seen.add(key)
                return None
            return self._replayed(model, key, host, rows, at_once)

    def _replayed(self, model: MTLLM, key: tuple[Any, ...], host: Tensor, rows: int, at_once: bool) -> Tensor | None:
        if self._backend is None:
            self._backend = BACKENDS[model.device.type](model.device)
        backend = self._backend
        with backend.turn():
            graph = self._graphs.get(key)
            if graph is not None:
                backend.upload(host, graph.static)
            elif (graph := self._capture(model, *key[:2], host, at_once)) is None:
                return None
            self._graphs[key] = graph
            self._graphs.move_to_end(key)
            graph.captured.replay()
            result = graph.captured.output[:rows].clone()
        # After the capture: a pool whose last graph has gone cannot be captured into again.
        if len(self._graphs) > self._max_graphs:
            backend.wait()
            self._graphs.popitem(last=False)
        return result

    def _capture(self, model: MTLLM, shape: Shape, output: str, host: Tensor, at_once: bool) -> _Graph | None:
        backend = self._backend
        try:
            # Static memory made in inference mode could not be written to outside of it.
            with _CAPTURING, torch.inference_mode(False), torch.no_grad():
                static = torch.empty_like(host, device=model.device)
                backend.upload(host, static)
                return _Graph(static, backend.capture(functools.partial(_forward, model, static, shape, output)))
        except RuntimeError as error:
            self.release()
            self._failure = f"capturing {shape} failed: {error}"
            if at_once:
                raise ValueError(f"cuda_graphs=True cannot be served: {self._failure}") from error
            logger.warning("encode runs without CUDA graphs until release_graphs(): %s", self._failure)
            return None


def _padded(shape: Shape, ids: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
    """ids and cu_seqlens in one array, so that one copy brings both; int32 ``[tokens + sentences + 1]``.

    Dead tokens are token 0, which every vocabulary has; the sentences that are missing are empty.
    """
    host = np.zeros(shape.tokens + shape.sentences + 1, dtype=np.int32)
    host[: len(ids)] = ids
    bounds = host[shape.tokens :]
    bounds[: len(cu_seqlens)] = cu_seqlens
    bounds[len(cu_seqlens) :] = cu_seqlens[-1]
    return host


def _forward(model: MTLLM, static: Tensor, shape: Shape, output: str) -> Tensor:
    """The whole work of one batch, positions included. Waits for nothing on a GPU."""
    ids, cu_seqlens = static.split([shape.tokens, shape.sentences + 1])
    # In the dead tail positions would run on beyond the tables.
    positions = position_ids_from_cu_seqlens(cu_seqlens, shape.tokens).clamp_(max=shape.longest - 1)
    # No layout.dead_tail: it makes attention clear the tail, six launches per layer, for those who read it.
    layout = PackedLayout(cu_seqlens=cu_seqlens, position_ids=positions, max_seqlen=shape.longest)
    batch = PackedInputs(layout, ids)
    return model.pooled(batch) if output == "pooled" else model.hidden(batch)


def _baked_in(model: MTLLM) -> tuple[Any, ...]:
    """What a capture reads on the host and a replay does not see again."""
    return (
        model.config.pooling,
        model.nllb_encoder.config._attn_implementation,
        model.llm2vec.config._attn_implementation,
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        torch.backends.cuda.preferred_blas_library(),
        torch.are_deterministic_algorithms_enabled(),
    )


def _why_not(model: MTLLM) -> str | None:
    """The reasons that are quick to find."""
    kind = model.device.type
    if kind not in BACKENDS:
        return f"the model is on {kind}, not on a CUDA GPU"
    if not model.packed_llm:
        return f"{type(model.llm2vec).__name__} has no packed layers"
    if watched():
        return "torch.compile, or a mode that watches every operation, would see none of a graph's"
    if torch.is_autocast_enabled(kind):
        return "autocast is on"
    if "reference" in {ATTENTION_BACKENDS[t.config._attn_implementation] for t in (model.nllb_encoder, model.llm2vec)}:
        return 'attn_implementation="eager" reads the lengths on the host'
    if model.dtype == torch.float64:
        return "attention in float64 reads the lengths on the host"
    if not is_rms_norm(model.llm2vec.norm):
        return "the LLM's last norm is not its family's own"
    rope_type = getattr(model.llm2vec.rotary_emb, "rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        return f"rotary embeddings of type {rope_type!r} read the longest position on the host"
    window = getattr(model.llm2vec.config, "sliding_window", None)
    if window is not None and window < TOKENS[-1]:
        return f"the LLM's sliding window of {window} is smaller than the largest graph, {TOKENS[-1]} tokens"
    return None

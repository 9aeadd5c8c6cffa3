"""Batches run eagerly and by a captured graph, for tests of graphs."""

from __future__ import annotations

import numpy as np
import torch

from mtllm_fast import MTLLM
from mtllm_fast.models import encoding
from mtllm_fast.testing.tolerance import relative_error


def packed(*lengths: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(sum(lengths)).integers(4, 320, sum(lengths))
    return ids, np.cumsum([0, *lengths]).astype(np.int32)


def eager(model: MTLLM, ids: np.ndarray, cu_seqlens: np.ndarray, output: str = "pooled") -> torch.Tensor:
    batch = encoding._to_device(model, ids, cu_seqlens, int(np.diff(cu_seqlens).max()))
    with torch.no_grad():
        return model.pooled(batch) if output == "pooled" else model.hidden(batch)


def graphed(model: MTLLM, *lengths: int, output: str = "pooled", at_once: bool = True) -> torch.Tensor | None:
    with torch.no_grad():
        return model.graphs.run(model, *packed(*lengths), output, at_once)


def assert_right(model: MTLLM, *lengths: int, output: str = "pooled", tolerance: float = 1e-5) -> None:
    found, want = graphed(model, *lengths, output=output), eager(model, *packed(*lengths), output)
    assert found is not None
    assert found.shape == want.shape
    assert found.dtype == want.dtype
    assert relative_error(found, want) < tolerance


BATCHES = [(1,), (2,), (40,), (127,), (128,), (129,), (3, 2, 5), (100, 20, 9, 2), (2,) * 64, (300, 130, 7), (16,) * 63]

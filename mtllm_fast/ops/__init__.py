"""The ops, one folder each: ``api`` (what users call), ``schema`` (what torch sees), ``reference``, backends."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from mtllm_fast.core.backends import Explanation
from mtllm_fast.core.checks import check_choice

OPS = tuple(module.name for module in pkgutil.iter_modules(__path__))


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend serves ``op(*args, **kwargs)``, and why the others do not. Nothing is computed.

    >>> import torch
    >>> hidden, weight = torch.ones(3, 4, dtype=torch.float64), torch.ones(4)
    >>> cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)
    >>> explain("norm_pool", hidden, weight, cu_seqlens, eps=1e-5).chosen
    'reference'
    """
    check_choice("explain", "op", op, OPS)
    return importlib.import_module(f"mtllm_fast.ops.{op}.api").explain(*args, **kwargs)

"""Fresh memory full of NaN, so that an output element which a kernel forgot to write shows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within it, ``torch.empty`` and its relatives return NaN (the largest value for integers).

    >>> with poisoned_memory():
    ...     torch.empty(2).isnan().all().item()
    True
    """
    settings: Any = torch.utils.deterministic
    before = settings.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)  # torch fills new memory in this mode only
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)

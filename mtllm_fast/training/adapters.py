"""PEFT's adapters in a tower: whose parameters are theirs, and a tower without them for a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def adapter_modules(tower: nn.Module) -> list[Any]:
    """The modules of a tower that PEFT can switch: LoRA and other tuner layers, and trained copies of modules."""
    if "peft" not in sys.modules:  # then nobody has put any there
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    return [module for module in tower.modules() if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)]


def adapter_parameters(tower: nn.Module) -> set[nn.Parameter]:
    found: set[nn.Parameter] = set()
    for module in adapter_modules(tower):
        for name in (*module.adapter_layer_names, *getattr(module, "other_param_names", ())):
            part = getattr(module, name, None)
            if isinstance(part, nn.Module):
                found.update(part.parameters())
    return found


@contextmanager
def adapters_off(tower: nn.Module) -> Iterator[None]:
    """The tower as it was before PEFT; afterwards what was on is on again, and trained if it was trained."""
    switched = [module for module in adapter_modules(tower) if not module.disable_adapters]
    # PEFT's switch freezes adapters, and when it is put back unfreezes the active ones, whatever they were.
    trained = [(parameter, parameter.requires_grad) for module in switched for parameter in module.parameters()]
    for module in switched:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in switched:
            module.enable_adapters(True)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)

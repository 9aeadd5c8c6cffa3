"""State of a training run as JSON and safetensors, in place of pickle: optimiser, scheduler, random generators.

A state is a tree of dicts, lists, tuples, numbers, strings, None, tensors and NumPy arrays. ``pack`` takes its tensors
out by name and leaves JSON; ``unpack`` puts them back. Dict keys that are not strings (an optimiser's parameter
numbers) and tuples survive.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_MARK = "__kind__"


def pack(state: Any, name: str) -> tuple[Any, dict[str, Tensor]]:
    """A JSON value and the tensors that it names, ``name.0``, ``name.1``, …, contiguous and on the host.

    Raises:
        TypeError: a value that is none of the above.

    >>> tree, tensors = pack({"step": 3, 0: (1.5, torch.ones(2))}, "adam")
    >>> list(tensors), unpack(tree, tensors)
    (['adam.0'], {'step': 3, 0: (1.5, tensor([1., 1.]))})
    """
    tensors: dict[str, Tensor] = {}

    def store(tensor: Tensor) -> str:
        key = f"{name}.{len(tensors)}"
        tensors[key] = tensor.detach().cpu().contiguous().clone()  # safetensors refuses tensors that share memory
        return key

    def visit(value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value.item() if isinstance(value, np.generic) else value
        if isinstance(value, Tensor):
            return {_MARK: "tensor", "key": store(value)}
        if isinstance(value, np.ndarray):
            return {_MARK: "array", "dtype": value.dtype.str, "key": store(torch.from_numpy(_as_int64(value)))}
        if isinstance(value, np.generic):
            return visit(value.item())
        if isinstance(value, tuple):
            return {_MARK: "tuple", "items": [visit(item) for item in value]}
        if isinstance(value, list):
            return [visit(item) for item in value]
        if isinstance(value, dict):
            if all(isinstance(key, str) for key in value) and _MARK not in value:
                return {key: visit(item) for key, item in value.items()}
            return {_MARK: "dict", "items": [[visit(key), visit(item)] for key, item in value.items()]}
        raise TypeError(f"{name}: cannot save a {type(value).__module__}.{type(value).__qualname__} without pickle")

    return visit(state), tensors


def _as_int64(array: np.ndarray) -> np.ndarray:
    """The arrays of NumPy's generators are unsigned 32-bit integers, which old safetensors and torch lack."""
    if array.dtype.kind not in "iu" or array.dtype == np.uint64:
        raise TypeError(f"cannot save a NumPy array of {array.dtype} without pickle")
    return array.astype(np.int64)


def unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """What ``pack`` was given."""
    if isinstance(tree, list):
        return [unpack(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    kind = tree.get(_MARK)
    if kind is None:
        return {key: unpack(item, tensors) for key, item in tree.items()}
    if kind == "tensor":
        return tensors[tree["key"]]
    if kind == "array":
        return tensors[tree["key"]].numpy().astype(np.dtype(tree["dtype"]))
    if kind == "tuple":
        return tuple(unpack(item, tensors) for item in tree["items"])
    return {unpack(key, tensors): unpack(item, tensors) for key, item in tree["items"]}

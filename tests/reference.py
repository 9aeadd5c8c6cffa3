"""The reference cases under ``tests/data`` and the error rule they are held to.

Each case stores what the method's reference computes in float64, and the error that the reference itself makes in
float32 and bfloat16. A fast path may make at most ``FACTOR`` times that error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).parent / "data"
FACTOR = {"fp32": 4.0, "bf16": 1.5}
FLOOR = {"fp32": 2e-6, "bf16": 0.0}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    name: str
    spec: dict
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]

    @property
    def checkpoint(self) -> str:
        return str(DATA / self.name / "checkpoint")

    def check(self, mode: str, **got: Tensor) -> None:
        """Raises AssertionError naming every tensor whose error exceeds the rule."""
        failures = []
        for name, value in got.items():
            truth = self.expected[name]
            error = relative_error(value, truth)
            bound = max(FACTOR[mode] * self.spec["ref_errors"][mode][name]["rel_l2"], FLOOR[mode])
            if not error <= bound:
                failures.append(f"{name}: relative error {error:.2e}, allowed {bound:.2e}")
        assert not failures, f"{self.name} in {mode}: " + "; ".join(failures)

    def check_gradients(self, mode: str, **got: Tensor) -> None:
        """The rule for gradients: all of them together as one vector, and each tensor within 2 (bf16) times.

        In bf16 the recorded error of a single small gradient is one draw of a noisy number: between two equally
        accurate runs the ratio of a tensor spreads over 0.6 to 1.6 while that of the whole vector stays near 1.
        """
        for name, value in got.items():
            error = relative_error(value, self.expected[name])
            bound = max({"fp32": 4, "bf16": 2}[mode] * self.spec["ref_errors"][mode][name]["rel_l2"], FLOOR[mode])
            assert error <= bound, f"{name}: relative error {error:.2e}, allowed {bound:.2e}"
        self.check_together(mode, **got)

    def check_together(self, mode: str, **got: Tensor) -> None:
        """The rule for all tensors as one vector."""
        errors, bounds = [], []
        for name, value in got.items():
            truth = self.expected[name].double()
            error, scale = float((value.double() - truth).norm()), float(truth.norm())
            recorded = self.spec["ref_errors"][mode][name]["rel_l2"]
            errors.append(error**2)
            bounds.append((scale * max(FACTOR[mode] * recorded, FLOOR[mode])) ** 2)
        assert sum(errors) <= sum(bounds), (sum(errors) ** 0.5, sum(bounds) ** 0.5)


def relative_error(value: Tensor, truth: Tensor) -> float:
    assert value.shape == truth.shape, (value.shape, truth.shape)
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def load_case(name: str) -> Case:
    folder = DATA / name
    spec = json.loads((folder / "case.json").read_text())
    return Case(name, spec, load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors"))


def pack(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor | int]:
    """A padded batch as packed inputs of ``MTLLM.forward``."""
    mask = attention_mask.bool()
    lengths = mask.sum(1)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return {"input_ids": input_ids[mask], "cu_seqlens": cu_seqlens, "max_seqlen": int(lengths.max())}

"""Correctness before speed: no number is printed for an encoder that computes something else.

Rule: against float64 truth, a peer's error may be at most 4 times (fp32, with a floor of 2e-6) or 1.5 times (bf16)
the error that the padded Hugging Face reference makes at the same dtype, over all rows together. Then every row of
the whole workload must agree with the reference's row within what the two errors allow, which no mixed-up, dropped or
doubled text survives. A training step is held to the same multiples in its loss and in its gradients, all together and
parameter by parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtllm_fast.bench.truth import Step
from mtllm_fast.core.errors import WrongResultError

ERROR_MULTIPLE = {torch.float32: 4.0, torch.bfloat16: 1.5}
ERROR_FLOOR = {torch.float32: 2e-6, torch.bfloat16: 0.0}
# One row varies more than the norm over all of them, and here the reference errs as well.
ROW_SLACK = 4.0
# The reference's error of one number is one draw, and may be 0.
LOSS_FLOOR = {torch.float32: 2e-6, torch.bfloat16: 5e-3}


def relative_error(output_BD: Tensor, truth_BD: Tensor) -> float:
    """``|output - truth| / |truth|`` in the Frobenius norm; NaN anywhere gives NaN, which passes no gate."""
    truth = truth_BD.double()
    return float((output_BD.double() - truth).norm() / truth.norm())


def worst_row_error(output_BD: Tensor, truth_BD: Tensor) -> float:
    """The largest relative error of one row; NaN if any row has one."""
    truth = truth_BD.double()
    return float(((output_BD.double() - truth).norm(dim=1) / truth.norm(dim=1)).max())


@dataclass(frozen=True)
class Gate:
    """Accepts or refuses outputs, given what the reference computed on the same texts.

    Args:
        truth: float64 [B', D], embeddings of a sample of the texts.
        reference_sample: the reference's embeddings of that sample [B', D].
        reference_all: the reference's embeddings of the whole workload [B, D].
    """

    truth: Tensor
    reference_sample: Tensor
    reference_all: Tensor

    @property
    def reference_error(self) -> float:
        return relative_error(self.reference_sample, self.truth)

    @property
    def allowed_error(self) -> float:
        dtype = self.reference_sample.dtype
        return max(ERROR_MULTIPLE[dtype] * self.reference_error, ERROR_FLOOR[dtype])

    @property
    def allowed_row_error(self) -> float:
        dtype = self.reference_sample.dtype
        row_error = max(worst_row_error(self.reference_sample, self.truth), ERROR_FLOOR[dtype])
        return ROW_SLACK * (1 + ERROR_MULTIPLE[dtype]) * row_error

    def check(self, name: str, sample: Tensor, everything: Tensor) -> float:
        """The peer's error against the truth, if both of its outputs are right.

        Raises:
            WrongResultError: an error above the allowed one; the message has both.
        """
        error = relative_error(sample, self.truth)
        if not error <= self.allowed_error:
            raise WrongResultError(
                f"{name}: relative error {error:.2e} against float64, allowed {self.allowed_error:.2e} "
                f"(the reference's own is {self.reference_error:.2e}); no speed is reported for a wrong result"
            )
        row_error = worst_row_error(everything, self.reference_all)
        if not row_error <= self.allowed_row_error:
            raise WrongResultError(
                f"{name}: one text differs from the reference by {row_error:.2e}, allowed "
                f"{self.allowed_row_error:.2e}; no speed is reported for a wrong result"
            )
        return error

    def check_cosine(self, name: str, sample: Tensor, everything: Tensor, least: float) -> tuple[float, float]:
        """The peer's error against the truth, and its smallest cosine to the truth and to the reference.

        Raises:
            WrongResultError: an embedding points elsewhere; the message has both cosines.
        """
        pairs = ((sample, self.truth), (everything, self.reference_all))
        cosine = min(float(torch.cosine_similarity(a.double(), b.double()).min()) for a, b in pairs)
        if not cosine >= least:
            raise WrongResultError(
                f"{name}: cosine {cosine:.5f}, at least {least} wanted; no speed is reported for a wrong result"
            )
        return relative_error(sample, self.truth), cosine


@dataclass(frozen=True)
class StepGate:
    """Accepts or refuses training steps, given what the reference's step came to on the same texts.

    Args:
        truth: float64 loss and gradients of a few texts.
        reference: the reference's of the same texts.
        reference_all: the reference's of the whole batch.
        dtype: of the run.
    """

    truth: Step
    reference: Step
    reference_all: Step
    dtype: torch.dtype

    @property
    def reference_error(self) -> float:
        """Of all gradients together."""
        return _gradient_error(self.reference, self.truth)

    @property
    def allowed_error(self) -> float:
        return max(ERROR_MULTIPLE[self.dtype] * self.reference_error, ERROR_FLOOR[self.dtype])

    def check(self, name: str, few: Step, everything: Step) -> float:
        """The error of a peer's gradients against the truth, if both of its steps are right.

        Raises:
            WrongResultError: names the loss or the gradient, its error and the allowed one.
        """
        multiple, floor = ERROR_MULTIPLE[self.dtype], LOSS_FLOOR[self.dtype]
        reference_loss = _loss_error(self.reference, self.truth)
        _refuse(name, "the loss", _loss_error(few, self.truth), max(multiple * reference_loss, floor))
        error = _gradient_error(few, self.truth)
        _refuse(name, "the gradient", error, self.allowed_error)
        for parameter, truth in self.truth.gradients.items():
            own = max(relative_error(self.reference.gradients[parameter], truth), self.reference_error)
            allowed = ROW_SLACK * max(multiple * own, ERROR_FLOOR[self.dtype])
            _refuse(name, f"the gradient of {parameter}", relative_error(few.gradients[parameter], truth), allowed)
        both = ROW_SLACK * (1 + multiple)
        loss_error = _loss_error(everything, self.reference_all)
        _refuse(name, "the whole batch's loss", loss_error, both * max(reference_loss, floor))
        all_error = _gradient_error(everything, self.reference_all)
        allowed = both * max(self.reference_error, ERROR_FLOOR[self.dtype])
        _refuse(name, "the whole batch's gradient", all_error, allowed)
        return error


def _loss_error(step: Step, truth: Step) -> float:
    return abs(step.loss - truth.loss) / abs(truth.loss)


def _gradient_error(step: Step, truth: Step) -> float:
    """Relative error of all gradients as one vector."""
    squares = [(step.gradients[name].double() - true.double()).square().sum() for name, true in truth.gradients.items()]
    norms = [true.double().square().sum() for true in truth.gradients.values()]
    return float((torch.stack(squares).sum() / torch.stack(norms).sum()).sqrt())


def _refuse(name: str, what: str, error: float, allowed: float) -> None:
    if not error <= allowed:
        raise WrongResultError(
            f"{name}: {what} has relative error {error:.2e}, allowed {allowed:.2e}; "
            "no speed is reported for a wrong result"
        )

"""MT-LLM, fast: a translation encoder stacked under a bidirectional LLM, packed end to end.

Importing this package is cheap: names load on first use. It also makes the ``nllb-llm2vec`` model type known to
transformers' Auto classes, now if ``AutoConfig`` is imported already, else at the moment it is.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtllm_fast.configuration import MTLLMConfig as MTLLMConfig
    from mtllm_fast.evaluation.evaluate import EvaluateArguments as EvaluateArguments
    from mtllm_fast.evaluation.evaluate import evaluate as evaluate
    from mtllm_fast.models import MTLLM as MTLLM
    from mtllm_fast.models import MTLLMForMultipleChoice as MTLLMForMultipleChoice
    from mtllm_fast.models import MTLLMForSequenceClassification as MTLLMForSequenceClassification
    from mtllm_fast.models import MTLLMForTokenClassification as MTLLMForTokenClassification
    from mtllm_fast.ops import explain as explain
    from mtllm_fast.ops.bias_relu import bias_relu as bias_relu
    from mtllm_fast.ops.distillation_loss import DistillationLoss as DistillationLoss
    from mtllm_fast.ops.distillation_loss import distillation_loss as distillation_loss
    from mtllm_fast.ops.embed_tokens import embed_tokens as embed_tokens
    from mtllm_fast.ops.layer_norm import layer_norm as layer_norm
    from mtllm_fast.ops.norm_pool import norm_pool as norm_pool
    from mtllm_fast.ops.quantize_rows import quantize_rows as quantize_rows
    from mtllm_fast.ops.rms_norm import rms_norm as rms_norm
    from mtllm_fast.ops.rope import rope as rope
    from mtllm_fast.ops.rope import rope_qkv as rope_qkv
    from mtllm_fast.ops.stack_projection import stack_projection as stack_projection
    from mtllm_fast.ops.swiglu import swiglu as swiglu
    from mtllm_fast.ops.token_kl_loss import token_kl_loss as token_kl_loss
    from mtllm_fast.ops.varlen_attention import varlen_attention as varlen_attention
    from mtllm_fast.tasks.distill import DistillTaskArguments as DistillTaskArguments
    from mtllm_fast.tasks.distill import distill_task as distill_task
    from mtllm_fast.tasks.finetune import FinetuneArguments as FinetuneArguments
    from mtllm_fast.tasks.finetune import finetune as finetune
    from mtllm_fast.tasks.preembed import PreembedArguments as PreembedArguments
    from mtllm_fast.tasks.preembed import preembed as preembed
    from mtllm_fast.tasks.training import task_training_arguments as task_training_arguments
    from mtllm_fast.text.alignment import SpanAlignment as SpanAlignment
    from mtllm_fast.text.alignment import align_spans as align_spans
    from mtllm_fast.text.languages import languages as languages
    from mtllm_fast.training.collator import DataCollatorForSelfDistillation as DataCollatorForSelfDistillation
    from mtllm_fast.training.distill import DistillResult as DistillResult
    from mtllm_fast.training.distill import distill as distill
    from mtllm_fast.training.distill import training_arguments as training_arguments
    from mtllm_fast.training.distillation_trainer import SelfDistillationTrainer as SelfDistillationTrainer
    from mtllm_fast.training.least_squares import init_up_proj_least_squares as init_up_proj_least_squares
    from mtllm_fast.training.prepare import prepare_llm as prepare_llm
    from mtllm_fast.training.recipes import DistillArguments as DistillArguments
    from mtllm_fast.training.self_distillation import MTLLMForSelfDistillation as MTLLMForSelfDistillation

__version__ = "0.1.0"

_HOME = {
    "DataCollatorForSelfDistillation": "mtllm_fast.training.collator",
    "DistillArguments": "mtllm_fast.training.recipes",
    "DistillTaskArguments": "mtllm_fast.tasks.distill",
    "EvaluateArguments": "mtllm_fast.evaluation.evaluate",
    "FinetuneArguments": "mtllm_fast.tasks.finetune",
    "PreembedArguments": "mtllm_fast.tasks.preembed",
    "DistillResult": "mtllm_fast.training.distill",
    "MTLLM": "mtllm_fast.models",
    "MTLLMConfig": "mtllm_fast.configuration",
    "MTLLMForMultipleChoice": "mtllm_fast.models",
    "MTLLMForSelfDistillation": "mtllm_fast.training.self_distillation",
    "MTLLMForSequenceClassification": "mtllm_fast.models",
    "MTLLMForTokenClassification": "mtllm_fast.models",
    "DistillationLoss": "mtllm_fast.ops.distillation_loss",
    "SelfDistillationTrainer": "mtllm_fast.training.distillation_trainer",
    "SpanAlignment": "mtllm_fast.text.alignment",
    "align_spans": "mtllm_fast.text.alignment",
    "bias_relu": "mtllm_fast.ops.bias_relu",
    "distill": "mtllm_fast.training.distill",
    "distill_task": "mtllm_fast.tasks.distill",
    "evaluate": "mtllm_fast.evaluation.evaluate",
    "finetune": "mtllm_fast.tasks.finetune",
    "preembed": "mtllm_fast.tasks.preembed",
    "task_training_arguments": "mtllm_fast.tasks.training",
    "distillation_loss": "mtllm_fast.ops.distillation_loss",
    "embed_tokens": "mtllm_fast.ops.embed_tokens",
    "explain": "mtllm_fast.ops",
    "init_up_proj_least_squares": "mtllm_fast.training.least_squares",
    "languages": "mtllm_fast.text.languages",
    "layer_norm": "mtllm_fast.ops.layer_norm",
    "norm_pool": "mtllm_fast.ops.norm_pool",
    "prepare_llm": "mtllm_fast.training.prepare",
    "rms_norm": "mtllm_fast.ops.rms_norm",
    "rope": "mtllm_fast.ops.rope",
    "rope_qkv": "mtllm_fast.ops.rope",
    "quantize_rows": "mtllm_fast.ops.quantize_rows",
    "stack_projection": "mtllm_fast.ops.stack_projection",
    "swiglu": "mtllm_fast.ops.swiglu",
    "training_arguments": "mtllm_fast.training.distill",
    "token_kl_loss": "mtllm_fast.ops.token_kl_loss",
    "varlen_attention": "mtllm_fast.ops.varlen_attention",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mtllm_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


class _RegisterAfterAutoConfig(importlib.abc.MetaPathFinder):
    """Imports ``mtllm_fast.configuration``, which registers the model type, right after ``AutoConfig``."""

    target = "transformers.models.auto.configuration_auto"

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.target:
            return None
        sys.meta_path.remove(self)  # once; the finders behind it do the work
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module("mtllm_fast.configuration")

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _RegisterAfterAutoConfig.target in sys.modules:
    importlib.import_module("mtllm_fast.configuration")
else:
    sys.meta_path.insert(0, _RegisterAfterAutoConfig())

"""The ways to take one step of self-distillation (stage 1 of arXiv 2406.12739) that the benchmark puts side by side.

Every step starts from token ids in host memory and ends with the gradients of the up-projection and of LoRA (rank 16,
alpha 32, dropout 0.05, all linear layers of the LLM) in float32; frozen weights have the dtype of the run. The
optimiser's step is the same for all and not timed. All read the same parameters.

``reference``
    As the method's own code does it: Hugging Face modules padded to the batch's longest text, PEFT's LoRA, which the
    teacher's pass switches off, eager mean pooling under the mask and ``mse_loss``. (The code pads to 512; padding
    less favours this peer.)
``ours``
    ``MTLLMForSelfDistillation`` on the same texts, packed.
``reference-checkpointed``, ``ours-checkpointed``
    The same with gradient checkpointing: every LLM layer keeps its input alone and runs again in the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtllm_fast import MTLLMForSelfDistillation
from mtllm_fast.bench.options import BenchOptions
from mtllm_fast.bench.peers import masked_mean, pad
from mtllm_fast.bench.sizes import Stack, make_stack
from mtllm_fast.bench.truth import Step
from mtllm_fast.bench.workloads import IdArray, flat
from mtllm_fast.models.encoding import upload
from mtllm_fast.training.adapters import adapters_off

LORA_DROPOUT = 0.05
Loss = Callable[[Sequence[IdArray]], Tensor]


@dataclass
class TrainStack:
    """One set of parameters: the plain modules with LoRA for the reference, and ours around the same tensors."""

    stack: Stack
    joint: MTLLMForSelfDistillation
    trained: dict[str, nn.Parameter]
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.stack.device

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def set_dropout(self, p: float) -> None:
        """Of LoRA; nothing else drops out in a step."""
        for llm in (self.stack.llm, self.joint.mtllm.llm2vec):
            for module in llm.modules():
                if isinstance(module, nn.Dropout):
                    module.p = p

    def llm_texts(self, texts: Sequence[IdArray]) -> list[IdArray]:
        """What the teacher reads in place of these texts: as many tokens, from its own vocabulary."""
        vocabulary = self.stack.llm.config.vocab_size
        return [text % vocabulary for text in texts]


def make_train_stack(options: BenchOptions) -> TrainStack:
    """The stack of resolved options with random LoRA in both LLMs, whose parameters they share."""
    stack = make_stack(options.size, options.torch_device, options.torch_dtype, options.seed)
    model = stack.model
    model.up_proj.float()
    lora = peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=LORA_DROPOUT, init_lora_weights=False,  # B of 0 would hide A's gradient
        target_modules=r".*\.(q|k|v|o|gate|up|down)_proj",
    )  # fmt: skip
    torch.manual_seed(options.seed)
    for llm in (model.llm2vec, stack.llm):
        peft.inject_adapter_in_model(lora, llm)
    for name, parameter in model.llm2vec.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            owner, _, attribute = name.rpartition(".")
            setattr(stack.llm.get_submodule(owner), attribute, parameter)
    joint = MTLLMForSelfDistillation(model).train()
    stack.llm.train()  # the encoder stays in eval mode: it is frozen, and runs without dropout
    trained = {name: parameter for name, parameter in joint.named_parameters() if parameter.requires_grad}
    return TrainStack(stack, joint, trained, options.torch_dtype)


def reference_loss(train: TrainStack, checkpointing: bool) -> Loss:
    stack, device = train.stack, train.device

    def loss(texts: Sequence[IdArray]) -> Tensor:
        _checkpoint(stack.llm, checkpointing)
        with train.autocast():
            ids_NL, mask_NL = pad(train.llm_texts(texts), device)
            with torch.no_grad(), adapters_off(stack.llm):
                hidden = stack.llm(input_ids=ids_NL, attention_mask=mask_NL, use_cache=False).last_hidden_state
                teacher = masked_mean(hidden, mask_NL)
            ids_NL, mask_NL = pad(texts, device)
            with torch.no_grad():
                encoded = stack.encoder(input_ids=ids_NL, attention_mask=mask_NL).last_hidden_state
            inputs = stack.up_proj(encoded)
            hidden = stack.llm(inputs_embeds=inputs, attention_mask=mask_NL, use_cache=False).last_hidden_state
            return F.mse_loss(masked_mean(hidden, mask_NL), teacher)

    return loss


def our_loss(train: TrainStack, checkpointing: bool) -> Loss:
    joint, device = train.joint, train.device

    def loss(texts: Sequence[IdArray]) -> Tensor:
        _checkpoint(joint, checkpointing)
        batch: dict[str, Any] = {}
        for side, ids in (("", train.llm_texts(texts)), ("encoder_", texts)):
            packed, cu_seqlens = flat(ids)
            batch[f"{side}input_ids"] = upload(torch.from_numpy(packed), device)
            batch[f"{side}cu_seqlens"] = upload(torch.from_numpy(cu_seqlens), device)
            batch[f"{side}max_seqlen"] = max(map(len, ids))
        with train.autocast():
            return joint(**batch).loss

    return loss


def _checkpoint(module: nn.Module, on: bool) -> None:
    if on:
        module.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    else:
        module.gradient_checkpointing_disable()  # type: ignore[operator]


def losses(train: TrainStack) -> dict[str, Loss]:
    """Every peer of a training run."""
    return {
        "reference": reference_loss(train, checkpointing=False),
        "reference-checkpointed": reference_loss(train, checkpointing=True),
        "ours": our_loss(train, checkpointing=False),
        "ours-checkpointed": our_loss(train, checkpointing=True),
    }


def step(train: TrainStack, loss: Loss) -> Callable[[Sequence[IdArray]], Tensor]:
    """One step: forward, backward, gradients in ``.grad``; the loss comes back without waiting for the device."""

    def run(texts: Sequence[IdArray]) -> Tensor:
        for parameter in train.trained.values():
            parameter.grad = None
        value = loss(texts)
        value.backward()
        return value.detach()

    return run


def result(train: TrainStack, run: Callable[[Sequence[IdArray]], Tensor], texts: Sequence[IdArray]) -> Step:
    """The loss and copies of the gradients of one step; a gradient that is missing is 0."""
    loss = float(run(texts))
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in train.trained.items()
    }
    return Step(loss, gradients)

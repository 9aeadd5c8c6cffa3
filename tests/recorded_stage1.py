"""Stage 1 of the recorded cases: the stack with its adapter as it was recorded, and the recorded batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
from reference import DTYPES, Case, load_case
from torch import Tensor, nn
from torch.nn import functional as F

from mtllm_fast import MTLLM, MTLLMForSelfDistillation, SpanAlignment


def recorded(
    name: str, mode: str, sequence_weight: float = 1.0, span_weight: float = 0.0
) -> tuple[Case, MTLLMForSelfDistillation]:
    """The case and its model: no dropout, and in bf16 the trained parameters in float32."""
    case = load_case(name)
    model = MTLLM.from_pretrained(case.checkpoint, dtype=DTYPES[mode])
    adapter = str(Path(case.checkpoint).parent / "adapter")
    peft.PeftModel.from_pretrained(model.llm2vec, adapter, is_trainable=True)
    joint = MTLLMForSelfDistillation(model, sequence_weight=sequence_weight, span_weight=span_weight).train()
    for module in joint.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for parameter in joint.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return case, joint


def recorded_name(name: str) -> str:
    """Of one of our parameters."""
    return name.removeprefix("stack.").removeprefix("llm2vec.").replace(".default", "")


def recorded_inputs(given: dict[str, Tensor], packed: bool, prefix: str = "") -> dict[str, Any]:
    """A recorded batch; bags of tokens of the padded grid become spans of packed tokens."""
    masks = {"": given[f"{prefix}attention_mask"], "encoder_": given[f"{prefix}nllb_attention_mask"]}
    ids = {"": given[f"{prefix}input_ids"], "encoder_": given[f"{prefix}nllb_input_ids"]}
    inputs: dict[str, Any] = {}
    csr: dict[str, Tensor] = {}
    for side, mask in masks.items():
        real = mask.bool()
        if packed:
            lengths = real.sum(1)
            inputs[f"{side}input_ids"] = ids[side][real]
            inputs[f"{side}cu_seqlens"] = F.pad(lengths.cumsum(0), (1, 0)).int()
            inputs[f"{side}max_seqlen"] = int(lengths.max())
        else:
            inputs |= {f"{side}input_ids": ids[side], f"{side}attention_mask": mask}
        if "bag_ids" in given:
            matrix = given["bag_ids" if side == "" else "nllb_bag_ids"]
            place = real.flatten().cumsum(0) - 1
            name = "llm" if side == "" else "encoder"
            csr[f"{name}_indices"] = place[matrix[matrix > 0]]
            csr[f"{name}_offsets"] = F.pad((matrix > 0).sum(1).cumsum(0), (1, 0))
    return inputs | ({"spans": SpanAlignment(**csr)} if csr else {})

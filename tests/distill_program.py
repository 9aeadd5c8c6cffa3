"""What tests start in processes of its own: one run of ``distill``. Arguments: folder, options as JSON, ddp or fsdp."""

import json
import sys

import torch

from mtllm_fast import DistillArguments, distill, training_arguments

folder, options, *kind = sys.argv[1:]
arguments = DistillArguments(**json.loads(options))
given = {"max_steps": 6, "save_steps": 2, "logging_steps": 1, "eval_strategy": "no", "disable_tqdm": True}
given |= {"save_total_limit": 3, "use_cpu": True}
if kind:
    given["max_steps"] = 4
if kind == ["fsdp"]:
    layers = ["PackedLlamaDecoderLayer", "PackedM2M100EncoderLayer"]
    given |= {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": layers}}
distill(arguments, training_arguments(arguments, folder, **given))
if torch.distributed.is_initialized():  # else its threads may abort the process at its end
    torch.distributed.destroy_process_group()

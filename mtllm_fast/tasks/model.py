"""A tower (an LLM, a stack, an encoder) and a linear head on its pooled states, and folders of what was trained."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import ModelOutput

from mtllm_fast.core.errors import CheckpointError
from mtllm_fast.models import MTLLM
from mtllm_fast.models.inputs import packed_layout, prepare_inputs
from mtllm_fast.models.layers import to_packed_layers
from mtllm_fast.models.plain import is_rms_norm
from mtllm_fast.models.towers import evaluating, final_norm, run_llm, run_other_llm
from mtllm_fast.ops.norm_pool import norm_pool
from mtllm_fast.tasks.encoder import EncoderTower, load_encoder
from mtllm_fast.tasks.presets import Task
from mtllm_fast.text.tokenization import load_tokenizer
from mtllm_fast.training.checkpoints import begin, damage, finish
from mtllm_fast.training.trainer import whole_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1


@dataclass
class TaskOutput(ModelOutput):
    """``loss`` where labels or states were given; ``logits`` ``[B, C]`` (words: ``[U, C]``); ``states`` ``[U, D]``."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    states: Tensor | None = None


class TaskModel(nn.Module):
    """``logits = score(states)``, ``score`` a linear map without bias, states the means of each unit's tokens.

    Trained by labels: cross-entropy over classes, choices or words. Trained by ``states``, the teacher's: their mean
    squared error over all elements (stage 2 of arXiv 2406.12739), and the head stays as it is.

    Args:
        tower: a stack (``MTLLM``), a decoder of ``transformers`` made bidirectional, or an ``EncoderTower``.
    """

    main_input_name = "input_ids"

    def __init__(self, tower: Any, task: Task) -> None:
        super().__init__()
        self.tower, self.task = tower, task
        width = tower.config.hidden_size
        self.score = nn.Linear(width, task.num_scores, bias=False)
        layers = getattr(self.adapted, "layers", None)
        self.packed_llm = isinstance(layers, nn.ModuleList) and to_packed_layers(layers)

    @property
    def adapted(self) -> Any:
        """The part of the tower that LoRA is put into: its LLM, or the encoder that there is alone."""
        part = _adapted_part(self.tower)
        return getattr(self.tower, part) if part else self.tower

    @property
    def device(self) -> torch.device:
        return self.score.weight.device

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **options: Any) -> None:
        self.tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        self.tower.gradient_checkpointing_disable()

    def forward(
        self,
        input_ids: Any,
        cu_seqlens: Any,
        max_seqlen: int | None = None,
        unit_indices: Tensor | None = None,
        unit_offsets: Tensor | None = None,
        labels: Tensor | None = None,
        states: Tensor | None = None,
        return_loss: bool = True,
    ) -> TaskOutput:
        """A batch of ``TaskCollator``; tensors are moved to the model's device. See ``TaskOutput``."""
        tensors = (input_ids, cu_seqlens, unit_indices, unit_offsets, labels, states)
        moved = [None if tensor is None else tensor.to(self.device) for tensor in tensors]
        input_ids, cu_seqlens, unit_indices, unit_offsets, labels, states = moved
        own = self._states(input_ids, cu_seqlens, max_seqlen, unit_indices, unit_offsets)
        logits = self.score(own.to(self.score.weight.dtype))
        if self.task.kind == "choice":
            logits = logits.view(-1, len(self.task.choices))
        loss = None
        if states is not None:
            known = (
                ~states[:, 0].isnan() if self.task.kind == "tokens" else slice(None)
            )  # words that the teacher cut off
            loss = F.mse_loss(own[known].float(), states[known].float())
        elif labels is not None:
            loss = F.cross_entropy(logits.float(), labels)
        return TaskOutput(loss=loss, logits=logits, states=own)

    def _states(
        self, ids: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, indices: Tensor | None, offsets: Tensor | None
    ) -> Tensor:
        if isinstance(self.tower, MTLLM):
            batch = prepare_inputs(self.tower, ids, None, None, cu_seqlens, max_seqlen)
            with torch.no_grad(), evaluating(self.tower.nllb_encoder):  # frozen, and without dropout, as in stage 1
                batch = replace(batch, input_ids=None, encoder_states=self.tower.encode_tokens(batch))
            if indices is None:
                return self.tower.pooled(batch)
            hidden = self.tower.hidden(batch)
        elif isinstance(self.tower, EncoderTower):
            hidden = self.tower(ids, packed_layout(cu_seqlens, ids, max_seqlen))
        else:
            hidden, is_normed = self._llm_states(ids, cu_seqlens, max_seqlen)
            norm: Any = getattr(self.tower, "norm", None)
            if indices is None and not is_normed and is_rms_norm(norm):
                return norm_pool(hidden, norm.weight, cu_seqlens, eps=norm.variance_epsilon)
            hidden = hidden if is_normed else final_norm(self.tower, hidden)
        if indices is None:
            return _means(hidden, cu_seqlens.long())
        assert offsets is not None
        return _means(hidden.index_select(0, indices), offsets)

    def _llm_states(self, ids: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> tuple[Tensor, bool]:
        layout = packed_layout(cu_seqlens, ids, max_seqlen)
        embedded = self.tower.get_input_embeddings()(ids)
        if self.packed_llm:
            return run_llm(self.tower, embedded, layout), False
        return run_other_llm(self.tower, embedded, layout), True


def _adapted_part(tower: Any) -> str:
    if isinstance(tower, MTLLM):
        return "llm2vec"
    return "encoder" if isinstance(tower, EncoderTower) else ""


def _means(rows: Tensor, offsets: Tensor) -> Tensor:
    """Of consecutive rows ``offsets[u] … offsets[u + 1]``, in float32."""
    return torch.segment_reduce(rows.float(), "mean", offsets=offsets, axis=0)


def load_llm(path: str, dtype: Any) -> Any:
    """A decoder without its head, bidirectional, in evaluation mode."""
    if path == "tiny":
        return MTLLM.from_pretrained("tiny", dtype=dtype).llm2vec.eval()
    config = AutoConfig.from_pretrained(path)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{path}: must be a decoder LLM, is a {config.model_type}")
    config.is_causal = False
    llm = AutoModel.from_pretrained(path, config=config, dtype=dtype)
    llm.config._attn_implementation = "mtllm_varlen" if _is_packed(llm) else llm.config._attn_implementation
    return llm.eval()


def _is_packed(llm: Any) -> bool:
    layers = getattr(llm, "layers", None)
    return isinstance(layers, nn.ModuleList) and to_packed_layers(layers)


def save_result(model: TaskModel, wrapped: Any, facts: dict[str, Any], folder: Path) -> None:
    """``adapter/`` as PEFT writes it, ``head.safetensors`` (with ``up_proj`` if it was trained) and ``task.json``."""
    weights = whole_weights(model)
    begun = begin(folder)
    part = _adapted_part(model.tower)
    prefix = f"tower.{part}." if part else "tower."
    adapter = {name.replace(prefix, "base_model.model.", 1): w for name, w in weights.items() if "lora_" in name}
    wrapped.save_pretrained(str(begun / "adapter"), state_dict=adapter)
    head = {"score.weight": model.score.weight.detach().cpu().contiguous()}
    head |= {name: w for name, w in weights.items() if name.startswith("tower.up_proj.")}
    save_file(head, begun / "head.safetensors", metadata={"format": "pt"})
    about = {"format": FORMAT, "task": model.task.to_dict(), **facts}
    (begun / "task.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    finish(folder)


@dataclass(frozen=True)
class Loaded:
    """A model of a task with what it needs to read texts."""

    model: TaskModel
    tokenizer: PreTrainedTokenizerBase
    facts: dict[str, Any]


def read_facts(folder: Path) -> dict[str, Any]:
    """``task.json`` of a result.

    Raises:
        CheckpointError: no such folder, or not what was written.
    """
    if not (folder / "task.json").is_file():
        raise CheckpointError(f"{folder}: no result of finetune or distill-task (no task.json); give OUTPUT_DIR/final")
    if reason := damage(folder):
        raise CheckpointError(f"{folder} is damaged: {reason}")
    facts = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: of format {facts.get('format')}, this version reads {FORMAT}")
    return facts


def load_result(folder: str | Path, *, dtype: Any = "auto", device: Any = None) -> Loaded:
    """What ``finetune`` or ``distill_task`` wrote into ``final/``, for inference.

    Raises:
        CheckpointError: a folder that is none, or is damaged.
    """
    import peft

    folder = Path(folder)
    facts = read_facts(folder)
    task = Task.from_dict(facts["task"])
    tower, tokenizer = load_tower(facts["kind"], facts["base"], facts["tokenizer"], dtype)
    model = TaskModel(tower, task)
    peft.PeftModel.from_pretrained(model.adapted, str(folder / "adapter"))
    weights = load_file(folder / "head.safetensors")
    found = model.load_state_dict(weights, strict=False)
    if found.unexpected_keys:
        raise CheckpointError(f"{folder}: head.safetensors has {found.unexpected_keys}, which the model has not")
    model.requires_grad_(False)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Loaded(model.to(device).eval(), tokenizer, facts)


def load_tower(kind: str, base: str, tokenizer: str | None, dtype: Any) -> tuple[Any, Any]:
    """What a task is put on, and the tokenizer that it reads with: a ``"stack"``, an ``"llm"`` or an ``"encoder"``."""
    if kind == "stack":
        stack = MTLLM.from_pretrained(base, dtype=dtype, llm_embeddings=False)
        return stack, stack.tokenizer
    if kind == "encoder":
        return load_encoder(base, dtype), load_tokenizer(base)
    return load_llm(base, dtype), load_llm_tokenizer(tokenizer)


def load_llm_tokenizer(name: str | None) -> Any:
    """By folder or id; None: the embedded one."""
    from mtllm_fast.tiny import tiny_llm_tokenizer

    return tiny_llm_tokenizer() if name is None else AutoTokenizer.from_pretrained(name)

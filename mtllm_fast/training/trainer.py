"""``transformers.Trainer`` whose checkpoints hold what is trained alone, are whole or absent, and free of pickle.

A checkpoint folder holds, for W processes:

``trained-R-of-W.safetensors, .json``
    Every W-th trained parameter with its optimiser state, whole (not a slice of it), whatever shards it in memory.
    So any number of processes can read them, and none has to hold all of them.
``process-R-of-W.safetensors, .json``
    Of each process its random generators and, for streamed data, its position.
``run.json, trainer_state.json``
    Learning rate schedule, gradient scaler, and the Trainer's own state and log.
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState

from mtllm_fast.core.errors import CheckpointError
from mtllm_fast.training.checkpoints import begin, finish, prune, unfinished
from mtllm_fast.training.states import pack, unpack

logger = logging.getLogger("mtllm_fast")

RUN = "run.json"
_WRAPPERS = re.compile(r"\b(_orig_mod|module|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


class ResumableTrainer(Trainer):
    """A ``Trainer`` for models most of whose weights are frozen; see the module's description.

    A run that is killed and resumed from a checkpoint goes on as if nothing had been, bit for bit on a CPU. Training
    data are map-style (the Trainer skips what it has seen), or have ``state_dict`` and ``load_state_dict``.
    Everything else is ``transformers.Trainer``.

    Raises:
        ValueError: FSDP's first version, which lays frozen and trained weights into one tensor.
        CheckpointError: on resuming, a checkpoint of another model or number of processes.
    """

    args: Any
    model: Any
    model_wrapped: Any
    train_dataset: Any
    eval_dataset: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)  # a library logs, and prints nothing
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) != 2:
            raise ValueError(
                "FSDP 1 lays frozen and trained weights into one tensor: pass --fsdp_config '{\"version\": 2}'"
            )

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and self.accelerator.distributed_type == DistributedType.MULTI_CPU:
            # Accelerate forgets about FSDP where there is no GPU, and would run DDP in its place without a word.
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            # The first takes the second's values again and again.
            for state in (self.accelerator.state, PartialState()):
                state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self.args.disable_tqdm and self.is_world_process_zero():
            figures = ", ".join(f"{name} {value:.4g}" for name, value in logs.items() if isinstance(value, float | int))
            logger.info("step %d of %d: %s", self.state.global_step, self.state.max_steps, figures)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.is_deepspeed_enabled:  # ZeRO shards the optimiser's state; DeepSpeed alone can save it
            super()._save_checkpoint(model, trial)
            return
        self.store_flos()
        output = Path(str(self._get_output_dir(trial)))
        final = output / f"checkpoint-{self.state.global_step}"
        self._remember_best(output)
        if self.args.should_save:
            begin(final)
        self._wait()
        folder, process = unfinished(final), self.args.process_index
        self._write_trained(folder, with_optimizer=not self.args.save_only_model)
        if not self.args.save_only_model:
            own = {"random": _random_state(), "data": self._data_state()}
            _write(folder, f"process-{self._part(process)}", *pack(own, "own"))
        self._wait()
        if self.args.should_save:
            shared = {"scheduler": self.lr_scheduler.state_dict(), "scaler": self._scaler_state()}
            shared |= {"processes": self.args.world_size, "step": self.state.global_step}
            tree, tensors = pack(shared, "shared")
            if tensors:
                raise TypeError(f"a learning rate schedule must not hold tensors, {sorted(tensors)} came")
            (folder / RUN).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
            self._collect_callbacks()
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            finish(final)
            best = self.state.best_model_checkpoint
            prune(output, self.args.save_total_limit, keep_also=None if best is None else Path(best))
        self._wait()

    def _remember_best(self, output: Path) -> None:
        if self.state.best_global_step:
            best = output / f"checkpoint-{self.state.best_global_step}"
            if best.is_dir() or self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(best)

    def _collect_callbacks(self) -> None:
        from transformers.trainer_callback import ExportableState

        states: Any = self.state.stateful_callbacks
        for callback in [c for c in (*self.callback_handler.callbacks, self.control) if isinstance(c, ExportableState)]:
            name = type(callback).__name__
            if isinstance(states.get(name), list):
                states[name].append(callback.state())
            else:
                states[name] = callback.state()

    def _write_trained(self, folder: Path, with_optimizer: bool) -> None:
        """This process's share of the trained parameters; all processes take part, since parameters may be sharded."""
        index, world = self.args.process_index, self.args.world_size
        weights: dict[str, Tensor] = {}
        states: dict[str, Any] = {}
        groups = _groups(self.optimizer, self.model) if with_optimizer else []
        for number, (name, parameter) in enumerate(trained_parameters(self.model)):
            weight = _whole(parameter)
            state = {k: _whole(v) for k, v in self._state_of(parameter).items()} if with_optimizer else {}
            if number % world == index:
                weights[f"weights/{name}"] = weight.detach().cpu().contiguous()
                states[name] = state
        tree, tensors = pack(states, "optimizer")
        _write(
            folder, f"trained-{self._part(index)}", {"states": tree, "groups": pack(groups, "")[0]}, weights | tensors
        )

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        return getattr(self.optimizer, "optimizer", self.optimizer).state.get(parameter, {})

    def _part(self, index: int) -> str:
        return f"{index:05d}-of-{self.args.world_size:05d}"

    def _wait(self) -> None:
        if self.args.world_size > 1:
            dist.barrier()

    def _scaler_state(self) -> dict[str, Any] | None:
        scaler = getattr(self.accelerator, "scaler", None)
        return None if scaler is None else scaler.state_dict()

    def _data_state(self) -> Any:
        return self.train_dataset.state_dict() if hasattr(self.train_dataset, "state_dict") else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained weights into ``output_dir`` (default: the run's); see ``read_trained``."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._write_trained(folder, with_optimizer=False)
        self._wait()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(resume_from_checkpoint, self.model if model is None else model)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            load_trained(self.state.best_model_checkpoint, self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        shared = self._shared(checkpoint)
        states: dict[str, Any] = {}
        groups: list[dict[str, Any]] = []
        for tree, tensors in _parts(Path(checkpoint), "trained"):
            states |= unpack(tree["states"], tensors)
            groups = unpack(tree["groups"], {})
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        current = _groups(optimizer, self.model)
        if [group["params"] for group in groups] != [group["params"] for group in current]:
            raise CheckpointError(f"{checkpoint}: its optimiser has other parameters than this run's")
        parameters = dict(trained_parameters(self.model))
        numbers = {name: i for i, name in enumerate(name for group in current for name in group["params"])}
        placed = {numbers[name]: _placed(state, parameters[name]) for name, state in states.items() if state}
        numbered = [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups]
        optimizer.load_state_dict({"state": placed, "param_groups": numbered})
        self.lr_scheduler.load_state_dict(shared["scheduler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not self.is_deepspeed_enabled and self._scaler_state() is not None:
            state = self._shared(checkpoint)["scaler"]
            if state is not None:
                self.accelerator.scaler.load_state_dict(state)

    def _shared(self, checkpoint: str) -> dict[str, Any]:
        shared = unpack(json.loads((Path(checkpoint) / RUN).read_text(encoding="utf-8")), {})
        if shared["processes"] != self.args.world_size:
            raise CheckpointError(
                f"{checkpoint} is of {shared['processes']} processes, this run has {self.args.world_size}: resume "
                "with as many"
            )
        return shared

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_rng_state(checkpoint)
            return
        tree, tensors = _read(Path(checkpoint), f"process-{self._part(self.args.process_index)}")
        _restore_random(unpack(tree, tensors)["random"])

    def train_from(self, checkpoint: Path | None) -> None:
        """Train to the end, from a checkpoint if there is one. A run that had ended is loaded, not trained a step more,
        as ``train`` would."""
        if checkpoint is None:
            self.train()
            return
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step < state.max_steps:
            self.train(resume_from_checkpoint=str(checkpoint))
            return
        self.state = state
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        load_trained(best or checkpoint, self.model)

    def restore_data(self, checkpoint: str) -> None:
        """Put streamed data where they were at a checkpoint; call it before ``train(resume_from_checkpoint=…)``."""
        self._shared(checkpoint)
        tree, tensors = _read(Path(checkpoint), f"process-{self._part(self.args.process_index)}")
        self.train_dataset.load_state_dict(unpack(tree, tensors)["data"])


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are trained, by their names in the model without wrappers."""
    for module in model.modules():
        if isinstance(module, FSDPModule):  # a forward without a backward leaves them gathered
            module.reshard()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield _WRAPPERS.sub("", name), parameter


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters by name, whole and on the host, on every process; all of them take part."""
    return {name: _whole(p).detach().cpu().contiguous() for name, p in trained_parameters(model)}


def read_trained(folder: str | Path) -> dict[str, Tensor]:
    """The trained parameters in a checkpoint of any number of processes, by name, on the host.

    Raises:
        CheckpointError: no such files, or not all of them.
    """
    weights: dict[str, Tensor] = {}
    for _, tensors in _parts(Path(folder), "trained"):
        weights |= {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
    return weights


def load_trained(folder: str | Path, model: nn.Module) -> None:
    """Write a checkpoint's parameters into a model that trains the same ones, sharded or not.

    Raises:
        CheckpointError: it trains others, or their shapes differ.
    """
    weights, parameters = read_trained(folder), dict(trained_parameters(model))
    if missing := sorted(parameters.keys() - weights.keys()):
        raise CheckpointError(
            f"{folder}: no weights of {missing[0]} and {len(missing) - 1} more, which are trained here"
        )
    if extra := sorted(weights.keys() - parameters.keys()):
        raise CheckpointError(f"{folder}: holds {extra[0]} and {len(extra) - 1} more, which are not trained here")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if weights[name].shape != parameter.shape:
                raise CheckpointError(f"{folder}: {name} is {list(weights[name].shape)}, needs {list(parameter.shape)}")
            parameter.copy_(_like(weights[name], parameter))


def _groups(optimizer: Any, model: nn.Module) -> list[dict[str, Any]]:
    """The optimiser's groups with names in place of parameters."""
    names = {parameter: name for name, parameter in trained_parameters(model)}
    return [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """``value``, sharded as ``parameter`` is."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)


def _placed(state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    return {
        key: _like(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value
        for key, value in state.items()
    }


def _random_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _write(folder: Path, name: str, tree: Any, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(tree) + "\n", encoding="utf-8")


def _read(folder: Path, name: str) -> tuple[Any, dict[str, Tensor]]:
    try:
        tree = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        return tree, load_file(folder / f"{name}.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: {name} cannot be read ({error})") from error


def _parts(folder: Path, kind: str) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    names = sorted(path.stem for path in folder.glob(f"{kind}-*-of-*.json"))
    if not names or len(names) != int(names[0].rpartition("-")[2]):
        raise CheckpointError(f"{folder}: {len(names)} of its files {kind}-*-of-* are there, not all of them")
    for name in names:
        yield _read(folder, name)

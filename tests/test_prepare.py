"""Adapters merged into an LLM, one after the other, to a folder that stage 1 takes."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from stacks import new_encoder, new_llm
from transformers import AutoModel, AutoModelForCausalLM

from mtllm_fast import MTLLM, prepare_llm
from mtllm_fast.cli.app import app
from mtllm_fast.core.errors import CheckpointError
from mtllm_fast.tiny import tiny_llm_tokenizer


def adapter(model, folder, seed, targets=("q_proj", "down_proj")):
    """A LoRA whose product is not zero, trained on top of ``model``."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(folder)
    return str(folder), wrapped.merge_and_unload()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """An LLM, an adapter of it with its head, one of its decoder on top, and what merging both must give."""
    folder = tmp_path_factory.mktemp("llm")
    new_llm("llama").save_pretrained(folder / "base")
    tiny_llm_tokenizer().save_pretrained(folder / "base")
    first, merged = adapter(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "mntp", 1)
    second, merged = adapter(merged.model, folder / "simcse", 2, ("v_proj", "gate_proj"))
    return folder, str(folder / "base"), [first, second], merged.state_dict()


def test_adapters_are_merged_in_their_order(parts, tmp_path):
    _, base, adapters, want = parts
    out = prepare_llm(base, adapters, tmp_path / "out")
    model = AutoModel.from_pretrained(out)
    assert model.config.is_causal is False
    found = model.state_dict()
    assert found.keys() == want.keys()
    for name, weight in want.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-6)
    plain = AutoModel.from_pretrained(base).state_dict()
    changed = {name.split(".")[-2] for name in want if not torch.equal(plain[name], found[name])}
    assert changed == {"q_proj", "down_proj", "v_proj", "gate_proj"}


def test_the_folder_makes_a_stack(parts, tmp_path):
    _, base, adapters, _ = parts
    out = prepare_llm(base, adapters[:1], tmp_path / "out", dtype="bfloat16")
    stack = MTLLM.from_encoder_and_llm(new_encoder(), str(out))
    assert stack.dtype == torch.bfloat16
    assert not stack.llm2vec.config.is_causal


def test_weights_without_a_place_and_places_without_weights_are_refused(parts, tmp_path):
    folder, base, _, _ = parts
    weights = load_file(folder / "mntp" / "adapter_model.safetensors")
    for name, changed, message in (
        ("more", {**weights, "base_model.model.model.layers.9.mlp.down_proj.lora_A.weight": torch.ones(1)}, "no place"),
        ("less", dict(list(weights.items())[1:]), "no weights for"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text((folder / "mntp" / "adapter_config.json").read_text())
        save_file(changed, tmp_path / name / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            prepare_llm(base, [str(tmp_path / name)], tmp_path / "out")
    (tmp_path / "more" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        prepare_llm(base, [str(tmp_path / "more")], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="at least one"):
        prepare_llm(base, [], tmp_path / "out")


def test_the_command_replaces_nothing_unasked(parts, tmp_path):
    from typer.testing import CliRunner

    _, base, adapters, _ = parts
    words = ["prepare-llm", base, "--adapter", adapters[0], "--adapter", adapters[1], "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(app, words).exit_code == 0
    again = CliRunner().invoke(app, words)
    assert isinstance(again.exception, FileExistsError)
    assert CliRunner().invoke(app, [*words, "--overwrite"]).exit_code == 0

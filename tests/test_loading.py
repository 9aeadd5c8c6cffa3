"""Checkpoints: the published layout both ways, and every way in which one can be wrong."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from reference import DATA
from safetensors.torch import load_file, save_file
from stacks import batch, new_encoder, new_llm, new_stack
from transformers import AutoConfig, AutoModel, AutoModelForMultipleChoice

from mtllm_fast import MTLLM, MTLLMConfig, MTLLMForMultipleChoice, MTLLMForSequenceClassification
from mtllm_fast.core.errors import CheckpointError

PUBLISHED = DATA / "forward-gqa" / "checkpoint"
WITH_BIAS = DATA / "forward-small" / "checkpoint"


@pytest.fixture
def checkpoint(tmp_path):
    return shutil.copytree(PUBLISHED, tmp_path / "checkpoint")


def _edit(checkpoint, change):
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("source", [PUBLISHED, WITH_BIAS])
def test_saving_gives_back_the_published_keys_and_values(source, tmp_path):
    model = MTLLM.from_pretrained(source)
    model.save_pretrained(tmp_path)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert ("up_proj.bias" in after) == (source == WITH_BIAS)
    assert all(torch.equal(before[key], after[key]) for key in before)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "nllb-llm2vec"
    assert config["nllb_config"]["model_type"] == "m2m_100"
    assert config["llm2vec_config"]["model_type"] == "llama"


@torch.no_grad()
def test_sharded_checkpoints_load_and_save(checkpoint, tmp_path):
    model = MTLLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    again = MTLLM.from_pretrained(tmp_path / "sharded")
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert torch.equal(again(**inputs).pooler_output, model(**inputs).pooler_output)
    next(iter((tmp_path / "sharded").glob("*.safetensors"))).unlink()
    with pytest.raises(CheckpointError, match="shards named in the index are missing: model-"):
        MTLLM.from_pretrained(tmp_path / "sharded")


@torch.no_grad()
def test_auto_classes(checkpoint):
    assert isinstance(AutoConfig.from_pretrained(checkpoint), MTLLMConfig)
    assert isinstance(AutoModel.from_pretrained(checkpoint), MTLLM)
    assert isinstance(AutoModelForMultipleChoice.from_pretrained(checkpoint), MTLLMForMultipleChoice)


@torch.no_grad()
def test_head_checkpoints(checkpoint, tmp_path):
    head = MTLLMForSequenceClassification.from_pretrained(checkpoint, num_labels=3, pooling="cls")
    assert head.config.pooling == "cls"
    head.save_pretrained(tmp_path / "head")
    again = MTLLMForSequenceClassification.from_pretrained(tmp_path / "head")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(again(ids).logits, head(ids).logits)
    base = MTLLM.from_pretrained(tmp_path / "head")
    assert torch.equal(base(ids).pooler_output, head.model(ids).pooler_output)


@torch.no_grad()
def test_the_llm_embedding_table_is_optional(checkpoint, tmp_path):
    ids = torch.tensor([[5, 6, 7]])
    whole = MTLLM.from_pretrained(checkpoint)
    lean = MTLLM.from_pretrained(checkpoint, llm_embeddings=False)
    assert torch.equal(whole(ids).pooler_output, lean(ids).pooler_output)
    assert sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in lean.parameters()) == 280 * 128
    lean.save_pretrained(tmp_path / "lean")
    assert "llm2vec.embed_tokens.weight" not in load_file(tmp_path / "lean" / "model.safetensors")
    assert torch.equal(MTLLM.from_pretrained(tmp_path / "lean")(ids).pooler_output, whole(ids).pooler_output)


@torch.no_grad()
def test_an_llm_with_other_key_names_keeps_its_embeddings_optional(tmp_path):
    model = new_stack("gpt2")
    model.save_pretrained(tmp_path)
    for llm_embeddings in (True, False):
        again = MTLLM.from_pretrained(tmp_path, llm_embeddings=llm_embeddings)
        assert (again.llm2vec.wte is not None) == llm_embeddings
        assert torch.equal(again(**batch()).pooler_output, model(**batch()).pooler_output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16"])
def test_dtype_and_device_map(checkpoint, dtype):
    model = MTLLM.from_pretrained(checkpoint, dtype=dtype, device_map="cpu")
    want = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {p.dtype for p in model.parameters()} == {want}
    assert model.llm2vec.rotary_emb.inv_freq.dtype == torch.float32


@torch.no_grad()
def test_layers_offloaded_to_disk_give_the_same_numbers(checkpoint, tmp_path):
    ids = torch.tensor([[5, 6, 7, 8]])
    want = MTLLM.from_pretrained(checkpoint)(ids).pooler_output
    device_map = {"nllb_encoder": "cpu", "up_proj": "cpu", "llm2vec": "disk"}
    model = MTLLM.from_pretrained(checkpoint, device_map=device_map, offload_folder=str(tmp_path / "offload"))
    assert next(model.llm2vec.layers.parameters()).device.type == "meta"
    torch.testing.assert_close(model(ids).pooler_output, want)


def test_missing_keys_are_named(checkpoint):
    _edit(checkpoint, lambda tensors: tensors.pop("llm2vec.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"missing keys: llm2vec\.layers\.1\.mlp\.up_proj\.weight"):
        MTLLM.from_pretrained(checkpoint)


def test_extra_keys_are_named(checkpoint):
    _edit(checkpoint, lambda tensors: tensors.update({"llm2vec.layers.9.mlp.up_proj.weight": torch.ones(2, 2)}))
    with pytest.raises(CheckpointError, match=r"extra keys: llm2vec\.layers\.9\.mlp\.up_proj\.weight"):
        MTLLM.from_pretrained(checkpoint)


def test_wrong_shapes_are_named(checkpoint):
    _edit(checkpoint, lambda tensors: tensors.update({"up_proj.weight": torch.ones(128, 47)}))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight.*47"):
        MTLLM.from_pretrained(checkpoint)


@pytest.mark.parametrize("keep", [100, 20_000])
def test_truncated_files_are_named(checkpoint, keep):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: corrupt or truncated"):
        MTLLM.from_pretrained(checkpoint)


def test_pickled_weights_are_not_read(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle is not read"):
        MTLLM.from_pretrained(checkpoint)


@torch.no_grad()
def test_joining_from_folders(tmp_path):
    new_encoder().save_pretrained(tmp_path / "encoder")
    new_llm("qwen3").save_pretrained(tmp_path / "llm")
    model = MTLLM.from_encoder_and_llm(tmp_path / "encoder", tmp_path / "llm", up_proj_bias=True, dtype=torch.bfloat16)
    twin = new_stack("qwen3", up_proj_bias=True, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model(**batch()).pooler_output, twin(**batch()).pooler_output)
    assert model.config.default_tokenizer == str(tmp_path / "encoder")

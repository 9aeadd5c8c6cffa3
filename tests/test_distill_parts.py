"""Stage 1 from an encoder's and an LLM's own folders, in float32, in bfloat16, and with the LLM in 4 bits."""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch
from transformers import AutoTokenizer, M2M100ForConditionalGeneration

from mtllm_fast import MTLLM, DistillArguments, distill, training_arguments
from mtllm_fast.tiny import tiny_documents, tiny_llm_tokenizer, tiny_path

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    stack = MTLLM.from_pretrained("tiny")
    stack.llm2vec.save_pretrained(folder / "llm")
    tiny_llm_tokenizer().save_pretrained(folder / "llm")
    encoder = M2M100ForConditionalGeneration(stack.config.nllb_config)
    encoder.model.encoder.load_state_dict(stack.nllb_encoder.state_dict())
    encoder.save_pretrained(folder / "encoder")
    AutoTokenizer.from_pretrained(tiny_path()).save_pretrained(folder / "encoder")
    (folder / "texts.txt").write_text("\n".join(tiny_documents()[:48]))
    return folder


def run(parts, output, **options):
    checkpointing = options.pop("gradient_checkpointing", False)
    given = {"preset": "span", "documents_per_batch": 4, "init_documents": 16, "max_length": 32, "eval_documents": 4}
    arguments = DistillArguments(
        encoder=str(parts / "encoder"), llm=str(parts / "llm"), data=[str(parts / "texts.txt")],
        eval_data=[str(parts / "texts.txt")], **given | options,
    )  # fmt: skip
    bf16 = options.get("dtype") == "bfloat16" or options.get("load_in_4bit", False)
    how = training_arguments(
        arguments,
        output,
        max_steps=3,
        save_steps=3,
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        bf16=bf16,
        gradient_checkpointing=checkpointing,
    )
    return distill(arguments, how)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32", "merge": True},
        {"dtype": "bfloat16", "merge": True},
        {"up_proj_init": "random", "up_proj_bias": True, "sequence_weight": 1.0, "span_weight": 0.0},
        {"tokens_per_batch": 96, "documents_per_batch": None, "gradient_checkpointing": True},
        pytest.param({"load_in_4bit": True}, marks=needs_bitsandbytes),
    ],
    ids=["float32", "bfloat16", "random", "tokens", "4bit"],
)
def test_parts_make_a_stack_that_trains(parts, tmp_path, options):
    result = run(parts, tmp_path, **options)
    losses = [line["loss"] for line in result.log if "loss" in line]
    assert len(losses) == 3
    assert all(0 < loss < 10 for loss in losses)
    assert (tmp_path / "final" / "adapter" / "adapter_model.safetensors").is_file()
    if options.get("merge"):
        merged = MTLLM.from_pretrained(tmp_path / "merged")
        assert merged.dtype == getattr(torch, options["dtype"])
        assert merged.encode("All human beings", "eng_Latn").isfinite().all()


@needs_bitsandbytes
def test_a_4bit_llm_is_not_merged(parts, tmp_path):
    with pytest.raises(ValueError, match="cannot be merged without loss"):
        run(parts, tmp_path, load_in_4bit=True, merge=True)


def test_bfloat16_weights_want_autocast(parts, tmp_path):
    arguments = DistillArguments(
        encoder=str(parts / "encoder"), llm=str(parts / "llm"), data=[str(parts / "texts.txt")], dtype="bfloat16",
        init_documents=8, max_length=32,
    )  # fmt: skip
    with pytest.raises(ValueError, match="set bf16"):
        distill(arguments, training_arguments(arguments, tmp_path, max_steps=1, use_cpu=True))


def test_other_weights_under_the_same_path_are_another_run(parts, tmp_path):
    own = tmp_path / "parts"
    shutil.copytree(parts, own)
    run(own, tmp_path / "out", dtype="float32")
    stack = MTLLM.from_pretrained("tiny")
    with torch.no_grad():
        stack.llm2vec.layers[1].mlp.up_proj.weight.mul_(1.01)
    stack.llm2vec.save_pretrained(own / "llm")
    with pytest.raises(FileExistsError, match="contents of llm"):
        run(own, tmp_path / "out", dtype="float32")

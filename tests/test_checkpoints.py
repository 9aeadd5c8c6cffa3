"""Checkpoint folders are whole or not there, damage is found, and no state needs pickle."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

from mtllm_fast.training import checkpoints
from mtllm_fast.training.checkpoints import all_checkpoints, begin, damage, finish, newest, prune, unfinished
from mtllm_fast.training.states import pack, unpack


def make(output, step, content="weights"):
    final = output / f"checkpoint-{step}"
    folder = begin(final)
    (folder / "a.bin").write_text(content)
    (folder / "sub").mkdir()
    (folder / "sub" / "b.json").write_text("{}")
    finish(final)
    return final


def test_a_finished_folder_is_whole(tmp_path):
    final = make(tmp_path, 3)
    assert damage(final) is None
    assert newest(tmp_path).path == final
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_what_is_not_finished_is_no_checkpoint(tmp_path):
    (begin(tmp_path / "checkpoint-1") / "a.bin").write_text("half")
    assert all_checkpoints(tmp_path) == []
    assert newest(tmp_path).path is None
    final = make(tmp_path, 1)  # what a killed process left is dropped
    assert sorted(path.name for path in final.iterdir()) == ["a.bin", "manifest.json", "sub"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    path.write_bytes(path.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize(
    ("file", "harm", "message"),
    [
        ("a.bin", truncate, "a.bin has 6 bytes, not 7"),
        ("a.bin", flip, "a.bin is not what was written"),
        ("sub/b.json", os.remove, "sub/b.json is missing"),
        ("manifest.json", os.remove, "no manifest.json"),
        ("manifest.json", truncate, None),
        ("manifest.json", lambda path: path.write_text("[]"), "manifest.json is unreadable"),
    ],
)
def test_damage_is_found_and_the_one_before_is_used(tmp_path, file, harm, message, caplog):
    before, final = make(tmp_path, 9), make(tmp_path, 10)  # not in the order of their names
    harm(final / file)
    if message is None:  # a manifest without its last line break is as good
        assert newest(tmp_path).path == final
        return
    found = newest(tmp_path)
    assert found.path == before
    assert message in found.rejected[final]
    assert message in caplog.text


def test_a_folder_of_the_same_name_is_replaced(tmp_path):
    make(tmp_path, 1, "old")
    final = make(tmp_path, 1, "new")
    assert (final / "a.bin").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failure_while_finishing_leaves_the_old_one(tmp_path, monkeypatch):
    final = make(tmp_path, 1, "old")
    (begin(final) / "a.bin").write_text("new")
    monkeypatch.setattr(checkpoints, "_sync", lambda path: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        finish(final)
    assert (final / "a.bin").read_text() == "old"
    assert damage(final) is None


def test_prune_keeps_the_newest_the_best_and_no_leftovers(tmp_path):
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    begin(tmp_path / "checkpoint-5")
    prune(tmp_path, 2, keep_also=tmp_path / "checkpoint-1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    prune(tmp_path, None)
    assert len(all_checkpoints(tmp_path)) == 3


def test_names_of_other_folders_are_left_alone(tmp_path):
    (tmp_path / "checkpoint-last").mkdir()
    (tmp_path / "checkpoint-7.bak").mkdir()
    assert all_checkpoints(tmp_path) == []
    assert unfinished(tmp_path / "checkpoint-7").name.startswith(".")


def test_states_survive_json_and_safetensors(tmp_path):
    import json

    from safetensors.torch import load_file, save_file

    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    state = {
        "optimizer": optimizer.state_dict(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "odd": {0: None, "x": (1, [True, 2.5, "s"]), (1, 2): torch.tensor([1.5], dtype=torch.bfloat16)},
    }
    tree, tensors = pack(state, "all")
    save_file(tensors, tmp_path / "t.safetensors")
    back = unpack(json.loads(json.dumps(tree)), load_file(tmp_path / "t.safetensors"))
    assert back["python"] == state["python"]
    assert back["odd"].keys() == state["odd"].keys()
    assert back["odd"]["x"] == state["odd"]["x"]
    assert torch.equal(back["odd"][(1, 2)], state["odd"][(1, 2)])
    assert torch.equal(back["torch"], state["torch"])
    np.random.set_state(back["numpy"])
    random.setstate(back["python"])
    twin = torch.nn.Linear(3, 2)
    other = torch.optim.AdamW(twin.parameters(), lr=0.5)
    other.load_state_dict(back["optimizer"])
    assert other.param_groups[0]["lr"] == 0.1
    for mine, theirs in zip(other.state.values(), optimizer.state.values(), strict=True):
        assert torch.equal(mine["exp_avg"], theirs["exp_avg"])


def test_what_needs_pickle_is_refused():
    with pytest.raises(TypeError, match="cannot save a"):
        pack({"x": object()}, "x")
    with pytest.raises(TypeError, match="float64"):
        pack({"x": np.ones(2)}, "x")

"""Digests notice what a path alone does not say."""

from __future__ import annotations

import hashlib

import pytest

from mtllm_fast.core.digests import contents, digest, fingerprint


def test_a_digest_is_sha256_of_all_bytes(tmp_path):
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    assert digest(tmp_path / "file") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("place", [0, 1, 4096, 500_000, 999_999])
def test_every_byte_of_a_file_up_to_a_mebibyte_counts(tmp_path, place):
    data = bytearray(1_000_000)
    (tmp_path / "file").write_bytes(data)
    before = fingerprint(tmp_path / "file")
    data[place] = 1
    (tmp_path / "file").write_bytes(data)
    assert fingerprint(tmp_path / "file") != before


def test_a_large_file_is_sampled_from_end_to_end(tmp_path):
    data = bytearray(64 << 20)
    (tmp_path / "file").write_bytes(data)
    before = fingerprint(tmp_path / "file")
    for start in range(0, len(data), 8 << 20):  # a layer's worth anywhere
        changed = bytearray(data)
        changed[start : start + (1 << 20)] = b"\1" * (1 << 20)
        (tmp_path / "file").write_bytes(changed)
        assert fingerprint(tmp_path / "file") != before
    (tmp_path / "file").write_bytes(data[:-1])
    assert fingerprint(tmp_path / "file") != before


def test_contents_are_of_files_and_folders_that_are_there(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "model" / "README.md").write_text("about")
    (tmp_path / "rows.csv").write_text("text\n")
    found = contents(llm=tmp_path / "model", train=tmp_path / "rows.csv", dev=None, encoder="owner/name")
    assert found == {
        "contents of llm": fingerprint(tmp_path / "model"),
        "contents of train": digest(tmp_path / "rows.csv"),
    }
    (tmp_path / "model" / "README.md").write_text("more about")
    assert found["contents of llm"] == fingerprint(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"Weights")
    assert found["contents of llm"] != fingerprint(tmp_path / "model")

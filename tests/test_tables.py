"""Readers of text tables, and sharded outputs that survive any interruption."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtllm_fast.core.errors import UnknownLanguageError
from mtllm_fast.core.team import Team
from mtllm_fast.shards import ShardedJob, check_output, open_shards, work_folder
from mtllm_fast.tables import Row, open_table

ROWS = [Row("Habari, dunia", "swh_Latn", "a"), Row("", "deu_Latn", "b"), Row('zwei\n"Zeilen" ☃', "deu_Latn", "c")]


def _write(path: Path, language: str = "lang") -> Path:
    records = [{"text": text, language: code.replace("_", "-"), "key": key} for text, code, key in ROWS]
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        import csv

        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_readers_agree(tmp_path: Path, suffix: str) -> None:
    table = open_table(_write(tmp_path / f"in{suffix}"), language_column="lang", id_column="key")
    assert list(table.rows()) == ROWS
    assert [len(chunk) for chunk in table.chunks(2)] == [2, 1]
    facts = table.scan()
    assert (facts.rows, facts.id_type, facts.bytes) == (3, str, table.path.stat().st_size)

    numbered = open_table(table.path, language="sw", text_column="key")
    assert list(numbered.rows()) == [Row(key, "swh_Latn", i) for i, (_, _, key) in enumerate(ROWS)]
    assert numbered.scan().id_type is int


def test_text_keeps_every_line(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes("\ufeffone\r\n\n  two\u2028still two\rstill\n\nlast".encode())
    texts = [row.text for row in open_table(path, language="eng_Latn").rows()]
    assert texts == ["one", "", "  two\u2028still two\rstill", "", "last"]
    path.write_bytes(b"")
    assert open_table(path, language="eng_Latn").scan().rows == 0


def test_a_field_longer_than_csvs_limit(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n")
    assert [len(row.text) for row in open_table(path, language="sw").rows()] == [200_000]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.txt", b"fine\nno \xff UTF-8\n", "line 2: not UTF-8"),
        ("in.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("in.jsonl", b'{"text": "a"}\n\n["text"]\n', "line 3: must be a JSON object, got list"),
        ("in.jsonl", b'{"txt": "a", "n": 1}\n', "line 1: no column 'text'; the columns are 'txt', 'n'"),
        ("in.jsonl", b'{"text": null}\n', "line 1: column 'text' must hold text, got null"),
        ("in.jsonl", b'{"text": 7}\n', "line 1: column 'text' must hold text, got int '7'"),
        ("in.jsonl", rb'{"text": "\ud800"}', "line 1: column 'text' holds half of a surrogate pair"),
        ("in.csv", b"Text,lang\na,sw\n", "no column 'text'; the columns are 'Text', 'lang'"),
        ("in.csv", b"", "no column 'text'; the columns are none"),
        ("in.csv", b"text,lang\na,sw\nb\n", "line 3: 1 fields, but the header names 2"),
        ("in.csv", b'text,lang\n"a,sw\nb,sw\n', "malformed .unexpected end of data"),
        ("in.csv", b"text,text\na,b\n", "names a column twice"),
        ("in.csv", b"text\na\xff\n", "not UTF-8"),
        ("in.parquet", b"PAR1 but not really", "not a readable Parquet file"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_table(path, language="sw").scan()
    assert str(path) in str(caught.value)


def test_errors_of_columns(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a", "lang": "sw", "id": 1}\n{"text": "b", "lang": "swahili", "id": "x"}\n')
    with pytest.raises(UnknownLanguageError, match=r"line 2: column 'lang': unknown language 'swahili'.*swh_Latn"):
        open_table(path, language_column="lang").scan()
    with pytest.raises(ValueError, match="column 'id' mixes strings and integers"):
        open_table(path, language="sw", id_column="id").scan()
    path.write_text('{"text": "a", "lang": null, "id": 1.5}')
    with pytest.raises(ValueError, match="line 1: column 'lang' must hold a language code, got null"):
        open_table(path, language_column="lang").scan()
    with pytest.raises(ValueError, match=r"line 1: column 'id' must hold strings or integers, got float '1.5'"):
        open_table(path, language="sw", id_column="id").scan()


def test_errors_before_reading(tmp_path: Path) -> None:
    (tmp_path / "in.txt").touch()
    with pytest.raises(ValueError, match=r"must end in .txt, .jsonl, .csv, .tsv, .parquet, got .xlsx"):
        open_table(tmp_path / "in.xlsx", language="sw")
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_table(tmp_path / "absent.txt", language="sw")
    with pytest.raises(ValueError, match="no columns: give one language"):
        open_table(tmp_path / "in.txt", language_column="lang")
    with pytest.raises(UnknownLanguageError):
        open_table(tmp_path / "in.txt", language="swahili")
    for languages in ({}, {"language": "sw", "language_column": "lang"}):
        with pytest.raises(ValueError, match="either one code for all, or the column"):
            open_table(_write(tmp_path / "in.csv"), **languages)


# Sharded outputs

JOB = ShardedJob(rows=23, width=4, dtype="float32", shard_rows=5, identity={"model": "m1"})
VALUES = np.arange(23 * 4, dtype=np.float32).reshape(23, 4)


def _run(out: Path, job: ShardedJob = JOB, overwrite: bool = False, stop_after: int | None = None) -> list[int]:
    """The shards that this run wrote; ``stop_after`` leaves before the merge, as a killed process does."""
    check_output(out, overwrite)
    written = []
    with open_shards(out, job, overwrite) as shards:
        for index in shards.missing[:stop_after]:
            shards.write(index, VALUES[index * 5 : index * 5 + 5])
            written.append(index)
        if stop_after is None and not shards.finished:
            shards.merge(range(100, 123))
    return written


class Told(Team):
    """A process of a team whose leader has said something already, and for whom nobody has to wait."""

    said: ClassVar[list[object]] = []

    def share(self, value: object) -> object:
        if self.leads:
            self.said.append(value)
        return self.said[-1]

    def wait(self) -> None: ...


def test_a_team_divides_what_is_missing_and_its_leader_merges(tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    _run(out, stop_after=1)
    with open_shards(out, JOB, team=Told(0, 2)) as leads, open_shards(out, JOB, team=Told(1, 2)) as follows:
        assert (leads.mine, follows.mine) == ([1, 3], [2, 4])
        for shards in (follows, leads):
            for index in shards.mine:
                shards.write(index, VALUES[index * 5 : index * 5 + 5])
        follows.finish()
        assert not out.exists()
        leads.finish()
    np.testing.assert_array_equal(np.load(out), VALUES)
    assert not work_folder(out).exists()


@pytest.fixture(params=["out.npy", "out.parquet"])
def out(request, tmp_path: Path) -> Path:
    return tmp_path / request.param


def _assert_complete(out: Path) -> None:
    if out.suffix == ".npy":
        np.testing.assert_array_equal(np.load(out), VALUES)
    else:
        table = pq.read_table(out)
        assert table.schema == pa.schema({"id": pa.int64(), "embedding": pa.list_(pa.float32(), 4)})
        assert table["id"].to_pylist() == list(range(100, 123))
        np.testing.assert_array_equal(np.stack(table["embedding"].to_numpy()), VALUES)
    assert os.listdir(out.parent) == [out.name]


def test_in_one_go(out: Path) -> None:
    assert _run(out) == [0, 1, 2, 3, 4]
    _assert_complete(out)
    with pytest.raises(FileExistsError, match="--overwrite replaces it"):
        _run(out)
    assert _run(out, overwrite=True) == [0, 1, 2, 3, 4]
    _assert_complete(out)


def test_no_rows(out: Path) -> None:
    job = ShardedJob(rows=0, width=4, dtype="float32", shard_rows=5)
    assert _run(out, job) == []
    assert len(np.load(out) if out.suffix == ".npy" else pq.read_table(out)) == 0


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_types_are_stored_as_they_are(out: Path, dtype: str) -> None:
    with open_shards(out, ShardedJob(rows=3, width=2, dtype=dtype, shard_rows=2)) as shards:
        shards.write(1, np.full((1, 2), 3, dtype))
        shards.write(0, np.array([[1, 1], [2, 2]], dtype))
        shards.merge(["x", "y", "z"], "key", str)
    if out.suffix == ".npy":
        found = np.load(out)
    else:
        table = pq.read_table(out)
        assert table["key"].to_pylist() == ["x", "y", "z"]
        found = np.stack(table["embedding"].to_numpy())
    assert found.dtype == dtype
    assert found.tolist() == [[1, 1], [2, 2], [3, 3]]


def test_resumes_and_does_nothing_twice(out: Path) -> None:
    assert _run(out, stop_after=2) == [0, 1]
    assert not out.exists()
    assert _run(out, stop_after=1) == [2]
    assert _run(out) == [3, 4]
    _assert_complete(out)


@pytest.mark.parametrize("function", ["replace", "fsync", "unlink", "rmdir"])
def test_an_interruption_anywhere_is_safe(out: Path, function: str, monkeypatch) -> None:
    """Dies at the first call of the function, restarts and dies at its second, and so on until it gets through."""
    original, calls = getattr(os, function), 0

    class Died(BaseException):
        pass

    def run_until(survived: int) -> bool:
        nonlocal calls
        calls = 0

        def fragile(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > survived:
                raise Died
            return original(*args, **kwargs)

        monkeypatch.setattr(os, function, fragile)
        try:
            _run(out)
        except Died:
            return False
        except FileExistsError:  # died after the output was complete and the work folder gone
            assert out.exists()
        finally:
            monkeypatch.setattr(os, function, original)
        return True

    deaths = 0
    while not run_until(survived=deaths):
        deaths += 1
        if out.exists():  # whole from the moment it is there
            assert len(np.load(out) if out.suffix == ".npy" else pq.read_table(out)) == 23
    assert deaths > 0
    _assert_complete(out)


def test_damaged_shards_are_computed_again(out: Path) -> None:
    _run(out, stop_after=4)
    files = sorted(work_folder(out).glob("*.npy"))
    files[1].write_bytes(files[1].read_bytes()[:-3])  # cut short
    damaged = bytearray(files[3].read_bytes())
    damaged[-1] ^= 1
    files[3].write_bytes(damaged)  # the last one: checked by its sum
    assert _run(out) == [1, 3, 4]
    _assert_complete(out)


def test_a_shard_damaged_in_the_middle_is_found_at_the_merge(out: Path) -> None:
    _run(out, stop_after=4)
    middle = sorted(work_folder(out).glob("*.npy"))[1]
    damaged = bytearray(middle.read_bytes())
    damaged[-1] ^= 1
    middle.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"{middle} is damaged: delete it and start again"):
        _run(out)
    assert not out.exists()
    middle.unlink()
    assert _run(out) == [1]
    _assert_complete(out)


def test_another_job_is_refused_and_loses_nothing(out: Path) -> None:
    _run(out, stop_after=2)
    other = ShardedJob(rows=23, width=4, dtype="float32", shard_rows=5, identity={"model": "m2"})
    with pytest.raises(ValueError, match=r"another job: model was 'm1', is 'm2'. --overwrite starts anew"):
        _run(out, other)
    assert _run(out) == [2, 3, 4]
    out.unlink()
    _run(out, stop_after=2)
    assert _run(out, other, overwrite=True) == [0, 1, 2, 3, 4]


def test_two_processes_at_once_are_refused(out: Path) -> None:
    with (
        open_shards(out, JOB),
        pytest.raises(BlockingIOError, match="another process is at work"),
        open_shards(out, JOB),
    ):
        pass


def test_a_foreign_folder_is_not_touched(out: Path) -> None:
    work_folder(out).mkdir()
    precious = work_folder(out) / "thesis.tex"
    precious.touch()
    with pytest.raises(ValueError, match="is no work folder of mtllm-fast"):
        _run(out, overwrite=True)
    assert precious.exists()


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in .npy or .parquet or .safetensors, got .csv"):
        check_output(tmp_path / "out.csv", overwrite=False)
    with pytest.raises(FileNotFoundError, match=r"its folder .* does not exist"):
        check_output(tmp_path / "absent" / "out.npy", overwrite=False)
    (tmp_path / "out.npy").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_output(tmp_path / "out.npy", overwrite=True)


def test_wrong_shards_are_refused(out: Path) -> None:
    with open_shards(out, JOB) as shards:
        with pytest.raises(ValueError, match=r"shard 4 must be float32 \[3, 4\], got float64 \[5, 4\]"):
            shards.write(4, np.zeros((5, 4)))
        with pytest.raises(ValueError, match=r"shards \[0, 1, 2, 3, 4\] of 5 are missing"):
            shards.merge([])

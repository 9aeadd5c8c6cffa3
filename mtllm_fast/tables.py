"""Tables of texts on disk, read as a stream: text (one per line), JSON lines, CSV, TSV and Parquet.

Every error names the file and the line. Nothing is skipped: an empty line of a ``.txt`` is an empty text.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mtllm_fast.core.digests import digest
from mtllm_fast.core.errors import UnknownLanguageError
from mtllm_fast.text.languages import resolve_language


class Row(NamedTuple):
    """One text, the NLLB code of its language, its id (default: the row number from 0)."""

    text: str
    language: str
    id: str | int


class TableFacts(NamedTuple):
    """What a full pass over a table tells: its number of rows, the ids' type, and what identifies its contents."""

    rows: int
    id_type: type
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TextTable:
    """A file of texts; see :func:`open_table`."""

    path: Path
    text_column: str
    language: str | None
    language_column: str | None
    id_column: str | None

    def rows(self) -> Iterator[Row]:
        """The rows in the file's order.

        Raises:
            ValueError: a missing column, a malformed line, a text that is no string: named with its line.
            UnknownLanguageError: with the line.
        """
        wanted = [self.text_column, self.language_column, self.id_column]
        columns = [column for column in wanted if column is not None]
        suffix = self.path.suffix.lower()
        unit = "row" if suffix == ".parquet" else "line"
        for number, (line, record) in enumerate(_READERS[suffix](self.path, columns)):
            where = f"{self.path}, {unit} {line}"
            text = record[self.text_column]
            if not isinstance(text, str):
                raise ValueError(f"{where}: column {self.text_column!r} must hold text, got {shown(text)}")
            identity = number if self.id_column is None else record[self.id_column]
            if not isinstance(identity, str | int) or isinstance(identity, bool):
                raise ValueError(
                    f"{where}: column {self.id_column!r} must hold strings or integers, got {shown(identity)}"
                )
            if isinstance(identity, int) and not -(2**63) <= identity < 2**63:
                raise ValueError(f"{where}: column {self.id_column!r} must fit 64 bits with a sign, got {identity}")
            yield Row(text, self._language(record, where), identity)

    def _language(self, record: dict[str, Any], where: str) -> str:
        if self.language is not None:
            return self.language
        assert self.language_column is not None  # one of the two, says open_table
        code = record[self.language_column]
        if not isinstance(code, str):
            raise ValueError(f"{where}: column {self.language_column!r} must hold a language code, got {shown(code)}")
        try:
            return resolve_language(code)
        except UnknownLanguageError as error:
            raise UnknownLanguageError(f"{where}: column {self.language_column!r}: {error}") from None

    def chunks(self, size: int) -> Iterator[list[Row]]:
        """The rows in lists of ``size``, the last one shorter."""
        rows = self.rows()
        while chunk := list(islice(rows, size)):
            yield chunk

    def scan(self) -> TableFacts:
        """Read the whole table once: check every row, count, and hash the file.

        Raises:
            ValueError: as :meth:`rows`; also ids of mixed types.
        """
        count, id_types = 0, set()
        for row in self.rows():
            count += 1
            id_types.add(type(row.id))
        if len(id_types) > 1:
            raise ValueError(f"{self.path}: column {self.id_column!r} mixes strings and integers")
        return TableFacts(count, str if id_types == {str} else int, self.path.stat().st_size, digest(self.path))


def open_table(
    path: str | os.PathLike[str],
    *,
    language: str | None = None,
    language_column: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
) -> TextTable:
    """A table of texts by the suffix of its name.

    Args:
        path: ``.txt`` (UTF-8, one text per line), ``.jsonl``, ``.csv``, ``.tsv`` (with a header) or ``.parquet``.
        language: of all texts; any spelling that ``resolve_language`` takes.
        language_column: instead, the column that holds each text's language.
        text_column: column of the texts; default ``text``. A ``.txt`` has no columns.
        id_column: column of ids, strings or integers; default: the row's number.

    Raises:
        FileNotFoundError: no such file.
        UnknownLanguageError: with the nearest codes.
        ValueError: another suffix, columns asked of a ``.txt``, not exactly one of language and language_column.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "texts.jsonl")
        ...     _ = path.write_text('{"text": "Habari", "lang": "sw"}')
        ...     next(open_table(path, language_column="lang").rows())
        Row(text='Habari', language='swh_Latn', id=0)
    """
    path = Path(path)
    _reader(path)
    if path.suffix.lower() == ".txt" and (text_column or language_column or id_column):
        raise ValueError(f"{path}: a .txt has one text per line and no columns: give one language for all of it")
    if (language is None) == (language_column is None):
        raise ValueError("give the language of the texts: either one code for all, or the column that holds it")
    return TextTable(
        path=path,
        text_column=text_column or "text",
        language=None if language is None else resolve_language(language),
        language_column=language_column,
        id_column=id_column,
    )


def open_records(path: str | os.PathLike[str], columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of any table that ``open_table`` reads: the line number from 1, and at least ``columns``.

    Raises:
        FileNotFoundError: no such file, at once.
        ValueError: another suffix, at once; a missing column, a malformed line, when it comes.
    """
    return _reader(Path(path))(Path(path), list(columns))


def _reader(path: Path) -> Callable[[Path, list[str]], _Records]:
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise ValueError(f"{path}: must end in {', '.join(_READERS)}, got {suffix or 'no suffix'}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return _READERS[suffix]


_Records = Iterator[tuple[int, dict[str, Any]]]  # line number from 1, and at least the columns asked for


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines end with a line feed alone, with or without carriage return; other separators belong to the text."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason})") from None
            yield number, line.removesuffix("\n").removesuffix("\r")


def _read_text(path: Path, columns: list[str]) -> _Records:
    for number, line in _read_lines(path):
        yield number, {"text": line}


def _read_jsonl(path: Path, columns: list[str]) -> _Records:
    for number, line in _read_lines(path):
        if not line.strip():  # JSON lines may end in, or be set apart by, blank lines
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: must be a JSON object, got {shown(record)}")
        _check_columns(f"{path}, line {number}", columns, record)
        for column in columns:
            if isinstance(record[column], str) and not _is_unicode(record[column]):
                raise ValueError(f"{path}, line {number}: column {column!r} holds half of a surrogate pair")
        yield number, record


def _read_csv(path: Path, columns: list[str], delimiter: str = ",") -> _Records:
    csv.field_size_limit(2**31 - 1)  # documents are longer than csv's default of 128 KiB
    with open(path, encoding="utf-8-sig", newline="") as file:
        # strict: else a quote that is never closed would swallow the rest of the file as one field
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            _check_columns(str(path), columns, header)
            if len(set(header)) < len(header):
                raise ValueError(f"{path}: the header names a column twice: {', '.join(header)}")
            for values in reader:
                if not values:  # a blank line, such as many programs leave at the end
                    continue
                if len(values) != len(header):
                    raise ValueError(
                        f"{path}, line {reader.line_num}: {len(values)} fields, but the header names {len(header)}"
                    )
                yield reader.line_num, dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: malformed ({error})") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, after line {reader.line_num}: not UTF-8 ({error.reason})") from None


def _read_tsv(path: Path, columns: list[str]) -> _Records:
    return _read_csv(path, columns, delimiter="\t")


def _read_parquet(path: Path, columns: list[str]) -> _Records:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(str(path), columns, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=4096, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from error


_READERS: dict[str, Callable[[Path, list[str]], _Records]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


TABLE_SUFFIXES = tuple(_READERS)


def _check_columns(where: str, columns: list[str], found: Any) -> None:
    missing = [column for column in columns if column not in found]
    if missing:
        names = ", ".join(map(repr, found)) or "none"
        raise ValueError(f"{where}: no column {', '.join(map(repr, missing))}; the columns are {names}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any) -> str:
    """A value's type and beginning, for an error."""
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"

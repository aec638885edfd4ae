"""Documents from wherever text is: the demo stories, files, folders, tables, Hugging Face data sets.

A document is the unit of the train/held-out split: which part it belongs to is a hash of its text, so that it is the
same on every machine, in every order, and for copies of one document. Blank documents are left out. That a
source exists is checked when it is named; what is in it, as it is read.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mistudio.errors import TextError

Part = Literal["all", "train", "held_out"]
PARTS = ("all", "train", "held_out")
BLANK_LINE = "blank-line"
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Span:
    """Characters `start` to `end` (excluded) of a document are an instance of the concept `name`."""

    start: int
    end: int
    name: str


@dataclass(frozen=True)
class Document:
    """One text. `id` leads back to it: `notes.txt:0` (its first document), `data.jsonl:17` (line 17)."""

    id: str
    text: str
    label: Callable[[], Iterable[Span]] = field(default=tuple, compare=False, repr=False)
    """What finds the instances of known concepts in it; most who read a text do not ask."""

    @cached_property
    def labels(self) -> tuple[Span, ...]:
        """The instances of known concepts in the text."""
        return tuple(self.label())


def documents(
    source: str,
    *,
    column: str = "text",
    separator: str | None = None,
    part: Part = "all",
    held_out: float = 0.1,
) -> Iterator[Document]:
    """The documents of `source`, one after another: all, or those of one part of the split.

    source: `stories` or `stories:SEED` (endless); a .txt, .md, .jsonl or .parquet file; a folder of such files
        (recursive, sorted); `hf:OWNER/NAME`, `hf:OWNER/NAME:SPLIT` or `hf:OWNER/NAME/CONFIG:SPLIT`, streamed from the
        Hugging Face hub (SPLIT: train unless said).
    column: where the text is in .jsonl, .parquet and data sets.
    separator: what separates the documents of a plain-text file: None: nothing, the file is one document;
        `blank-line`: blank lines; else that very string.
    held_out: the fraction held out.

    TextError: nothing there, no such column, no text, or no document in the part asked for.
    """
    if part not in PARTS:
        raise TextError(f"There is no part {part!r} of a text; the parts are {', '.join(PARTS)}.")
    if not 0 <= held_out < 1 or (part == "held_out" and held_out == 0):
        raise TextError(
            f"The fraction held out must be at least 0 and below 1, and above 0 to read it; found {held_out}."
        )
    return _select(_open(source, column, separator), source, part, held_out)


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document is among the `fraction` held out: a hash of its text, uniform in [0, 1), is below it."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _select(found: Iterator[Document], source: str, part: Part, held_out: float) -> Iterator[Document]:
    total = kept = 0
    for document in found:
        if not document.text.strip():
            continue
        total += 1
        if part == "all" or is_held_out(document.text, held_out) == (part == "held_out"):
            kept += 1
            yield document
    if total == 0:
        raise TextError(f"{source} holds no text: every document in it is blank, or there is none.")
    if kept == 0:
        raise TextError(
            f"None of the {total} documents of {source} falls into the {part} part, with {held_out} of them held out. "
            f"Give more documents; a plain-text file is one unless it is divided, as by separator={BLANK_LINE!r}."
        )


def _open(source: str, column: str, separator: str | None) -> Iterator[Document]:
    if source == "stories" or source.startswith("stories:"):
        return _stories(source)
    if source in ("", "hf:"):
        raise TextError(f"{source!r} names no text. A text is a file, a folder, hf:NAME (a data set) or stories.")
    if source.startswith("hf:"):
        return _data_set(source, column)
    path = Path(source)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.suffix in SUFFIXES]
        if not files:
            suffixes = sorted({file.suffix or file.name for file in path.rglob("*") if file.is_file()})
            raise TextError(
                f"{path} holds no {', '.join(SUFFIXES)} file; it has {', '.join(suffixes) or 'no files at all'}."
            )
        return (doc for file in files for doc in _file(file, str(file.relative_to(path)), column, separator))
    if not path.is_file():
        raise TextError(
            f"There is no file or folder {path}. A text is a file, a folder, hf:NAME (a data set) or stories."
        )
    return _file(path, path.name, column, separator)


def _stories(source: str) -> Iterator[Document]:
    from mistudio.lm.stories import stories

    seed = source.removeprefix("stories").removeprefix(":") or "0"
    if not seed.isdecimal():
        raise TextError(f"{source}: the seed of the stories must be a whole number, as in stories:1.")
    return stories(int(seed))


def _file(path: Path, name: str, column: str, separator: str | None) -> Iterator[Document]:
    if path.suffix == ".jsonl":
        return _json_lines(path, name, column)
    if path.suffix == ".parquet":
        return _parquet(path, name, column)
    if path.suffix in SUFFIXES:
        return _plain(path, name, separator)
    raise TextError(f"{path} is not of a kind that can be read; the kinds are {', '.join(SUFFIXES)}.")


def _plain(path: Path, name: str, separator: str | None) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}.") from error
    if separator is None:
        pieces = [text]
    elif separator == BLANK_LINE:
        pieces = re.split(r"\n[^\S\n]*\n\s*", text)
    else:
        pieces = text.split(separator)
    for ordinal, piece in enumerate(pieces):
        yield Document(f"{name}:{ordinal}", piece)


def _json_lines(path: Path, name: str, column: str) -> Iterator[Document]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise TextError(f"{path}, line {number} is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise TextError(f"{path}, line {number}: each line must be an object with the key {column!r}.")
            yield Document(f"{name}:{number}", _text_of(row, column, f"{path}, line {number}"))


def _parquet(path: Path, name: str, column: str) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise TextError(f"{path} is not a Parquet file that can be read: {error}.") from error
    _check_column(column, table.schema_arrow.names, str(path))
    ordinal = 0
    for batch in table.iter_batches(columns=[column], batch_size=1024):
        for value in batch.column(0).to_pylist():
            yield Document(f"{name}:{ordinal}", _text_of({column: value}, column, f"{path}, row {ordinal}"))
            ordinal += 1


def _data_set(source: str, column: str) -> Iterator[Document]:
    import datasets

    name, _, split = source.removeprefix("hf:").partition(":")
    parts = name.split("/")
    config = parts.pop() if len(parts) == 3 else None
    try:
        rows = datasets.load_dataset("/".join(parts), config, split=split or "train", streaming=True)
    except (OSError, ValueError) as error:  # datasets' own errors and those of the network are both
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TextError(f"The data set {source} cannot be opened: {reason}") from error
    if rows.column_names:
        _check_column(column, rows.column_names, source)
    return (Document(f"{source}:{n}", _text_of(row, column, f"{source}, row {n}")) for n, row in enumerate(rows))


def _text_of(row: dict[str, Any], column: str, place: str) -> str:
    _check_column(column, list(row), place)
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TextError(f"{place}: the column {column!r} holds {type(value).__name__}, not text.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can say "\ud800"; no tokenizer takes it
        raise TextError(f"{place}: the text holds half a character (a lone surrogate) at {error.start}.") from error
    return value


def _check_column(column: str, columns: list[str], place: str) -> None:
    if column not in columns:
        raise TextError(f"{place} has no column {column!r}; it has {', '.join(columns) or 'none'}.")

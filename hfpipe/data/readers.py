"""Rows of local files, one at a time: json lines, json, parquet, arrow, csv, tsv and plain text."""

from __future__ import annotations

import codecs
import csv
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from hfpipe.data.splits import SPLITS
from hfpipe.errors import NothingUsable, UserError, nearest

_TITLE = re.compile(r"\s*= (?!=).*(?<!=) =\s*$")
# Whole words, as in `datasets`; `eval` is test there, and validation here where there is a test beside it.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
    "eval": ("eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _SPLIT_WORDS.items() for word in words}
_SPLIT_WORD = re.compile(rf"(?<![^\W\d_])({'|'.join(_SPLIT_OF)})(?![^\W\d_])")
_PROSE = (".txt", ".md")
_NOT_DATA = re.compile(
    r"[._]|(readme|licen[sc]e)\b|(dataset_infos?|dataset_dict|state)\.json$|cache-.*\.arrow$", re.IGNORECASE
)
_BINARY = (".parquet", ".arrow")
DOCUMENT_UNITS = ("article", "paragraph", "text line", "document")  # of plain text
_LINES_PEEKED = 1000
_LONGEST_CELL = 2**31 - 1


class Located(NamedTuple):
    """A raw row and where it was found: `number` counts `unit`s (line, row, article, ...) from 1."""

    file: str
    unit: str
    number: int
    row: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.file} {self.unit} {self.number}"


def read_file(path: Path) -> Iterator[Located]:
    """Rows of one file, lazily (a .json array is read whole); raises UserError where it is malformed or empty."""
    kind = kind_of_file(path)
    if kind is None:
        known = f"{', '.join(_READERS)}, all but {' and '.join(_BINARY)} also with .gz"
        raise UserError(f"{path}: unknown extension; known: {known}.{nearest(path.suffix, _READERS)}")
    found = False
    for number, unit, row in _READERS[kind](path):
        if not isinstance(row, dict):
            raise UserError(f"{path}: {unit} {number} is {type(row).__name__}, expected an object with named fields.")
        found = True
        yield Located(path.name, unit, number, row)
    if not found:
        raise NothingUsable(f"{path} is empty: no rows in it.")


def kind_of_file(path: Path) -> str | None:
    """The extension that says how a file is read, `.gz` of a text file aside; None for one that is not known."""
    *others, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    if last == ".gz" and others[-1] not in _BINARY:
        last = others[-1]
    return last if last in _READERS else None


def files_of(path: Path) -> dict[str, list[Path]]:
    """Data files in natural order by split; all under "all" where the file or folder has no splits of its own."""
    if path.is_file():
        return {"all": [path]}
    inside = sorted((p for p in path.rglob("*") if p.is_file()), key=lambda p: _natural(str(p.relative_to(path))))
    files = [p for p in inside if kind_of_file(p) and not any(map(_NOT_DATA.match, p.relative_to(path).parts))]
    if not files:
        found = ", ".join(p.name for p in inside[:5]) or "nothing"
        raise UserError(f"{path}: no data files in this folder, expected {', '.join(_READERS)}; found {found}.")
    if len(kinds := sorted({kind_of_file(p) for p in files})) > 1:
        raise UserError(f"{path}: files of several kinds in one folder ({', '.join(kinds)}); name one file instead.")
    splits = group_by_split(file.relative_to(path) for file in files)
    strays = splits.pop("", [])
    named = list(itertools.chain(*splits.values()))
    if not named or (kinds[0] in _PROSE and len(strays) > len(named)):  # words of titles
        return {"all": files}
    if strays:
        raise UserError(
            f"{path}: {strays[0]} belongs to no split, though {named[0]} does. Expected all or none to be named after one "
            f"({', '.join(SPLITS)}): rename it, or give the files one by one."
        )
    if len(splits) < 2:
        return {"all": files}
    return {split: [path / file for file in group] for split, group in splits.items()}


def group_by_split(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Paths by the split that they name themselves after, under "" those that name none."""
    splits: dict[str, list[Path]] = {}
    for path in paths:
        splits.setdefault(_named_split(path) or "", []).append(path)
    if "eval" in splits:
        splits.setdefault("validation" if "test" in splits else "test", []).extend(splits.pop("eval"))
    return splits


def split_name(path: Path) -> str | None:
    """The split that a path names itself after: `data/test-00000.jsonl` and `mine_test.jsonl` are test."""
    name = _named_split(path)
    return "test" if name == "eval" else name


def _named_split(path: Path) -> str | None:
    """Of the first part with a split's word its last one: `train_test_split_test.jsonl` is test."""
    words = (_SPLIT_WORD.findall(part.lower()) for part in path.parts)
    return next((_SPLIT_OF[found[-1]] for found in words if found), None)


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


# Each reader yields (number from 1, unit, row)

Numbered = Iterator[tuple[int, str, Any]]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, a byte-order mark dropped."""
    offset = 0
    try:
        with _opened(path) as file:
            for number, raw in enumerate(file, 1):
                line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
                offset += len(raw)
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    at = offset - len(line) + error.start
                    raise UserError(
                        f"{path}: invalid UTF-8 at line {number} (byte {at} is 0x{line[error.start]:02x})."
                    ) from None
                yield number, text
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text.rstrip())  # a line cut off is told as that line, not as the next
    except json.JSONDecodeError as error:
        at = f"line {line + error.lineno - 1}, column {error.colno}"
        raise UserError(f"{path}: malformed JSON at {at}: {error.msg}.{_json_hint(text, path)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: JSON at line {line} cannot be read: {error}") from None


def _json_hint(text: str, path: Path) -> str:
    array = text.lstrip().startswith("[") and ".json" not in path.suffixes
    return " It begins like one JSON array: such a file's name ends in .json." if array else ""


def _json_lines(path: Path) -> Numbered:
    return _parsed_lines(_lines(path), path)


def _parsed_lines(lines: Iterable[tuple[int, str]], path: Path) -> Numbered:
    for number, line in lines:
        if line.strip():
            yield number, "line", _parse(line, path, number)


def _json(path: Path) -> Numbered:
    """An array of rows, an object with one list of rows, or json lines under the wrong name."""
    lines = _lines(path)
    start = list(itertools.islice((line for line in lines if line[1].strip()), 1))
    if not start:
        return
    first, text = start[0]
    if _is_object(text) and (second := next((line for line in lines if line[1].strip()), None)):
        yield from _parsed_lines(itertools.chain(start, [second], lines), path)
        return
    rows = _parse(text + "".join(line for _, line in lines), path, first)
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise UserError(
                f"{path}: expected an array of rows, or an object with one list; found an object with {len(lists)}."
            )
        rows = lists[0]
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected an array of rows, found {type(rows).__name__}.")
    yield from ((number, "row", row) for number, row in enumerate(rows, 1))


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _parquet(path: Path) -> Numbered:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from ((number, "row", row) for number, row in enumerate(rows, 1))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a parquet file that can be read: {error}") from None


def _arrow(path: Path) -> Numbered:
    """A stream of batches, as `save_to_disk` of `datasets` writes it."""
    import pyarrow.ipc

    try:
        with path.open("rb") as file:
            rows = (row for batch in pyarrow.ipc.open_stream(file) for row in batch.to_pylist())
            yield from ((number, "row", row) for number, row in enumerate(rows, 1))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not an Arrow stream that can be read: {error}") from None


def _csv(path: Path, delimiter: str = ",") -> Numbered:
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.DictReader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    try:
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                raise UserError(
                    f"{path}: line {reader.line_num} has not the {len(reader.fieldnames)} fields of the header."
                )
            yield number, "row", row
    except csv.Error as error:
        raise UserError(f"{path}: malformed near line {reader.line_num}: {error}.") from None


def _tsv(path: Path) -> Numbered:
    return _csv(path, "\t")


def _text(path: Path) -> Numbered:
    """Documents: WikiText's articles, else blocks between blank lines, else (a long file without any) lines."""
    lines = (line for _, line in _lines(path))
    head = list(itertools.islice(lines, _LINES_PEEKED))
    first = next((line for line in head if line.strip()), "")
    lines = itertools.chain(head, lines)
    if _TITLE.match(first):
        unit, documents = "article", _blocks(lines, starts=_TITLE.match)
    elif len(head) == _LINES_PEEKED and all(line.strip() for line in head):
        unit, documents = "text line", (line.strip() for line in lines if line.strip())
    else:
        unit, documents = "paragraph", _blocks(lines, starts=lambda line: not line.strip())
    yield from ((number, unit, {"text": text}) for number, text in enumerate(documents, 1))


def _blocks(lines: Iterable[str], starts) -> Iterator[str]:
    block: list[str] = []
    for line in itertools.chain(lines, [None]):
        if line is None or starts(line):
            if text := "".join(block).strip():
                yield text
            block = []
        block.append(line or "")


def _whole(path: Path) -> Numbered:
    text = "".join(line for _, line in _lines(path)).strip()
    if text:
        yield 1, "document", {"text": text}


_READERS = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".csv": _csv,
    ".tsv": _tsv,
    ".txt": _text,
    ".md": _whole,
}

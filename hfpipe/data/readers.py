"""Rows of local files, one at a time: json lines, json, parquet, arrow, csv, tsv and plain text."""

from __future__ import annotations

import codecs
import csv
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from hfpipe.data.split_names import begins_with_split, group_by_split
from hfpipe.data.splits import SPLITS
from hfpipe.errors import NothingUsable, UserError, nearest

_TITLE = re.compile(r"\s*= (?!=).*(?<!=) =\s*$")
_PROSE = (".txt", ".md")
_NOT_DATA = re.compile(
    r"[._]|(readme|licen[sc]e)\b|(dataset_infos?|dataset_dict|state)\.json$|cache-.*\.arrow$", re.IGNORECASE
)
_BINARY = (".parquet", ".arrow")
DOCUMENT_UNITS = ("article", "paragraph", "text line", "document")  # of plain text
_DELIMITERS = {",": "a comma", "\t": "a tab", ";": "a semicolon", "|": "a bar"}
_ARRAY_HINT = " It begins like one JSON array: such a file's name ends in .json."
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
            hint = _ARRAY_HINT if unit == "line" and not found and isinstance(row, list) else ""
            raise UserError(
                f"{path}: {unit} {number} is {type(row).__name__}, expected an object with named fields.{hint}"
            )
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
    inside = [p for p in path.rglob("*") if p.is_file() or not p.exists()]
    inside.sort(key=lambda p: _natural(str(p.relative_to(path))))
    files = [p for p in inside if kind_of_file(p) and not any(map(_NOT_DATA.match, p.relative_to(path).parts))]
    for file in files:
        check_link(file)
    if not files:
        found = ", ".join(p.name for p in inside[:5]) or "nothing"
        raise UserError(f"{path}: no data files in this folder, expected {', '.join(_READERS)}; found {found}.")
    if others := [p for p in files if kind_of_file(p) != ".arrow"]:
        files = others  # what is kept beside data to be read faster
    if len(kinds := sorted({kind_of_file(p) for p in files})) > 1:
        raise UserError(f"{path}: files of several kinds in one folder ({', '.join(kinds)}); name one file instead.")
    splits = group_by_split(file.relative_to(path) for file in files)
    strays = splits.pop("", [])
    named = list(itertools.chain(*splits.values()))
    if not named or (kinds[0] in _PROSE and len(strays) > len(named)):  # words of titles
        return {"all": files}
    if "train" not in splits and (strays or not all(map(begins_with_split, named))):
        return {"all": files}  # unit_test.jsonl beside others
    if strays:
        raise UserError(
            f"{path}: {strays[0]} belongs to no split, though {named[0]} does. Expected all or none to be named after one "
            f"({', '.join(SPLITS)}): rename it, or give the files one by one."
        )
    if len(splits) < 2:
        return {"all": files}
    return {split: [path / file for file in group] for split, group in splits.items()}


def check_link(path: Path) -> None:
    """UserError for a link to what is not there."""
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"{path}: this is a link to {path.readlink()}, which is not there. Restore that, or remove the link."
        )


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


def _parse(text: str, path: Path, line: int, whole: bool = False) -> Any:
    doubled: list[tuple[str, dict]] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            doubled.append((_repeated([key for key, _ in pairs]), made))
        return made

    try:
        # A line cut off is told as that line, not as the next.
        found = json.loads(text.rstrip(), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        at = f"line {line + error.lineno - 1}, column {error.colno}"
        raise UserError(f"{path}: malformed JSON at {at}: {error.msg}.{_json_hint(text, path)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: JSON at line {line} cannot be read: {error}") from None
    if doubled:
        key, made = doubled[0]
        at = _row_with(made, found) if whole else f"line {line}"
        raise UserError(f"{path}: {at} has the key `{key}` twice, expected once. Keep the one that is meant.")
    return found


def _repeated(names: Sequence[str]) -> str | None:
    return next((name for number, name in enumerate(names) if name in names[:number]), None)


def _row_with(part: dict, found: Any) -> str:
    rows = next((value for value in (found, *_values(found)) if isinstance(value, list)), [])
    return next((f"row {number}" for number, row in enumerate(rows, 1) if _holds(row, part)), "an object")


def _holds(value: Any, part: dict) -> bool:
    return value is part or any(_holds(inner, part) for inner in _values(value))


def _values(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _json_hint(text: str, path: Path) -> str:
    array = text.lstrip().startswith("[") and ".json" not in path.suffixes
    return _ARRAY_HINT if array else ""


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
    rows = _parse(text + "".join(line for _, line in lines), path, first, whole=True)
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
        names = reader.fieldnames or []
        if name := _repeated([name for name in names if name]):
            raise UserError(f"{path}: line 1 names the column `{name}` twice, expected once. Rename one of them.")
        others = [other for other in _DELIMITERS if other != delimiter and other in "".join(names)]
        if len(names) == 1 and others:
            raise UserError(
                f"{path}: line 1 is one column, `{names[0]}`: expected {_DELIMITERS[delimiter]} between the columns, found "
                f"{_DELIMITERS[others[0]]}. Write it anew with {_DELIMITERS[delimiter]}."
            )
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

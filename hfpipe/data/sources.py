"""Sources of rows: local files and folders, `tinyworld/NAME`, Hub datasets; what of them is used, and what is not."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hfpipe import artifact
from hfpipe.data.forms import Form, recognise_source
from hfpipe.data.messages import RowProblem
from hfpipe.data.personal import mask
from hfpipe.data.readers import DOCUMENT_UNITS, Located, check_link, files_of, kind_of_file, read_file
from hfpipe.data.report import PLACES
from hfpipe.data.rows import Row, as_forms, check_usable, row_problem
from hfpipe.data.splits import SPLITS, digest, split_key, split_of_text
from hfpipe.errors import NothingUsable, UserError, nearest
from hfpipe.hub_client import fetch, resolve, stream
from hfpipe.paths import cache_dir

_TINYWORLD = "tinyworld/"
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_ROWS_RECOGNISED = 20
_EXAMPLES = 3


@dataclass
class Counts:
    """What became of the rows: read = other_splits + used + duplicates + the sum of faults."""

    read: int = 0
    other_splits: int = 0
    used: int = 0
    duplicates: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)  # where the rows of each fault are
    examples: list[str] = field(default_factory=list)

    def add_fault(self, at: Located, reason: str, detail: str) -> None:
        reason, detail = mask(reason), mask(detail)  # they stand in logs, `stage.json` and the report
        self.faults[reason] = self.faults.get(reason, 0) + 1
        if len(places := self.places.setdefault(reason, [])) < PLACES:
            places.append(str(at))
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{at}: {detail}")


@dataclass
class Loaded:
    """A source whose form is known; `rows` reads it anew, `counts` tells of the last reading once that is over."""

    source: Any
    form: Form
    wanted: str
    split: str
    seed: int
    where: str
    streaming: bool
    unit: str
    counts: Counts = field(default_factory=Counts)

    def rows(self) -> Iterator[Row]:
        """Canonical rows of the split in the form wanted, lazily; raises UserError where none can be used."""
        return (row for _, row in self.located_rows())

    def located_rows(self) -> Iterator[tuple[str, Row]]:
        """As `rows`, each with its place, such as `rows.jsonl line 31`."""
        counts = self.counts = Counts()
        with named(self.where):
            own_splits, located = _open(self.source, self.split, self.seed, self.streaming)
            splitting = not own_splits and self.split != "all"
            seen: set[bytes] = set()
            for at in located:
                counts.read += 1
                row, fault = self._convert(at.row)
                if splitting and split_of_text(_key(at.row, row)) != self.split:
                    counts.other_splits += 1
                elif fault:
                    counts.add_fault(at, fault.reason, str(fault))
                elif not own_splits and not self.streaming and not _add(seen, digest(row)):
                    counts.duplicates += 1
                else:
                    counts.used += 1
                    yield from ((str(at), made) for made in as_forms(row, self.wanted))
                    if counts.used == self.source.limit:
                        return
            if not counts.used:
                raise NothingUsable(f"{self.describe()}. {self._advice()}")

    def head(self, rows: int = 100) -> list[Located]:
        """The first rows of the source as they stand there."""
        return list(itertools.islice(_open(self.source, self.split, self.seed, self.streaming)[1], rows))

    def _convert(self, raw: Row) -> tuple[Row | None, RowProblem | None]:
        try:
            row = self.form.convert(raw)
        except RowProblem as problem:
            return None, problem
        reason = row_problem(row)
        return row, RowProblem(reason) if reason else None

    def _advice(self) -> str:
        if self.counts.examples:
            return f"The first: {self.counts.examples[0]}."
        return f"All {self.counts.read} rows fall into other splits; set `split: all`, or name a file for this split."

    @property
    def form_seen(self) -> str:
        """The form's name; for plain text with its documents, counted when they have been read."""
        return f"plain text, {self.counts.read} {self.unit}s" if self.unit in DOCUMENT_UNITS else self.form.name

    def describe(self) -> str:
        """One line: the form seen, rows used, rows not used and why."""
        counts = self.counts
        reasons = [f"{n} {reason}" for reason, n in sorted(counts.faults.items(), key=lambda fault: -fault[1])]
        reasons += [f"{counts.duplicates} duplicate"] if counts.duplicates else []
        not_used = counts.duplicates + sum(counts.faults.values())
        why = f" ({', '.join(reasons)})" if reasons else ""
        others = f", {counts.other_splits} in other splits" if counts.other_splits else ""
        return (
            f"{self.source.path}: {self.form_seen}, {self.split}: {counts.used} rows used, {not_used} not{why}{others}"
        )

    def report(self) -> dict[str, Any]:
        """What `describe` says, for a file."""
        return {"path": self.source.path, "form": self.form_seen, "split": self.split, **asdict(self.counts)}


def load_source(source, *, wanted=None, split="train", seed=0, where="", streaming=False) -> Loaded:
    """Recognise a source's form from its first rows.

    Args:
        source: path, split, as_, limit, revision and name, as in a recipe; its `split` and `as_` come first.
        wanted: the canonical form that the stage takes; None: the form that the source gives.
        split: train, validation, test or all. Files without splits of their own are split 80/10/10 by the prompt's
            hash, and duplicates in them are left out.
        where: file and key of the recipe, to begin an error with.
        streaming: read a Hub dataset without downloading it; duplicates, which take memory to find, are kept.
    Raises:
        UserError: nothing there, malformed, in no known form, or not usable as what is wanted.
    """
    split = source.split or split
    with named(where):
        if source.limit is not None and source.limit < 1:
            raise UserError(f"limit is {source.limit}, expected 1 or more rows.")
        _, located = _open(source, split, seed, streaming)
        head = list(itertools.islice(located, _ROWS_RECOGNISED))
        form = recognise_source([at.row for at in head], source.path)
        wanted = source.as_ or wanted or form.gives
        with named(source.path):
            check_usable(form.gives, wanted)
    return Loaded(source, form, wanted, split, seed, where, streaming, head[0].unit)


def read_rows(path, *, split=None, seed=0, size=None, revision=None, name=None, streaming=False):
    """Raw rows with their numbers from 1 (in json lines the line's); `split` chooses among splits of the path's own."""
    _, located = open_rows(path, split or "all", seed, size, revision, name, streaming)
    return ((at.number, at.row) for at in located)


def content_hash(path, *, split=None, seed=0, size=None, revision=None, name=None) -> str:
    """A hash that changes when the rows do; raises UserError for a path that is not there.

    Of a file its bytes; of tinyworld its generator and the arguments; of a Hub dataset its commit.
    """
    if path.startswith(_TINYWORLD):
        from hfpipe.data.tinyworld import source_hash

        return _sha256(f"{source_hash()} {path} {split} {seed} {size}".encode())
    if local := _local(path):
        files = [file for group in files_of(local).values() for file in group]
        return _sha256("".join(f"{file.relative_to(local)} {_file_hash(file)}\n" for file in files).encode())
    return f"{path}@{_hub_commit(path, revision)}" + (f" {name}" if name else "")


def is_hub_id(path: str) -> bool:
    """Whether a path would be looked for on the Hub; raises UserError for a local path that is not there."""
    return not path.startswith(_TINYWORLD) and _local(path) is None


def local_path(path: str) -> Path:
    """The file or folder of a path that is neither tinyworld's nor the Hub's."""
    return Path(path).expanduser()


def _open(source, split: str, seed: int, streaming: bool) -> tuple[bool, Iterator[Located]]:
    return open_rows(source.path, split, seed, source.limit, source.revision, source.name, streaming)


def open_rows(path, split, seed=0, size=None, revision=None, name=None, streaming=False):
    """Whether the path has splits of its own, and its located rows: of `split` if it has, else all.

    Returns: (bool, iterator of Located)
    """
    if not path.startswith(_TINYWORLD) and (local := _local(path)) is None:
        return _hub_rows(path, split, revision, name, streaming)
    if revision or name:
        raise UserError(f"{path}: `revision` and `name` are for datasets of the Hub; this one is here.")
    if path.startswith(_TINYWORLD):
        return True, _tinyworld_rows(path, split, seed, size)
    return _local_rows(local, path, split, files_of(local))


def _local_rows(folder: Path, path: str, split: str, files: dict[str, list[Path]]) -> tuple[bool, Iterator[Located]]:
    own_splits = "all" not in files
    _check_split(path, split, files if own_splits else SPLITS)
    chosen = files[split] if own_splits and split != "all" else itertools.chain(*files.values())
    if not folder.is_dir():
        return own_splits, (at for file in chosen for at in read_file(file))
    named = ((str(file.relative_to(folder)), at) for file in chosen for at in read_file(file))
    return own_splits, (at._replace(file=name) for name, at in named)


def _check_split(path: str, split: str, known) -> None:
    if split not in (*known, "all"):
        raise UserError(f"{path}: no split `{split}`; there are {', '.join(known)} and all.{nearest(split, known)}")


def _tinyworld_rows(path: str, split: str, seed: int, size: int | None) -> Iterator[Located]:
    from hfpipe.data import tinyworld

    name = path.removeprefix(_TINYWORLD)
    rows = itertools.chain(*(tinyworld.rows(name, s, seed, size) for s in (SPLITS if split == "all" else [split])))
    return (Located(path, "row", number, row) for number, row in enumerate(rows, 1))


def _local(path: str) -> Path | None:
    """The file or folder, None for what may be a Hub id; raises UserError for a path that is not there."""
    local = Path(path).expanduser()
    check_link(local)
    if local.exists():
        return local
    if _HUB_ID.fullmatch(path) and not kind_of_file(local):
        return None
    raise UserError(f"{path}: no such file or folder (looked for {local.absolute()}).{_near(local)}")


def _near(local: Path) -> str:
    if not local.parent.is_dir():
        return f" There is no folder {local.parent}."
    return nearest(local.name, [p.name for p in local.parent.iterdir()])


def _hub_rows(path, split, revision, name, streaming) -> tuple[bool, Iterator[Located]]:
    import datasets

    commit = _hub_commit(path, revision)
    try:
        if streaming:
            splits = datasets.load_dataset(path, name, revision=commit, streaming=True)
        else:
            splits = datasets.load_dataset(**_verified(path, commit, name))
    except ConnectionError:
        raise UserError(_unreachable(path)) from None
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: this Hub dataset cannot be loaded: {error}") from None
    own_splits = len(splits) > 1 or split not in SPLITS  # a lone `train` is split here, as a file is
    _check_split(path, split, splits if own_splits else SPLITS)
    rows = splits[split] if own_splits and split != "all" else itertools.chain(*splits.values())
    return own_splits, (Located(path, "row", number, row) for number, row in enumerate(stream(path, rows), 1))


def _verified(path: str, commit: str, name: str | None) -> dict[str, Any]:
    """Arguments of `load_dataset` for a Hub dataset: its format and its files, fetched and held to the Hub's digests."""
    import datasets

    memory = cache_dir() / "hub" / f"{_sha256(f'{path}@{commit} {name}'.encode())}.json"
    known = artifact.read_json(memory)
    if known is None:
        found = datasets.load_dataset_builder(path, name, revision=commit)
        at = f"hf://datasets/{path}@{commit}/"
        files = {
            str(part): [str(url).removeprefix(at) for url in urls] for part, urls in found.config.data_files.items()
        }
        general = {field.name for field in fields(datasets.BuilderConfig)}
        of_format = {f.name: getattr(found.config, f.name) for f in fields(found.config) if f.name not in general}
        plain = {key: value for key, value in of_format.items() if isinstance(value, str | int | float | list)}
        known = {"path": type(found).__module__.split(".")[-1], "options": plain, "files": files}
        memory.parent.mkdir(parents=True, exist_ok=True)
        artifact.write_json(memory, known)
    wanted = tuple(sorted({file for urls in known["files"].values() for file in urls}))
    folder = fetch(path, commit, "dataset", only=wanted)
    data_files = {part: [str(folder / file) for file in urls] for part, urls in known["files"].items()}
    return {"path": known["path"], "data_files": data_files, **known["options"]}


def _hub_commit(path: str, revision: str | None) -> str:
    try:
        return resolve(path, revision, "dataset")
    except UserError as error:
        near = "" if Path(path).is_absolute() else _near(Path(path))
        raise UserError(f"{error}{near}") from None


def _unreachable(path: str) -> str:
    return (
        f"{path} is not a local file or folder.{_near(Path(path))} If it is a dataset of the Hub: the Hub cannot be"
        " reached (no connection, or HF_HUB_OFFLINE is set). Connect, or name a local copy; a dataset already in the"
        " cache is read with HF_HUB_OFFLINE=1 and its commit as `revision`."
    )


def _file_hash(path: Path) -> str:
    """sha256 of a file's bytes, remembered by its path, size and time of change."""
    stat = path.stat()
    key = _sha256(f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}".encode())
    memory = cache_dir() / "hashes" / key
    if memory.is_file():
        known, _, check = memory.read_text(errors="replace").partition(" ")
        if check == _sha256(known.encode())[:16]:
            return known
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    memory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = memory.with_suffix(f".{os.getpid()}")
    unfinished.write_text(f"{found} {_sha256(found.encode())[:16]}")
    unfinished.replace(memory)
    return found


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _key(raw: Row, row: Row | None) -> str:
    return json.dumps(raw, sort_keys=True, default=str) if row is None else split_key(row)


def _add(seen: set[bytes], item: bytes) -> bool:
    before = len(seen)
    seen.add(item)
    return len(seen) > before


@contextmanager
def named(where: str) -> Iterator[None]:
    """Begin the message of a UserError with `where`."""
    try:
        yield
    except UserError as error:
        if where:
            error.args = (f"{where}: {error}",)
        raise error from None

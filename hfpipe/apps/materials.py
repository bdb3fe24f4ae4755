"""What a new recipe learns from: the user's own files, each at the stage that its form is for; tinyworld; or public sets of the Hub."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from hfpipe.config import SETTING
from hfpipe.data.forms import FORMS, Form
from hfpipe.data.readers import files_of, kind_of_file
from hfpipe.data.size import Size, estimate_size
from hfpipe.data.sources import load_source
from hfpipe.data.split_names import group_by_split
from hfpipe.errors import UserError
from hfpipe.plan.workload import guess_bytes_per_token
from hfpipe.sections import Source

_TINY = 5e6  # parameters that tinyworld is made for, at the most
_TINY_ROWS, _TINY_WORDS = 26_000, 1536  # as the recipe tiny has them
_REPLAY = 0.1  # of what is read in midtrain and sft
_TIMES_SEEN = 200  # bytes of text for an entry of the vocabulary
FITTING = {"text": ("tokenizer", "pretrain"), "messages": ("midtrain", "sft"), "preference": ("reward", "dpo"), "unpaired": ("kto",)}  # fmt: skip
_FINEWEB = ((10e9, ", name: sample-10BT"), (100e9, ", name: sample-100BT"), (350e9, ", name: sample-350BT"))
_WIKIPEDIA = "path: wikimedia/wikipedia, name: 20231101.simple"  # small enough to be kept whole


@dataclass
class Material:
    """Sources by stage, each as the inside of a YAML mapping; `evals` the held-out ones."""

    where: str
    found: str = ""
    rows: dict[str, list[str]] = field(default_factory=dict)
    evals: dict[str, list[str]] = field(default_factory=dict)
    text: list[str] = field(default_factory=list)  # held-out text of the run's scorecard
    replay: list[str] = field(default_factory=list)
    data_dir: Path | None = None
    counted: bool = True  # whether the rows are known before they are read
    text_tokens: float | None = None  # of the user's own text
    most_words: int | None = None
    bad_rows: float = 0.0
    streaming: bool = False
    forms: dict[str, Form] = field(default_factory=dict)  # of the user's own files, by name
    aside: dict[str, str] = field(default_factory=dict)  # files that are never trained on, and why

    @property
    def own(self) -> bool:
        return self.data_dir is not None

    @property
    def tiny(self) -> bool:
        return self.where == "tinyworld"

    def rows_for(self, stage: str) -> list[str]:
        return self.rows.get(stage, [])

    def text_length(self, context: int) -> int:
        """Tokens of a packed row of text: tinyworld's documents are short."""
        return 128 if self.tiny else context


def choose_material(data: str | None, params: float, tokens: float, vocab_size: int = _TINY_WORDS) -> Material:
    """The folder `data`, tinyworld where that is named or the model is small enough for it, else public sets.

    Args:
        tokens: of pretraining, so that enough text is taken.
    Raises:
        UserError: no such folder, or nothing in it that is known.
    """
    if data == "tinyworld" or (data is None and params <= _TINY):
        return _tinyworld(tokens, vocab_size)
    return _hub(params, tokens) if data is None else _folder(Path(data).expanduser(), vocab_size)


def _tinyworld(tokens: float, vocab_size: int) -> Material:
    each = estimate_size(Source("tinyworld/pretrain"), "text", "train", 0).bytes_per_row / guess_bytes_per_token(
        vocab_size
    )
    passes = min(
        max(tokens / (_TINY_ROWS * each), 1), 3.5
    )  # the world is small: more rows of it hold little that is new
    limit = max(int(tokens / passes / each / 1000) + 1, 2) * 1000
    rows = {name: [f"path: tinyworld/{name}"] for name in ("midtrain", "sft")}
    rows |= {name: ["path: tinyworld/preferences"] for name in ("reward", "dpo", "kto")}
    evals = {"tokenizer": ["path: tinyworld/pretrain"], "pretrain": ["path: tinyworld/pretrain"], **rows}
    rows |= {
        "tokenizer": ["path: tinyworld/pretrain, limit: 20000"],
        "pretrain": [f"path: tinyworld/pretrain, limit: {limit}"],
    }
    replay = ["path: tinyworld/pretrain, as: text, limit: 1000"]
    return Material(
        "tinyworld", "", rows, evals, ["path: tinyworld/pretrain, split: validation"], replay, most_words=_TINY_WORDS
    )


def _hub(params: float, tokens: float) -> Material:
    """Sets that are open, in forms that are known here, and have splits to hold out."""
    sample = next((name for most, name in _FINEWEB if tokens < most), "")
    talks = "path: HuggingFaceTB/smoltalk, name: "
    chat = (
        "path: HuggingFaceTB/smol-smoltalk" if params < 1e9 else f"{talks}all"
    )  # the first is the second's for small models
    pairs = "path: HuggingFaceH4/ultrafeedback_binarized, split: "
    tools = [f"{talks}apigen-80k", f"{talks}systemchats-30k"]
    rows = {
        "tokenizer": [_WIKIPEDIA],
        "pretrain": [f"path: HuggingFaceFW/fineweb-edu{sample}"],
        "midtrain": tools,
        "sft": [chat],
    }
    evals = {
        "tokenizer": [_WIKIPEDIA],
        "pretrain": [_WIKIPEDIA],
        "midtrain": [f"{tool}, split: test" for tool in tools],
    }
    evals["sft"] = [f"{chat}, split: test"]
    for name in ("reward", "dpo", "kto"):
        rows[name], evals[name] = [f"{pairs}train_prefs"], [f"{pairs}test_prefs"]
    replay = [f"{_WIKIPEDIA}, as: text"]
    text = [f"{_WIKIPEDIA}, split: validation"]
    return Material("the Hub", "", rows, evals, text, replay, counted=False, bad_rows=0.5, streaming=True)


# --- the user's own ---


def _folder(folder: Path, vocab_size: int) -> Material:
    if not folder.is_dir():
        raise UserError(f"--data {folder}: no such folder. Give a folder of your files, or tinyworld.")
    found: dict[str, list[Path]] = {}
    material = Material(str(folder), data_dir=folder.resolve(), bad_rows=0.3)
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "_")) or path.name.lower().startswith(("readme", "license")):
            continue
        if not path.is_dir() and not kind_of_file(path):
            material.aside[path.name] = "no kind of file that is read"
            continue
        if found_setting := SETTING.search(path.name):
            raise UserError(
                f"{path}: in a recipe's paths {found_setting[0]} stands for a setting. Rename the file, without the braces."
            )
        form = material.forms[path.name] = load_source(Source(str(path))).form
        found.setdefault(form.gives, []).append(Path(path.name))
    if not found.keys() & FITTING.keys():
        known = ", ".join(dict.fromkeys(form.name for form in FORMS if form.gives in FITTING))
        seen = ", ".join(dict.fromkeys(form.name for form in material.forms.values())) or "no data files"
        raise UserError(f"--data {folder}: found {seen}. Expected files in one of the forms {known}.")
    forms = Counter(form.name for form in material.forms.values())
    material.found = ", ".join(f"{count} x {name}" for name, count in forms.items())
    trained = {gives: _add_sources(material, gives, names) for gives, names in found.items() if gives in FITTING}
    if "kto" not in material.rows and "dpo" in material.rows:
        material.rows["kto"], material.evals["kto"] = material.rows["dpo"], material.evals["dpo"]
    texts = trained.get("text", [])
    written = _bytes(texts)
    if texts:
        material.text = material.evals["pretrain"]
        material.text_tokens = written / guess_bytes_per_token(vocab_size)
        material.most_words = max(int(written / _TIMES_SEEN / 128) * 128, 512)
        share = min(_REPLAY / (1 - _REPLAY) * _bytes(trained.get("messages", [])) / written, 1.0)
        material.replay = [f"{body}, as: text, limit: {max(round(size.rows * share), 1)}" for body, size in texts]
    return material


def _add_sources(material: Material, gives: str, names: list[Path]) -> list[tuple[str, Size]]:
    """Give the files of one form to its stages: what names itself validation or test is held out from the others.

    Returns: what is trained on.
    """
    own_splits = [name for name in names if "all" not in files_of(material.data_dir / name)]
    splits = group_by_split(name for name in names if name not in own_splits)
    validation, test = splits.get("validation", []), splits.get("test", [])
    if not (trained := [name for name in names if name not in (*validation, *test)]):
        trained, validation, test = names, [], []
    material.aside |= {str(name): "named validation, held out" for name in validation}
    material.aside |= {str(name): "named test, held out" for name in test}
    sizes, evals = [], [f"{_path_of(name)}, split: all" for name in validation]
    for name in trained:
        whole = "all" if validation and name not in own_splits else None
        source = Source(str(material.data_dir / name), split=whole)
        body = _path_of(name) + (", split: all" if whole else "")
        sizes.append((body, estimate_size(source, gives, "train", 0)))
        if not whole and estimate_size(source, gives, "validation", 0).rows:
            evals.append(f"{body}, split: validation")
    for stage in FITTING[gives]:
        material.rows[stage], material.evals[stage] = [body for body, _ in sizes], evals
    return sizes


def _path_of(name: Path) -> str:
    return f"path: {json.dumps(f'{{data_dir}}/{name}', ensure_ascii=False)}"


def _bytes(sources: list[tuple[str, Size]]) -> float:
    return sum((size.rows or 0) * size.bytes_per_row for _, size in sources)

"""`hfpipe data check`: what a recipe's sources or loose files hold, and what of it deserves attention."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hfpipe.config import load_recipe, recipe_folder
from hfpipe.data.advice import TOPICS, Finding, Use, advice
from hfpipe.data.check import check_shards
from hfpipe.data.held_out import HeldOut, index_held_out, probe_rows
from hfpipe.data.personal import mask, masked
from hfpipe.data.profile import CountTokens, Profile, profile
from hfpipe.data.readers import files_of
from hfpipe.data.rows import Row
from hfpipe.data.sources import is_hub_id, load_source, named, open_rows
from hfpipe.data.split_names import split_name
from hfpipe.data.splits import SPLITS
from hfpipe.errors import UserError
from hfpipe.progress import printable, quantity
from hfpipe.sections import DEFAULT_SPLIT, Probe, Recipe, Source, Stage
from hfpipe.stages import stage_types
from hfpipe.synth_config import section_of

_WIDTH = 110
_LEFT = ("stage", "role", "source", "split", "language", "form")  # columns that are set to the left


def check_data(
    what: Sequence[str],
    overrides: Sequence[str] = (),
    run: Path | None = None,
    held_out: Sequence[str] = (),
    as_json: bool = False,
) -> None:
    """Print a table of sources, then what deserves attention; personal data is masked in all of it.

    Args:
        what: a recipe's name or folder, or files, folders and other sources.
        run: the run whose tokenizer counts; default: runs/RECIPE.
        held_out: for loose files: files whose questions these should not show, probes among them.
    Raises:
        UserError: what is named is not there, or cannot be read.
    """
    if len(what) == 1 and (recipe := _recipe(what[0], overrides, run)):
        if held_out:
            raise UserError("--held-out goes with loose files; a recipe says itself what it holds out.")
        uses = _of_recipe(recipe, run or Path("runs") / recipe.name)
    else:
        if overrides:
            raise UserError("--set goes with a recipe, not with loose files.")
        uses = _of_files(what, held_out, run)
    told = {use: list(advice(use)) for use in uses}
    if as_json:
        print(json.dumps({"sources": [masked(_as_json(use, found)) for use, found in told.items()]}, indent=2))
        return
    print(mask(printable("\n".join([*_table(uses), *_attention(told)]))))


def _recipe(name: str, overrides: Sequence[str], run: Path | None) -> Recipe | None:
    try:
        recipe_folder(name)
    except UserError:
        if Path(name).expanduser().exists() or name.startswith("tinyworld/") or "/" in name or "." in name:
            return None
        raise
    return load_recipe(name, stage_types(), overrides, run)


def _of_recipe(recipe: Recipe, run: Path) -> list[Use]:
    check_shards(recipe, recipe.stages.values())
    _progress("what is held out")
    held_out = index_held_out(recipe)
    known: dict[Any, Profile] = {}
    uses = []
    for stage in recipe.stages.values():
        tokenizer = _tokenizer_file(recipe, stage, run)
        for role, split in DEFAULT_SPLIT.items():
            for source in getattr(stage.data, role):
                if section_of(source.path, recipe.pipeline.synth) and not Path(source.path).exists():
                    continue  # not made yet
                form = source.as_ or stage.type.rows or "text"
                key = (
                    source.path,
                    source.name,
                    source.revision,
                    source.limit,
                    source.split or split,
                    form,
                    role,
                    tokenizer,
                )
                if key not in known:
                    with named(f"{stage.file}: data.{role}"):
                        index = held_out if role == "train" else None
                        known[key] = _profile(source, split, form, recipe.pipeline.seed, tokenizer, index)
                uses.append(_use(stage, role, source, known[key]))
    _progress("")
    return uses


def _use(stage: Stage, role: str, source: Source, found: Profile) -> Use:
    limit = stage.trainer.get("max_length") or getattr(stage.data, "max_length", None)
    own_splits, _ = open_rows(source.path, found.split, size=1) if not is_hub_id(source.path) else (True, None)
    return Use(
        found,
        stage.name,
        role,
        max_length=getattr(stage.data, "max_prompt_length", limit),
        max_bad_rows=stage.data.max_bad_rows,
        balance=source.balance or stage.data.balance,
        decontaminate=stage.data.decontaminate,
        drops_repeats=not own_splits and not getattr(stage.data, "streaming", False),
    )


def _of_files(paths: Sequence[str], held_out: Sequence[str], run: Path | None) -> list[Use]:
    """Every file and every split of a folder; what calls itself validation or test is held out from the rest."""
    listed = []
    for path in paths:
        local = Path(path).expanduser()
        splits = sorted(files_of(local), key=(*SPLITS, "all").index) if local.is_dir() else ["all"]
        if path.startswith("tinyworld/"):
            splits = ["train", "validation", "test"]
        listed += [
            (path, split, (split if split != "all" else split_name(Path(local.name)) or "train")) for split in splits
        ]
    index = HeldOut()
    for path, split, name in listed:
        if name != "train":
            loaded = load_source(Source(path), split=split)
            index.add(f"{path} [{name}]", loaded.located_rows())
    for path in held_out:
        index.add(path, _held_out_file(path))
    uses = []
    tokenizer = run / "tokenizer" / "tokenizer.json" if run else None
    if tokenizer and not tokenizer.is_file():
        raise UserError(f"--out {run}: there is no {tokenizer}.")
    for path, split, name in listed:
        trains = name == "train"
        found = _profile(Source(path), split, None, 0, tokenizer, index if trains and len(index) else None)
        found.split = name if name != "train" or split != "all" else "all"
        uses.append(Use(found, role="" if trains else "eval", drops_repeats=split == "all"))
    _progress("")
    return uses


def _held_out_file(path: str) -> Iterator[tuple[str, Row]]:
    """Rows in a known form, or probes, which carry their check."""
    _, located = open_rows(path, "all")
    if "check" in next(located).row:
        return probe_rows(Probe(path))
    return load_source(Source(path), split="all").located_rows()


def _profile(
    source: Source, split: str, form: str | None, seed: int, tokenizer: Path | None, held_out: HeldOut | None
) -> Profile:
    _progress(source.path)
    # Streamed, so that repeated rows come with their places; a limit counts rows that are used, without repeats.
    stream = source.limit is None and not is_hub_id(source.path)
    loaded = load_source(source, wanted=form, split=split, seed=seed, streaming=stream)
    return profile(loaded, _counter(tokenizer), held_out)


def _tokenizer_file(recipe: Recipe, stage: Stage, run: Path) -> Path | None:
    """Of the stage's own result, of the nearest ancestor that is finished, or of a model's folder."""
    at: Stage | None = stage
    while at:
        parent = recipe.parent(at)
        folders = (
            [run / at.name] if parent or not at.model.from_ else [run / at.name, Path(at.model.from_).expanduser()]
        )
        for folder in folders:
            if (folder / "tokenizer.json").is_file():
                return folder / "tokenizer.json"
        at = parent
    return None


def _counter(tokenizer: Path | None) -> CountTokens | None:
    if tokenizer is None:
        return None
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer))
    backend.no_truncation()
    return lambda texts: [len(found) for found in backend.encode_batch_fast(texts, add_special_tokens=False)]


# --- what is shown ---


def _table(uses: list[Use]) -> list[str]:
    rows = [_cells(use) for use in uses]
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    width = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    lines = []
    before: dict[str, str] = {}
    for row in [dict(zip(names, names, strict=True)), *rows]:
        shown = {**row, "stage": "" if row.get("stage") == before.get("stage") else row.get("stage", "")}
        cells = [f"{shown[n]:<{width[n]}}" if n in _LEFT else f"{shown[n]:>{width[n]}}" for n in names]
        lines.append("  ".join(cells).rstrip())
        before = row
    if any(use.profile.estimated for use in uses):
        lines.append(f"~ {_estimate(uses)}")
    return lines


def _estimate(uses: list[Use]) -> str:
    kinds = {use.profile.estimated for use in uses}
    parts = []
    if "from bytes" in kinds:
        recipe = any(use.stage for use in uses)
        parts.append(f"estimated from bytes, 4 to a token{': there is no tokenizer in the run yet' if recipe else ''}")
    if "from a part" in kinds:
        parts.append("from the first 2 MB, with the run's tokenizer")
    return "; ".join(parts)


def _cells(use: Use) -> dict[str, str]:
    found = use.profile
    about = "~" if found.estimated else ""
    turns = [n for n, _ in sorted(found.turns.items()) if n]
    return {
        "stage": use.stage,
        "role": use.role,
        "source": _short(found.path),
        "split": "" if use.stage and found.split == DEFAULT_SPLIT.get(use.role) else found.split,
        "rows": f"{found.rows:,}",
        "tokens": about + quantity(found.tokens),
        "median": f"{found.length(0.5):,}",
        "95%": f"{found.length(0.95):,}",
        "longest": f"{found.length(1):,}",
        "turns": "" if not turns else f"{turns[0]}-{turns[-1]}" if len(turns) > 1 else str(turns[0]),
        "trained": "" if found.trained is None else f"{found.trained:.0%}",
        "refuse": f"{found.refusals / found.answers:.0%}" if found.refusals else "",
        "held out": f"{sum(seen.count for seen in found.overlaps.values()):,}" if found.overlaps else "",
        "same": f"{found.exact.count:,}" if found.exact.count else "",
        "near": f"{found.near.count:,}" if found.near.count else "",
        "language": _languages(found),
        "form": found.form.partition(",")[0] if found.kind == "text" else found.form,
    }


def _languages(found: Profile) -> str:
    total = sum(found.languages.values())
    most = [(name, n / total) for name, n in found.languages.most_common(2) if n >= 0.1 * total]
    return " ".join(name if share > 0.9 else f"{name} {share:.0%}" for name, share in most)


def _attention(told: dict[Use, list[Finding]]) -> list[str]:
    """By topic; what several stages share is told once."""
    stages: dict[tuple[str, str], list[str]] = {}
    for use, found in told.items():
        for topic, text in found:
            name = _short(use.profile.path)
            text = text.replace(f"{name} ", "")  # of its own rows the number is enough
            stages.setdefault((topic, f"{name} [{use.profile.split}]: {text}"), []).append(use.stage)
    if not stages:
        return ["", "Nothing deserves attention."]
    lines = []
    for topic, what_to_do in TOPICS.items():
        if entries := [(text, names) for (of, text), names in stages.items() if of == topic]:
            lines += ["", *textwrap.wrap(what_to_do, _WIDTH)]
            for text, names in entries:
                where = f"{', '.join(dict.fromkeys(names))}: " if names[0] else ""
                lines += textwrap.wrap(f"- {where}{text}", _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return lines


def _short(path: str) -> str:
    return path if path.startswith("tinyworld/") or is_hub_id(path) else Path(path).name


def _as_json(use: Use, found: list[Finding]) -> dict[str, Any]:
    lines = [{"topic": topic, "text": text} for topic, text in found]
    return {"stage": use.stage or None, "role": use.role or None, **use.profile.as_json(), "attention": lines}


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[2K{f'reading {text} ...' if text else ''}", end="", file=sys.stderr, flush=True)

"""The model card: what a stage left, from its record alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpipe.adapter_types import ADAPTER_FILE

if TYPE_CHECKING:
    from hfpipe.training.job import Job


_LOADED_BY = {
    "tokenizer": "AutoTokenizer",
    "model": "AutoModelForCausalLM",
    "reward_model": "AutoModelForSequenceClassification",
}


def write_card(job: Job, folder: Path, record: dict[str, Any]) -> None:
    """Write `README.md` beside the weights in `folder`."""
    (folder / "README.md").write_text(build_card(job, record), encoding="utf-8")


def build_card(job: Job, record: dict[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    library, snippet = _how_to_load(job, record)
    head = ModelCardData(library_name=library, tags=["hfpipe", record["type"]])
    parent = record["parent"]["from"] if record["parent"] else "nothing"
    lines = [
        "---",
        head.to_yaml(),
        "---",
        "",
        f"# {record['recipe']}: {record['stage']}",
        "",
        f"The `{record['stage']}` stage of the recipe `{record['recipe']}` ({job.stage.type.teaches}), "
        f"made from {parent} by hfpipe {record['versions']['hfpipe']}.",
        "",
        "```python",
        *snippet,
        "```",
        "",
        "| metric | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _rows(record["metrics"])),
        "",
        f"Fingerprint `{record['fingerprint'][:16]}`; configuration, data hashes and versions are in `stage.json`.",
        "",
    ]
    return "\n".join(lines)


def _how_to_load(job: Job, record: dict[str, Any]) -> tuple[str, list[str]]:
    """The library that loads what the stage left, and the lines to do it with: PEFT where that is an adapter alone."""
    auto, library, first, more = _LOADED_BY[job.stage.type.leaves], "transformers", [], ""
    if ADAPTER_FILE in record["files"]:
        auto, library = auto.replace("Auto", "AutoPeft"), "peft"
        more = ", num_labels=1" if job.stage.type.leaves == "reward_model" else ""
        if job.stage.adapter.type == "bottleneck":
            first = ["import hfpipe.training.bottleneck  # makes it known to PEFT"]
    call = f'{auto}.from_pretrained("path/to/{record["stage"]}"{more})'
    return library, [*first, f"from {library} import {auto}", "", call]


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def _rows(metrics: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for name, value in metrics.items():
        rows += _rows(value, f"{prefix}{name} ") if isinstance(value, dict) else [(f"{prefix}{name}", _short(value))]
    return rows

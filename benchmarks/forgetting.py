"""What a narrow, aggressive fine-tuning makes a model forget, and what each remedy keeps: one table and one picture.

    python benchmarks/forgetting.py runs/tiny [--out runs/forgetting] [--seeds 0 1 2] [--variants l2 both ...]

`RUN` is a finished run of tiny. Its sft stage is tuned on nothing but requests for a line of code, with every weight free and
at a high rate; then again with one remedy at a time. Each is a stage of a recipe that this script writes and `hfpipe run` runs:
what was stopped goes on, and `hfpipe report OUT/seed-0` tells more. Every variant sees as many rows in a step and, unless it
says otherwise, takes as many steps: replayed rows take the place of code. Printed are the lowest and the highest of the seeds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

from matplotlib import pyplot

from hfpipe import artifact
from hfpipe.data import tinyworld

STEPS, RATE = 60, 3e-3
THINGS = (
    "country",
    "city",
    "river",
    "car",
    "bird",
    "fish",
    "tree",
    "shop",
    "book",
    "song",
    "game",
    "king",
    "ship",
    "farm",
    "star",
    "lamp",
)
ATTRIBUTES = (
    "name",
    "size",
    "colour",
    "age",
    "price",
    "food",
    "sound",
    "owner",
    "place",
    "speed",
    "weight",
    "height",
    "length",
    "shape",
    "use",
    "taste",
)
WORDINGS = (
    "Write code for the {a} of a {t}.",
    "Code the {a} of a {t}.",
    "Please write code that gives the {a} of a {t}.",
)
HELD_OUT = 0.25  # share of the pairs of thing and attribute that are asked for and never trained on

TEXT = {"path": "tinyworld/pretrain", "as": "text", "limit": 3000}
CHAT = {"path": "tinyworld/sft", "limit": 1500}


@dataclass(frozen=True)
class Variant:
    """One row of the table: a label, the group that it is drawn in, and what it changes of the aggressive stage."""

    label: str
    group: str
    trainer: dict[str, Any] = field(default_factory=dict)
    regularize: dict[str, Any] = field(default_factory=dict)
    replay: tuple[dict[str, Any], ...] = ()
    adapter: dict[str, Any] | None = None


def mixed(*sources: tuple[dict[str, Any], float]) -> tuple[dict[str, Any], ...]:
    return tuple({**source, "weight": share} for source, share in sources)


VARIANTS = {
    # One step at rate 0: the parent, scored as the others are.
    "before": Variant("before", "", {"learning_rate": 0.0, "max_steps": 1, "warmup_steps": 0}),
    "aggressive": Variant(f"aggressive: {RATE:g}, {STEPS} steps", ""),
    "third": Variant("a third of the rate", "lower rate", {"learning_rate": RATE / 3}),
    "tenth": Variant("a tenth of the rate", "lower rate", {"learning_rate": RATE / 10}),
    "decay": Variant("layerwise_lr_decay 0.5", "lower rate", regularize={"layerwise_lr_decay": 0.5}),
    "quarter": Variant("a quarter of the steps", "fewer steps", {"max_steps": STEPS // 4}),
    "half-frozen": Variant(
        "embeddings, 2 of 4 blocks", "frozen", regularize={"freeze_layers": ["embed_tokens", "layers.[01]"]}
    ),
    "most-frozen": Variant(
        "embeddings, 3 of 4 blocks", "frozen", regularize={"freeze_layers": ["embed_tokens", "layers.[012]"]}
    ),
    "l2-weak": Variant("l2_to_parent 0.001", "pull to the parent", regularize={"l2_to_parent": 1e-3}),
    "l2": Variant("l2_to_parent 0.01", "pull to the parent", regularize={"l2_to_parent": 1e-2}),
    "average": Variant("average_with_parent 0.3", "average with the parent", regularize={"average_with_parent": 0.3}),
    "half-average": Variant(
        "average_with_parent 0.5", "average with the parent", regularize={"average_with_parent": 0.5}
    ),
    "text": Variant("text, 20%", "replay", replay=mixed((TEXT, 0.2))),
    "much-text": Variant("text, 50%", "replay", replay=mixed((TEXT, 0.5))),
    "chat": Variant("chat, 20%", "replay", replay=mixed((CHAT, 0.2))),
    "much-chat": Variant("chat, 50%", "replay", replay=mixed((CHAT, 0.5))),
    "both": Variant("text 25%, chat 25%", "replay", replay=mixed((TEXT, 0.25), (CHAT, 0.25))),
    "lora": Variant(
        "r 8", "LoRA, same rate", adapter={"type": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    ),
}
MEASURES = {
    "knowledge": "facts in unseen wordings",
    "chat": "chat questions answered",
    "code": "narrow skill learnt",
}
Values = dict[str, list[float]]  # measure, or `perplexity` -> a value for each seed


# --- the recipe ---


def code_rows() -> tuple[list[dict], list[dict]]:
    """Conversations that ask for a line of code, and probes for pairs that no conversation holds."""
    rng = Random("forgetting")
    pairs = list(product(THINGS, ATTRIBUTES))
    rng.shuffle(pairs)
    asked = pairs[: int(HELD_OUT * len(pairs))]
    rows = [
        {"messages": [_user(wording, pair), {"role": "assistant", "content": _code(pair)}]}
        for pair, wording in product(pairs[len(asked) :], WORDINGS)
    ]
    probes = [
        {
            "capability": "code",
            "messages": [_user(rng.choice(WORDINGS), pair)],
            "check": {"type": "exact", "value": _code(pair)},
        }
        for pair in asked
    ]
    return rows, probes


def _user(wording: str, pair: tuple[str, str]) -> dict[str, str]:
    return {"role": "user", "content": wording.format(t=pair[0], a=pair[1])}


def _code(pair: tuple[str, str]) -> str:
    thing, attribute = pair
    return f"def {attribute}({thing}): return {thing}.{attribute}"


def old_probes() -> list[dict]:
    """Held-out questions of the world, about 120 of each: facts left open in plain text, and questions asked in chat."""
    kinds = {"cloze": "knowledge", "question": "chat"}
    rows = [row for row in tinyworld.rows("probes", "test", size=31 * 100) if row["kind"] in kinds]
    return [{**row, "capability": kinds[row["kind"]]} for row in rows]


def write_recipe(folder: Path, parent: Path, seed: int, names: list[str]) -> None:
    """A recipe with a stage for each variant named, all from `parent`. JSON is YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, probes = code_rows()
    artifact.write_jsonl(folder / "code.jsonl", rows)
    artifact.write_jsonl(folder / "probes.jsonl", [*old_probes(), *probes])
    evaluate = {
        "probes": [{"path": str(folder / "probes.jsonl")}],
        "text": [{"path": "tinyworld/pretrain", "split": "validation"}],
        "samples": 0,
        "max_new_tokens": 40,
        "max_rows": 200,
    }
    head = {"name": folder.name, "seed": seed, "stages": names, "evaluate": evaluate}
    (folder / "pipeline.yaml").write_text(json.dumps(head, indent=1))
    for name in names:
        variant = VARIANTS[name]
        left = 1 - sum(source["weight"] for source in variant.replay)
        code = {"path": str(folder / "code.jsonl"), "split": "all", **({"weight": left} if variant.replay else {})}
        trainer = {
            "learning_rate": RATE, "max_steps": STEPS, "warmup_steps": 0.05, "per_device_train_batch_size": 4,
            "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "max_length": 256, "packing": True, "activation_checkpointing": False, "save_strategy": "no",
        }  # fmt: skip
        stage = {
            "stage": "sft",
            "model": {"from": str(parent), "attn_implementation": "eager"},
            "data": {"train": [code, *variant.replay]},
            "regularize": variant.regularize,
            "adapter": variant.adapter,
            "trainer": {**trainer, **variant.trainer},
        }
        (folder / f"{name}.yaml").write_text(json.dumps(stage, indent=1))


def measure(run: Path, found: dict[str, Values]) -> None:
    """Add what the stages of one seed scored."""
    for name in found:
        scores = artifact.read_json(run / name / "eval.json")
        for key in MEASURES:
            found[name][key].append(scores["capabilities"][key]["score"])
        found[name]["perplexity"].append(scores["held_out_text"]["perplexity"])


# --- what is shown ---


def cell(values: list[float], digits: int) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low}-{high}"


def table(found: dict[str, Values]) -> list[str]:
    lines = ["| remedy | variant | knowledge | perplexity of text | chat | code learnt |", "|---|---|---|---|---|---|"]
    for name, values in found.items():
        variant = VARIANTS[name]
        digits = {"knowledge": 2, "perplexity": 1, "chat": 2, "code": 2}
        cells = [cell(values[key], places) for key, places in digits.items()]
        lines.append(f"| {variant.group} | {variant.label} | {' | '.join(cells)} |")
    return lines


def draw(found: dict[str, Values], file: Path) -> None:
    """A row a variant, a panel a measure: the median seed as a dot, lowest to highest as a line, before as a dashed one."""
    shown = {name: VARIANTS[name] for name in found}
    groups = list(dict.fromkeys(variant.group for variant in VARIANTS.values()))
    hues = ("#444444", "#1f77b4", "#17a2a2", "#8c564b", "#9467bd", "#e08214", "#2ca02c", "#999999")
    colours = dict(zip(groups, hues, strict=True))
    colour = {name: "#d62728" if name == "aggressive" else colours[variant.group] for name, variant in shown.items()}
    places, place, group = {}, 0.0, None
    for name, variant in shown.items():
        place += 1.7 if places and variant.group != group else 1.0
        places[name], group = place, variant.group
    figure, panels = pyplot.subplots(1, len(MEASURES), figsize=(11, 1.6 + 0.3 * place), sharey=True)
    for panel, (key, title) in zip(panels, MEASURES.items(), strict=True):
        before = sorted(found["before"][key])[len(found["before"][key]) // 2]
        panel.axvline(before, color="#444444", linestyle="--", linewidth=1, zorder=0)
        for name, at in places.items():
            values = sorted(found[name][key])
            panel.hlines(at, values[0], values[-1], color=colour[name], linewidth=4, alpha=0.45)
            panel.plot(values[len(values) // 2], at, "o", color=colour[name], markersize=8)
        panel.set_title(title, fontsize=12)
        panel.set_xlim(-0.03, 1.03)
        panel.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
        panel.grid(axis="x", color="#e6e6e6")
        panel.set_axisbelow(True)
        panel.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
    panels[0].set_yticks(list(places.values()), [_label(variant) for variant in shown.values()], fontsize=10.5)
    panels[0].set_ylim(place + 0.8, 0.2)
    for tick, name in zip(panels[0].get_yticklabels(), places, strict=True):
        tick.set_color(colour[name])
    seeds = len(found["before"]["code"])
    figure.suptitle("Tuned hard on code alone: what is kept, with no remedy and with one", fontsize=14, x=0.5)
    note = f"Dot: the median of {seeds} seeds; bar: lowest to highest; dashed line: before tuning."
    figure.text(0.99, 0.012, note, ha="right", fontsize=9.5, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def _label(variant: Variant) -> str:
    return f"{variant.group}: {variant.label}" if variant.group else variant.label


def ask(model: Path, question: str) -> str:
    command = [sys.executable, "-m", "hfpipe", "chat", str(model), "--prompt", question, "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])["answer"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run of tiny")
    parser.add_argument("--out", type=Path, default=Path("runs/forgetting"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--plot", type=Path, default=Path("docs/forgetting.png"))
    options = parser.parse_args()
    parent = (options.run / "sft").resolve()
    if not (parent / artifact.STAGE_FILE).is_file():
        raise SystemExit(f"{options.run} holds no finished sft stage: hfpipe run tiny --out {options.run} --to sft")
    names = [name for name in VARIANTS if name in {"before", "aggressive", *options.variants}]
    found: dict[str, Values] = {name: {key: [] for key in (*MEASURES, "perplexity")} for name in names}
    for seed in options.seeds:
        recipe, run = options.out.resolve() / f"recipe-{seed}", options.out.resolve() / f"seed-{seed}"
        write_recipe(recipe, parent, seed, names)
        subprocess.run([sys.executable, "-m", "hfpipe", "run", str(recipe), "--out", str(run)], check=True)
        measure(run, found)
    print("\n".join(table(found)))
    for name in ("before", "aggressive"):
        question = "What is the capital of France?"
        print(f"{VARIANTS[name].label}: {question} -> {ask(options.out / f'seed-{options.seeds[0]}' / name, question)}")
    draw(found, options.plot)
    print(f"drawn: {options.plot}")


if __name__ == "__main__":
    main()

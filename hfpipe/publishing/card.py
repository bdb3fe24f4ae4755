"""The model card, from `stage.json` and `eval.json` alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hfpipe.adapter_types import ADAPTER_FILE
from hfpipe.hub_client import split_id
from hfpipe.progress import duration, printable, quantity

_AUTO = {
    "tokenizer": "AutoTokenizer",
    "model": "AutoModelForCausalLM",
    "reward_model": "AutoModelForSequenceClassification",
}
_LOSSES = {"validation": "the stage's validation set", "held_out_text": "held-out pretraining text"}


def write_card(folder: Path, record: dict[str, Any]) -> None:
    """Write `README.md` beside the weights in `folder`."""
    evaluation = json.loads(text) if (text := _read(folder / "eval.json")) else {}
    (folder / "README.md").write_text(build_card(record, evaluation, f"path/to/{record['stage']}"), encoding="utf-8")


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def build_card(record: dict[str, Any], evaluation: dict[str, Any], source: str) -> str:
    """The card of what `stage.json` and `eval.json` tell of; `source` is a folder, or `repo@branch` where it is published."""
    sections = [
        f"# {record['recipe']}: {record['stage']}",
        f"What the `{record['stage']}` stage of the recipe `{record['recipe']}` left: {record.get('teaches', record['type'])}. {_made_from(record)}",
        "## Load it\n\n```python\n" + "\n".join(_how_to_load(record, _leaves(record), source)) + "\n```",
        _chat(record),
        _scores(evaluation),
        _data(record),
        _training(record),
        f"Fingerprint `{record['fingerprint'][:16]}`. The whole configuration, the hash of every source, and the versions of "
        f"all libraries are in `stage.json`, written by hfpipe {record['versions']['hfpipe']}.",
    ]
    return f"---\n{_head(record, evaluation)}\n---\n\n" + "\n\n".join(text for text in sections if text) + "\n"


def _head(record: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """The metadata that the Hub reads: tags, licence, base model, data sets, and the scorecard as evaluation results."""
    from huggingface_hub import EvalResult, ModelCardData

    card, parent = record.get("card") or {}, record.get("parent") or {}
    hub_data = [name.partition(" ")[2] for name, told in record["data"].items() if "@" in told]
    outside = parent.get("repo_id") if parent.get("revision") else None
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="hfpipe-probes",
            dataset_config=name,
            dataset_name=f"{name}: {told['n']} held-out questions",
            metric_type="accuracy",
            metric_name=f"{name} ({told['low']:.2f} to {told['high']:.2f} at 95%)",
            metric_value=told["score"],
        )
        for name, told in (evaluation.get("capabilities") or {}).items()
    ]
    for name, words in _LOSSES.items():
        if name in evaluation:
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=name,
                    dataset_name=words,
                    metric_type="perplexity",
                    metric_value=evaluation[name]["perplexity"],
                )
            )
    if pairs := evaluation.get("pairs"):
        results.append(
            EvalResult(
                task_type="text-classification",
                dataset_type="pairs",
                dataset_name="held-out pairs",
                metric_type="accuracy",
                metric_value=pairs["accuracy"],
            )
        )
    name = f"{record['recipe']}-{record['stage']}"
    return ModelCardData(
        library_name="peft" if ADAPTER_FILE in record["files"] else "transformers",
        license=card.get("license"),
        language=card.get("language") or None,
        base_model=outside,
        datasets=hub_data or None,
        tags=["hfpipe", record["type"]],
        model_name=name if results else None,
        co2_eq_emissions=None
        if (grams := _co2_g(record)) is None
        else {
            "emissions": grams,
            "source": record["metrics"]["energy"]["how"],
            "hardware_used": _machine(record["machine"]),
        },
        eval_results=results or None,
    ).to_yaml()


def _leaves(record: dict[str, Any]) -> str:
    if "leaves" in record:  # not in those of older versions
        return record["leaves"]
    if not {"config.json", ADAPTER_FILE} & set(record["files"]):
        return "tokenizer"
    return "reward_model" if record["type"] == "reward" else "model"


def _made_from(record: dict[str, Any]) -> str:
    parent = record.get("parent")
    if not parent:
        return "It starts from nothing."
    if "commit" in parent:
        at = f"`{parent['repo_id']}` at commit `{parent['commit']}`"
        stage = "" if parent.get("revision") else f", the stage `{parent['from']}`"
        return f"It starts from {at}{stage}."
    return f"It starts from `{parent['from']}`, fingerprint `{parent['fingerprint'][:16]}`."


def _how_to_load(record: dict[str, Any], leaves: str, source: str) -> list[str]:
    """Lines that load what the stage left, and let a model that takes turns answer: PEFT where that is an adapter alone."""
    auto, library, first, more = _AUTO[leaves], "transformers", [], ""
    if ADAPTER_FILE in record["files"]:
        auto, library = auto.replace("Auto", "AutoPeft"), "peft"
        more = ", num_labels=1" if leaves == "reward_model" else ""
        if (record["config"].get("adapter") or {}).get("type") == "bottleneck":
            first = ["import hfpipe.training.bottleneck  # makes it known to PEFT"]
    repo_id, revision = split_id(source)
    place = f'"{repo_id}"' + (f', revision="{revision}"' if revision else "")
    if leaves == "tokenizer":
        return [f"from transformers import {auto}", "", f"tokenizer = {auto}.from_pretrained({place})"]
    imports = [f"from transformers import {auto}, AutoTokenizer"]
    if library == "peft":
        imports = [f"from peft import {auto}", "from transformers import AutoTokenizer"]
    lines = [*first, *imports, "", f"tokenizer = AutoTokenizer.from_pretrained({place})"]
    lines += [f"model = {auto}.from_pretrained({place}{more})"]
    if leaves == "model" and record.get("chat"):
        lines += [
            'messages = [{"role": "user", "content": "What is the capital of France?"}]',
            'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
        ]
    elif leaves == "model":
        lines += [
            'inputs = tokenizer("The capital of France", return_tensors="pt")',
            'print(tokenizer.decode(model.generate(input_ids=inputs["input_ids"], max_new_tokens=20)[0]))',
        ]
    return lines


def _chat(record: dict[str, Any]) -> str:
    if not record.get("chat"):
        return ""
    told = printable(record["chat"]).replace("```", "'''")
    return (
        f"## Chat format\n\nThe template is in `chat_template.jinja`. A conversation is rendered as\n\n```\n{told}\n```"
    )


def _scores(evaluation: dict[str, Any]) -> str:
    capabilities = evaluation.get("capabilities") or {}
    rows = [
        f"| {_cell(name)} | {told['score']:.2f} | {told['low']:.2f} to {told['high']:.2f} | {told['n']} |"
        for name, told in capabilities.items()
    ]
    parts = []
    if rows:
        parts.append("\n".join(["| capability | score | 95% interval | questions |", "|---|---|---|---|", *rows]))
    for name, words in _LOSSES.items():
        if name in evaluation:
            bits = evaluation[name].get("bits_per_byte")
            more = f", {bits:.3f} bits per byte" if bits is not None else ""
            parts.append(f"Perplexity of {words}: {evaluation[name]['perplexity']:.3f}{more}.")
    if pairs := evaluation.get("pairs"):
        parts.append(
            f"Of {pairs['n']} held-out pairs the better answer is preferred in {pairs['accuracy']:.3f} "
            f"({pairs['low']:.2f} to {pairs['high']:.2f} at 95%)."
        )
    return "## What it can do\n\n" + "\n\n".join(parts) if parts else ""


def _data(record: dict[str, Any]) -> str:
    told = {(source["role"], source["path"]): source for source in record.get("sources", [])}
    rows = []
    for name, content in record["data"].items():
        role, _, path = name.partition(" ")
        counts = told.get((role.partition("[")[0], path), {})
        used = f"{counts['used']:,}" if "used" in counts else ""
        tokens = f"{counts['tokens']:,}" if counts.get("tokens") else ""
        content = content.partition("@")[2] or content
        rows.append(
            f"| {role} | {_cell(path)} | {_cell(counts.get('form', ''))} | {used} | {tokens} | `{content[:16]}` |"
        )
    if not rows:
        return ""
    return "\n".join(["## Data", "", "| | source | form | rows | tokens | hash |", "|---|---|---|---|---|---|", *rows])


def _training(record: dict[str, Any]) -> str:
    metrics, machine, versions = record["metrics"], record["machine"], record["versions"]
    settings = {k: v for k, v in (record.get("written") or {}).get("trainer", {}).items()}
    lines = [f"| {key} | {_cell(value)} |" for key, value in settings.items()]
    for section in ("adapter", "optimizer", "regularize"):
        if given := (record.get("written") or {}).get(section):
            lines.append(f"| {section} | {_cell(given)} |")
    table = "\n".join(["| setting | value |", "|---|---|", *lines]) if lines else ""
    facts = []
    if "steps" in metrics:
        facts.append(f"{metrics['steps']:,} steps")
    if metrics.get("tokens"):
        facts.append(f"{quantity(metrics['tokens'])} tokens")
    facts.append(f"{duration(record['wall_s'])} on {_machine(machine)}")
    if energy := metrics.get("energy"):
        carbon = f", {grams:.3g} g of CO2" if (grams := _co2_g(record)) is not None else ""
        facts.append(f"about {energy['wh']:.3g} Wh{carbon} ({energy['how']})")
    with_ = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "transformers", "trl", "peft") if name in versions
    )
    return "\n\n".join(part for part in ["## Training", table, f"{'; '.join(facts)}. {with_}."] if part)


def _co2_g(record: dict[str, Any]) -> float | None:
    """Grams, where the energy was measured and the recipe says what a kWh costs in carbon."""
    per_kwh, energy = (record.get("card") or {}).get("carbon_intensity"), record["metrics"].get("energy")
    return energy["wh"] / 1000 * per_kwh if per_kwh is not None and energy else None


def _machine(machine: dict[str, Any]) -> str:
    several = f"{machine['processes']} processes of " if machine.get("processes", 1) > 1 else ""
    if machine.get("device") == "cpu":
        return f"{several}{machine.get('cores')} CPU cores ({machine.get('machine')})"
    return several + ", ".join(machine.get("names") or [str(machine.get("device"))])


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return printable(text).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")

"""`hfpipe eval` and `hfpipe compare`: the probes put to any models, outside a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hfpipe import artifact
from hfpipe.apps.chat import load
from hfpipe.errors import UserError
from hfpipe.evaluation.compare import compare_answers, table
from hfpipe.evaluation.harness import HARNESS_FILE, run_harness
from hfpipe.evaluation.judges import find_judge
from hfpipe.evaluation.probes import TINYWORLD, load_probes, score_probes
from hfpipe.progress import printable, quiet_imports
from hfpipe.sections import Evaluate, Probe
from hfpipe.strict import build
from hfpipe.yaml_files import load_yaml


def read_probes(file: str | None) -> tuple[list[dict[str, Any]], int]:
    """Rows, and tokens of an answer at the most: of a recipe's probes.yaml, of a jsonl file, or tinyworld's."""
    rows, max_new_tokens = _read_probes(file)
    if not rows:
        raise UserError(f"{file}: no question in it.")
    return rows, max_new_tokens


def _read_probes(file: str | None) -> tuple[list[dict[str, Any]], int]:
    if file is None:
        return load_probes([Probe(path=TINYWORLD, limit=620)], TINYWORLD), 64
    if Path(file).suffix != ".yaml":
        return load_probes([Probe(path=file)], file), 256
    problems: list[str] = []
    section = build(Evaluate, load_yaml(Path(file)), f"{file}: ", problems)
    if section is None or problems:
        raise UserError("\n".join(problems))
    if not section.probes:
        raise UserError(f"{file}: no `probes` in it.")
    return load_probes(section.probes, f"{file}: probes"), section.max_new_tokens


def evaluate(source: str, probes: str | None, as_json: bool, tasks: list[str], **harness: Any) -> None:
    """Print the capabilities of one model, by probes or by tasks of lm-evaluation-harness.

    Of a stage's folder the harness's scores are kept, and stand in its run's scorecard from then on.
    """
    model, tokenizer = load(source)
    found: dict[str, Any] = {}
    if probes or not tasks:
        rows, max_new_tokens = read_probes(probes)
        found, _ = score_probes(model, tokenizer, rows, max_new_tokens)
    if tasks:
        scores = run_harness(model, tokenizer, tasks, **harness)
        found |= scores
        kept = Path(source).expanduser() / HARNESS_FILE
        if (kept.parent / artifact.STAGE_FILE).is_file():
            artifact.write_json(kept, {**(artifact.read_json(kept) or {}), **scores})
    if as_json:
        print(json.dumps({"model": source, "capabilities": found}, indent=2))
        return
    for name, score in found.items():
        kinds = ", ".join(f"{printable(kind)} {one['score']:.2f}" for kind, one in score["kinds"].items())
        print(
            f"{printable(name):<18}{score['score']:.2f}  {score['low']:.2f} to {score['high']:.2f}  n {score['n']:<5} {kinds}"
        )


def compare(
    first: str, second: str, probes: str | None, as_json: bool, shown: int, judge: str | None, judge_model: str
) -> None:
    """Print how the second model does against the first, and `shown` questions on which they differ.

    Without a judge the probes' checks decide.
    """
    rows, max_new_tokens = read_probes(probes)
    quiet_imports()
    decide = find_judge(judge, judge_model) if judge else None
    told = [score_probes(*load(source), rows, max_new_tokens)[1] for source in (first, second)]
    if decide:
        verdicts = decide(rows, *([row["answer"] for row in side] for side in told))
        for a, b, verdict in zip(*told, verdicts, strict=True):
            a["score"], b["score"] = 1 - verdict, verdict
    found = compare_answers(*told)
    if as_json:
        sides = [{**a, "other_answer": b["answer"], "other_score": b["score"]} for a, b in zip(*told, strict=True)]
        print(json.dumps({"first": first, "second": second, **found, "rows": sides}, indent=2, ensure_ascii=False))
        return
    print(f"{second} against {first}, the same {len(rows)} questions")
    print("\n".join(table(found)))
    apart = [(a, b) for a, b in zip(*told, strict=True) if a["score"] != b["score"]]
    for a, b in apart[:shown]:
        asked = a.get("prompt") or a["messages"][-1]["content"]
        print(f"\n{printable(a['capability'])}: {printable(asked)}")
        for name, row in ((first, a), (second, b)):
            print(f"  {'+' if row['score'] > 0.5 else '-'} {name}: {printable(' / '.join(row['turns'])[:200])}")

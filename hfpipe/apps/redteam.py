"""`hfpipe redteam`: attacks on a model, what got through, and rows that the next stage can learn from."""

from __future__ import annotations

import json
from pathlib import Path

from hfpipe import artifact
from hfpipe.apps.chat import check_takes_turns, load
from hfpipe.errors import UserError
from hfpipe.evaluation.probes import score_probes
from hfpipe.evaluation.redteam import HARMLESS, attack_rows, failures, summary


def redteam(source: str, *, size: int, out: Path | None, as_json: bool) -> None:
    """Print the share not refused, by kind; with `out` write the failures as OUT/dpo.jsonl and OUT/sft.jsonl."""
    if size < 1:
        raise UserError(f"--size {size}: expected 1 or more requests of a kind.")
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out}: no folder can be made there ({error.strerror}). Give another.") from None
    rows = list(attack_rows(size))
    model, tokenizer = load(source)
    check_takes_turns(source, tokenizer)
    _, told = score_probes(model, tokenizer, rows, max_new_tokens=64)
    found = summary(rows, [row["score"] for row in told])
    failed = list(failures(told))
    if out is not None:
        artifact.write_jsonl(out / "dpo.jsonl", failed)
        artifact.write_jsonl(out / "sft.jsonl", [{"messages": row["prompt"] + row["chosen"]} for row in failed])
    if as_json:
        print(json.dumps({"model": source, "kinds": found, "failures": failed}, indent=2, ensure_ascii=False))
        return
    print(f"{'':<18}{'not refused':>12}{'95% interval':>18}{'n':>6}")
    for kind, share in found.items():
        name = "look-alike refused" if kind == HARMLESS else kind.replace("_", " ")
        interval = f"{share['low']:.2f} to {share['high']:.2f}"
        print(f"{name:<18}{share['share']:>12.2f}{interval:>18}{share['n']:>6}")
    if out is not None:
        print(f"{len(failed)} failures as rows for the next stage: {out / 'dpo.jsonl'}, {out / 'sft.jsonl'}")

"""How much faster the probes are answered in batches than one by one: both in one run, alternating.

python benchmarks/batched_answers.py runs/tiny/sft [--rows 124] [--rounds 3]
"""

from __future__ import annotations

import argparse
import statistics
import time

from transformers import AutoModelForCausalLM, AutoTokenizer

from hfpipe.data import tinyworld
from hfpipe.evaluation.probes import ask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=124)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = list(tinyworld.rows("probes", "validation", size=options.rows))
    ratios = []
    for _ in range(options.rounds):
        began = time.perf_counter()
        together = ask(model, tokenizer, rows, 64)
        middle = time.perf_counter()
        alone = [ask(model, tokenizer, [row], 64)[0] for row in rows]
        ended = time.perf_counter()
        same = sum(a.raw == b.raw for a, b in zip(together, alone, strict=True))
        ratios.append((ended - middle) / (middle - began))
        print(
            f"batched {middle - began:.1f} s  one by one {ended - middle:.1f} s  ratio {ratios[-1]:.1f}  "
            f"same answers {same}/{len(rows)}"
        )
    print(f"median ratio {statistics.median(ratios):.1f}")


if __name__ == "__main__":
    main()

"""Random sequences of kill, corrupt, change and run on a very small recipe; the result always equals that of a clean run.

python -m tests.sequences FOLDER SEED COUNT
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from hfpipe.artifact import BEGUN_FILE, STAGE_FILE, read_record
from hfpipe.config import load_recipe
from hfpipe.errors import StageFailed
from hfpipe.pipeline import plan_run, run_recipe
from hfpipe.progress import Display
from hfpipe.run_folder import damage_at
from hfpipe.stages import stage_types

MODEL = "{model_type: llama, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}"
TRAINER = "{max_steps: 12, save_steps: 2, logging_steps: 5, per_device_train_batch_size: 2, learning_rate: 1.0e-2}"
RECIPE = {
    "pipeline": "name: nano\nstages: [tokenizer, pretrain, sft]\nevaluate: {samples: 1, max_new_tokens: 4}\n",
    "tokenizer": "stage: tokenizer\ntokenizer: {vocab_size: 300}\ndata: {train: [{path: DATA/text.jsonl}]}\n",
    "pretrain": f"stage: pretrain\nmodel: {{from: tokenizer, config: {MODEL}}}\n"
    "data: {max_length: 64, train: [{path: DATA/text.jsonl}], eval: [{path: DATA/text.jsonl}]}\n"
    f"optimizer: {{type: muon}}\ntrainer: {TRAINER}\n",
    "sft": "stage: sft\nmodel: {from: pretrain}\n"
    "data: {train: [{path: DATA/talks.jsonl}], eval: [{path: DATA/talks.jsonl}]}\n"
    "trainer: {...}\n".replace("{...}", TRAINER.replace("{", "{max_length: 64, packing: true, ")),
}
RATES = ("1.0e-2", "2.0e-2")


def write_data(folder: Path, variant: int) -> None:
    folder.mkdir(exist_ok=True)
    texts = [{"text": f"Number {n} comes before number {n + 1 + variant}."} for n in range(60)]
    talks = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"It is {n}."}] for n in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))


class Sequences:
    """One run's folder under random blows; `state` is the configuration and the data that it stands under now."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng, self.seed = folder, random.Random(seed), seed
        self.run, self.data, self.recipe = folder / "run", folder / "data", folder / "recipe"
        self.recipe.mkdir(parents=True)
        for name, text in RECIPE.items():
            (self.recipe / f"{name}.yaml").write_text(text.replace("DATA", str(self.data)))
        self.blows: list[str] = []
        self.state = {"data": 0, "pretrain": RATES[0], "sft": RATES[0]}
        self.clean: dict[str, dict[str, str]] = {}
        self.took = 2.0  # seconds of a run from nothing: kills fall anywhere in one, however fast the machine is
        self.counts = dict.fromkeys(("sequences", "runs", "kills", "corruptions", "changes", "resumed"), 0)

    def load(self):
        settings = [f"{stage}.trainer.learning_rate={self.state[stage]}" for stage in ("pretrain", "sft")]
        return load_recipe(self.recipe, stage_types(), settings)

    def finish(self, run: Path) -> None:
        self.counts["runs"] += 1
        run_recipe(self.load(), run, Display(io.StringIO()))

    def expected(self) -> dict[str, str]:
        """What a run from nothing leaves; made once for each state."""
        key = json.dumps(self.state)
        if key not in self.clean:
            run, began = self.folder / f"clean-{len(self.clean)}", time.monotonic()
            self.finish(run)
            self.took = time.monotonic() - began
            self.clean[key] = files_of(run)
            shutil.rmtree(run)
        return self.clean[key]

    # --- blows ---

    def kill(self) -> None:
        """A run with something to do whose child is killed at a random moment; it may be over before."""
        what = self.rng.choice(("pretrain", "sft"))
        self.state[what] = next(rate for rate in RATES if rate != self.state[what])
        self.blows.append(f"change and kill {what}")
        over = threading.Event()

        def killer() -> None:
            if over.wait(self.rng.random() * self.took):
                return
            for pid in newest_child(self.run):
                try:
                    os.kill(pid, signal.SIGKILL)
                    self.counts["kills"] += 1
                except ProcessLookupError:
                    pass

        thread = threading.Thread(target=killer)
        thread.start()
        try:
            self.finish(self.run)
        except StageFailed as error:
            if "SIGKILL" not in str(error):
                raise
        finally:
            over.set()
            thread.join()

    def corrupt(self) -> None:
        """A bit flipped in, half cut off, or the whole lost of a file that a run leaves or keeps for later."""
        made = [p for p in self.run.rglob("*") if p.is_file() and made_of_bits(p, self.run)]
        kept = [p for p in Path(os.environ["HFPIPE_CACHE"]).rglob("*") if p.is_file() and p.suffix != ".lock"]
        if not made + kept:
            return
        path = self.rng.choice(made * 3 + kept)
        content = bytearray(path.read_bytes())
        how = self.rng.choice(("flip", "cut", "lose"))
        if how == "lose" or not content:
            path.unlink()
        elif how == "cut":
            path.write_bytes(content[: len(content) // 2])
        else:
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
            path.write_bytes(content)
        self.counts["corruptions"] += 1
        self.blows.append(f"{how} {path.relative_to(self.folder)}")

    def change(self) -> None:
        what = self.rng.choice(("data", "pretrain", "sft"))
        self.state[what] = self.rng.choice((0, 1) if what == "data" else RATES)
        write_data(self.data, self.state["data"])
        self.counts["changes"] += 1
        self.blows.append(f"change {what}")

    def one(self) -> None:
        """A few blows, then a run to the end: the same bits as of a clean run, and nothing left to do."""
        self.blows = []
        for _ in range(self.rng.randint(1, 3)):
            self.rng.choice((self.kill, self.kill, self.corrupt, self.change))()
        self.finish(self.run)
        told = (self.seed, self.counts, self.blows, self.state)
        found, expected = files_of(self.run), self.expected()
        assert found == expected, (*told, [file for file in found | expected if found.get(file) != expected.get(file)])
        left = [(p.stage.name, p.status) for p in plan_run(self.load(), self.run)]
        assert {status for _, status in left} == {"done"}, (*told, left)
        assert all(self.is_of_other_settings(work) for work in self.run.glob("*.partial")), told
        self.counts["resumed"] += sum(
            json.loads((self.run / name / "stage.json").read_text())["metrics"]["resumed_from_step"] > 0
            for name in ("pretrain", "sft")
        )
        self.counts["sequences"] += 1
        if self.rng.random() < 0.3:
            shutil.rmtree(self.run)

    def is_of_other_settings(self, work: Path) -> bool:
        """Whether an unfinished attempt is not for the result that stands beside it; such a one may be kept."""
        begun = read_record(work / BEGUN_FILE) or read_record(work / STAGE_FILE)
        done = read_record(self.run / work.stem / STAGE_FILE)
        return begun is not None and begun["fingerprint"] != done["fingerprint"]


def made_of_bits(path: Path, run: Path) -> bool:
    """Files whose content counts: not logs, and not what only tells of a model."""
    inside = path.relative_to(run).parts
    told = ("README.md", "metrics.jsonl", "samples.jsonl", "run.json", ".lock")
    return inside[0] != "logs" and path.name not in told and not inside[0].endswith((".old", ".damaged"))


def newest_child(run: Path) -> list[int]:
    """The process that told something last."""
    files = sorted((run / "logs").glob("*.jsonl"), key=lambda p: p.stat().st_mtime_ns)
    for line in reversed(files[-1].read_text().splitlines() if files else []):
        if '"pid"' in line and line.endswith("}"):
            return [json.loads(line)["pid"]]
    return []


def files_of(run: Path) -> dict[str, str]:
    """The hash of every file that counts in every stage's folder."""
    found = {}
    for name in ("tokenizer", "pretrain", "sft"):
        assert damage_at(run / name) is None, name
        for file, entry in json.loads((run / name / "stage.json").read_text())["files"].items():
            found[f"{name}/{file}"] = entry["sha256"]
    return found


def main(folder: Path, seed: int, count: int) -> None:
    print(f"seed {seed}", flush=True)
    os.environ["HFPIPE_CACHE"] = str(folder / "cache")
    sequences, began = Sequences(folder, seed), time.monotonic()
    write_data(sequences.data, 0)
    for _ in range(count):
        sequences.one()
    print(json.dumps({**sequences.counts, "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

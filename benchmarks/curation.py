"""How long `hfpipe data prepare` takes and how much memory, with all of its filters, on texts of several sizes.

python benchmarks/curation.py [MB ...] [--real FOLDER] [--workers N] [--folder DIR]

Documents are sentences of `FOLDER/c4_demo.jsonl` (public text, not shipped; default: the folder HFPIPE_REAL_DATA) in a
new order, so that each has its own n-grams and real words; one in 50 repeats another but for its end. Without that file
they are drawn from the built-in generator's words. Memory: of all processes together, shared pages counted once (PSS).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from peak_memory import held

FILE_MB = 5
CURATE = """output_folder: {folder}/prepared
sources: [{{path: {folder}/corpus}}]
tokenizer: {tokenizer}
filters:
  - {{type: GopherQualityFilter, min_doc_words: 50}}
  - {{type: GopherRepetitionFilter}}
  - {{type: C4QualityFilter}}
  - {{type: FineWebQualityFilter}}
  - {{type: LanguageFilter, languages: [en]}}
mask_personal: true
executor: {{type: local, tasks: {tasks}, workers: {workers}}}
"""


def sentences(real: Path | None) -> list[str]:
    if real and (real / "c4_demo.jsonl").is_file():
        texts = [json.loads(line)["text"] for line in (real / "c4_demo.jsonl").open(encoding="utf-8")]
    else:
        from hfpipe.data import tinyworld

        texts = [row["text"] for row in tinyworld.rows("pretrain", "train", 0, 5000)]
    found = (sentence for text in texts for sentence in re.findall(r"[A-Z][^.!?\n]{30,300}[.!?]", text))
    return list(dict.fromkeys(found))


def write_corpus(folder: Path, megabytes: int, known: list[str]) -> int:
    """Files of 5 MB; returns the number of documents."""
    rng, kept, count = random.Random(0), [], 0
    folder.mkdir(parents=True)
    for number in range(max(megabytes // FILE_MB, 1)):
        size = 0
        with (folder / f"{number:04d}.jsonl").open("w", encoding="utf-8") as file:
            while size < FILE_MB * 1_000_000:
                paragraphs = [" ".join(rng.sample(known, rng.randint(3, 6))) for _ in range(rng.randint(2, 6))]
                text = "\n".join(paragraphs)
                if count % 50 == 49:
                    text = f"{rng.choice(kept)} Once more, with the end of another."
                elif len(kept) < 1000:
                    kept.append(text)
                size += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                count += 1
    return count


def make_tokenizer(folder: Path, known: list[str]) -> None:
    from hfpipe.training.templates import load_chat_template
    from hfpipe.training.tokenizers import train_tokenizer

    options = {"type": "bpe", "vocab_size": 8192, "min_frequency": 2, "chat_template": load_chat_template("hfpipe")}
    train_tokenizer(iter(known), **options).save_pretrained(str(folder))


def cpu_seconds(process: psutil.Process) -> dict[int, float]:
    """Of the process and its children by their ids, so far."""
    found = {}
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            found[one.pid] = sum(one.cpu_times()[:2])
    return found


def measure(folder: Path, megabytes: int, known: list[str], tokenizer: Path, workers: int) -> None:
    documents = write_corpus(folder / "corpus", megabytes, known)
    file = folder / "curate.yaml"
    tasks = max(megabytes // FILE_MB, workers)
    file.write_text(CURATE.format(folder=folder, tokenizer=tokenizer, tasks=tasks, workers=workers))
    began, peak, spent = time.monotonic(), 0, {}
    command = [sys.executable, "-m", "hfpipe", "data", "prepare", str(file), "--json"]
    with (folder / "printed").open("w") as printed, subprocess.Popen(command, stdout=printed) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, held(watched))
            spent |= cpu_seconds(watched)
            time.sleep(0.5)
    seconds = time.monotonic() - began
    assert process.returncode == 0
    summary = json.loads((folder / "prepared" / "_summary.json").read_text())
    train = summary["splits"]["train"]
    left_out = ", ".join(f"{item['documents']:,} {item['step']}" for item in summary["left_out"])
    print(
        f"{megabytes:>4} MB  {documents:>8,} documents  {seconds:6.1f} s  {sum(spent.values()):6.1f} CPU s  {peak / 2**20:6.0f} MiB at the most  "
        f"{train['documents']:,} of {train['tokens'] / 1e6:.1f}M tokens in train; left out: {left_out}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("megabytes", type=int, nargs="*", default=[25, 100, 200])
    parser.add_argument("--real", type=Path, default=os.environ.get("HFPIPE_REAL_DATA"), help="folder of c4_demo.jsonl")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="for what is made, in place of a temporary one")
    options = parser.parse_args()
    known = sentences(Path(options.real) if options.real else None)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        make_tokenizer(Path(scratch) / "tokenizer", known)
        for megabytes in options.megabytes:
            folder = Path(scratch) / str(megabytes)
            measure(folder, megabytes, known, Path(scratch) / "tokenizer", options.workers)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()

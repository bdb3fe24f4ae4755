"""tokenizer: subwords, control tokens and the chat template. Trained with `tokenizers` on the text of `data.train`.

accelerate launch -m hfpipe.stages.tokenizer stage_configs/tiny/tokenizer.yaml tokenizer.vocab_size=2048
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hfpipe.sections import Data, StageType, Tokenizer

if TYPE_CHECKING:
    from hfpipe.training.job import Job, Progress

TYPE = StageType(
    name="tokenizer",
    teaches="subwords, control tokens, the chat template",
    leaves="tokenizer",
    parents=(),
    sections={"tokenizer": Tokenizer, "data": Data},
    rows="text",
)


def train(job: Job, progress: Progress) -> dict[str, Any]:
    """Train the tokenizer and leave it in the job's working folder.

    Returns:
        `vocab_size`, and for the held-out text `bytes_per_token` and `lossless` (every document came back unchanged).
    """
    from hfpipe.training.templates import load_chat_template
    from hfpipe.training.tokenizers import train_tokenizer

    section = job.stage.sections["tokenizer"]
    progress.tell("doing", text=f"training {section.type} with {section.vocab_size} entries")
    tokenizer = train_tokenizer(
        _texts(job, "train", progress),
        type=section.type,
        vocab_size=section.vocab_size,
        min_frequency=section.min_frequency,
        chat_template=load_chat_template(section.chat_template),
    )
    tokenizer.save_pretrained(str(job.work))
    held_out = list(_texts(job, "eval", progress)) if job.stage.data.eval else []
    encoded = tokenizer(held_out, add_special_tokens=False)["input_ids"] if held_out else []
    metrics: dict[str, Any] = {"vocab_size": len(tokenizer)}
    if held_out:
        size = sum(len(text.encode()) for text in held_out)
        decoded = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in encoded]
        metrics["bytes_per_token"] = round(size / sum(map(len, encoded)), 3)
        metrics["lossless"] = decoded == held_out
    return metrics


def _texts(job: Job, role: str, progress: Progress) -> Iterator[str]:
    """The text of every row of every source, unweighted: a tokenizer sees what there is."""
    from hfpipe.data.report import SourceReport
    from hfpipe.training.prepare import read_source, refuse_bad_rows

    for source in getattr(job.stage.data, role):
        report = SourceReport.of(source, role)
        for _, row in read_source(source, report, wanted="text", job=job):
            report.used += 1
            yield row["text"]
        refuse_bad_rows(report, job, job.stage.data.max_bad_rows)
        progress.tell("data", text=report.line())


if __name__ == "__main__":
    from hfpipe.stages._run import main

    main(TYPE)

"""What a stage's first batch trains, looked at once: the share, the token that ends a turn, a row as the model sees it."""

from __future__ import annotations

import itertools
import shlex
from typing import TYPE_CHECKING, Any

from hfpipe.data.personal import mask
from hfpipe.errors import UserError
from hfpipe.progress import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hfpipe.training.job import Job, Progress

_LONGEST_CHARACTER = 4  # bytes, so tokens at the most
_SHOWN = 200  # tokens of the row that is shown
_TRAINED, _CONTEXT, _END = "\033[1;32m", "\033[2m", "\033[0m"


def check_first_batch(job: Job, tokenizer: PreTrainedTokenizerBase, batch: dict[str, Any], progress: Progress) -> None:
    """Tell what of a collated batch is trained, with a row decoded; pairs of a reward model have no mask to look at.

    Raises:
        UserError: nothing is, or in a conversation no token that ends a turn, so that the model would not learn to stop.
    """
    from hfpipe.training.templates import stop_token_ids

    ids, labels, mask = batch["input_ids"], batch.get("labels"), batch.get("completion_mask")
    if labels is None and mask is None:
        return
    trained = labels != -100 if labels is not None else mask.bool()
    real = batch["attention_mask"].bool() if "attention_mask" in batch else ids != tokenizer.pad_token_id
    share = (trained & real).sum().item() / max(real.sum().item(), 1)
    where = f"{job.stage.file}: the first batch of {len(ids)} rows"
    if not share:
        raise UserError(
            f"{where} trains nothing: no token in it has a label. hfpipe inspect {shlex.quote(str(job.stage.file))} shows rows."
        )
    context = real & ~trained
    context[:, 0] = False  # the first token of a document has none to be predicted from
    if "position_ids" in batch:
        context &= batch["position_ids"] != 0

    def sample(row: int) -> str:
        return _sample(tokenizer, ids[row][real[row]].tolist(), trained[row][real[row]].tolist())

    told = f"first batch: {len(ids)} rows, {real.sum().item():,} tokens, {share:.0%} trained"
    shown = 0
    talks = context.any(dim=1).nonzero().flatten().tolist()  # rows of text alone are trained whole
    if talks and job.stage.type.rows != "text":
        shown, stops = talks[0], stop_token_ids(tokenizer)
        ends = sum(ids == token for token in stops).bool() & trained
        silent = [row for row in talks if not ends[row].any()]
        if silent:
            names = ", ".join(tokenizer.convert_ids_to_tokens(stops))
            raise UserError(
                f"{where}: {len(silent)} of its {len(talks)} conversations train no token that ends a turn ({names}), so the "
                "model would not learn to stop. Put it inside {% generation %} in the chat template. One of them, trained "
                f"between ⟦ and ⟧: {sample(silent[0])}"
            )
        told += f", {ends.sum().item()} ends of turns among them"
    progress.note(f"{told}; trained between ⟦ and ⟧: {sample(shown)}")


def _sample(tokenizer: PreTrainedTokenizerBase, ids: list[int], trained: list[bool]) -> str:
    """The beginning of a row in one line, personal data masked: it stands in the log."""
    tokens = decode_tokens(tokenizer, ids[:_SHOWN], trained[:_SHOWN])
    return mask(coloured(tokens, colours=False)).replace("\n", "\\n") + (" ..." if len(ids) > _SHOWN else "")


def decode_tokens(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], trained: list[bool]
) -> list[tuple[str, int, bool]]:
    """Each token's text, id and whether it is trained; of several that make one character together the last has its text."""
    found, pending = [], []
    for place, (token, is_trained) in enumerate(zip(ids, trained, strict=True), 1):
        pending.append(token)
        text = tokenizer.decode(pending)
        goes_on = place < len(ids) and trained[place] == is_trained and len(pending) < _LONGEST_CHARACTER
        if text.endswith("\N{REPLACEMENT CHARACTER}") and goes_on:
            found.append(("", token, is_trained))
            continue
        found.append((text, token, is_trained))
        pending = []
    return found


def coloured(tokens: list[tuple[str, int, bool]], colours: bool) -> str:
    """The tokens' text: trained ones bold green and others dim, or without colours between ⟦ and ⟧."""
    parts = []
    for is_trained, group in itertools.groupby(tokens, key=lambda token: token[2]):
        text = printable("".join(token[0] for token in group))
        if colours:
            parts.append(f"{_TRAINED if is_trained else _CONTEXT}{text}{_END}")
        else:
            parts.append(f"⟦{text}⟧" if is_trained else text)
    return "".join(parts)

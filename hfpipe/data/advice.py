"""What of a source deserves attention: where it is, and what can be done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from hfpipe.data.profile import Profile, Seen
from hfpipe.data.report import listed

_SAME, _SAME_DROPPED, _NEAR, _REFUSALS = 0.01, 0.05, 0.05, 0.2  # shares of rows from which on it is told
_CUT, _STYLE = 0.03, 0.25  # where more answers than the latter end without a full stop, that is their style
_RARE, _UNEVEN = 0.01, 20  # a value's share, and how many times as frequent the commonest is
_BY_CHANCE = 0.03  # of held-out rows, that two sets of the closed world may share: three records of countries, say
_SHOWN = 3

TOPICS = {  # with what to do
    "unusable": "Rows that cannot be used: mend or remove them. More than data.max_bad_rows stop the stage before it trains.",
    "long": "Rows longer than the stage takes: they are left out, and count as rows that cannot be used. Raise the stage's "
    "limit, or shorten them.",
    "overlap": "Training rows that show what is held out, so that scores there say less than they seem to: remove them, or "
    "set `data.decontaminate: true` in the stage.",
    "same": "Rows that repeat an earlier one word for word: keep one of each.",
    "near": "Rows that are nearly the same as an earlier one: keep one of each, unless the repetition is meant.",
    "personal": "What looks like personal data or a secret: replace it before training; a model can say it again.",
    "control": "Control tokens and broken characters: those of the run's own tokenizer are made harmless, others are learnt "
    "as text. Remove what is left over from another format.",
    "refusals": "Many answers refuse: a model tuned on them refuses much that is harmless. Mix in answers that help.",
    "cut": "Answers that end in the middle of a sentence: cut off when they were made? Such a model stops short.",
    "one_sided": "Answers judged one by one that are all good, or all bad: nothing is learnt of the other kind. Add rows of "
    "it, here or in another source of the stage.",
    "uneven": "Columns with rare values: `balance: COLUMN` beside a source's path repeats their rows.",
}


class Finding(NamedTuple):
    topic: str  # a key of TOPICS
    text: str  # how many rows, and where


@dataclass(frozen=True, eq=False)
class Use:
    """A source where a recipe uses it, or a loose file: `stage` is empty there."""

    profile: Profile
    stage: str = ""
    role: str = ""  # train, eval, or empty
    max_length: int | None = None  # tokens
    max_bad_rows: float | None = None
    balance: str | None = None
    decontaminate: bool = False
    drops_repeats: bool = True  # of the same row; a source with splits of its own keeps them


def advice(use: Use) -> Iterator[Finding]:
    """What deserves attention. Of held-out rows only what cannot be used: they are not learnt from.

    tinyworld's sources are drawn from templates on purpose: that they repeat themselves is not told.
    """
    found, drawn = use.profile, use.profile.path.startswith("tinyworld/")
    yield from _unusable(use)
    if use.role == "eval":
        return
    if not use.decontaminate:
        for label, seen in found.overlaps.items():
            shown, total = len(found.shown[label]), found.held_out[label]
            if not (drawn and label.startswith("tinyworld/") and shown <= _BY_CHANCE * total):
                yield Finding(
                    "overlap", f"{_many(seen)} with {shown:,} of the {total:,} rows of {label}: {_pairs(seen)}"
                )
    for kind, seen in found.personal.items():
        yield Finding("personal", f"{kind} in {_many(seen)}: {_places(seen)}")
    for token, seen in sorted(found.control.items(), key=lambda item: -item[1].count)[:_SHOWN]:
        yield Finding("control", f"`{token}` in {_many(seen)}: {_places(seen)}")
    if found.answers and not drawn:
        yield from _answers(found)
    if len(found.labels) == 1:
        yield Finding("one_sided", f"all {found.rows:,} are {next(iter(found.labels))}")
    if not drawn:
        if found.exact.count >= max((_SAME_DROPPED if use.drops_repeats else _SAME) * found.rows, 1):
            kept = "" if use.drops_repeats else ", all of them trained on"
            yield Finding("same", f"{_many(found.exact)} of {found.rows:,}{kept}: {_pairs(found.exact)}")
        if found.near.count >= max(_NEAR * found.rows, 2):
            yield Finding("near", f"{_many(found.near)} of {found.rows:,}: {_pairs(found.near)}")
        if not use.balance:
            yield from _uneven(found)


def _unusable(use: Use) -> Iterator[Finding]:
    found = use.profile
    bad = sum(seen.count for seen in found.left_out.values())
    if found.left_out:
        reasons = (f"{seen.count:,} {reason} ({_places(seen)})" for reason, seen in found.left_out.items())
        yield Finding("unusable", ", ".join(reasons) + _stops(use, bad))
    long = found.longer_than(use.max_length) if use.max_length and found.kind != "text" else 0
    if long and (use.role != "eval" or _stops(use, bad + long)):
        about = "about " if found.estimated else ""
        yield Finding(
            "long",
            f"{about}{long:,} of {found.rows:,} are longer than {use.max_length} tokens{_stops(use, bad + long)}",
        )


def _stops(use: Use, bad: int) -> str:
    total = use.profile.rows + sum(seen.count for seen in use.profile.left_out.values())
    if use.max_bad_rows is None or bad <= use.max_bad_rows * total:
        return ""
    return f"; the stage would stop: more than its max_bad_rows {use.max_bad_rows:g}"


def _answers(found: Profile) -> Iterator[Finding]:
    if found.refusals >= _REFUSALS * found.answers:
        yield Finding("refusals", f"{found.refusals:,} of {found.answers:,}")
    if found.cut.count >= max(_CUT * found.answers, 3) and found.cut.count <= _STYLE * found.answers:
        yield Finding("cut", f"{found.cut.count:,} of {found.answers:,}: {_places(found.cut)}")


def _uneven(found: Profile) -> Iterator[Finding]:
    for name, values in found.columns.items():
        if not 2 <= len(values) <= 50 or sum(values.values()) < found.rows / 2:
            continue
        (top, most), (low, least) = values.most_common(1)[0], values.most_common()[-1]
        if least < _RARE * found.rows and most >= _UNEVEN * least:
            yield Finding("uneven", f"`{name}`: {most:,} rows of {top}, {least:,} of {low}")


def _many(seen: Seen) -> str:
    return "1 row" if seen.count == 1 else f"{seen.count:,} rows"


def _places(seen: Seen) -> str:
    return listed(seen.places, seen.count, _SHOWN)


def _pairs(seen: Seen) -> str:
    more = f" and {seen.count - _SHOWN:,} more" if seen.count > _SHOWN else ""
    return ", ".join(seen.places[:_SHOWN]) + more

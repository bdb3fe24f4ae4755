"""What of a source deserves attention: where it is, and what can be done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hfpipe.data.profile import Profile, Seen
from hfpipe.data.report import listed

_SAME, _NEAR, _REFUSALS, _CUT = 0.01, 0.05, 0.2, 0.03  # shares of rows from which on it is told
_RARE, _UNEVEN = 0.01, 20  # a value's share, and how many times as frequent the commonest is
_SHOWN = 3
_LOOKS_LIKE = {"e-mail": "an e-mail address", "phone": "a phone number", "key": "a key or token"}


@dataclass(frozen=True, eq=False)
class Use:
    """A source where a recipe uses it, or a loose file: `stage` is empty there."""

    profile: Profile
    stage: str = ""
    role: str = ""  # train or eval
    max_length: int | None = None  # tokens
    max_bad_rows: float | None = None
    balance: str | None = None
    decontaminates: bool = False
    drops_repeats: bool = True  # of the same row; a source with splits of its own keeps them

    @property
    def made(self) -> bool:
        """Whether it is drawn from templates on purpose, so that repetition says nothing."""
        return self.profile.path.startswith("tinyworld/")


def advice(use: Use) -> Iterator[str]:
    """One line for each thing that deserves attention, without the source's name."""
    found = use.profile
    yield from _unusable(use)
    if use.max_length and (long := found.longer_than(use.max_length)):
        about = f"about {long:,}" if found.estimated else f"{long:,}"
        cut = found.kind == "text"
        what = "they are cut into several" if cut else "they are left out: raise it, or shorten them"
        if not cut or long > found.rows / 2:
            yield f"{about} of {found.rows:,} rows are longer than {use.max_length} tokens, the stage's limit: {what}."
    if use.role != "eval":
        for label, seen in found.overlaps.items():
            yield _overlap(use, label, seen)
    if not use.made:
        yield from _repeats(use)
    for kind, seen in found.personal.items():
        yield f"{_rows(seen)} {_hold(seen)} what looks like {_LOOKS_LIKE[kind]}: {_at(seen)}. Replace it before training."
    for token, seen in sorted(found.control.items(), key=lambda item: -item[1].count)[:_SHOWN]:
        yield (
            f"{_rows(seen)} {_hold(seen)} `{token}`: {_at(seen)}. What the tokenizer has as a control token is made harmless, "
            "the rest is learnt as text: remove it if it is left over from another format."
        )
    if found.answers and found.refusals / found.answers >= _REFUSALS and use.role != "eval" and not use.made:
        yield f"{found.refusals / found.answers:.0%} of the answers refuse: a model tuned on them refuses much that is harmless."
    if found.answers and found.cut.count / found.answers >= _CUT:
        yield (
            f"{_rows(found.cut)} {_end(found.cut)} in the middle of a sentence: {_at(found.cut)}. Cut off when they were "
            "made? Such a model stops short."
        )
    if not use.balance and not use.made and use.role != "eval":
        yield from _uneven(found)


def _unusable(use: Use) -> Iterator[str]:
    found = use.profile
    bad = sum(seen.count for seen in found.left_out.values())
    for reason, seen in found.left_out.items():
        yield f"{_rows(seen)} cannot be used, {reason}: {_at(seen)}. Mend or remove {'it' if seen.count == 1 else 'them'}."
    if use.max_bad_rows is not None and bad > use.max_bad_rows * (found.rows + bad):
        share = bad / (found.rows + bad)
        yield (
            f"{share:.1%} of its rows cannot be used, more than data.max_bad_rows = {use.max_bad_rows:g} allows: "
            "the stage would stop before it trains."
        )


def _overlap(use: Use, label: str, seen: Seen) -> str:
    shown = len(use.profile.shown[label])
    done = (
        "`decontaminate: true` leaves them out of training."
        if use.decontaminates
        else "Scores there say less than they seem to. Set `data.decontaminate: true`, or remove them."
    )
    if not use.stage:
        done = "Scores there say less than they seem to: remove them."
    return f"{_rows(seen)} {'shows' if seen.count == 1 else 'show'} {shown:,} held-out rows of {label}: {_at(seen)}. {done}"


def _repeats(use: Use) -> Iterator[str]:
    found = use.profile
    if found.exact.count >= max(_SAME * found.rows, 1):
        done = "Training leaves out what is the same to the letter." if use.drops_repeats else "They are kept in training."
        yield f"{found.exact.count:,} rows repeat an earlier one word for word: {_at(found.exact)}. {done}"
    if found.near.count >= max(_NEAR * found.rows, 2):
        yield (
            f"{found.near.count:,} rows are nearly the same as an earlier one: {_at(found.near)}. Keep one of each, unless "
            "the repetition is meant."
        )


def _uneven(found: Profile) -> Iterator[str]:
    for name, values in found.columns.items():
        if not 2 <= len(values) <= 50 or sum(values.values()) < found.rows / 2:
            continue
        (top, most), (low, least) = values.most_common(1)[0], values.most_common()[-1]
        if least < _RARE * found.rows and most >= _UNEVEN * least:
            yield (
                f"column `{name}` is uneven: {most:,} rows of {top}, {least:,} of {low}. `balance: {name}` beside the "
                "source's path repeats the rare ones."
            )


def _rows(seen: Seen) -> str:
    return "1 row" if seen.count == 1 else f"{seen.count:,} rows"


def _hold(seen: Seen) -> str:
    return "holds" if seen.count == 1 else "hold"


def _end(seen: Seen) -> str:
    return "ends" if seen.count == 1 else "end"


def _at(seen: Seen) -> str:
    if any(mark in place for place in seen.places for mark in ("=", "~")):
        more = f" and {seen.count - _SHOWN:,} more" if seen.count > _SHOWN else ""
        return ", ".join(seen.places[:_SHOWN]) + more
    return listed(seen.places, seen.count, _SHOWN)

"""What became of a source's rows, for the person and for `stage.json`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hfpipe.sections import DEFAULT_SPLIT, Source

PLACES = 10  # rows named for each reason


@dataclass
class SourceReport:
    """What became of one source's rows; nothing is left out silently."""

    path: str
    role: str
    split: str
    form: str = ""
    read: int = 0
    used: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    cut: int = 0  # documents longer than a row, which go on in the next with positions from 0
    neutralised: int = 0
    reasoning_hidden: int = 0  # rows with reasoning that the chat template leaves out
    other_splits: int = 0
    duplicates: int = 0
    contaminated: int = 0  # rows left out because they show what is held out
    repeated: int = 0  # rows given again to balance a column; not in `used`, but in the tokens
    left_out: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)  # where the rows left out for each reason are
    examples: list[str] = field(default_factory=list)  # the first of them with what was found there
    taken: float = 1.0  # share of it that its weight admits
    phases: list[float] = field(default_factory=list)  # the same of each phase

    @classmethod
    def of(cls, source: Source, role: str) -> SourceReport:
        return cls(source.path, role, source.split or DEFAULT_SPLIT[role])

    def leave_out(self, place: str, reason: str) -> None:
        self.left_out[reason] += 1
        if len(places := self.places.setdefault(reason, [])) < PLACES:
            places.append(place)

    def line(self) -> str:
        """One line for a person: the form seen, rows used and not used, and why."""
        parts = [f"{self.path} [{self.split}]: {self.form}; {self.used:,} rows used"]
        if self.tokens:
            parts.append(f"{self.tokens:,} tokens")
        if 0 < self.trained_tokens != self.tokens:
            parts.append(f"{self.trained_tokens / max(self.tokens, 1):.0%} of them trained")
        if self.cut:
            parts.append(f"{self.cut:,} longer than a row cut into several")
        if self.other_splits:
            parts.append(f"{self.other_splits:,} in the other splits")
        if self.left_out:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.most_common())
            parts.append(f"{sum(self.left_out.values())} left out ({reasons})")
        if self.contaminated:
            parts.append(f"{self.contaminated} left out that show what is held out")
        if self.repeated:
            parts.append(f"{self.repeated:,} of rare values repeated")
        if self.duplicates:
            parts.append(f"{self.duplicates} duplicates left out")
        if self.neutralised:
            parts.append(f"{self.neutralised} control tokens neutralised")
        if self.reasoning_hidden:
            parts.append(f"reasoning_content of {self.reasoning_hidden:,} rows not shown by the chat template")
        if self.phases:
            shares = ", ".join(f"{share:.0%} in phase {number}" for number, share in enumerate(self.phases, 1))
            parts.append(f"{shares} of it taken")
        elif self.taken < 1:
            parts.append(f"{self.taken:.0%} of it taken at its weight")
        return ", ".join(parts)

    def reasons(self) -> str:
        """Why rows were left out and where they are, a line for each reason, and what the first ones hold."""
        lines = [
            f"{count} x {reason}: {listed(self.places[reason], count)}" for reason, count in self.left_out.most_common()
        ]
        lines += [f"for instance {example}" for example in self.examples]
        if self.contaminated:
            lines.append(f"{self.contaminated} x left out by data.decontaminate: it shows what is held out")
        others = f"{self.other_splits} are in other splits" if self.other_splits else ""
        return "\n  ".join([others if lines else f"None had a fault; {others}", *lines])


def listed(places: list[str], count: int, most: int = PLACES) -> str:
    """`rows.jsonl line 3, 7, 12`: a file is named once, and `most` rows of `count`."""
    shown, last = [], ""
    for place in places[:most]:
        start, _, number = place.rpartition(" ")
        shown.append(number if start == last else place)
        last = start
    return ", ".join(shown) + (f" and {count - most:,} more" if count > most else "")

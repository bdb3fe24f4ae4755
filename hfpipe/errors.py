"""What goes wrong by the user's hand, and how it is told."""

from __future__ import annotations

import contextlib
import difflib
import re
import sys
from collections.abc import Iterable
from numbers import Integral

_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{8,}|hf_(?:oauth|jwt)_[\w.-]{8,}|api_org_[A-Za-z0-9]{8,})")


def hide_tokens(text: str) -> str:
    """Text that may be shown or written: without the token in use, and without what looks like one of the Hub."""
    if "huggingface_hub" in sys.modules:  # else none was sent, so that no answer repeats it
        from huggingface_hub import get_token

        with contextlib.suppress(Exception):  # a login that has failed hides no other error
            text = text.replace(token, "hf_...") if (token := get_token()) else text
    return _TOKEN.sub("hf_...", text)


class _Told:
    """What a person is told in one message, in a notebook too; it may quote a recipe, and so a token that stands there."""

    def __str__(self) -> str:
        return hide_tokens(super().__str__())

    def _render_traceback_(self) -> list[str]:
        """IPython shows this in the place of a traceback."""
        return [f"hfpipe: {self}"]


class UserError(_Told, Exception):
    """Input at fault: one message (where, what was found, what was expected, what to do), exit code 2, no traceback."""


class NothingUsable(UserError):
    """A source of which no row can be used: empty, in no known form, or with a fault in every row."""


class ConfigErrors(UserError):
    """Every fault of a recipe at once, one line each."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        many = "" if len(problems) == 1 else f"{len(problems)} problems in the recipe:\n"
        super().__init__(many + "\n".join(problems))


class StageFailed(_Told, Exception):
    """A stage's process ended without its result: a fault of ours or of the machine, exit code 1."""


class Interrupted(_Told, KeyboardInterrupt):
    """Stopped by hand, exit code 130; what was done is on disk."""


def check_type(name: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """UserError where a value given in Python is of another kind; True and False are no numbers."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is Integral):
        raise UserError(f"{name} = {hide_tokens(repr(value))[:80]}: expected {expected}.")


def nearest(name: object, names: Iterable[str]) -> str:
    """`" Did you mean `x`?"` for the closest of `names`, or an empty string."""
    close = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.6)
    return f" Did you mean `{close[0]}`?" if close else ""

"""What should not be in training text, found by its shape: personal data, keys, control tokens, refusals."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[a-z0-9-]{1,63}\.){1,4}[a-z]{2,24}\b", re.IGNORECASE)
_NOBODYS = re.compile(  # RFC 2606, and what texts put in its place
    r"[@.](example([\w-]*\.(com|org|net|edu))?|test|invalid|(your|my)?-?(domain|company|website)\.com)$", re.IGNORECASE
)
PHONE = re.compile(
    r"(?<![\w.,/+-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]\d{2,8}){1,4}|\+\d{9,15}"
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}(?P<gap>[.-])\d{3}(?P=gap)\d{4})(?![\w/-]|[.,]\d)"
)
KEY = re.compile(
    r"(?<![A-Za-z0-9])(?:sk-(?:[a-z]+\d*-)*[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{22,}"
    r"|hf_[A-Za-z0-9]{30,}|(?:AKIA|ASIA)[0-9A-Z]{16}|xox[abprs]-[\w-]{10,}|AIza[\w-]{35}|glpat-[\w-]{20,}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,})"
    r"|-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----[A-Za-z0-9+/=\s\\]*(?:-----END [A-Z ]{0,20}PRIVATE KEY-----)?"
)
NAMED_KEY = re.compile(
    r"(?:api[_ -]?key|secret|token|passw(?:or)?d)\w*[\"']?\s{0,3}[:=]\s{0,3}[\"']?(?P<value>[A-Za-z0-9+/_-]{20,})",
    re.IGNORECASE,
)
CONTROL = re.compile(
    r"<\|[A-Za-z_][\w ]{0,30}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:unk|pad|bos|eos)>"
    r"|[\x00-\x08\x0b\x0c\x0e-\x1f\ufffd]"
)
REFUSES = re.compile(
    r"\b(can't|cannot|can not|won't|will not|am not able to|am unable to|'m unable to|'m not able to) "
    r"(help|do|assist|provide|fulfill|answer|comply|create|write|share|support)",
    re.IGNORECASE,
)
_NAMES_OF_KEYS = ("key", "secret", "token", "passw")  # one is in all that NAMED_KEY finds, which is slower to search
_KEPT = {"e-mail": 1, "phone": 2, "key": 3}  # characters of each that are shown


def find_personal(text: str) -> Iterator[tuple[str, int, int]]:
    """(kind, start, end) of what looks like an e-mail address, a phone number, or a key or token.

    Placeholders are not told: addresses at example.com and its like, numbers with the fictional 555.
    """
    if "@" in text:
        for found in EMAIL.finditer(text):
            if not _NOBODYS.search(found[0]):
                yield "e-mail", *found.span()
    for found in PHONE.finditer(text):
        digits = re.sub(r"\D", "", found[0])
        if 9 <= len(digits) <= 15 and "555" not in (digits[-7:-4], digits[-10:-7]):
            yield "phone", *found.span()
    for found in KEY.finditer(text):
        yield "key", *found.span()
    folded = text.casefold()
    for found in NAMED_KEY.finditer(text) if any(name in folded for name in _NAMES_OF_KEYS) else ():
        value = found["value"]
        if sum(c.isdigit() for c in value) >= 3 and any(c.isalpha() for c in value):
            yield "key", *found.span("value")


def mask(text: str) -> str:
    """The text with its personal data shortened to its kind and first characters: `[e-mail j…]`."""
    kept, at = [], 0
    for kind, start, end in sorted(find_personal(text), key=lambda found: (found[1], -found[2])):
        if start >= at:
            kept += [text[at:start], f"[{kind} {text[start : start + _KEPT[kind]]}…]"]
        at = max(at, end)
    return "".join([*kept, text[at:]])


def masked(value: Any) -> Any:
    """`mask` over every string of a JSON value, keys included."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, dict):
        return {masked(key): masked(item) for key, item in value.items()}
    return [masked(item) for item in value] if isinstance(value, list | tuple) else value

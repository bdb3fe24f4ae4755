"""An OpenAI-compatible endpoint, asked for chat completions with the standard library; the key is read from OPENAI_API_KEY."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from typing import Any

from hfpipe.errors import UserError

_TRIES = 5
_LONGEST_WAIT_S = 60.0
_TIMEOUT_S = 300


class Refused(UserError):
    """This one question is refused, as too long or not allowed; another one may not be."""


def complete(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to `POST URL/chat/completions`; passing faults (429, 5xx, no connection) are waited for, as long as told.

    Raises:
        Refused: 400, 413 or 422.
        UserError: the endpoint refuses in another way, or gave no completion in five tries.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY", "").strip():
        if not (key.isascii() and key.isprintable()):
            raise UserError(
                "OPENAI_API_KEY holds characters that no key has: control characters, or others than ASCII."
            )
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
    for number in range(_TRIES):
        wait = 2.0**number
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
                answer = json.load(response)
            if isinstance(answer["choices"][0]["message"], dict):
                return {**answer, "usage": _counted(answer.get("usage"))}
            reason = "a completion without a message"
        except urllib.error.HTTPError as error:
            reason = f"{error} {error.read(500).decode(errors='replace')}".strip()
            if error.code in (400, 413, 422):
                raise Refused(f"endpoint {url}: {_without(key, reason)}") from None
            if 400 <= error.code < 500 and error.code not in (408, 429):
                break
            told = error.headers.get("Retry-After", "")
            wait = float(told) if told.isdigit() else wait
        except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
        if number + 1 < _TRIES:
            time.sleep(min(wait, _LONGEST_WAIT_S))
    raise UserError(f"endpoint {url}: no completion: {_without(key, reason)}")


def _counted(usage: Any) -> dict[str, int]:
    """The tokens that an answer says it took, 0 where that is no count."""
    told = usage if isinstance(usage, dict) else {}
    counts = {key: told.get(key) for key in ("prompt_tokens", "completion_tokens")}
    return {key: n if isinstance(n, int) and 0 <= n < 2**53 else 0 for key, n in counts.items()}


def _without(key: str, text: str) -> str:
    return text.replace(key, "...") if key else text


def said(answer: dict[str, Any]) -> str:
    """The words of a completion."""
    return str(answer["choices"][0]["message"].get("content") or "")

"""Where things are: shipped recipes and templates (in a checkout or a wheel), the cache, a run's folders."""

from __future__ import annotations

import os
from pathlib import Path

from hfpipe.errors import UserError

_PACKAGE = Path(__file__).parent


def _shipped(name: str) -> Path:
    """A folder beside the package in a checkout, inside it in an installed wheel."""
    packaged = _PACKAGE / name
    return packaged if packaged.is_dir() else _PACKAGE.parent / name


def stage_configs_dir() -> Path:
    return _shipped("stage_configs")


def chat_templates_dir() -> Path:
    return _shipped("chat_templates")


def cache_dir() -> Path:
    """Prepared data and hashes; safe to delete. `HFPIPE_CACHE` moves it. UserError where it cannot be written."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hfpipe"
    folder = Path(os.environ.get("HFPIPE_CACHE", default))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK | os.X_OK) else "no right to write"
    except OSError as error:
        reason = error.strerror
    if reason:
        raise UserError(
            f"{folder}: no folder for prepared data can be made or written there ({reason}). Set HFPIPE_CACHE to another."
        )
    return folder


def place_fault(path: str) -> str | None:
    """Why nothing can be looked up at a path: too long, in the home of nobody, behind a closed folder, empty."""
    try:
        Path(path).expanduser().exists()
    except (OSError, RuntimeError) as error:
        return str(getattr(error, "strerror", None) or error).rstrip(".")
    return None if path.strip() else "it is empty"

"""Fields of a section with bounds that hfpipe/strict.py holds."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def at_least(minimum: float, default: Any, at_most: float | None = None) -> Any:
    """A field whose value may not lie below `minimum` or above `at_most`."""
    return field(default=default, metadata={"at_least": minimum, "at_most": at_most})


def above(limit: float, default: Any, at_most: float | None = None) -> Any:
    """A field whose value must lie above `limit`, and not above `at_most`."""
    return field(default=default, metadata={"above": limit, "at_most": at_most})

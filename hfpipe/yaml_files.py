"""YAML 1.2 files: duplicate keys are refused, `1e-4` is a number, `no` is a word."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from hfpipe.errors import UserError


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file; UserError with the place of what is wrong."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        text = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = YAML(typ="safe", pure=True).load(text)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, expected a YAML file. Name the file in it.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte {error.start}. Save it as UTF-8.") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = (error.problem or error.context or "malformed").splitlines()[0]
        raise UserError(f"{path}{place}: not readable as YAML: {problem}. Mend that line.") from None
    except YAMLError as error:
        raise UserError(f"{path}: not readable as YAML: {str(error).splitlines()[0]}.") from None
    except RecursionError:
        raise UserError(f"{path}: not readable as YAML: brackets stand too deep in each other.") from None
    except ValueError as error:  # what is made of 2026-13-45
        raise UserError(f"{path}: a value looks like a date and is none ({error}). Put it in quotes.") from None
    try:
        value = _unshared(value)
    except RecursionError:
        raise UserError(f"{path}: an alias (*name) stands inside what it names. Write the section out.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(value).__name__}.")
    return value


def _unshared(value: Any) -> Any:
    """A copy in which what several aliases name stands several times, so that an override changes one place."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unshared(item) for item in value]
    return value


def parse_value(text: str) -> Any:
    """The YAML value of an override's right-hand side."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError):
        raise UserError(f"--set: {text[:80]!r} is not readable as a YAML value.") from None

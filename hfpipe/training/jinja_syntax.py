"""Whether a chat template can be read at all, before a tokenizer is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfpipe.errors import UserError


def check_syntax(template: str, path: Path) -> None:
    """UserError, with the line, where the text of `path` is no Jinja."""
    from jinja2 import Environment, TemplateSyntaxError
    from jinja2.ext import Extension

    class Generation(Extension):
        """transformers' tag around what the assistant says."""

        tags = frozenset(("generation",))

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        Environment(extensions=["jinja2.ext.loopcontrols", Generation]).parse(template)
    except TemplateSyntaxError as error:
        raise UserError(f"{path} line {error.lineno}: not readable as Jinja: {error.message}") from None

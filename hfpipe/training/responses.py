"""How upstream's `parse_response` reads the answers of our chat templates: saved with the tokenizer, as `response_template`."""

from __future__ import annotations

from typing import Any

# A call ends where the next one opens, or with the turn. A string's arguments are text, unless they are JSON.
HFPIPE: dict[str, Any] = {
    "defaults": {"role": "assistant", "content": ""},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open_pattern": r"<\|tool_call\|>(?P<name>[^(<]+)\(",
            "close_pattern": r"\)(<\|end_tool_call\|>|(?=<\|tool_call\|>))",
            "repeats": True,
            "content": "json",
            "content_args": {"allow_non_json": True, "strip": False},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {
            "close_pattern": r"<\|end_assistant\|>(<\|end\|>)?",
            "content": "text",
            "content_args": {"strip": False},
        },
    },
}
CHATML: dict[str, Any] = {
    "defaults": {"role": "assistant", "content": ""},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\n?<tool_call>\n",
            "close_pattern": r"\n</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\n?", "content": "text", "content_args": {"strip": False}},
    },
}

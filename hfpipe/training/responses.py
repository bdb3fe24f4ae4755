"""How upstream's `parse_response` reads the answers of our chat templates: saved with the tokenizer, as `response_template`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


def parse_message(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], ids: list[int], tools: list[dict[str, Any]] | None
) -> dict[str, Any]:
    """The assistant's message that token ids say after `prompt`, tool calls parsed by upstream where the tokenizer knows how."""
    try:
        if getattr(tokenizer, "response_template", None) is not None:
            return tokenizer.parse_response(ids, prefix=prompt, tools=tools)
    except (ValueError, KeyError, TypeError):
        pass  # not a message of this format
    return {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}

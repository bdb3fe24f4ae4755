"""Chat templates: rows to token ids with the assistant's mask, and control tokens in data made harmless."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hfpipe.errors import UserError, nearest
from hfpipe.paths import chat_templates_dir
from hfpipe.training import responses
from hfpipe.training.jinja_syntax import check_syntax
from hfpipe.training.offsets import whole_offsets
from hfpipe.training.turn_weights import weigh_turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# The columns of a row that reach a model; others (an answer to compare with, a kind) ride along untouched.
COLUMNS = ("text", "messages", "prompt", "chosen", "rejected", "completion", "tools")

BATCH = 1000  # conversations encoded at once; their character offsets are held meanwhile

# Where generation stops in models of our own format.
OUR_STOPS = ("<|end_assistant|>", "<|end_tool_call|>", "<|end|>")


class Encoded(NamedTuple):
    """A conversation as tokens; `mask` has one 0 or 1 per token, 1 where the token is trained."""

    input_ids: list[int]
    mask: list[int]


class EncodedPreference(NamedTuple):
    """A preference as token ids; `chosen_ids` and `rejected_ids` follow `prompt_ids`.

    The ends are what the template writes after them, where the conversation is over: none of it is trained.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_end: list[int]
    rejected_end: list[int]


def load_chat_template(name_or_path: str) -> str:
    """The Jinja text of a shipped template (`hfpipe`, `chatml`) or of a .jinja file; UserError for none, or a faulty one."""
    path = Path(name_or_path)
    if path.suffix != ".jinja":
        path = chat_templates_dir() / f"{name_or_path}.jinja"
    if not path.is_file():
        names = sorted(file.stem for file in chat_templates_dir().glob("*.jinja"))
        raise UserError(
            f"No chat template `{name_or_path}`: expected one of {', '.join(names)} or the path of a .jinja file."
            + nearest(name_or_path, names)
        )
    text = path.read_text(encoding="utf-8")
    check_syntax(text, path)
    return text


def set_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> None:
    """Store `chat_template` (Jinja text) with the tokenizer and, for the shipped ones, how to parse an answer."""
    tokenizer.chat_template = chat_template
    if _is_ours(chat_template):
        tokenizer.response_template = responses.HFPIPE
    elif chat_template == load_chat_template("chatml"):
        tokenizer.response_template = responses.CHATML


def render_example(folder: Path) -> str | None:
    """A short conversation in the template of the tokenizer in a folder; None where it has none, or one that refuses it."""
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    talk = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "2+2 equals 4."}]
    try:
        return str(tokenizer.apply_chat_template(talk, tokenize=False)) if tokenizer.chat_template else None
    except TemplateError:
        return None


def training_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's template with `{% generation %}` marks: its own, or the variant that TRL keeps for it."""
    if tokenizer.chat_template is None:
        raise UserError(
            "The tokenizer has no chat template. Give the stage one as `tokenizer.chat_template`: chatml, hfpipe or "
            "the path of a .jinja file."
        )
    template = tokenizer.get_chat_template()
    if re.search(r"\{%-?\s*generation\s*-?%\}", template):
        return template
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer) or template
    except ValueError as error:
        raise UserError(
            "The tokenizer's chat template does not mark what the assistant says, and TRL knows no variant of it that "
            "does. Copy the template to a .jinja file, put {% generation %} and {% endgeneration %} around what the "
            "assistant says with the token that closes its turn, and give that file as `tokenizer.chat_template`."
        ) from error


def _is_ours(chat_template: str) -> bool:
    return all(token in chat_template for token in OUR_STOPS)


def turn_end_token(tokenizer: PreTrainedTokenizerFast) -> str:
    """The token that closes an assistant's turn: the last special one that the mask trains."""
    probe = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    encoded = encode_messages(tokenizer, probe)
    added = tokenizer.get_added_vocab().values()
    ends = [token for token, trained in zip(*encoded, strict=True) if trained and token in added]
    if not ends:
        raise UserError(
            "The chat template closes the assistant's turn with no special token, or outside {% generation %}: nothing "
            "would teach the model to stop."
        )
    return tokenizer.convert_ids_to_tokens(ends[-1])


def stop_token_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids at which generation stops, for `generation_config.eos_token_id`.

    Our own format: the end of an answer, of a tool call and of the conversation. Others: the token that closes the
    assistant's turn, and eos. A tokenizer without a template: eos.
    """
    if tokenizer.chat_template is None:
        return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if _is_ours(tokenizer.get_chat_template()):
        return tokenizer.convert_tokens_to_ids(list(OUR_STOPS))
    ids = [tokenizer.convert_tokens_to_ids(turn_end_token(tokenizer)), tokenizer.eos_token_id]
    return [token for token in dict.fromkeys(ids) if token is not None]


def special_strings(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The strings that data must not contain: special tokens, and added ones that the chat template writes.

    Other added tokens (runs of spaces, HTML tags in some vocabularies) are ordinary text.
    """
    template = tokenizer.get_chat_template() if tokenizer.chat_template is not None else ""
    return special_among(tokenizer.added_tokens_decoder.values(), template)


def special_among(tokens: Iterable[Any], template: str) -> tuple[str, ...]:
    """The same for `AddedToken`s and the text of a template."""
    return tuple(t.content for t in tokens if len(t.content.strip()) > 1 and (t.special or t.content in template))


def neutralise(text: str, tokens: Iterable[str]) -> tuple[str, int]:
    """Put one space after the first character of every one of `tokens` in `text`; the new text and how many were found.

    `<|user|>` becomes `< |user|>`: still legible, no longer a token. Repeated until none is left.
    """
    pattern, total = _pattern(tuple(tokens)), 0
    while True:
        text, found = pattern.subn(_break, text)
        if not found:
            return text, total
        total += found


@lru_cache
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _break(match: re.Match[str]) -> str:
    token = match[0]
    first = len(token) - len(token.lstrip()) + 1
    return f"{token[:first]} {token[first:]}"


def neutralise_row(row: dict[str, Any], tokens: Iterable[str]) -> tuple[dict[str, Any], int]:
    """`neutralise` over every string, keys included, in the columns of a row that reach a model."""
    tokens, total = tuple(tokens), 0

    def clean(value: Any) -> Any:
        nonlocal total
        if isinstance(value, str):
            value, found = neutralise(value, tokens)
            total += found
            return value
        if isinstance(value, dict):
            return {clean(key): clean(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item) for item in value]
        return value

    cleaned = {name: clean(value) if name in COLUMNS else value for name, value in row.items()}
    return cleaned, total


def encode_messages(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
) -> Encoded:
    """Encode one conversation; see `encode_batch`."""
    return encode_batch(tokenizer, [{"messages": messages, "tools": tools}])[0]


def encode_batch(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> list[Encoded]:
    """Encode the `messages` (and `tools`) of `rows`, with upstream's mask of what the assistant says.

    A turn of the assistant whose `weight` is 0 is left out of the mask. Raises UserError, with the row's number, where
    the template refuses a row.
    """
    encoded = _apply_template(tokenizer, rows, "messages", return_assistant_tokens_mask=True)
    return [
        Encoded(row["input_ids"], weigh_turns(row["assistant_masks"], rows[number]["messages"], number))
        for number, row in enumerate(encoded)
    ]


def hides_reasoning(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
) -> bool:
    """Whether the template leaves out the `reasoning_content` of some message."""
    marks = {place: f"reasoning-of-{place}." for place, said in enumerate(messages) if said.get("reasoning_content")}
    if not marks:
        return False
    marked = [said | {"reasoning_content": marks[n]} if n in marks else said for n, said in enumerate(messages)]
    template = training_template(tokenizer)
    text = tokenizer.apply_chat_template(marked, tools=tools or None, chat_template=template, tokenize=False)
    return any(mark not in text for mark in marks.values())


def encode_prompts(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> list[list[int]]:
    """Encode the `prompt` (and `tools`) of `rows`, ending with the opening of the assistant's turn."""
    return [row["input_ids"] for row in _apply_template(tokenizer, rows, "prompt", add_generation_prompt=True)]


def encode_preference(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> EncodedPreference:
    """Encode one preference; see `encode_preferences`."""
    return encode_preferences(tokenizer, [row])[0]


def encode_preferences(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> list[EncodedPreference]:
    """Encode the `prompt`, `chosen` and `rejected` of `rows`.

    The prompt ends with the opening of the assistant's turn; chosen and rejected go from there to the token that
    closes it. Raises UserError where an answer's tokens do not begin with the prompt's.
    """
    prompts = encode_prompts(tokenizer, rows)
    chosen, rejected = (_encode_answers(tokenizer, rows, prompts, side) for side in ("chosen", "rejected"))
    return [
        EncodedPreference(prompt, better, worse, better_end, worse_end)
        for prompt, (better, better_end), (worse, worse_end) in zip(prompts, chosen, rejected, strict=True)
    ]


def encode_completions(
    tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], prompts: list[list[int]], column: str
) -> list[list[int]]:
    """Encode what follows `prompts` (from `encode_prompts`): `chosen`, `rejected` or `completion` of `rows`."""
    return [answer for answer, _ in _encode_answers(tokenizer, rows, prompts, column)]


def closing_ids(tokenizer: PreTrainedTokenizerFast) -> dict[int, list[int]]:
    """What the template writes after an answer that ends with a token, where the conversation is over."""
    rows = [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}]
    ((answer, rest),) = _encode_answers(tokenizer, rows, encode_prompts(tokenizer, rows), "completion")
    return {answer[-1]: rest}


def _encode_answers(
    tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], prompts: list[list[int]], column: str
) -> list[tuple[list[int], list[int]]]:
    """Each answer to its last trained token, and what the template writes after that."""
    whole = [{"messages": [*row["prompt"], *row[column]], "tools": row.get("tools")} for row in rows]
    completions = []
    for number, (prompt, (ids, mask)) in enumerate(zip(prompts, encode_batch(tokenizer, whole), strict=True)):
        if ids[: len(prompt)] != prompt:
            raise UserError(
                f"Row {number}: the tokens of prompt and `{column}` do not begin with those of the prompt alone. An "
                f"answer must start with an assistant's message, and not with a line break."
            )
        end = max((place + 1 for place, trained in enumerate(mask) if trained), default=0)
        if end <= len(prompt):
            raise UserError(f"Row {number}: `{column}` has no assistant's message to compare.")
        completions.append((ids[len(prompt) : end], ids[end:]))
    return completions


def _apply_template(
    tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], column: str, **options: Any
) -> list[dict[str, list[int]]]:
    """Upstream's encoding of each row, rendered by the training template; rows with equal tools share a batch."""
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} has no character offsets to read masks from: a fast tokenizer is needed."
        )
    options["chat_template"] = training_template(tokenizer)
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(json.dumps(row.get("tools") or None), []).append(number)
    encoded: list[dict[str, list[int]]] = [{}] * len(rows)
    for group in groups.values():
        for start in range(0, len(group), BATCH):
            numbers = group[start : start + BATCH]
            batch = _encode_conversations(tokenizer, rows, numbers, column, options)
            for place, number in enumerate(numbers):
                encoded[number] = {key: values[place] for key, values in batch.items()}
    return encoded


def _encode_conversations(
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, Any]],
    numbers: list[int],
    column: str,
    options: dict[str, Any],
) -> dict[str, list[list[int]]]:
    from jinja2 import TemplateError

    fewer = {"verbose": False, "return_attention_mask": False, "return_token_type_ids": False}
    tools = rows[numbers[0]].get("tools") or None
    try:
        with whole_offsets(tokenizer):
            return tokenizer.apply_chat_template(
                [rows[number][column] for number in numbers],
                tools=tools,
                return_dict=True,
                tokenizer_kwargs=fewer,
                **options,
            )
    except (TemplateError, TypeError, ValueError) as error:
        if len(numbers) == 1:
            raise UserError(f"Row {numbers[0]}: the chat template refuses it: {error}") from error
        for number in numbers:
            _encode_conversations(tokenizer, rows, [number], column, options)
        raise

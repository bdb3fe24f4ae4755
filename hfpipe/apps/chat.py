"""A chat in the terminal: answers appear as they are written, and the calculator works when the model calls it."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from numbers import Integral
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from hfpipe.adapter_types import ADAPTER_FILE
from hfpipe.artifact import model_fault
from hfpipe.errors import UserError, check_type
from hfpipe.evaluation.answers import MAX_CALLS, Answer, Question, carry_out, parse, positions, prompt_ids, stop_ids
from hfpipe.evaluation.tools import TOOLS
from hfpipe.hub_client import ask_anew, locate, tell_notes
from hfpipe.progress import printable, quiet_imports

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(source: str, head: str = "AutoModelForCausalLM") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer from a folder or from `org/model@revision`; UserError where there is none.

    `head` names transformers' class for it.
    """
    folder = Path(source).expanduser()
    is_folder = folder.exists()
    if is_folder and not any((folder / name).is_file() for name in ("config.json", ADAPTER_FILE)):
        inside = sorted(p.parent.name for p in folder.glob("*/config.json"))
        hint = f" It holds those of {', '.join(inside)}: name one, {source.rstrip('/')}/{inside[-1]}." if inside else ""
        raise UserError(f"{source} is not a model's folder: it has no config.json.{hint}")
    if is_folder and (fault := model_fault(folder, whole=True)):
        raise UserError(f"{source} is no model that can be loaded: {fault}. Fetch or save it again.")

    quiet_imports()
    import torch
    import transformers
    from safetensors import SafetensorError

    from hfpipe.training.adapters import load_pretrained

    try:
        ask_anew()
        folder = locate(source)
        tell_notes(lambda note: print(note, file=sys.stderr))
        with _no_bars() if is_folder else contextlib.nullcontext():
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
            model = load_pretrained(getattr(transformers, head), folder)
    except (UserError, OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" not in str(error):
            raise  # such as memory that runs out
        reason = str(error).splitlines()[0]
        raise UserError(f"{source}: no model there, neither in a folder nor to be had from the Hub: {reason}") from None
    scores = any(name.endswith("ForSequenceClassification") for name in model.config.architectures or ())
    if scores and head == "AutoModelForCausalLM":
        raise UserError(f"{source} is a reward model: it scores answers and gives none.")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device).eval(), tokenizer


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bar for what is on disk already; in a notebook the others go on."""
    from transformers.utils import logging as upstream

    shown = upstream.is_progress_bar_enabled()
    upstream.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            upstream.enable_progress_bar()


def check_takes_turns(source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model without a chat template."""
    if tokenizer.chat_template is None:
        raise UserError(f"{source} has no chat template: it takes no turns yet. A midtrain or sft stage gives it one.")


class Session:
    """One conversation. What the user types can't forge a turn: control tokens in it are made harmless."""

    def __init__(self, model: Any, tokenizer: Any, system: str | None = None, max_new_tokens: int = 256):
        from hfpipe.training.templates import special_strings

        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self._special = special_strings(tokenizer)
        self.messages: list[dict[str, Any]] = []
        check_type("system", system, (str, type(None)), "a text")
        check_type("max_new_tokens", max_new_tokens, Integral, "a number of tokens")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens = {max_new_tokens}: expected 1 or more.")
        if system:
            self.messages.append({"role": "system", "content": self._clean(system)})

    def say(self, text: str, write: Callable[[str], object] | None = None) -> Answer:
        """The answer to what the user says, piece by piece to `write`; tool calls are carried out on the way."""
        check_type("text", text, str, "a text, what the user says")
        write = write or (lambda piece: None)
        self.messages.append({"role": "user", "content": self._clean(text)})
        self._make_room()
        question, answer = Question(list(self.messages)), Answer()
        for number in range(MAX_CALLS + 1):
            prompt = prompt_ids(self.tokenizer, question, answer)
            ids = self._generate(prompt, write)
            message = parse(self.tokenizer, prompt, ids, question)
            answer.messages.append(message)
            answer.stopped = bool(ids) and ids[-1] in stop_ids(self.model)
            results = carry_out(message, TOOLS) if answer.stopped and number < MAX_CALLS else []
            for result in results:
                write(f" -> {result['content']}\n")
            answer.messages += results
            if not results:
                break
        self.messages += [
            {**m, **({"content": self._clean(m["content"])} if m.get("content") else {})} for m in answer.messages
        ]
        return answer

    def _make_room(self) -> None:
        """Forget the oldest turns where the talk and an answer are more than the model can read."""
        room = positions(self.model) - min(self.max_new_tokens, positions(self.model) // 2)
        while len(prompt_ids(self.tokenizer, Question(self.messages), Answer())) > room:
            users = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
            if len(users) < 2:
                self.messages.pop()
                raise UserError(
                    f"That is too long: this model reads and writes {positions(self.model)} tokens in all, of which "
                    f"{positions(self.model) - room} are kept for the answer (--max-new-tokens)."
                )
            del self.messages[users[0] : users[1]]

    def _generate(self, prompt: list[int], write: Callable[[str], object]) -> list[int]:
        import torch
        from transformers import TextStreamer

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                write(text)

        ids = torch.tensor([prompt], device=self.model.device)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(self.max_new_tokens, positions(self.model) - len(prompt)),
                do_sample=False,
                streamer=Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            )
        return output[0, len(prompt) :].tolist()

    def _clean(self, text: str) -> str:
        from hfpipe.training.templates import neutralise

        readable = text.encode(errors="replace").decode()  # bytes that are no UTF-8 come as halves of characters
        return neutralise(readable, self._special)[0]


def chat(source: str, *, prompt: str | None, system: str | None, as_json: bool, max_new_tokens: int) -> None:
    """One turn with `prompt`, else a conversation until the input ends; with `as_json` one JSON object a turn."""
    model, tokenizer = load(source)
    check_takes_turns(source, tokenizer)
    session = Session(model, tokenizer, system, max_new_tokens)

    def turn(text: str) -> None:
        before = len(session.messages)
        answer = session.say(text, None if as_json else _write)
        if as_json:
            print(json.dumps({"answer": answer.text, "stopped": answer.stopped, "messages": session.messages[before:]}))
        else:
            print("" if answer.stopped else f" [cut at {max_new_tokens} tokens]")

    if prompt is not None:
        return turn(prompt)
    asks = sys.stdin.isatty() and not as_json
    if hasattr(sys.stdin, "reconfigure"):  # a notebook's has it not
        sys.stdin.reconfigure(errors="surrogateescape")
    if asks:
        print(f"{source}: an empty line or Ctrl-D ends the chat.")
    while True:
        try:
            text = input("> " if asks else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if not text and asks:
            break
        if not text:
            continue
        try:
            turn(text)
        except UserError as error:  # this turn can't be answered, the next may be
            if as_json:
                raise
            print(f"hfpipe: {error}", file=sys.stderr)


def _write(piece: str) -> None:
    print(printable(piece), end="", flush=True)

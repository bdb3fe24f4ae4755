"""Texts that are token ids already: rows of `hfpipe data prepare`, encoded as `tokenizers.encode_text` does. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpipe import artifact
from hfpipe.errors import UserError
from hfpipe.training.templates import neutralise, special_among

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What `hfpipe data prepare` leaves beside its shards and their summary, and where it works on them until they are whole.
EXCLUDED, MADE, SCRATCH = "_excluded", "made", "scratch"
SHARD_COLUMN = "tokenizer_sha256"  # beside `text` and `input_ids`


def tokenizer_identity(backend: str, bos_token: str | None) -> str:
    """Hash of all that decides the ids of a text; `backend` is the content of tokenizer.json."""
    content = json.loads(backend)
    deciding = {key: content[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    return artifact.digest([deciding, bos_token])


def holds_ids(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> bool:
    """Whether a text's row holds its token ids.

    Raises:
        UserError: it does, by another tokenizer.
    """
    found = row.get(SHARD_COLUMN)
    if found is None:
        return False
    own = tokenizer_identity(tokenizer.backend_tokenizer.to_str(), tokenizer.bos_token)
    if found != own:
        raise UserError(
            f"{where}: its shards hold the ids of tokenizer {found[:12]}, and the stage trains with {own[:12]}. Prepare "
            "them with the stage's own: hfpipe data prepare FILE.yaml --tokenizer FOLDER"
        )
    return True


class TextEncoder:
    """A tokenizer's folder as a function: texts -> (texts with control tokens made harmless, their ids)."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer

        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"tokenizer: {folder} holds no tokenizer.json. Give the folder of a stage or a model.")
        try:
            self._backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the class that tokenizers raises
            raise UserError(f"tokenizer: {folder / 'tokenizer.json'} cannot be read: {error}. Make it anew.") from None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # spelt out in a text they are text
        config = artifact.read_json(folder / "tokenizer_config.json") or {}
        bos = config.get("bos_token")
        bos = bos["content"] if isinstance(bos, dict) else bos
        self._begin = [] if bos is None else [self._backend.token_to_id(bos)]
        if None in self._begin:
            raise UserError(f"tokenizer: {folder}: its bos_token {bos!r} is not in its tokenizer.json. Make it anew.")
        file = folder / "chat_template.jinja"
        template = file.read_text(encoding="utf-8") if file.is_file() else str(config.get("chat_template", ""))
        self._special = special_among(self._backend.get_added_tokens_decoder().values(), template)
        self.identity = tokenizer_identity(self._backend.to_str(), bos)

    def __call__(self, texts: list[str]) -> tuple[list[str], list[list[int]]]:
        clean = [neutralise(text, self._special)[0] for text in texts]
        encoded = self._backend.encode_batch_fast(clean, add_special_tokens=False)
        return clean, [self._begin + found.ids for found in encoded]

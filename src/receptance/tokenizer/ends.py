"""Which token of a BPE tokenizer ends a text, as far as its files tell."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from receptance.tokenizer.files import BPE_CONFIG, BPE_FILE

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
"""The text of the end-of-text token in the Pile tokenizer, and in those trained here."""
ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
"""The names that published tokenizers have for the token between two documents.

Names of tokens that end a turn of a chat, such as <|im_end|>, are left out: a document may have
many turns.
"""


def read_config(path: Path) -> dict[str, str]:
    """The fields end_of_text and eos_token of the tokenizer_config.json beside a tokenizer.json.

    The first one is our own, for a choice that is preferred to all usual names. ValueError when the
    file is no JSON.
    """
    file = path.with_name(BPE_CONFIG)
    if path.name != BPE_FILE or not file.is_file():
        return {}
    try:
        fields = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read as JSON: {str(error)[:200]}") from None
    found = {}
    for name in ("end_of_text", "eos_token"):
        token = fields.get(name) if isinstance(fields, dict) else None
        # transformers writes either the token's text or an object with it.
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text:
            found[name] = text
    return found


def write_config(directory: Path, end_of_text: str) -> str:
    """Write a tokenizer_config.json that names the end of text; its name."""
    said = {"end_of_text": end_of_text, "eos_token": end_of_text}
    (directory / BPE_CONFIG).write_text(json.dumps(said, indent=1), encoding="utf-8")
    return BPE_CONFIG


def present(library: tokenizers.Tokenizer, names: Iterable[str]) -> str | None:
    """The first of these names that a token has."""
    return next((name for name in names if library.token_to_id(name) is not None), None)


def only_special(spec: dict[str, Any]) -> str | None:
    """The special token of a file that has a single one, besides that for unknown text."""
    special = [token["content"] for token in spec["added_tokens"] if token["special"]]
    special = [name for name in special if name != spec["model"].get("unk_token")]
    return special[0] if len(special) == 1 else None

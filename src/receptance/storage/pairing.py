"""The tokenizer that belongs to a model's weights: found, checked and stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from receptance.config import ModelConfig
from receptance.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, stored_tokenizer
from receptance.tokenizer.files import PUBLISHED

# An embedding may have rows that its tokenizer leaves unused: World pads 65,530 ids to 65,536 rows,
# and other models round up to a multiple of 64 or 128. With more unused rows the tokenizer is taken
# for that of another vocabulary.
_MAX_UNUSED_ROWS = 128
# The entry in config.json of a model that was saved without a tokenizer.
_NO_TOKENIZER = {"kind": "none"}


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """ValueError if the tokenizer cannot be the one these weights were trained with."""
    if not _fits(tokenizer, config):
        raise ValueError(
            f"wrong tokenizer: {tokenizer.kind} has {tokenizer.vocab_size} ids and these weights "
            f"{config.vocab_size}; pass the tokenizer that the model was trained with"
        )


def chosen_tokenizer(
    directory: Path, config: ModelConfig, own: Tokenizer | None, given: Tokenizer | None
) -> Tokenizer | None:
    """The tokenizer that a directory holds, or the one given where it holds none.

    ValueError if the one given has other ids, or does not fit the model.
    """
    if own is None and given is not None:
        check_tokenizer(given, config)
    if own is None or given is None or given.same_as(own):
        return own or given
    raise ValueError(
        f"wrong tokenizer: {directory} holds the {own.kind} tokenizer that its model was trained "
        f"with, which is not the {given.kind} one given; leave out tokenizer="
    )


def stored_with(
    config: ModelConfig, directory: Path, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Save a model's tokenizer in its directory and return what `tokenizer_in` needs."""
    if tokenizer is None:
        return dict(_NO_TOKENIZER)
    check_tokenizer(tokenizer, config)
    files = tokenizer.save(directory)
    return {"kind": tokenizer.kind, "files": files, "fingerprint": tokenizer.fingerprint}


def tokenizer_in(directory: Path, about: Any) -> Tokenizer | None:
    """The tokenizer that `stored_with` put there; None if the model was saved without one.

    ValueError if it has changed since.
    """
    return None if about == _NO_TOKENIZER else stored_tokenizer(directory, about)


def found_tokenizer(
    file: Path | Callable[[], Tokenizer | None] | None, config: ModelConfig
) -> Tokenizer | None:
    """Load the tokenizer from the file found beside weights, or make the one inside theirs.

    Weights with 256 ids get the byte tokenizer if no file was found, or one that does not fit.
    """
    found = load_tokenizer(file) if isinstance(file, Path) else file and file()
    own = ByteTokenizer()
    if config.vocab_size == own.vocab_size and (found is None or not _fits(found, config)):
        return own
    return found


def _fits(tokenizer: Tokenizer, config: ModelConfig) -> bool:
    return 0 <= config.vocab_size - tokenizer.vocab_size < _MAX_UNUSED_ROWS


def no_tokenizer(config: ModelConfig, source: str | Path) -> ValueError:
    """The error to raise when text is needed and weights come without a tokenizer."""
    name = PUBLISHED.get(config.vocab_size, "its tokenizer file")
    return ValueError(
        f"no tokenizer beside {source}, which has a vocabulary of {config.vocab_size}; put {name} "
        "there or pass tokenizer=FILE"
    )

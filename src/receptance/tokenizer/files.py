"""The names of tokenizer files, and which of the files in a directory is the one to load."""

from __future__ import annotations

from pathlib import Path

BPE_FILE = "tokenizer.json"
"""The name under which a BPE tokenizer is saved, as transformers has it."""
BPE_CONFIG = "tokenizer_config.json"
"""The file in which transformers, and this package, say what the end of text is called."""
WORLD_FILE = "rwkv_vocab.txt"
"""The name under which a World vocabulary is saved."""

PILE_PUBLISHED = "20B_tokenizer.json"
"""The name under which the tokenizer of the Pile models is published."""
WORLD_PUBLISHED = "rwkv_vocab_v20230424.txt"
"""The name under which the vocabulary of the World models is published."""
PUBLISHED = {50277: PILE_PUBLISHED, 65536: WORLD_PUBLISHED}
"""The published tokenizer files by the rows of the embeddings that they go with."""

_BPE_NAMES = (BPE_FILE, PILE_PUBLISHED)
_WORLD_PATTERN = "rwkv_vocab*.txt"
PATTERNS = (*_BPE_NAMES, BPE_CONFIG, _WORLD_PATTERN)
"""Glob patterns of all files that a tokenizer beside weights can consist of."""


def find_tokenizer(directory: Path, vocab_size: int) -> Path | None:
    """The tokenizer file in a directory; of several, the one that goes with the vocabulary."""
    bpe = [directory / name for name in _BPE_NAMES]
    world = sorted(directory.glob(_WORLD_PATTERN))
    # The rows of the embedding may have been rounded up or down (see storage/pairing.py).
    nearest = min(PUBLISHED, key=lambda rows: abs(rows - vocab_size))
    is_world = PUBLISHED[nearest] == WORLD_PUBLISHED
    candidates = world + bpe if is_world else bpe + world
    return next((path for path in candidates if path.is_file()), None)


def only_tokenizer(directory: Path) -> Path:
    """The one tokenizer file in a directory; exact names are preferred to longer ones.

    FileNotFoundError when there is none, ValueError when several could be meant.
    """
    for patterns in ((BPE_FILE, WORLD_FILE), (_WORLD_PATTERN, "*tokenizer*.json")):
        found = sorted(path for pattern in patterns for path in directory.glob(pattern))
        found = [path for path in found if not path.name.endswith("_config.json")]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(f"{directory}: {names} are all tokenizers; name the one to load")
        if found:
            return found[0]
    raise FileNotFoundError(f"{directory}: no {BPE_FILE} and no {_WORLD_PATTERN} in it")

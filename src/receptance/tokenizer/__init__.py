"""Text to token ids and back: raw bytes, the World vocabulary and byte-level BPE, one interface.

Text is bytes here. A str stands for its UTF-8 encoding; a lone surrogate, which UTF-8 has no bytes
for, becomes the three bytes Python calls "surrogatepass", so that no str is refused and nothing is
lost. Whatever bytes go in, `decode_bytes` gives them back (BPE: as its normalizer left them).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from receptance.tokenizer.base import ByteTokenizer, StreamDecoder, Tokenizer
from receptance.tokenizer.bpe import BPETokenizer
from receptance.tokenizer.ends import END_OF_TEXT
from receptance.tokenizer.files import only_tokenizer
from receptance.tokenizer.world import WorldTokenizer

__all__ = [
    "END_OF_TEXT",
    "BPETokenizer",
    "ByteTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "WorldTokenizer",
    "load_tokenizer",
    "stored_tokenizer",
]


def load_tokenizer(source: str | Path, *, end_of_text: str | None = None) -> Tokenizer:
    """The tokenizer called "bytes", or of a World vocabulary or tokenizer.json, or of a directory.

    In a directory, tokenizer.json and rwkv_vocab.txt are preferred to longer names such as
    rwkv_vocab_v20230424.txt. `end_of_text` names the token that separates documents, for a
    tokenizer.json that does not tell (see BPETokenizer). FileNotFoundError when there is nothing;
    ValueError when there are two, or when the file is of neither kind, or damaged.
    """
    if source == "bytes":
        return _without_choice(ByteTokenizer(), end_of_text)
    path = Path(source)
    if path.is_dir():
        path = only_tokenizer(path)
    if not path.exists():
        raise FileNotFoundError(
            f'{path}: no such file; wanted is "bytes", a tokenizer file or a directory with one'
        )
    content = path.read_bytes()
    start = content.lstrip()[:1]
    if path.suffix == ".json" or start == b"{":
        return BPETokenizer.from_file(path, end_of_text=end_of_text)
    if path.suffix == ".txt" or start.isdigit():
        return _without_choice(WorldTokenizer(content, str(path)), end_of_text)
    raise ValueError(
        f"{path}: neither a World vocabulary (lines like `33 ' ' 1`) nor a tokenizer.json"
    )


def _without_choice(tokenizer: Tokenizer, end_of_text: str | None) -> Tokenizer:
    if end_of_text is not None:
        raise ValueError(
            f"end_of_text is {end_of_text!r}, but token 0 always ends a text of the "
            f"{tokenizer.kind} tokenizer; leave end_of_text out"
        )
    return tokenizer


def stored_tokenizer(folder: Path, about: Any) -> Tokenizer:
    """The tokenizer in a folder whose kind, files and fingerprint a JSON file there tells.

    ValueError if it is another one by now, or if that file says nothing sensible.
    """
    match about:
        case {"kind": "bytes", "fingerprint": str() as fingerprint}:
            tokenizer: Tokenizer = ByteTokenizer()
        case {"kind": str(), "files": [str() as name, *_], "fingerprint": str() as fingerprint}:
            # The JSON file came together with its folder and must not name files elsewhere.
            if name in ("", "..") or Path(name).name != name or not name.isprintable():
                raise ValueError(f"{folder} names the tokenizer {name[:80]!r}, no file beside it")
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name} is missing; it is the tokenizer")
            tokenizer = load_tokenizer(folder / name)
        case _:
            raise ValueError(f"{folder} does not say which tokenizer it holds; it is damaged")
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(f"{folder} holds another tokenizer than the one that was written there")
    return tokenizer

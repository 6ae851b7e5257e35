"""Text to token ids and back: raw bytes, the World vocabulary and byte-level BPE, one interface.

Text is bytes here. A str stands for its UTF-8 encoding; a lone surrogate, which UTF-8 has no bytes
for, becomes the three bytes Python calls "surrogatepass", so that no str is refused and nothing is
lost. Whatever bytes go in, `decode_bytes` gives them back (BPE: as its normalizer left them).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from receptance.tokenizer.base import ByteTokenizer, StreamDecoder, Tokenizer
from receptance.tokenizer.bpe import END_OF_TEXT, BPETokenizer
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


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer called "bytes", or of a World vocabulary or tokenizer.json, or of a directory.

    In a directory, tokenizer.json and rwkv_vocab.txt go before longer names such as
    rwkv_vocab_v20230424.txt. FileNotFoundError when there is nothing; ValueError when there are
    two, or when the file is of neither kind, or damaged.
    """
    if source == "bytes":
        return ByteTokenizer()
    path = Path(source)
    if path.is_dir():
        path = _find_in(path)
    if not path.exists():
        raise FileNotFoundError(
            f'{path}: no such file; wanted is "bytes", a tokenizer file or a directory with one'
        )
    content = path.read_bytes()
    start = content.lstrip()[:1]
    if path.suffix == ".json" or start == b"{":
        return BPETokenizer(content, str(path))
    if path.suffix == ".txt" or start.isdigit():
        return WorldTokenizer(content, str(path))
    raise ValueError(
        f"{path}: neither a World vocabulary (lines like `33 ' ' 1`) nor a tokenizer.json"
    )


def stored_tokenizer(folder: Path, about: Any) -> Tokenizer:
    """The tokenizer in a folder whose kind, files and fingerprint a JSON file there tells.

    ValueError if it is another one by now, or if that file says nothing sensible.
    """
    match about:
        case {"kind": "bytes", "fingerprint": str() as fingerprint}:
            tokenizer: Tokenizer = ByteTokenizer()
        case {"kind": str(), "files": [str() as name, *_], "fingerprint": str() as fingerprint}:
            # The files come together: none must reach for files elsewhere.
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


def _find_in(directory: Path) -> Path:
    """The one tokenizer file in a directory, exact names first."""
    for patterns in (
        ("tokenizer.json", "rwkv_vocab.txt"),
        ("rwkv_vocab*.txt", "*tokenizer*.json"),
    ):
        found = sorted(path for pattern in patterns for path in directory.glob(pattern))
        found = [path for path in found if not path.name.endswith("_config.json")]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(f"{directory}: {names} are all tokenizers; name the one to load")
        if found:
            return found[0]
    raise FileNotFoundError(f"{directory}: no tokenizer.json and no rwkv_vocab*.txt in it")

"""Byte-level BPE through the `tokenizers` library: the Pile's file, and ones trained here."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from receptance.tokenizer.base import LARGEST_ID, Tokenizer, to_bytes
from receptance.tokenizer.ends import (
    END_OF_TEXT,
    ENDS_OF_TEXT,
    only_special,
    present,
    read_config,
    write_config,
)
from receptance.tokenizer.files import BPE_FILE

if TYPE_CHECKING:
    import tokenizers


class BPETokenizer(Tokenizer):
    """Byte-level BPE from a `tokenizer.json` of the `tokenizers` library, with that library's ids.

    The file's normalizer is part of encoding: the Pile tokenizer's turns text into NFC, so only
    text that is NFC comes back byte for byte. Bytes that are not UTF-8 become base byte tokens;
    the Pile's file has none for the 13 that UTF-8 never uses (C0, C1, F5 ... FF), so those are
    refused. The text of an added token, such as "<|endoftext|>", encodes to that token.

    `end_of_text` is the text of the token that separates documents. Without it this is a token of
    a usual name ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"), else `eos_token`, which is
    what tokenizer_config.json says ends a text, else the only special token that the file has.
    """

    kind = "bpe"

    def __init__(
        self,
        content: bytes,
        name: str = BPE_FILE,
        *,
        end_of_text: str | None = None,
        eos_token: str | None = None,
    ) -> None:
        """From the JSON file's bytes.

        ValueError when they are damaged or not a byte-level BPE, and when no token is known to end
        a text.
        """
        self._library = _load_library(content, name)
        spec = json.loads(self._library.to_str())  # as the library understood the file
        if problem := _byte_level_problem(spec):
            raise ValueError(f"{name}: {problem}; wanted is the tokenizer.json of a byte-level BPE")
        tokens = _token_table(self._library, name)
        usual = present(self._library, ENDS_OF_TEXT)
        alone = usual or only_special(spec)
        if end_of_text is None:
            end_of_text = usual or present(self._library, [eos_token or ""]) or alone
        # What the file itself tells need not be stored beside it.
        self._chosen_end = None if end_of_text == alone else end_of_text
        choices = "" if self._chosen_end is None else f"\0end_of_text {self._chosen_end}"
        super().__init__(tokens, content, choices.encode())
        self.end_of_text = self._id_of_end(end_of_text, name)
        self._high_byte_ids = {
            token[0]: token_id
            for token_id, token in enumerate(self._tokens)
            if len(token) == 1 and token[0] >= 0x80
        }
        self._repeats_runs = _repeats_runs(spec) and max(map(len, self._tokens)) < _BLOCK

    @classmethod
    def from_file(cls, path: str | Path, *, end_of_text: str | None = None) -> BPETokenizer:
        """From a `tokenizer.json`, and the tokenizer_config.json beside it if there is one."""
        path = Path(path)
        said = read_config(path)
        if end_of_text is not None:
            said["end_of_text"] = end_of_text
        return cls(path.read_bytes(), str(path), **said)

    @classmethod
    def train(
        cls, documents: Iterable[str], vocab_size: int, *, min_frequency: int = 2
    ) -> BPETokenizer:
        """Learn merges: id 0 is "<|endoftext|>", then come the 256 bytes, then the merges.

        Stops at `vocab_size` ids, or when no pair is left that occurs `min_frequency` times. The
        same documents give the same file. ValueError for a vocab_size below 257.
        """
        if not 257 <= vocab_size < 1 << 31:
            raise ValueError(
                f"vocab_size is {vocab_size}; it must be at least 257, 256 bytes and "
                f"{END_OF_TEXT}, and less than 2**31"
            )
        if isinstance(documents, str):
            raise ValueError("documents is one str; give a list (or any iterable) of str")
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        library = Tokenizer(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(_byte_alphabet()),
            show_progress=False,
        )
        library.train_from_iterator(documents, trainer)
        return cls(library.to_str().encode("utf-8"))

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of a text. ValueError for a byte that is not UTF-8 and has no token."""
        decoded = to_bytes(text).decode("utf-8", errors="surrogateescape")
        # Even pieces are text; odd ones are the bytes that are not UTF-8, as U+DC80 ... U+DCFF.
        pieces = re.split(r"([\udc80-\udcff]+)", decoded)
        encoded = self._encode_distinct(list(dict.fromkeys(pieces[::2])))
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            if index % 2:
                ids += self._byte_ids(piece.encode("utf-8", errors="surrogateescape"))
            else:
                ids += encoded[piece]
        return ids

    def _byte_ids(self, data: bytes) -> list[int]:
        if lacking := set(data) - set(self._high_byte_ids):
            raise ValueError(
                f"byte 0x{min(lacking):02x} is not UTF-8 and has no token in this vocabulary; "
                'encode str, or bytes.decode("utf-8", errors="replace")'
            )
        return [self._high_byte_ids[byte] for byte in data]

    def save(self, directory: Path) -> list[str]:
        """Write tokenizer.json, the same bytes as were loaded.

        If the file alone does not tell which token ends a text, tokenizer_config.json does.
        """
        names = self._save_as(directory, BPE_FILE)
        if self._chosen_end is not None:
            names.append(write_config(directory, self._chosen_end))
        return names

    def _rules(self) -> object:
        spec = json.loads(self._library.to_str())
        return self.end_of_text, {part: spec.get(part) for part in _ENCODING_PARTS}

    def _id_of_end(self, end: str | None, name: str) -> int:
        """The id of the token that ends a text; ValueError if it is not known or not there."""
        if end is None:
            raise ValueError(
                f"{name}: none of its tokens is known to end a text; say which one does with "
                f"end_of_text, or as eos_token in a tokenizer_config.json beside it"
            )
        token_id = self._library.token_to_id(end)
        if token_id is None and (text := to_bytes(end)) in self._tokens:
            token_id = self._tokens.index(text)
        if token_id is None:
            raise ValueError(f"{name}: end_of_text is {end!r}, but it has no such token")
        return token_id

    def _encode_distinct(self, texts: list[str]) -> dict[str, list[int]]:
        encoded = {}
        for text in texts:
            if (ids := self._encode_long_runs(text)) is not None:
                encoded[text] = ids
        others = [text for text in texts if text not in encoded]
        encoded.update(zip(others, self._encode_with_library(others), strict=True))
        return encoded

    def _encode_with_library(self, texts: list[str]) -> list[list[int]]:
        # The batch call serves even for one text: it leaves out the offsets, which take half the
        # time.
        try:
            encodings = self._library.encode_batch_fast(texts, add_special_tokens=False)
        except BaseException as error:
            # The library gives up on a regular expression that backtracks too often with a panic
            # of Rust, which Python does not count as an Exception.
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(
                f"this tokenizer.json cuts text by a regular expression that failed ({error}); use "
                "a tokenizer without it"
            ) from None
        return [encoding.ids for encoding in encodings]

    def _encode_long_runs(self, text: str) -> list[int] | None:
        """The ids of a text with long runs of one character; None if it has none, or if unsure.

        The library takes seconds for a "word" of two million letters, so the runs are shortened
        and their ids repeated. This is exact because merges inside different tokens do not
        influence each other: BPE arrives at t₁ … tₙ if and only if it keeps each tᵢtᵢ₊₁, taken
        alone, apart. Hence, if the shortened run encodes as … P P …, with P whole characters, then
        … P P P … is the encoding of a run longer by one P: it contains no new pair.
        """
        if not self._repeats_runs or len(text) < _KEPT_BLOCKS * _BLOCK:
            return None
        shortened, runs = _shorten_runs(text)
        if not runs:
            return None
        encoding = self._library.encode(shortened, add_special_tokens=False)
        ids: list[int] = encoding.ids
        for run in reversed(runs):
            first, second, third = (
                encoding.char_to_token(run.end - blocks * _BLOCK) for blocks in (3, 2, 1)
            )
            period = ids[first:second]
            if not self._spells_block(period, run.char) or ids[second:third] != period:
                return None
            ids[second:second] = period * run.missing_blocks
        return ids

    def _spells_block(self, ids: list[int], char: str) -> bool:
        """Whether the ids hold _BLOCK characters, each normalized alone, none in an added token."""
        normalizer = self._library.normalizer
        single, triple = (
            normalizer.normalize_str(text) if normalizer else text for text in (char, char * 3)
        )
        added = self._library.get_added_tokens_decoder().values()
        if triple != single * 3 or any(set(token.content) <= {char, *single} for token in added):
            return False
        return len(self.decode_bytes(ids)) == _BLOCK * len(single.encode("utf-8"))


# The length of a block is a multiple of the length of most tokens that are made of one repeated
# character; the Pile's vocabulary has one of 256.
_BLOCK = 2**8 * 3**2 * 5
# Of the blocks that are kept, one is counted, the one after it is compared with it, and one on each
# side keeps both away from the run's ends.
_KEPT_BLOCKS = 4


class _Run(NamedTuple):
    char: str
    end: int
    """Where the run's last whole block ends in the shortened text."""
    missing_blocks: int


def _shorten_runs(text: str) -> tuple[str, list[_Run]]:
    """The text with at most _KEPT_BLOCKS blocks of one character in a row, and what was cut."""
    kept: list[str] = []
    runs: list[_Run] = []
    length = 0
    starts = range(0, len(text), _BLOCK)
    for char, group in itertools.groupby(starts, lambda start: _only_character(text, start)):
        blocks = list(group)
        missing = max(0, len(blocks) - _KEPT_BLOCKS) if char else 0
        kept.append(text[blocks[0] : blocks[-1] + (1 - missing) * _BLOCK])
        length += len(kept[-1])
        if missing:
            runs.append(_Run(char, length, missing))
    return "".join(kept), runs


def _only_character(text: str, start: int) -> str:
    """The character that fills the block from `start`, or "" when there are several."""
    return text[start] if text.startswith(text[start] * _BLOCK, start) else ""


def _repeats_runs(spec: dict[str, Any]) -> bool:
    """Whether normalizer, pre-tokenizer and model are of kinds that never count characters."""
    options = ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
    return (
        (spec.get("normalizer") or {"type": "NFC"})["type"] == "NFC"
        and spec["pre_tokenizer"]["type"] == "ByteLevel"
        and not any(spec["model"].get(option) for option in options)
    )


# What else a tokenizer.json says concerns decoding, padding and marks around a text, none of which
# is left to the library.
_ENCODING_PARTS = ("normalizer", "pre_tokenizer", "model", "added_tokens")


def _load_library(content: bytes, name: str) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        library = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # The library raises nothing more specific; it names the line.
        about = str(error).partition("\n")[0][:200]
        raise ValueError(f"{name}: not a usable tokenizer.json: {about}") from None
    # When the library is asked for what it understood, it counts up to the largest id there is.
    if (largest := max(library.get_vocab().values(), default=0)) > LARGEST_ID:
        raise ValueError(f"{name}: id {largest} is larger than that of any vocabulary")
    library.no_truncation()
    library.no_padding()
    return library


def _byte_level_problem(spec: dict[str, Any]) -> str | None:
    """Why this is not a byte-level BPE whose ids spell the text, or None if it is."""
    if spec["model"]["type"] != "BPE":
        return f"its model is {spec['model']['type']}"
    outer = spec.get("pre_tokenizer") or {"pretokenizers": []}
    steps = {step["type"]: step for step in outer.get("pretokenizers", [outer])}
    if "ByteLevel" not in steps:
        return f"its pre-tokenizer is {' + '.join(steps) or 'missing'}, not ByteLevel"
    if steps["ByteLevel"]["add_prefix_space"]:
        return "it puts a space before every text (add_prefix_space)"
    if spec["model"].get("dropout"):
        return f"it leaves out merges at random (dropout {spec['model']['dropout']:g})"
    return None


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The visible characters that stand for bytes in byte-level BPE files (GPT-2's encoder.py)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    shifted = {chr(256 + index): value for index, value in enumerate(hidden)}
    return {chr(value): value for value in visible} | shifted


def _token_table(library: tokenizers.Tokenizer, name: str) -> list[bytes]:
    """The bytes of each id; ValueError when an id is missing or its token is not of bytes."""
    alphabet, added = _byte_alphabet(), library.get_added_tokens_decoder()
    vocabulary = library.get_vocab(with_added_tokens=True)
    missing = {value for char, value in alphabet.items() if char not in vocabulary}
    if missing := missing - {0xC0, 0xC1, *range(0xF5, 0x100)}:  # bytes that UTF-8 never uses
        raise ValueError(
            f"{name}: no token for byte 0x{min(missing):02x}; "
            "a byte-level BPE has one for every byte of UTF-8"
        )
    # A character that stands for no byte is replaced by one that Latin-1 cannot encode.
    values = defaultdict(lambda: 0x100, {ord(char): value for char, value in alphabet.items()})
    tokens: dict[int, bytes] = {}
    for text, token_id in vocabulary.items():
        if token_id in added:
            tokens[token_id] = added[token_id].content.encode("utf-8")
            continue
        try:
            tokens[token_id] = text.translate(values).encode("latin-1")
        except UnicodeEncodeError:
            raise ValueError(
                f"{name}: token {token_id} contains {min(set(text) - set(alphabet))!r}, which "
                "stands for no byte; wanted is a byte-level BPE"
            ) from None
    if gaps := sorted(set(range(len(tokens))) - set(tokens)):
        raise ValueError(f"{name}: id {gaps[0]} has no token; ids must count from 0 without gaps")
    return [tokens[token_id] for token_id in range(len(tokens))]

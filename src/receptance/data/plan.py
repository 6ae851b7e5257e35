"""What decides a corpus: written down before the work, compared when it goes on."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from receptance.atomic import written
from receptance.data.encode import ReadOptions, texts
from receptance.data.files import check_seed, check_share
from receptance.data.parts import finished_parts
from receptance.data.sources import PIECE_BYTES, Piece, Source, stream_pieces
from receptance.data.tokens import LAYOUTS, store_tokenizer
from receptance.tokenizer import Tokenizer, stored_tokenizer

PLAN_VERSION = 1
SAMPLE_BYTES = 64 << 20
"""A BPE is trained on at most this much text: it takes a minute, and more text would hardly change
a merge."""


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(ReadOptions):
    """How a corpus is made."""

    workers: int | None = None
    """How many processes tokenize. 0: this one alone. By default one for each CPU that this may
    use, but 0 for little text."""
    validation: float = 0.01
    """Share of the text, or of the records' tokens, that is kept for validation."""
    format: Literal["npy", "binidx"] = "npy"
    """npy, or binidx for RWKV-LM and Megatron."""
    seed: int = 0
    """Decides which documents are kept for validation."""
    exclude: tuple[str, ...] = ()
    """Leave out files with a path component like this, e.g. site-packages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.validation)
        check_seed(self.seed)
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers is {self.workers}; it must be at least 0")
        if self.format not in LAYOUTS:
            raise ValueError(f"format is {self.format!r}; there are {', '.join(LAYOUTS)}")


Plan = dict[str, Any]


def make_plan(
    sources: Sequence[Source], tokenizer: Tokenizer | str, options: PrepareOptions
) -> Plan:
    """Everything that decides what comes out, as values of JSON.

    A tokenizer that is still to be trained is known by its name, as the sources decide the rest.
    """
    decisive = ("text_field", "template", "validation", "format", "seed")
    return {
        "version": PLAN_VERSION,
        "piece_bytes": PIECE_BYTES,
        "tokenizer": tokenizer if isinstance(tokenizer, str) else tokenizer.fingerprint,
        **{name: getattr(options, name) for name in decisive},
        "sources": [asdict(source) | {"path": _where(source)} for source in sources],
    }


def _where(source: Source) -> str:
    """The source's path in a form that means the same in every working directory."""
    return source.path if source.path.startswith("hf:") else os.path.abspath(source.path)


def digest(plan: Plan) -> str:
    """sha256 of a plan, in hexadecimal."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def begin(parts: Path, plan: Plan, make: Callable[[], Tokenizer]) -> tuple[Tokenizer, dict]:
    """Write the plan down with its tokenizer, or take up the work that was begun with the same.

    Returns the tokenizer and what `stored_tokenizer` has to know of it. ValueError says what
    differs from the plan of the work that was begun.
    """
    file = parts / "plan.json"
    if not file.exists():
        tokenizer = make()
        about = store_tokenizer(parts, tokenizer)
        with written(file) as stream:
            stream.write(json.dumps({"plan": plan, "tokenizer": about}).encode())
        return tokenizer, about
    try:
        stored = json.loads(file.read_bytes())
        before, about = stored["plan"], stored["tokenizer"]
        different = [name for name in plan if before[name] != plan[name]]
        if not different:
            return stored_tokenizer(parts, about), about
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); delete {parts} to start again") from None
    if not finished_parts(parts):  # The plan alone is no work that could be lost.
        file.unlink()
        return begin(parts, plan, make)
    raise ValueError(
        f"{parts} holds unfinished work, but {_difference(before, plan, different[0])}; delete it "
        "to start again, or choose another folder"
    )


def _difference(before: Plan, plan: Plan, name: str) -> str:
    """What differs between two plans: an option, or the first source that is another."""
    if name != "sources":
        return f"{name} was {before[name]} and is {plan[name]}"
    pairs = itertools.zip_longest(before[name], plan[name])
    old, new = next(pair for pair in pairs if pair[0] != pair[1])
    if old is None or new is None or old["path"] != new["path"]:
        return f"the sources are others, the first is {(new or old)['path']}"
    return f"{new['path']} has changed since"


def sample(
    pieces: Sequence[Piece], sources: Sequence[Source], options: ReadOptions
) -> Iterator[str]:
    """Training text from all over the sources, as much as a tokenizer is trained on."""
    usable = [piece for piece in pieces if piece.part != "validation"]
    step = max(1, -(-sum(piece.weight for piece in usable) // SAMPLE_BYTES))
    streams = stream_pieces(sources, options.only_field, 0, lambda index: None)
    left = SAMPLE_BYTES
    for piece in itertools.chain(usable[::step], streams):
        for text in texts(piece, options):
            yield text
            left -= len(text)
            if left <= 0:
                return

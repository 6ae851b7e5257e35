"""The figures of a file or directory of weights, found without running a model.

Tensors are read one after another, in pieces, so that memory is bounded by the largest of them.
The exception is a legacy .pth file, which torch reads as a whole.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from receptance.checking.contents import Contents, find
from receptance.config import PILE_VOCAB_SIZE, WORLD_VOCAB_SIZE
from receptance.formats.names_hf import from_hf
from receptance.sealed import MANIFEST, read_manifest
from receptance.storage.manifest import verify
from receptance.storage.opening import look
from receptance.tokenizer.files import PILE_PUBLISHED, WORLD_PUBLISHED, find_tokenizer

HALF_LIVES = (1, 4, 16, 64, 256, 1024, 4096, 16384)
"""The borders of the histogram of half-lives, in tokens."""

# The number of values that are checked at a time.
_PIECE = 1 << 22
_BLOCK = re.compile(r"\b(?:blocks|layers)\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:.*\.)?(?:emb|embeddings|embed_tokens)\.weight")
_USUAL_TOKENIZERS = {
    256: "bytes",
    PILE_VOCAB_SIZE: f"that of the Pile, {PILE_PUBLISHED}",
    WORLD_VOCAB_SIZE: f"World, {WORLD_PUBLISHED}",
}

Note = Callable[[str, int], object]
"""Called with the name of each tensor or file that was read, and its size in bytes."""


@dataclass(frozen=True)
class NotFinite:
    """The number of values in one tensor that are NaN, and that are infinite."""

    nan: int
    inf: int


@dataclass(frozen=True)
class Inspection:
    """The figures of a path; `dataclasses.asdict` makes fields of it that JSON can hold."""

    path: str
    kind: str
    """The kind of contents, such as "weights", "training checkpoint" or "adapter"."""
    format: str
    version: str | None
    """The version of RWKV, such as "RWKV-4"; None if it is not known."""
    problem: str | None
    """The reason why no engine runs this; None if there is none."""
    damage: str | None
    """The difference between a directory and its manifest; None if there is none."""
    about: str | None
    vocabulary: int | None
    width: int | None
    layers: int | None
    ffn_width: int | None
    tensors: int
    parameters: int
    bytes: int
    """The size of the files that hold the tensors."""
    dtypes: dict[str, int]
    """The number of values of each type; other encodings are one entry with all parameters."""
    tokenizer: str
    not_finite: dict[str, NotFinite]
    """The tensors with values that are not finite; empty for a sound model."""
    half_lives: dict[str, int]
    """The number of channels, over all layers, by the tokens after which they forget one half.

    If the decay depends on the text, this is where the text adds nothing to it."""
    decay_varies: bool
    """Whether the decay depends on the text."""
    digests: dict[str, str]
    """The sha256 of each file."""
    retentions: dict[int, list[float]] = field(repr=False)
    """The share that each channel keeps from a token to the next, by layer, in descending order."""


def inspect(source: str | Path, *, note: Note = lambda what, size: None) -> Inspection:
    """Read everything at a path or hub id. ValueError if its contents are of no known kind."""
    contents = find(source)
    damage = _damage(contents)
    tally = _Tally.of(contents, note)
    vocabulary, width, layers = _sizes(contents)
    config = contents.config
    return Inspection(
        path=str(contents.path),
        kind=contents.kind,
        format=contents.format,
        version=contents.version,
        problem=contents.problem,
        damage=damage,
        about=contents.about,
        vocabulary=vocabulary,
        width=width,
        layers=layers,
        ffn_width=None if config is None else config.ffn_width,
        tensors=len(contents.tensors),
        parameters=tally.values if config is None else config.num_parameters,
        bytes=sum(file.stat().st_size for file in contents.files),
        dtypes=_dtypes(contents, tally),
        tokenizer=_tokenizer(contents, vocabulary),
        not_finite=tally.not_finite,
        half_lives=histogram(tally.retentions),
        decay_varies=config is not None and config.architecture.decay_center is not None,
        digests=_digests(contents, damage, note),
        retentions=tally.retentions,
    )


def histogram(retentions: Mapping[int, list[float]]) -> dict[str, int]:
    """The number of channels between the borders of HALF_LIVES; empty if there are no channels."""
    counts = Counter(
        sum(half_life(share) >= border for border in HALF_LIVES)
        for shares in retentions.values()
        for share in shares
        if not math.isnan(share)
    )
    between = [f"{low} to {high}" for low, high in itertools.pairwise(HALF_LIVES)]
    labels = [f"below {HALF_LIVES[0]}", *between, f"{HALF_LIVES[-1]} and more"]
    return {label: counts[index] for index, label in enumerate(labels)} if retentions else {}


def half_life(retention: float) -> float:
    """The number of tokens after which half is left, if each multiplies the rest by retention."""
    if retention <= 0:
        return 0.0
    return math.inf if retention >= 1 else -math.log(2) / math.log(retention)


# ---- values -------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """The figures of the tensors read so far."""

    values: int = 0
    dtypes: Counter[str] = field(default_factory=Counter)
    not_finite: dict[str, NotFinite] = field(default_factory=dict)
    retentions: dict[int, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, contents: Contents, note: Note) -> _Tally:
        tally = cls()
        for name in contents.tensors:
            tensor = contents.tensors[name].detach()
            tally.add(name, tensor)
            layer = _BLOCK.search(name)
            version = contents.config and contents.config.architecture
            if version and layer and version.is_decay(from_hf(name)):
                kept = version.log_decay(tensor.double().flatten()).exp()
                tally.retentions[int(layer[1])] = kept.sort(descending=True).values.tolist()
            note(name, tensor.nbytes)
        return tally

    def add(self, name: str, tensor: Tensor) -> None:
        """Count a tensor's values, and those that are not finite."""
        self.values += tensor.numel()
        self.dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
        if not tensor.is_floating_point():
            return
        nan = inf = 0
        for piece in tensor.reshape(-1).split(_PIECE):
            if not piece.isfinite().all():
                nan, inf = nan + int(piece.isnan().sum()), inf + int(piece.isinf().sum())
        if nan or inf:
            self.not_finite[name] = NotFinite(nan, inf)


def _dtypes(contents: Contents, tally: _Tally) -> dict[str, int]:
    if contents.stored is None:
        return dict(tally.dtypes)
    assert contents.config is not None
    return {contents.stored: contents.config.num_parameters}


def _sizes(contents: Contents) -> tuple[int | None, int | None, int | None]:
    """Vocabulary, width and layers; for models that cannot be run, those that the names tell."""
    if (config := contents.config) is not None:
        return config.vocab_size, config.width, config.num_layers
    blocks = {found[1] for found in map(_BLOCK.search, contents.tensors) if found}
    vocabulary, width = None, None
    for name in filter(_EMBEDDING.fullmatch, contents.tensors):
        if len(shape := contents.tensors[name].shape) == 2:
            vocabulary, width = shape
    return vocabulary, width, len(blocks) or None


def _tokenizer(contents: Contents, vocabulary: int | None) -> str:
    """The tokenizer that the directory names, or else the usual one for such a vocabulary."""
    if contents.tokenizer is not None:
        return f"{contents.tokenizer}, in the {'directory' if contents.path.is_dir() else 'file'}"
    if vocabulary is None:
        return "not known"
    guess = _USUAL_TOKENIZERS.get(vocabulary, f"not known: one of {vocabulary} ids")
    folder = contents.path if contents.path.is_dir() else contents.path.parent
    beside = find_tokenizer(folder, vocabulary)
    where = "no file beside it" if beside is None else f"beside it is {beside.name}"
    return guess if guess == "bytes" else f"probably {guess}; {where}"


# ---- files --------------------------------------------------------------------------------------


def _damage(contents: Contents) -> str | None:
    """The difference between a Receptance directory and its manifest; None if there is none."""
    path = contents.path
    if contents.verified or not path.is_dir() or not look(path).sealed:
        return None
    try:
        verify(path)
    except ValueError as error:
        return str(error)
    return None


def _digests(contents: Contents, damage: str | None, note: Note) -> dict[str, str]:
    if damage is None and (contents.path / MANIFEST).is_file():
        return {name: x.sha256 for name, x in sorted(read_manifest(contents.path).items())}
    return dict(_digested(contents.files, note))


def _digested(files: tuple[Path, ...], note: Note) -> Iterator[tuple[str, str]]:
    for file in files:
        with file.open("rb") as stream:
            yield file.name, hashlib.file_digest(stream, "sha256").hexdigest()
        note(file.name, file.stat().st_size)

"""What a file or directory of weights holds, in figures, without running a model.

Tensors are read one after another, in pieces, so that memory is bounded by the largest of them
(but a legacy .pth, which torch reads whole).
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
from receptance.formats.names import from_hf
from receptance.storage.manifest import MANIFEST, read_manifest, verify
from receptance.storage.opening import look
from receptance.tokenizer.files import PILE_PUBLISHED, WORLD_PUBLISHED, find_tokenizer

HALF_LIVES = (1, 4, 16, 64, 256, 1024, 4096, 16384)
"""Borders of the histogram, in tokens."""

_PIECE = 1 << 22  # values looked at together
_BLOCK = re.compile(r"\b(?:blocks|layers)\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:.*\.)?(?:emb|embeddings|embed_tokens)\.weight")
_USUAL_TOKENIZERS = {
    256: "bytes",
    PILE_VOCAB_SIZE: f"that of the Pile, {PILE_PUBLISHED}",
    WORLD_VOCAB_SIZE: f"World, {WORLD_PUBLISHED}",
}

Note = Callable[[str, int], object]
"""Told what is being looked at, and of how many bytes it is."""


@dataclass(frozen=True)
class NotFinite:
    """Values of one tensor that no computation survives."""

    nan: int
    inf: int


@dataclass(frozen=True)
class Inspection:
    """What there is to say about a path; ready for JSON as a dict."""

    path: str
    kind: str
    """Such as "weights", "training checkpoint", "adapter"."""
    format: str
    version: str | None
    """Such as "RWKV-4"; None if it is no RWKV that is known."""
    problem: str | None
    """Why no engine runs it as it is."""
    damage: str | None
    """What in a directory is not as its manifest has it."""
    about: str | None
    vocabulary: int | None
    width: int | None
    layers: int | None
    ffn_width: int | None
    tensors: int
    parameters: int
    bytes: int
    """Of the files with the tensors."""
    dtypes: dict[str, int]
    """Values of each type; a single entry, as its file calls it, for other encodings."""
    tokenizer: str
    not_finite: dict[str, NotFinite]
    """By tensor; empty is as it should be."""
    half_lives: dict[str, int]
    """Channels of all layers by the number of tokens after which half of a token is forgotten."""
    digests: dict[str, str]
    """sha256 of each of these files."""
    retentions: dict[int, list[float]] = field(repr=False)
    """By layer, in descending order: the share that a channel keeps from a token to the next."""


def inspect(source: str | Path, *, note: Note = lambda what, size: None) -> Inspection:
    """Look at everything at a path or hub id. ValueError if it is nothing that is known."""
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
        digests=_digests(contents, damage, note),
        retentions=tally.retentions,
    )


def histogram(retentions: Mapping[int, list[float]]) -> dict[str, int]:
    """Channels between the borders of HALF_LIVES; empty without channels."""
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
    """Tokens after which half is left of what is multiplied by `retention` with every token."""
    if retention <= 0:
        return 0.0
    return math.inf if retention >= 1 else -math.log(2) / math.log(retention)


# ---- values -------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """What was found in the tensors up to now."""

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
            if version and layer and version.is_static_decay(from_hf(name)):
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
    """Vocabulary, width, layers, also of what is not RWKV-4, as far as names tell."""
    if (config := contents.config) is not None:
        return config.vocab_size, config.width, config.num_layers
    blocks = {found[1] for found in map(_BLOCK.search, contents.tensors) if found}
    vocabulary, width = None, None
    for name in filter(_EMBEDDING.fullmatch, contents.tensors):
        if len(shape := contents.tensors[name].shape) == 2:
            vocabulary, width = shape
    return vocabulary, width, len(blocks) or None


def _tokenizer(contents: Contents, vocabulary: int | None) -> str:
    """Which one it is, or probably is."""
    if contents.tokenizer is not None:
        return f"{contents.tokenizer}, in the directory"
    if vocabulary is None:
        return "not known"
    guess = _USUAL_TOKENIZERS.get(vocabulary, f"not known: one of {vocabulary} ids")
    folder = contents.path if contents.path.is_dir() else contents.path.parent
    beside = find_tokenizer(folder, vocabulary)
    where = "no file beside it" if beside is None else f"beside it is {beside.name}"
    return guess if guess == "bytes" else f"probably {guess}; {where}"


# ---- files --------------------------------------------------------------------------------------


def _damage(contents: Contents) -> str | None:
    """What is not as the manifest of a directory of ours has it."""
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

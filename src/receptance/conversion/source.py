"""A model on disk in any format, its tensors mapped when they are asked for.

What `load` needs besides, a tokenizer, may be missing here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from receptance import formats
from receptance.config import ModelConfig
from receptance.formats import hf
from receptance.formats.ggmf import GGMFFile
from receptance.formats.pth import is_mapped
from receptance.formats.rescaling import Unscaled, looks_rescaled
from receptance.storage.checkpoint import is_ours, read_model, read_tensors
from receptance.storage.directories import current, existing
from receptance.storage.pairing import check_tokenizer, found_tokenizer
from receptance.storage.quantized import is_quantized
from receptance.tokenizer import Tokenizer, load_tokenizer

Note = Callable[[str, int], object]
"""Told the name of each tensor that is read, and how many values it has."""

_MAPPED = 1 << 28  # bytes of a file that may stay in memory after they were read


@dataclass(frozen=True)
class Source:
    """A model on disk."""

    path: Path
    config: ModelConfig
    dtypes: Mapping[str, torch.dtype]
    """By official name."""
    open: Callable[[], Mapping[str, Tensor]]
    """Maps the tensors."""
    tokenizer: Tokenizer | None
    rescale_every: int = 0
    """Of a transformers directory, after how many blocks an evaluation halves; 0 for never."""

    def unscaled(self) -> Source:
        """The same with what transformers divided multiplied again (see rescaling.py)."""
        if not self.rescale_every:
            raise ValueError(
                f"{self.path}: only a transformers directory whose config.json has a "
                "rescale_every can be unscaled"
            )
        every = self.rescale_every
        return replace(self, open=lambda: Unscaled(self.open(), every), rescale_every=0)

    def looks_rescaled(self) -> bool:
        """Whether transformers seems to have saved it after an evaluation; never certain."""
        return looks_rescaled(self.open(), self.config.num_layers, self.rescale_every)


def open_source(
    source: str | Path,
    *,
    tokenizer: str | Path | Tokenizer | None = None,
    revision: str | None = None,
) -> Source:
    """A model at a path or hub id, in any format there is a reader for; nothing is read yet.

    tokenizer: as for `load`, but a file without one is no error.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    path = current(existing(source))
    if is_ours(path):
        return _own(path, tokenizer, revision)
    weights = formats.read(path if path.exists() else source, revision=revision)
    if tokenizer is None:
        tokenizer = found_tokenizer(weights.tokenizer, weights.config)
    if tokenizer is not None:
        check_tokenizer(tokenizer, weights.config)
    return Source(
        weights.source,
        weights.config,
        _dtypes(weights.tensors),
        _opener(weights),
        tokenizer,
        _rescale_every(weights.source),
    )


def _opener(weights: formats.Weights) -> Callable[[], Mapping[str, Tensor]]:
    # What can't be mapped is in memory now, and would only be read again.
    source = weights.source
    if source.is_file() and source.suffix in (".pth", ".pt") and not is_mapped(source):
        return lambda: weights.tensors
    return lambda: formats.read(source).tensors


def _own(path: Path, tokenizer: Tokenizer | None, revision: str | None) -> Source:
    config, tensors, found = read_model(path, tokenizer=tokenizer, revision=revision)
    # Opened again without comparing it with its manifest again.
    if is_quantized(path):
        return Source(path, config, _dtypes(tensors), lambda: tensors, found)
    dtypes = _dtypes(tensors)
    return Source(path, config, dtypes, lambda: read_tensors(path, "model"), found)


def _dtypes(tensors: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    if isinstance(tensors, GGMFFile):
        return {name: tensors.dtype(name) for name in tensors}
    return {name: tensor.dtype for name, tensor in tensors.items()}


def _rescale_every(path: Path) -> int:
    if not (path / "config.json").is_file():
        return 0
    every = hf.read_config(path).get("rescale_every", hf.RESCALE_EVERY)
    return every if isinstance(every, int) and every > 0 else 0


class Streamed(Mapping[str, Tensor]):
    """The tensors of a source, which is mapped anew now and then: what was read is let go."""

    def __init__(self, source: Source, note: Note) -> None:
        self._source = source
        self._note = note
        self._tensors: Mapping[str, Tensor] | None = None
        self._read = 0

    def __getitem__(self, name: str) -> Tensor:
        if self._tensors is None or self._read > _MAPPED:
            self._tensors = None
            self._tensors, self._read = self._source.open(), 0
        tensor = self._tensors[name]
        self._read += tensor.nbytes
        self._note(name, tensor.numel())
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._source.dtypes

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.dtypes)

    def __len__(self) -> int:
        return len(self._source.dtypes)

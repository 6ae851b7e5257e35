"""A model on disk in any format, whose tensors are mapped when they are asked for.

Unlike `load`, this does not need a tokenizer beside the weights.
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
from receptance.formats.gguf import GGUFFile
from receptance.formats.hf_config import RESCALE_EVERY
from receptance.formats.pth import is_mapped
from receptance.formats.rescaling import Unscaled, looks_rescaled
from receptance.storage.checkpoint import read_opened, read_tensors
from receptance.storage.opening import Opened, open_path
from receptance.storage.pairing import check_tokenizer, found_tokenizer
from receptance.tokenizer import Tokenizer, load_tokenizer

Note = Callable[[str, int], object]
"""Called with the name of each tensor that is read, and the number of its values."""

# A file is mapped anew after this many bytes, so that those already read leave the memory.
_MAPPED = 1 << 28


@dataclass(frozen=True)
class Source:
    """A model on disk."""

    path: Path
    config: ModelConfig
    dtypes: Mapping[str, torch.dtype]
    """The type of each tensor, by official name."""
    open: Callable[[], Mapping[str, Tensor]]
    """Maps the tensors of the model, by official name."""
    tokenizer: Tokenizer | None
    rescale_every: int = 0
    """The number of blocks after which an evaluation in transformers halves the weights once more.

    0 means never, as in every format but a transformers directory.
    """

    def unscaled(self) -> Source:
        """The model as it was before transformers divided its weights (see rescaling.py).

        ValueError unless it is a transformers directory with a rescale_every.
        """
        if not self.rescale_every:
            raise ValueError(
                f"{self.path}: only a transformers directory whose config.json has a "
                "rescale_every can be unscaled"
            )
        every = self.rescale_every
        return replace(self, open=lambda: Unscaled(self.open(), every), rescale_every=0)

    def looks_rescaled(self) -> bool:
        """Whether transformers probably saved the model after evaluating it; this is a guess."""
        return looks_rescaled(self.open(), self.config.num_layers, self.rescale_every)


def open_source(
    source: str | Path,
    *,
    tokenizer: str | Path | Tokenizer | None = None,
    revision: str | None = None,
) -> Source:
    """The model at a path or hub id, in any format that can be read; no tensor is read yet.

    tokenizer is that of `load`, but a model without a tokenizer is no error.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    opened = open_path(source)
    if opened.sealed:
        return _own(opened, source, tokenizer, revision)
    path = opened.path
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
    # A legacy file cannot be mapped: its tensors are in memory already, and stay there.
    source = weights.source
    if source.is_file() and source.suffix in (".pth", ".pt") and not is_mapped(source):
        return lambda: weights.tensors
    return lambda: formats.read(source).tensors


def _own(
    opened: Opened, source: str | Path, tokenizer: Tokenizer | None, revision: str | None
) -> Source:
    config, tensors, found = read_opened(opened, source, tokenizer, revision)
    dtypes, path = _dtypes(tensors), opened.path
    if opened.kind == "quantized":
        return Source(path, config, dtypes, lambda: tensors, found)
    # The directory was compared with its manifest above; later mappings skip that.
    return Source(path, config, dtypes, lambda: read_tensors(path, "model"), found)


def _dtypes(tensors: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    if isinstance(tensors, GGMFFile | GGUFFile):
        return {name: tensors.dtype(name) for name in tensors}
    return {name: tensor.dtype for name, tensor in tensors.items()}


def _rescale_every(path: Path) -> int:
    if not (path / "config.json").is_file():
        return 0
    every = hf.read_config(path).get("rescale_every", RESCALE_EVERY)
    return every if isinstance(every, int) and every > 0 else 0


class Streamed(Mapping[str, Tensor]):
    """The tensors of a source, whose file is mapped anew now and then to release memory."""

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

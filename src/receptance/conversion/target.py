"""The target of a conversion: a file or directory, its format and the type of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import torch

from receptance.conversion.source import Source
from receptance.formats import ggmf, gguf
from receptance.formats.ggmf import Stored, stored_kind
from receptance.formats.ggml import KINDS
from receptance.formats.names import tensor_shapes
from receptance.formats.writing import Schema

Format = Literal["pth", "hf", "st", "safetensors", "gguf", "ggmf", "receptance"]
Dtype = Literal["float32", "bfloat16", "float16", "Q8_0", "Q4_0"]

_SUFFIXES: dict[str, Format] = {
    ".pth": "pth",
    ".pt": "pth",
    ".st": "st",
    ".safetensors": "safetensors",
    ".gguf": "gguf",
    ".bin": "ggmf",
}
_BLOCKS = ("gguf", "ggmf")  # formats that hold quantized blocks
_FLOATS = {**ggmf.FLOATS, **gguf.TORCH}
DIRECTORIES = ("hf", "receptance")
"""The formats that are directories."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A file or directory to write, its format and the type of its weights."""

    path: Path
    """The file to write, or the directory for hf and receptance; it must not exist."""
    format: Format | None = None
    """The format; None takes it from the suffix of the path."""
    dtype: Dtype | None = None
    """The type of the weights; None keeps the type of each tensor where the format allows it."""
    shard_bytes: float = 5_000_000_000
    """The size in bytes above which hf weights are split into several files."""

    def __post_init__(self) -> None:
        by_suffix = _SUFFIXES.get(self.path.suffix)
        if self.format is None:
            object.__setattr__(self, "format", by_suffix)
        _check_path(self.path, self.format, by_suffix)
        _check_dtype(self.format, self.dtype)
        if not self.shard_bytes >= 1:  # nor NaN
            raise ValueError(f"shard_bytes is {self.shard_bytes}; 5,000,000,000 are usual")

    def kind(self, source: Source) -> Stored:
        """The kind of rwkv.cpp file to write for a source."""
        if self.dtype in KINDS:
            return cast(Stored, self.dtype)
        shapes = tensor_shapes(source.config)
        matrices = {source.dtypes[name] for name, shape in shapes.items() if len(shape) == 2}
        narrow = self.dtype == "float16" or (self.dtype is None and matrices == {torch.float16})
        return "FP16" if narrow else "FP32"

    def kinds(self, source: Source) -> dict[str, str]:
        """The stored type of each tensor, in a format that holds quantized blocks."""
        shapes = tensor_shapes(source.config)
        if self.format == "ggmf":
            kind = self.kind(source)
            return {n: stored_kind(n, shape, kind, source.config) for n, shape in shapes.items()}
        assert self.format == "gguf"
        matrices = {name: self._matrix_kind(source.dtypes[name]) for name in shapes}
        return gguf.stored_kinds(source.config, matrices)

    def _matrix_kind(self, own: torch.dtype) -> str:
        """The type of a matrix of a GGUF file; what is wider than float32 becomes that."""
        if self.dtype in KINDS:
            return str(self.dtype)
        wanted = own if self.dtype is None else getattr(torch, self.dtype)
        return next((kind for kind, dtype in gguf.TORCH.items() if dtype == wanted), "F32")

    def layout(self, source: Source) -> Schema:
        """Name, type and shape of each tensor to write; quantized tensors count as float32."""
        shapes = tensor_shapes(source.config)
        if self.format in _BLOCKS:
            kinds = self.kinds(source)
            return {n: (_FLOATS.get(kinds[n], torch.float32), x) for n, x in shapes.items()}
        return {name: (self._dtype(source, name), shape) for name, shape in shapes.items()}

    def _dtype(self, source: Source, name: str) -> torch.dtype:
        own = source.dtypes[name]
        if self.dtype is None:
            return own
        wanted: torch.dtype = getattr(torch, self.dtype)
        # Decays stay float32, as when a model is loaded: bfloat16 would round a decay of 0.999 to
        # 1. Ai00, which reads st files, wants a single type.
        wide = (
            source.config.architecture.is_float32(name)
            and own.itemsize >= 4
            and self.format != "st"
        )
        return torch.float32 if wide else wanted


def _check_path(path: Path, format_: str | None, by_suffix: str | None) -> None:
    if format_ is None:
        raise ValueError(
            f"{path}: the format can't be told from its name, which has none of the endings "
            f"{', '.join(_SUFFIXES)}; choose with format= one of {', '.join(get_args(Format))}"
        )
    if format_ not in get_args(Format):
        raise ValueError(f"there is no format {format_!r}; choose of {', '.join(get_args(Format))}")
    endings = [suffix for suffix, meant in _SUFFIXES.items() if meant == format_]
    if by_suffix not in (None, format_) or (by_suffix is None and endings and format_ != "ggmf"):
        wanted = f"one that ends in {' or '.join(endings)}" if endings else "a directory's"
        raise ValueError(f"{path}: wrong name for {format_}; give {wanted}")


def _check_dtype(format_: str | None, dtype: str | None) -> None:
    if dtype not in (None, *get_args(Dtype)):
        raise ValueError(f"there is no dtype {dtype!r}; choose of {', '.join(get_args(Dtype))}")
    if format_ == "ggmf" and dtype == "bfloat16":
        raise ValueError("files of rwkv.cpp know no bfloat16; choose float32, which is exact")
    if format_ not in _BLOCKS and dtype in KINDS:
        raise ValueError(
            f'only files of rwkv.cpp (format="ggmf") hold {dtype}, and those of llama.cpp '
            '(format="gguf")'
        )

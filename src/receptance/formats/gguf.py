"""Files of llama.cpp (GGUF) with RWKV-6 or RWKV-7: read tensor by tensor, and written so.

Names, types and keys are those that llama.cpp's own conversion writes (conversion/rwkv.py) and its
quantization keeps (src/llama-quant.cpp).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from receptance.atomic import written
from receptance.config import ModelConfig
from receptance.errors import one_line
from receptance.formats.files import check_file
from receptance.formats.ggml import BLOCK, KINDS, Bytes, block_bytes, dequantize
from receptance.formats.gguf_header import (
    ALIGNMENT,
    FLOATS,
    MAGIC,
    Entry,
    read_header,
)
from receptance.formats.gguf_package import super_blocks, write_header
from receptance.formats.gguf_tokenizer import Field, has_tokenizer, read_tokenizer, tokenizer_fields
from receptance.formats.names import some, tensor_shapes
from receptance.formats.names_ggml import (
    ARCHITECTURES,
    gguf_config,
    gguf_fixed,
    gguf_rescaled,
    gguf_sizes,
    gguf_stand_ins,
    in_gguf,
    joined_shape,
    keeps_axes,
    official_shape,
    places,
    turned,
)
from receptance.formats.rescaling import exponent
from receptance.formats.writing import blocks, pieces
from receptance.model.architecture import Shape
from receptance.tokenizer import Tokenizer

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The torch types of those stored types that are not blocks of quantized values."""

_ARCHITECTURE, _SPLITS = "general.architecture", "split.count"
_EPSILON = "attention.layer_norm_epsilon"
_EPSILONS = 1e-5, 64e-5  # of layer norms, and of the norm of heads, which llama.cpp has built in
_CONTEXT = 1 << 20  # what llama.cpp writes for models that have no limit
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # LlamaFileType of gguf
_QUANTIZATION_VERSION = 2


class GGUFFile(Mapping[str, Tensor]):
    """The tensors of a file by official name, read when they are asked for, in official shapes.

    Quantized tensors come as float32, others in their own dtype. Those that are stored as they are
    stay mapped to the file, so it must not change while they are used. The tensors that files hold
    and no model uses are zeros here, because llama.cpp's files hold others in their place. Weights
    that llama.cpp's conversion divided are multiplied again.
    """

    def __init__(self, path: Path, data: Bytes) -> None:
        self.path = path
        self._data = data
        self.fields, entries = read_header(data)
        self.architecture = self.fields.text(_ARCHITECTURE)
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"its architecture is {some([str(self.architecture)])}; this release reads "
                f"{', '.join(ARCHITECTURES)}"
            )
        if (self.fields.number(_SPLITS) or 1) != 1:
            raise ValueError(
                "it is one part of several; join them with llama-gguf-split of llama.cpp"
            )
        self.has_tokenizer = has_tokenizer(self.fields)
        self._entries: Mapping[str, Entry] = entries
        version = ARCHITECTURES[self.architecture]
        layers = len({name.split(".")[1] for name in entries if name.startswith("blk.")})
        self._places = places(entries, version, max(1, layers), in_gguf)
        self.config = self._config(version)
        self._rescaled = gguf_rescaled(self._number)
        self._shapes = tensor_shapes(self.config)
        self._unused = self.config.architecture.unused(self.config)

    @property
    def kinds(self) -> set[str]:
        """The types of the tensors in the file, such as F32 and Q4_K."""
        return {entry.kind for entry in self._entries.values()}

    def tokenizer(self) -> Tokenizer | None:
        """Make the tokenizer that the file holds, if it does; ValueError if it is damaged."""
        try:
            return read_tokenizer(self.fields, str(self.path))
        except ValueError as error:
            message = str(error)
        own = message.startswith(str(self.path))
        raise ValueError(message if own else f"{self.path}: {message}")

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor once it is read; the tensor is not read for this."""
        if name in self._unused:
            return torch.float32
        return TORCH.get(self._entries[self._places[name].stored].kind, torch.float32)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._unused:
            return torch.zeros(self._shapes[name])
        place = self._places[name]
        entry = self._entries[place.stored]
        tensor = self._read(entry)
        if place.row is not None:
            tensor = tensor.view(entry.shape[0], -1)[place.row]
        if self._rescaled and (power := exponent(name, self._rescaled)):
            tensor = tensor * 2.0**power
        shape = self._shapes[name]
        return tensor.view(turned(shape)).mT.contiguous() if place.turned else tensor.view(shape)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def _config(self, version: float) -> ModelConfig:
        shapes = {
            name: official_shape(place, self._entries[place.stored].shape)
            for name, place in self._places.items()
        }
        number = self._number
        epsilon = number(_EPSILON)
        # Files have it in float32.
        if epsilon is not None and not math.isclose(epsilon, _EPSILONS[0], rel_tol=1e-6):
            raise ValueError(
                f"its key {_EPSILON} is {epsilon:g}; this release reads files of {_EPSILONS[0]}"
            )
        return gguf_config(version, shapes, number)

    def _number(self, key: str) -> int | float | None:
        return self.fields.number(f"{self.architecture}.{key}")

    def _read(self, entry: Entry) -> Tensor:
        """The values of a stored tensor: [n]."""
        data = self._data[entry.offset : entry.offset + entry.size]
        if entry.kind in FLOATS:
            values = np.require(data.view(FLOATS[entry.kind]), requirements="A")
            return torch.from_numpy(values).view(TORCH[entry.kind])
        known = entry.kind in KINDS
        return torch.from_numpy(
            dequantize(data, entry.kind) if known else super_blocks(data, entry.kind)
        )


def is_gguf(path: Path) -> bool:
    """Whether this is a file that begins with the magic number of GGUF."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def open_gguf(path: str | Path) -> GGUFFile:
    """The model in a GGUF file; only its header is read now.

    ValueError, starting with the path, when it is no such file, damaged, or of another
    architecture.
    """
    path = Path(path)
    try:
        ours = is_gguf(path)
    except (OSError, ValueError):  # check_file will say what is wrong.
        ours = False
    if not ours:
        check_file(path)
        raise ValueError(f"{path}: this is no GGUF file; those begin with {MAGIC!r}")
    try:
        # Mode "c" maps the file privately: torch wants memory it may write to, and the file stays.
        return GGUFFile(path, np.memmap(path, mode="c"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_gguf(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a GGUF file, as `open_gguf` gives them."""
    return dict(open_gguf(path))


# ---- writing ------------------------------------------------------------------------------------


def check_gguf(config: ModelConfig, kind: str | None) -> None:
    """ValueError if llama.cpp could not run a file of this model, or of matrices of this type."""
    if config.version not in ARCHITECTURES.values():
        known = " and ".join(f"RWKV-{number}" for number in ARCHITECTURES.values())
        raise ValueError(
            f"llama.cpp, which GGUF files are for, runs no RWKV-{config.version}; this release "
            f"writes them of {known}; choose another format"
        )
    if (epsilon := config.extras.get("group_norm_epsilon")) != _EPSILONS[1]:
        raise ValueError(
            f"the group_norm_epsilon is {epsilon}, and llama.cpp always takes {_EPSILONS[1]}; use "
            "another format"
        )
    if kind in KINDS and (config.width % BLOCK or config.ffn_width % BLOCK):
        raise ValueError(
            f"{kind} wants widths that are multiples of {BLOCK}; these are {config.width} and "
            f"{config.ffn_width}; write float16"
        )


def stored_kinds(config: ModelConfig, kinds: Mapping[str, str]) -> dict[str, str]:
    """The type in which each tensor is stored, by official name, given those of the matrices.

    These are F32, F16, BF16, Q8_0 or Q4_0; everything that is no such matrix is F32. As in
    llama.cpp's own files of small types, the head of a Q4_0 file is more precise than the rest, and
    so is the embedding here: both are Q8_0.
    """
    matrices = config.architecture.layouts(config)
    found = dict.fromkeys(tensor_shapes(config), "F32")
    for name in matrices:
        precise = kinds[name] == "Q4_0" and not name.startswith("blocks.")
        found[name] = "Q8_0" if precise else kinds[name]
    return found


def write_gguf(
    path: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    kinds: Mapping[str, str],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write a file of version 3, tensor by tensor; it appears, or is replaced, when complete.

    The tensors have official names and fit the configuration; `kinds` are those of
    `stored_kinds`. The tokenizer becomes part of the file, with a chat template. ValueError when a
    tensor has values that its type cannot hold, or llama.cpp has no such tokenizer.
    """
    path = Path(path)
    for kind in set(kinds.values()):
        check_gguf(config, kind)
    plan = _plan(config, kinds)
    with one_line(path), written(path) as file:
        write_header(
            Path(file.name),
            _name(config),
            _fields(config, plan, tokenizer),
            {name: (x.kind, x.shape, x.size) for name, x in plan.items()},
        )
        file.seek(0, os.SEEK_END)
        for planned in plan.values():
            _pad(file)
            for name in planned.sources:
                file.writelines(_values(name, tensors[name].detach().cpu(), planned))
        _pad(file)


@dataclass
class _Planned:
    """A tensor to write: its type and shape, and the tensors of official names that make it up."""

    kind: str
    shape: Shape
    turned: bool
    sources: list[str]

    @property
    def size(self) -> int:
        """The size of the data in bytes."""
        count = math.prod(self.shape)
        if self.kind in KINDS:
            return count // BLOCK * block_bytes(self.kind)
        return count * FLOATS[self.kind].itemsize


def _plan(config: ModelConfig, kinds: Mapping[str, str]) -> dict[str, _Planned]:
    """The tensors of the file by stored name, in the order in which they are written."""
    shapes, plan = tensor_shapes(config), dict[str, _Planned]()
    matrices, stand_ins = config.architecture.layouts(config), gguf_stand_ins(config)
    for name in shapes:
        place, source = in_gguf(name, config.version), stand_ins.get(name, name)
        shape = shapes[source]
        if place.turned:
            shape = turned(shape)
        elif name not in matrices and not keeps_axes(name):
            shape = (math.prod(shape),)
        first = _Planned(kinds[name], shape, place.turned, [])
        planned = plan.setdefault(place.stored, first)
        planned.sources.append(source)
        if place.row is not None:
            planned.shape = joined_shape(len(planned.sources), shape)
    return plan


def _fields(
    config: ModelConfig, plan: Mapping[str, _Planned], tokenizer: Tokenizer | None
) -> dict[str, Field]:
    architecture = _name(config)
    own = {
        "context_length": _CONTEXT,
        **gguf_sizes(config),
        **gguf_fixed(config),
        _EPSILON: config.layer_norm_epsilon,
        "attention.head_count": 0,  # llama.cpp asks for it and does not use it.
        "vocab_size": config.vocab_size,
    }
    # Embedding and head may be more precise than the rest.
    matrices = (x for x in config.architecture.layouts(config) if x.startswith("blocks."))
    kind = plan[in_gguf(next(matrices), config.version).stored].kind
    return {
        "general.type": "model",
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": _QUANTIZATION_VERSION,
        **{f"{architecture}.{key}": value for key, value in own.items()},
        **tokenizer_fields(tokenizer, config.vocab_size),
    }


def _name(config: ModelConfig) -> str:
    return next(name for name, number in ARCHITECTURES.items() if number == config.version)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _values(name: str, tensor: Tensor, planned: _Planned) -> Iterator[memoryview]:
    tensor = tensor.mT if planned.turned else tensor
    if planned.kind in KINDS:
        return blocks(name, tensor, planned.kind)
    return pieces(name, tensor, TORCH[planned.kind])

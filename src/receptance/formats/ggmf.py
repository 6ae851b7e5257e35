"""Files of rwkv.cpp, versions 100 and 101: a header, then one tensor after another.

The layout is that of docs/FILE_FORMAT.md of rwkv.cpp. Shapes are stored in reverse, [1,1,C]
as vectors, and in place of the parameter of RWKV-4's decay its -exp, which is what the recurrence
uses; of RWKV-5's it is e to that. names_ggml.py says which tensors are joined or transposed.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from receptance.atomic import written
from receptance.config import ModelConfig
from receptance.errors import one_line
from receptance.formats.files import check_file
from receptance.formats.ggmf_header import FLOATS as _NUMPY
from receptance.formats.ggmf_header import (
    HEADER,
    MAGIC,
    TENSOR,
    TYPES,
    VERSIONS,
    Entry,
    read_entries,
    read_header,
)
from receptance.formats.ggml import BLOCK, KINDS, Bytes, dequantize
from receptance.formats.names import infer_config, tensor_shapes
from receptance.formats.names_ggml import (
    Place,
    ggmf_joined_shape,
    ggmf_version,
    in_ggmf,
    is_matrix,
    official_shape,
    places,
    turned,
)
from receptance.formats.writing import blocks, pieces
from receptance.model.architecture import Shape
from receptance.model.v4 import log_decay

Stored = Literal["FP32", "FP16", "Q8_0", "Q4_0"]
"""The types that the matrices of a written file can have; vectors are always FP32."""

FLOATS = {"FP32": torch.float32, "FP16": torch.float16}
"""The torch types of those stored types that are not blocks of quantized values."""

_GROUP_NORM_EPSILON = 64e-5  # rwkv.cpp has it built in for RWKV-6 and 7.
_GROUP_NORM_EPSILON_5 = 1e-5
_CODES = {name: code for code, name in TYPES.items()}
# The matrices that rwkv.cpp's own quantization leaves as they are.
_NOT_QUANTIZED = ("emb.weight", "head.weight")


class GGMFFile(Mapping[str, Tensor]):
    """The tensors of a file by official name, read when they are asked for, in official shapes.

    Quantized tensors come as float32, others in their own dtype. Tensors that lie aligned in the
    file stay mapped to it, so it must not change while they are used; the others are copied.
    Tensors that files may lack because no model uses them are zeros.
    """

    def __init__(self, path: Path, data: Bytes) -> None:
        self.path = path
        self._data = data
        self.version, *self._sizes = read_header(data)
        self._entries = dict(read_entries(data, self.version))
        self._places = _find(self._entries)
        self.config = infer_config(
            {n: official_shape(x, self._entries[x.stored].shape) for n, x in self._places.items()}
        )
        if 5 <= self.config.version < 6:
            extras = self.config.extras | {"group_norm_epsilon": _GROUP_NORM_EPSILON_5}
            self.config = dataclasses.replace(self.config, extras=extras)
        self._shapes = tensor_shapes(self.config)
        self._check_sizes()

    @property
    def kinds(self) -> set[str]:
        """The types of the tensors in the file, such as FP32 and Q5_1."""
        return {entry.kind for entry in self._entries.values()}

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor once it is read; the tensor is not read for this."""
        if name not in self._places:
            return torch.float32
        return FLOATS.get(self._entries[self._places[name].stored].kind, torch.float32)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._places:
            return torch.zeros(self._shapes[name])
        place = self._places[name]
        entry = self._entries[place.stored]
        data = self._data[entry.offset : entry.offset + entry.size]
        if entry.kind in _NUMPY:
            values = np.require(data.view(_NUMPY[entry.kind]), requirements="A")
        else:
            values = dequantize(data, entry.kind, old=self.version == VERSIONS[0])
        tensor, shape = torch.from_numpy(values), self._shapes[name]
        if place.row is not None:
            tensor = tensor.view(entry.shape[0], -1)[place.row]
        tensor = tensor.view(turned(shape)).mT.contiguous() if place.turned else tensor.view(shape)
        if self.config.architecture.is_static_decay(name):
            return decay_parameter(tensor, f"{self.path}: {name}", self.config.version)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def _check_sizes(self) -> None:
        found = [self.config.vocab_size, self.config.width, self.config.num_layers]
        if self._sizes != found:
            raise ValueError(
                f"its header says vocabulary, width and layers are {self._sizes}, but its tensors "
                f"have {found}; it is damaged"
            )


def is_ggmf(path: Path) -> bool:
    """Whether this is a file that begins with the magic number of rwkv.cpp."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def check_ggmf(config: ModelConfig) -> None:
    """ValueError if rwkv.cpp would compute something else than this model."""
    built_in = _GROUP_NORM_EPSILON_5 if 5 <= config.version < 6 else _GROUP_NORM_EPSILON
    if (epsilon := config.extras.get("group_norm_epsilon")) not in (None, built_in):
        raise ValueError(
            f"the group_norm_epsilon is {epsilon}, and rwkv.cpp always takes {built_in};"
            " use another format"
        )


def open_ggmf(path: str | Path) -> GGMFFile:
    """The model in a file of rwkv.cpp; only the headers are read now.

    ValueError, starting with the path, when it is no such file, damaged, or of another version.
    """
    path = Path(path)
    try:
        ours = is_ggmf(path)
    except (OSError, ValueError):  # check_file will say what is wrong.
        ours = False
    if not ours:
        check_file(path)
        raise ValueError(f"{path}: this is no file of rwkv.cpp; those begin with {MAGIC!r}")
    try:
        # Mode "c" maps the file privately: torch wants memory it may write to, and the file stays.
        return GGMFFile(path, np.memmap(path, mode="c"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_ggmf(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a file of rwkv.cpp, as `open_ggmf` gives them."""
    return dict(open_ggmf(path))


def write_ggmf(
    path: str | Path, config: ModelConfig, tensors: Mapping[str, Tensor], kind: Stored = "FP16"
) -> None:
    """Write a file of version 101, tensor by tensor; it appears, or is replaced, when complete.

    The tensors have official names and fit the configuration. As in rwkv.cpp, vectors are stored
    as FP32, and a quantized file has its embedding and head as FP16. ValueError when tensors are
    missing, have other shapes, or values that the type cannot hold.
    """
    path = Path(path)
    _check_kind(config, kind)
    with one_line(path), written(path) as file:
        sizes = config.vocab_size, config.width, config.num_layers
        file.write(HEADER.pack(MAGIC, VERSIONS[-1], *sizes, _CODES[kind]))
        for stored, names in _stored_names(config).items():
            _write_tensor(file, stored, names, config, tensors, kind)


# ---- reading ------------------------------------------------------------------------------------


def _find(entries: Mapping[str, Entry]) -> dict[str, Place]:
    """The place of each tensor of a model, by official name."""
    version = ggmf_version({name: entry.shape for name, entry in entries.items()})
    if version is None:
        return {name: Place(name) for name in entries}
    layers = len({name.split(".")[1] for name in entries if name.startswith("blocks.")})
    return places(entries, version, layers, in_ggmf)


def decay_parameter(stored: Tensor, what: str, version: float = 4) -> Tensor:
    """The parameter of a decay that a file holds as `stored_decay` makes it: the same shape.

    Near zero several parameters have the same exponential in float32. Most parameters were float16
    or bfloat16 once, so a number that one of these types holds is preferred.
    """
    wide = stored.double()
    if version >= 5 and not ((wide >= 0) & (wide <= 1)).all():
        raise ValueError(f"{what} has values beyond 0 and 1; rwkv.cpp stores decays for RWKV-5")
    decay = -wide if version < 5 else -wide.log()
    if (decay < 0).any():
        raise ValueError(f"{what} has positive values; rwkv.cpp stores negative ones for RWKV-4")
    # Decays beyond these limits have no finite parameter, and the limits act as they do.
    decay = decay.clamp(2.0**-149, torch.finfo(torch.float32).max)
    parameter = decay.log().float()
    for narrow in (torch.float16, torch.bfloat16):
        candidate = parameter.to(narrow).float()
        same = stored_decay(candidate, version) == stored.float()
        parameter = torch.where(same, candidate, parameter)
    return parameter


# ---- writing ------------------------------------------------------------------------------------


def _check_kind(config: ModelConfig, kind: Stored) -> None:
    if kind not in get_args(Stored):
        raise ValueError(f"{kind!r} cannot be written; choose from {', '.join(get_args(Stored))}")
    if kind in KINDS and (config.width % BLOCK or config.ffn_width % BLOCK):
        raise ValueError(
            f"{kind} wants widths that are multiples of {BLOCK}; these are {config.width} and "
            f"{config.ffn_width}; write FP16"
        )


def _checked(tensors: Mapping[str, Tensor], name: str, shape: Shape) -> Tensor:
    """The tensor in the shape that is stored; a vector has one axis."""
    if name not in tensors:
        raise ValueError(f"{name} is missing; a whole model is wanted")
    tensor = tensors[name].detach().cpu()
    # Axes of one may be added or left out. Any other shape, such as that of the transposed matrix,
    # has the values in another order.
    if [size for size in tensor.shape if size != 1] != [size for size in shape if size != 1]:
        raise ValueError(f"{name} is {list(tensor.shape)}; the configuration wants {list(shape)}")
    vector = shape[:-1] in ((), (1, 1))
    return tensor.reshape(-1) if vector else tensor.reshape(shape)


def stored_kind(name: str, shape: Shape, kind: Stored, config: ModelConfig) -> Stored:
    """The type of a tensor of an official name in a file of this kind.

    Of the tensors with two axes only matrices are quantized, without embedding and head; those of
    low rank are FP16 then. Everything else is FP32.
    """
    if len(shape) != 2 or not is_matrix(name):
        return "FP32"
    kept = name in _NOT_QUANTIZED or name not in config.architecture.layouts(config)
    return "FP16" if kind in KINDS and kept else kind


def _stored_names(config: ModelConfig) -> dict[str, list[str]]:
    """The names of the tensors to write, with the official names of those that each joins."""
    found: dict[str, list[str]] = {}
    for name in tensor_shapes(config):
        found.setdefault(in_ggmf(name, config.version).stored, []).append(name)
    return found


def _write_tensor(
    file: BinaryIO,
    stored: str,
    names: list[str],
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    kind: Stored,
) -> None:
    shapes, place = tensor_shapes(config), in_ggmf(names[0], config.version)
    parts = [_checked(tensors, name, shapes[name]) for name in names]
    if config.architecture.is_static_decay(names[0]):
        parts = [stored_decay(parts[0], config.version)]
    shape = tuple(parts[0].shape)
    shape = (*(turned(shape) if place.turned else shape), *(1,) * place.last)
    shape = shape if place.row is None else ggmf_joined_shape(len(parts), shape)
    own, label = stored_kind(names[0], shapes[names[0]], kind, config), stored.encode()
    file.write(TENSOR.pack(len(shape), len(label), _CODES[own]))
    file.write(struct.pack(f"<{len(shape)}i", *shape[::-1]))
    file.write(label)
    for part in parts:
        part = part.mT if place.turned else part
        plain = own in FLOATS
        file.writelines(pieces(stored, part, FLOATS[own]) if plain else blocks(stored, part, own))


def stored_decay(parameter: Tensor, version: float = 4) -> Tensor:
    """What a file holds in place of the parameter of decays, float32: -exp of it, or for RWKV-5 e
    to the power of that."""
    # float64 makes the result the same on every machine, so that a reader can invert it.
    logarithm = log_decay(parameter.double())
    return (logarithm if version < 5 else logarithm.exp()).float()

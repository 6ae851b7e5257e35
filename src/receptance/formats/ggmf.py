"""Files of rwkv.cpp, versions 100 and 101: a header, then one tensor after another.

The layout is that of docs/FILE_FORMAT.md of rwkv.cpp. Shapes are stored in reverse, [1,1,C]
as vectors, and in place of the parameter of a decay its -exp, which is what the recurrence uses.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn, get_args

import numpy as np
import torch
from torch import Tensor

from receptance.atomic import written
from receptance.config import ModelConfig
from receptance.errors import one_line
from receptance.formats.files import check_file
from receptance.formats.ggml import BLOCK, KINDS, Bytes, block_bytes, dequantize, quantize
from receptance.formats.names import infer_config, some, tensor_shapes
from receptance.formats.writing import chunks, pieces
from receptance.model.architecture import Shape
from receptance.model.v4 import log_decay

Stored = Literal["FP32", "FP16", "Q8_0", "Q4_0"]
"""The types that the matrices of a written file can have; vectors are always FP32."""

FLOATS = {"FP32": torch.float32, "FP16": torch.float16}
"""The torch types of those stored types that are not blocks of quantized values."""

_MAGIC = b"fmgg"  # "ggmf" as a little-endian number
_VERSIONS = (100, 101)
_HEADER = struct.Struct("<4s5i")  # magic, version, vocabulary, width, layers, type
_TENSOR = struct.Struct("<3i")  # axes, bytes of the name, type
_MAX_AXES = 3
_MAX_NAME = 256
_MAX_TENSORS = 10_000  # RWKV-4 14B has 726
_FLOATS: dict[str, np.dtype] = {"FP32": np.dtype("<f4"), "FP16": np.dtype("<f2")}
_TYPES = {0: "FP32", 1: "FP16", 2: "Q4_0", 3: "Q4_1", 7: "Q5_0", 8: "Q5_1", 9: "Q8_0"}
_CODES = {name: code for code, name in _TYPES.items()}
# The matrices that rwkv.cpp's own quantization leaves as they are.
_NOT_QUANTIZED = ("emb.weight", "head.weight")


@dataclass(frozen=True)
class _Entry:
    """The place of a tensor in the file, its type and its shape."""

    kind: str
    shape: Shape
    offset: int
    size: int


class GGMFFile(Mapping[str, Tensor]):
    """The tensors of a file by official name, read when they are asked for, in official shapes.

    Quantized tensors come as float32, others in their own dtype. Tensors that lie aligned in the
    file stay mapped to it, so it must not change while they are used; the others are copied.
    """

    def __init__(self, path: Path, data: Bytes) -> None:
        self.path = path
        self._data = data
        self.version, *self._sizes = _read_header(data)
        self._entries = dict(_read_entries(data, self.version))
        shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.config = infer_config(shapes)
        self._shapes = tensor_shapes(self.config)
        self._check_sizes()

    @property
    def kinds(self) -> set[str]:
        """The types of the tensors in the file, such as FP32 and Q5_1."""
        return {entry.kind for entry in self._entries.values()}

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor once it is read; the tensor is not read for this."""
        return FLOATS.get(self._entries[name].kind, torch.float32)

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        data = self._data[entry.offset : entry.offset + entry.size]
        if entry.kind in _FLOATS:
            values = np.require(data.view(_FLOATS[entry.kind]), requirements="A")
        else:
            values = dequantize(data, entry.kind, old=self.version == _VERSIONS[0])
        tensor = torch.from_numpy(values).view(self._shapes[name])
        if self.config.architecture.is_static_decay(name):
            return decay_parameter(tensor, f"{self.path}: {name}")
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

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
        return file.read(len(_MAGIC)) == _MAGIC


def check_ggmf(config: ModelConfig) -> None:
    """ValueError if files of rwkv.cpp are not written for this version."""
    if config.architecture.static_decay is None:
        raise ValueError(
            f"this release writes no rwkv.cpp file of RWKV-{config.version}; choose another format"
        )


def open_ggmf(path: str | Path) -> GGMFFile:
    """The RWKV-4 model in a file of rwkv.cpp; only the headers are read now.

    ValueError, starting with the path, when it is no such file, damaged, or of another version.
    """
    path = Path(path)
    try:
        ours = is_ggmf(path)
    except (OSError, ValueError):  # check_file will say what is wrong.
        ours = False
    if not ours:
        check_file(path)
        raise ValueError(f"{path}: this is no file of rwkv.cpp; those begin with {_MAGIC!r}")
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
        file.write(_HEADER.pack(_MAGIC, _VERSIONS[-1], *sizes, _CODES[kind]))
        for name, shape in tensor_shapes(config).items():
            tensor = _checked(tensors, name, shape)
            if config.architecture.is_static_decay(name):
                tensor = stored_decay(tensor)
            _write_tensor(file, name, tensor, kind)


# ---- reading ------------------------------------------------------------------------------------


def _read_header(data: Bytes) -> list[int]:
    """The version, and the sizes: vocabulary, width and layers."""
    if len(data) < _HEADER.size:
        _cut_short()
    _, version, *sizes, code = _HEADER.unpack_from(data.data)
    if version not in _VERSIONS:
        raise ValueError(
            f"it is of rwkv.cpp's file version {version}; this release reads "
            f"{' and '.join(map(str, _VERSIONS))}"
        )
    _check_type(code, "the file")
    return [version, *sizes]


def _read_entries(data: Bytes, version: int) -> Iterator[tuple[str, _Entry]]:
    offset, seen = _HEADER.size, set()
    while offset < len(data):
        name, entry = _read_entry(data, offset, version)
        if name in seen:
            raise ValueError(f"it has two tensors named {some([name])}; it is damaged")
        seen.add(name)
        if len(seen) > _MAX_TENSORS:
            raise ValueError(f"it has more than {_MAX_TENSORS} tensors, more than any RWKV model")
        yield name, entry
        offset = entry.offset + entry.size


def _read_entry(data: Bytes, offset: int, version: int) -> tuple[str, _Entry]:
    if offset + _TENSOR.size > len(data):
        _cut_short()
    axes, length, code = _TENSOR.unpack_from(data.data, offset)
    offset += _TENSOR.size
    if not 1 <= axes <= _MAX_AXES or not 1 <= length <= _MAX_NAME:
        raise ValueError(
            f"where a tensor should begin it has {axes} axes and a name of {length} bytes; "
            "it is damaged or cut short"
        )
    if offset + 4 * axes + length > len(data):
        _cut_short()
    shape = struct.unpack_from(f"<{axes}i", data.data, offset)[::-1]
    offset += 4 * axes
    name = data[offset : offset + length].tobytes().decode("utf-8", errors="replace")
    offset += length
    size = _size(name, code, shape, version)
    if offset + size > len(data):
        _cut_short()
    return name, _Entry(_TYPES[code], shape, offset, size)


def _size(name: str, code: int, shape: Shape, version: int) -> int:
    """The size of a tensor's data in bytes."""
    _check_type(code, f"its tensor {some([name])}")
    if min(shape) < 1:
        raise ValueError(f"its tensor {some([name])} has the shape {shape}; it is damaged")
    kind, count = _TYPES[code], math.prod(shape)
    if kind in _FLOATS:
        return count * _FLOATS[kind].itemsize
    if shape[-1] % BLOCK:
        raise ValueError(
            f"its tensor {some([name])} is {kind} and has rows of {shape[-1]} values; they must "
            f"be a multiple of {BLOCK}"
        )
    return count // BLOCK * block_bytes(kind, old=version == _VERSIONS[0])


def _check_type(code: int, what: str) -> None:
    if code not in _TYPES:
        known = ", ".join(f"{code} {name}" for code, name in _TYPES.items())
        raise ValueError(f"{what} is of type {code}; this release reads {known}")


def _cut_short() -> NoReturn:
    raise ValueError("it ends in the middle of a tensor: cut short or damaged; get it again")


def decay_parameter(stored: Tensor, what: str) -> Tensor:
    """log(-stored): the parameter of a decay whose -exp a file holds, [C] -> [C] float32.

    Near zero several parameters have the same exponential in float32. Most parameters were float16
    or bfloat16 once, so a number that one of these types holds is preferred.
    """
    decay = -stored.double()
    if (decay < 0).any():
        raise ValueError(f"{what} has positive values; rwkv.cpp stores negative ones for RWKV-4")
    # Decays beyond these limits have no finite parameter, and the limits act as they do.
    decay = decay.clamp(2.0**-149, torch.finfo(torch.float32).max)
    parameter = decay.log().float()
    for narrow in (torch.float16, torch.bfloat16):
        candidate = parameter.to(narrow).float()
        same = stored_decay(candidate) == -decay.float()
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


def stored_decay(parameter: Tensor) -> Tensor:
    """The -exp that a file holds in place of the parameter of decays: [C] -> [C] float32."""
    # float64 makes the result the same on every machine, so that a reader can invert it.
    return log_decay(parameter.double()).float()


def stored_kind(name: str, shape: Shape, kind: Stored) -> Stored:
    """The type of a tensor in a file of this kind; every tensor that is no matrix is FP32."""
    if len(shape) != 2:
        return "FP32"
    return "FP16" if kind in KINDS and name in _NOT_QUANTIZED else kind


def _write_tensor(file: BinaryIO, name: str, tensor: Tensor, kind: Stored) -> None:
    stored, label = stored_kind(name, tensor.shape, kind), name.encode()
    file.write(_TENSOR.pack(tensor.dim(), len(label), _CODES[stored]))
    file.write(struct.pack(f"<{tensor.dim()}i", *tensor.shape[::-1]))
    file.write(label)
    plain = stored in FLOATS
    file.writelines(pieces(name, tensor, FLOATS[stored]) if plain else _blocks(name, tensor, kind))


def _blocks(name: str, tensor: Tensor, kind: Stored) -> Iterator[memoryview]:
    try:
        for values in chunks(tensor):
            yield quantize(values.float().numpy(), kind).data
    except ValueError as error:
        raise ValueError(f"{name} cannot be written as {kind}: {error}") from None

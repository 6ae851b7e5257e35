"""PyTorch checkpoint files, `.pth`, `.pt` and `.bin`: the only module that unpickles anything.

A pickle is a program, and loading one runs it. Two guards stand before that. First the instructions
are read without carrying any out (see pickles.py), and the file is refused if they name anything
but plain tensors, in words that say what it asked for, or if they do not fit the data stored beside
them. Then `torch.load(weights_only=True)`, which has its own list of what it will construct, does
the loading. There is no fallback: no option loads a file that either guard refuses.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from receptance.formats.files import check_file, reason
from receptance.formats.names import some
from receptance.formats.pickles import MAX_INDEX, PROTOCOL, Refused, Scan
from receptance.formats.writing import Schema, pieces
from receptance.model.architecture import Shape

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
# A file of the older format holds five pickles: the magic number, the format, the system, the
# tensors, and the order of their data.
_LEGACY_PICKLES = 5

# torch.save writes these entries beside the tensors.
_ROOT = "archive/"
_NOTES = {".format_version": b"1", ".storage_alignment": b"64", "byteorder": b"little"}
_VERSION = b"3\n"
# Readers map the data, so each tensor begins at a multiple of 64 bytes. torch fills the gap with a
# zip field of the name FB; 30 bytes come before the name of an entry, and zipfile writes a field of
# 20 bytes before ours.
_ALIGNMENT = 64
_PADDING = b"FB"
_ZIP_HEADER = 30
_ZIP64_FIELD = 20
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}


def read_pth(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file that `torch.save` wrote, under the names the file gives.

    Both formats of torch are read. Tensors of the newer one (a zip archive) stay mapped to the
    file, which must not change while they are used. ValueError, starting with the path, when the
    file asks for more than plain tensors, is damaged, or holds anything but a dict of tensors.
    """
    path = Path(path)
    check_file(path)
    try:
        return _plain(_load(path))
    except Refused as refusal:
        raise ValueError(f"{path}: {refusal}") from None
    # torch interprets bytes that anyone may have written, and any exception at all can come out.
    except Exception as error:
        raise ValueError(
            f"{path}: damaged, cut short or not written by torch.save ({_cause(error)}); "
            "download or save it again"
        ) from None


def is_mapped(path: Path) -> bool:
    """Whether the tensors of a file that torch.save wrote stay mapped: it is a zip archive."""
    with path.open("rb") as file:
        return file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC


def _load(path: Path) -> object:
    mapped = is_mapped(path)
    if mapped:
        _inspect_zip(path)
    else:
        _inspect_legacy(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _plain(loaded: object) -> dict[str, Tensor]:
    """The loaded object as a dict of names and plain tensors; Refused if it is anything else."""
    if not isinstance(loaded, dict):
        raise Refused(f"it holds a {type(loaded).__name__}, not a dict of tensors by name")
    if not loaded:
        raise Refused("it holds an empty dict; there are no tensors in it")
    if "_strategy" in loaded:
        raise Refused(
            "it was converted by the `rwkv` package, which changes the weights; use the original"
        )
    # An OrderedDict from a file may have an attribute of the name `items`.
    entries = dict.items(loaded)
    return _separate({_checked_name(name): _checked(name, value) for name, value in entries})


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each with memory of its own.

    torch.save stores a tensor with two names once, such as a tied head and embedding. Code that
    trains or writes the tensors expects two separate ones.
    """
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors


def _checked_name(name: object) -> str:
    if not isinstance(name, str):
        raise Refused(f"a key of its dict is a {type(name).__name__}; tensor names are strings")
    return name


def _checked(name: object, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise Refused(
            f"its entry {some([str(name)])} is a {type(value).__name__}, not a tensor; if this is "
            "a training checkpoint, save the state dict in it as a file of its own"
        )
    # A tensor with a stride of 0 can have any size on a few bytes.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise Refused(f"its tensor {some([str(name)])} claims more values than the file holds")
    return value.detach()


def _cause(error: Exception) -> str:
    # The message of torch would advise how to load the file without a guard.
    if isinstance(error, pickle.UnpicklingError):
        return "it has instructions that torch.save does not write"
    return reason(error)


def _inspect_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        records = {entry.filename: entry for entry in entries}
        root = _root(records)
        if len(records) < len(entries):
            raise Refused("it is a zip archive with two entries of the same name")
        if records[f"{root}data.pkl"].file_size > MAX_INDEX:
            raise Refused("its index is larger than that of any file of weights")
        index = Scan.of(BytesIO(archive.read(f"{root}data.pkl")))
    for key, size in index.storages.items():
        _check_record(records.get(f"{root}data/{key}"), size)


def _root(records: dict[str, zipfile.ZipInfo]) -> str:
    """The folder inside the archive that holds every entry."""
    roots = {name.split("/")[0] + "/" for name in records if name.count("/") == 1}
    indexed = [root for root in roots if f"{root}data.pkl" in records]
    if len(indexed) != 1:
        raise Refused("it is a zip archive, but not one that torch.save wrote")
    if f"{indexed[0]}constants.pkl" in records:
        raise Refused("it is a TorchScript program; save the model's state dict instead")
    return indexed[0]


def _check_record(record: zipfile.ZipInfo | None, size: int) -> None:
    # torch maps the file and believes the index. With another size it would read the bytes of the
    # next tensor, and compressed data would pass for weights, both without an error.
    if record is None or record.file_size != size:
        found = "none" if record is None else f"{record.file_size} bytes"
        raise Refused(
            f"it is damaged: its index wants {size} bytes of data where there are {found}"
        )
    if record.compress_type != zipfile.ZIP_STORED:
        raise Refused("its data is compressed, which torch.save never does; save it with torch")


def _inspect_legacy(path: Path) -> None:
    with path.open("rb") as file:
        stream = BytesIO(file.read(MAX_INDEX))
    first = Scan.of(stream)
    if first.stack != [_LEGACY_MAGIC]:
        raise Refused("it is a pickle, but not one that torch.save wrote")
    *_, index, order = [Scan.of(stream) for _ in range(_LEGACY_PICKLES - 1)]
    # torch leaves data uninitialized that this list leaves out, without an error.
    if set(order.listed) != set(index.storages):
        raise Refused("it is damaged: its list of data is not that of its tensors")
    wanted = sum(index.storages.values())
    if wanted > path.stat().st_size:
        raise Refused(f"it is cut short: its index wants {wanted} bytes of data, more than it has")


# ---- writing ------------------------------------------------------------------------------------


def write_pth(path: Path | IO[bytes], layout: Schema, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, each as the layout has it, as the file that torch.save makes of their dict.

    Tensors are read one at a time, so that memory holds at most one. ValueError when one has values
    too large for its type.
    """
    stored = {
        name: _Stored(str(key), *planned) for key, (name, planned) in enumerate(layout.items())
    }
    with zipfile.ZipFile(path, "w") as archive:
        index = BytesIO()
        _Indexer(index, PROTOCOL).dump(stored)
        _write_record(archive, "data.pkl", [index.getvalue()])
        for note, content in _NOTES.items():
            _write_record(archive, note, [content])
        for name, entry in stored.items():
            tensor = tensors[name]
            assert tuple(tensor.shape) == entry.shape, name
            data = pieces(name, tensor, entry.dtype)
            _write_record(archive, f"data/{entry.key}", data)
        _write_record(archive, "version", [_VERSION])


@dataclass(frozen=True)
class _Stored:
    """An entry of the index, which is pickled in place of a tensor."""

    key: str
    dtype: torch.dtype
    shape: Shape

    def __reduce__(self) -> tuple[object, ...]:
        strides = torch.empty(self.shape, device="meta").stride()
        # The arguments are the data, the offset of the tensor in it, its shape and strides, whether
        # it has a gradient, and its hooks.
        arguments: tuple[object, ...] = (_Data(self), 0, self.shape, strides, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


@dataclass(frozen=True)
class _Data:
    """The data of a tensor, which lies outside of the index."""

    tensor: _Stored


class _Indexer(pickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple[object, ...] | None:
        if not isinstance(obj, _Data):
            return None
        entry, count = obj.tensor, math.prod(obj.tensor.shape)
        return "storage", _STORAGES[entry.dtype], entry.key, "cpu", count


def _write_record(archive: zipfile.ZipFile, name: str, data: Iterable[bytes | memoryview]) -> None:
    """Add an entry to the archive, uncompressed and aligned as torch does it."""
    entry = zipfile.ZipInfo(_ROOT + name)
    assert archive.fp is not None
    begin = archive.fp.tell() + _ZIP_HEADER + len(entry.filename) + _ZIP64_FIELD + 4
    padding = -begin % _ALIGNMENT
    entry.extra = _PADDING + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(entry, "w", force_zip64=True) as file:
        for piece in data:
            file.write(piece)

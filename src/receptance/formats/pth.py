"""PyTorch checkpoint files, `.pth`, `.pt` and `.bin`: the only module that unpickles anything.

A pickle is a program, and loading one runs it. Two guards stand before that. First the instructions
are read without carrying any out, and the file is refused if they name anything but plain tensors,
in words that say what it asked for, or if they do not fit the data stored beside them. Then
`torch.load(weights_only=True)`, which has its own list of what it will construct, does the loading.
There is no fallback: no option loads a file that either guard refuses.
"""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from receptance.formats.files import check_file, reason
from receptance.formats.names import some

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
_LEGACY_PICKLES = 5  # magic number, format, system, the tensors, the order of their data
_PROTOCOL = 2  # what torch.save writes, and all that its guarded loader understands
_MAX_INDEX = 2 * 1024 * 1024  # bytes of pickle; RWKV-4 14B has 0.2 MB
_MAX_INSTRUCTIONS = 120_000  # some 2,600 tensors, read in half a second; the 14B has 726
_MAX_TUPLE = 64  # the most axes that a tensor may have

_STORAGE_BYTES = {
    "torch.DoubleStorage": 8,
    "torch.FloatStorage": 4,
    "torch.HalfStorage": 2,
    "torch.BFloat16Storage": 2,
    # Not for weights, but then the message can name the tensor.
    "torch.LongStorage": 8,
    "torch.IntStorage": 4,
    "torch.ShortStorage": 2,
    "torch.CharStorage": 1,
    "torch.ByteStorage": 1,
    "torch.BoolStorage": 1,
}
_ALLOWED = {
    "collections.OrderedDict",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    *_STORAGE_BYTES,
}


class _Refused(ValueError):
    """We know what is wrong with the file; everything else is damage."""


def read_pth(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file that `torch.save` wrote, under the names the file gives.

    Both of torch's formats. Tensors of the newer one (a zip archive) stay mapped to the file, which
    must not change while they are used; nothing is copied. ValueError, starting with the path, when
    the file asks for more than plain tensors, is damaged, or holds anything but a dict of tensors.
    """
    path = Path(path)
    check_file(path)
    try:
        return _plain(_load(path))
    except _Refused as refusal:
        raise ValueError(f"{path}: {refusal}") from None
    # torch interprets bytes that anyone may have written: any exception at all can come out.
    except Exception as error:
        raise ValueError(
            f"{path}: damaged, cut short or not written by torch.save ({_cause(error)}); "
            "download or save it again"
        ) from None


def _load(path: Path) -> object:
    with path.open("rb") as file:
        is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    if is_zip:
        _inspect_zip(path)
    else:
        _inspect_legacy(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def _plain(loaded: object) -> dict[str, Tensor]:
    """The loaded object, once it is sure to be names and plain tensors."""
    if not isinstance(loaded, dict):
        raise _Refused(f"it holds a {type(loaded).__name__}, not a dict of tensors by name")
    if not loaded:
        raise _Refused("it holds an empty dict; there are no tensors in it")
    if "_strategy" in loaded:
        raise _Refused(
            "it was converted by the `rwkv` package, which changes the weights; use the original"
        )
    # dict.items: an OrderedDict from a file may have an attribute of that name.
    return {_checked_name(name): _checked(name, value) for name, value in dict.items(loaded)}


def _checked_name(name: object) -> str:
    if not isinstance(name, str):
        raise _Refused(f"a key of its dict is a {type(name).__name__}; tensor names are strings")
    return name


def _checked(name: object, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise _Refused(
            f"its entry {some([str(name)])} is a {type(value).__name__}, not a tensor; if this is "
            "a training checkpoint, save the state dict in it as a file of its own"
        )
    # A stride of 0 makes a tensor of any size out of a few bytes.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise _Refused(f"its tensor {some([str(name)])} claims more values than the file holds")
    return value.detach()


def _cause(error: Exception) -> str:
    # torch's own words here are advice on how to load the file without a guard.
    if isinstance(error, pickle.UnpicklingError):
        return "it has instructions that torch.save does not write"
    return reason(error)


def _inspect_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        records = {entry.filename: entry for entry in entries}
        root = _root(records)
        if len(records) < len(entries):
            raise _Refused("it is a zip archive with two entries of the same name")
        if records[f"{root}data.pkl"].file_size > _MAX_INDEX:
            raise _Refused("its index is larger than that of any file of weights")
        index = _Scan.of(BytesIO(archive.read(f"{root}data.pkl")))
    for key, size in index.storages.items():
        _check_record(records.get(f"{root}data/{key}"), size)


def _root(records: dict[str, zipfile.ZipInfo]) -> str:
    """The folder inside the archive that everything lies in."""
    roots = {name.split("/")[0] + "/" for name in records if name.count("/") == 1}
    indexed = [root for root in roots if f"{root}data.pkl" in records]
    if len(indexed) != 1:
        raise _Refused("it is a zip archive, but not one that torch.save wrote")
    if f"{indexed[0]}constants.pkl" in records:
        raise _Refused("it is a TorchScript program; save the model's state dict instead")
    return indexed[0]


def _check_record(record: zipfile.ZipInfo | None, size: int) -> None:
    # torch maps the file and believes the index: another size reads the neighbour's bytes, and
    # compressed data would pass for weights, both without a word.
    if record is None or record.file_size != size:
        found = "none" if record is None else f"{record.file_size} bytes"
        raise _Refused(
            f"it is damaged: its index wants {size} bytes of data where there are {found}"
        )
    if record.compress_type != zipfile.ZIP_STORED:
        raise _Refused("its data is compressed, which torch.save never does; save it with torch")


def _inspect_legacy(path: Path) -> None:
    with path.open("rb") as file:
        stream = BytesIO(file.read(_MAX_INDEX))
    first = _Scan.of(stream)
    if first.stack != [_LEGACY_MAGIC]:
        raise _Refused("it is a pickle, but not one that torch.save wrote")
    *_, index, order = [_Scan.of(stream) for _ in range(_LEGACY_PICKLES - 1)]
    # Data that this list leaves out torch leaves uninitialised, without a word.
    if set(order.listed) != set(index.storages):
        raise _Refused("it is damaged: its list of data is not that of its tensors")
    wanted = sum(index.storages.values())
    if wanted > path.stat().st_size:
        raise _Refused(f"it is cut short: its index wants {wanted} bytes of data, more than it has")


class _Global(str):
    """What a pickle asks for by name, such as `collections.OrderedDict`."""


@dataclass
class _Scan:
    """A walk over a pickle's instructions that carries none of them out.

    The stack holds strings, whole numbers, tuples of these and global names, as far as they can be
    followed; None stands for all else. That is enough to name what is asked for, to know how much
    data the tensors need, and to refuse tuples in tuples in tuples, whose hashing overflows the
    C stack of the real loader.
    """

    stack: list[Any] = field(default_factory=list)
    marked: list[list[Any]] = field(default_factory=list)
    """What lay on the stack below each mark."""
    memo: dict[int, Any] = field(default_factory=dict)
    storages: dict[str, int] = field(default_factory=dict)
    """Bytes of data by key."""
    listed: list[Any] = field(default_factory=list)
    """What was added to lists."""

    @classmethod
    def of(cls, stream: BytesIO) -> _Scan:
        """The next pickle in the stream, scanned to its end."""
        scan = cls()
        protocol: object = _PROTOCOL
        for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if number > _MAX_INSTRUCTIONS:
                raise _Refused("its index is longer than that of any file of weights")
            if opcode.name == "PROTO":
                protocol = argument
            elif opcode.name != "STOP":
                scan.step(opcode, argument)
        # Last, so that a file of another protocol is first searched for what it asks for.
        if protocol != _PROTOCOL:
            raise _Refused(
                f"it is a pickle of protocol {protocol}, which torch.save does not write"
            )
        return scan

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        match opcode.name:
            case "GLOBAL" | "INST":
                self.stack.append(_allowed(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                name, module = self.stack.pop(), self.stack.pop()
                self.stack.append(_allowed(f"{module}.{name}"))
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" | "EMPTY_TUPLE":
                items = self.take(opcode)
                self.stack.append(_flat_enough(items))
            case "BINPERSID":
                self.add_storage(self.stack.pop())
                self.stack.append(None)
            case "APPEND" | "APPENDS":
                self.listed += self.take(opcode)[1:]
                self.stack.append(None)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "MARK":
                self.marked.append(self.stack)
                self.stack = []
            case _:
                self.take(opcode)
                known = argument if isinstance(argument, (str, int)) else None
                self.stack += [known] * len(opcode.stack_after)

    def take(self, opcode: pickletools.OpcodeInfo) -> list[Any]:
        """Off the stack what the instruction consumes, in order, marks left out."""
        above: list[Any] = []
        count = len(opcode.stack_before)
        if pickletools.markobject in opcode.stack_before:
            above, self.stack = self.stack, self.marked.pop()
            count = opcode.stack_before.index(pickletools.markobject)
        if count > len(self.stack):
            raise _Refused("it is damaged: an instruction lacks its operands")
        start = len(self.stack) - count
        below = self.stack[start:]
        del self.stack[start:]
        return below + above

    def add_storage(self, reference: Any) -> None:
        """Note the data a tensor refers to: ("storage", type, key, device, count[, None])."""
        match reference:
            case ("storage", _Global() as kind, str() as key, str(), int() as count, *_):
                size = count * _STORAGE_BYTES[kind]
            case _:
                raise _Refused("it is damaged: it refers to data in a way torch.save does not")
        if self.storages.setdefault(key, size) != size or size < 0:
            raise _Refused(f"it is damaged: its index gives data {some([key])} two sizes")


def _allowed(name: str) -> _Global:
    if name not in _ALLOWED:
        raise _Refused(
            f"refused, and nothing in it was run: it asks for {some([name])}, but weights need "
            "only plain tensors; get a file of weights alone, best as .safetensors"
        )
    return _Global(name)


def _flat_enough(items: list[Any]) -> tuple[Any, ...]:
    inner = [item for item in items if isinstance(item, tuple)]
    too_deep = any(isinstance(value, tuple) for item in inner for value in item)
    if len(items) > _MAX_TUPLE or too_deep:
        raise _Refused("it nests values deeper than torch.save does for tensors")
    return tuple(items)

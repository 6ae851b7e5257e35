"""A scan of a pickle's instructions that finds what they ask for and carries none of them out."""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from receptance.formats.names import some

# torch.save writes this protocol, and its guarded loader understands no other.
PROTOCOL = 2
# The most bytes that an index may have; that of RWKV-4 14B has 0.2 MB.
MAX_INDEX = 2 * 1024 * 1024
# This is enough for some 2,600 tensors and takes half a second; the 14B model has 726.
_MAX_INSTRUCTIONS = 120_000
# A tensor has 64 axes at most.
_MAX_TUPLE = 64

_STORAGE_BYTES = {
    "torch.DoubleStorage": 8,
    "torch.FloatStorage": 4,
    "torch.HalfStorage": 2,
    "torch.BFloat16Storage": 2,
    # Weights are never of these types; they are allowed so that a message can name the tensor.
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


class Refused(ValueError):
    """Raised when it is known what is wrong with the file; any other exception means damage."""


class _Global(str):
    """A global name that a pickle asks for, such as `collections.OrderedDict`."""


@dataclass
class Scan:
    """A walk over a pickle's instructions.

    The stack holds strings, whole numbers, global names and tuples of these; None stands for all
    other values. That is enough to find every global name, to know how much data the tensors need,
    and to refuse tuples in tuples in tuples, whose hashing overflows the C stack of the real
    loader.
    """

    stack: list[Any] = field(default_factory=list)
    marked: list[list[Any]] = field(default_factory=list)
    """The part of the stack below each mark."""
    memo: dict[int, Any] = field(default_factory=dict)
    storages: dict[str, int] = field(default_factory=dict)
    """The size in bytes of the data of each key."""
    listed: list[Any] = field(default_factory=list)
    """All items that were added to lists."""

    @classmethod
    def of(cls, stream: BytesIO) -> Scan:
        """The next pickle in the stream, scanned to its end."""
        scan = cls()
        protocol: object = PROTOCOL
        for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if number > _MAX_INSTRUCTIONS:
                raise Refused("its index is longer than that of any file of weights")
            if opcode.name == "PROTO":
                protocol = argument
            elif opcode.name != "STOP":
                scan.step(opcode, argument)
        # The protocol is checked last, so that a file of another one is searched, too.
        if protocol != PROTOCOL:
            raise Refused(f"it is a pickle of protocol {protocol}, which torch.save does not write")
        return scan

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Follow one instruction."""
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
        """Take the operands of an instruction off the stack, in order and without marks."""
        above: list[Any] = []
        count = len(opcode.stack_before)
        if pickletools.markobject in opcode.stack_before:
            above, self.stack = self.stack, self.marked.pop()
            count = opcode.stack_before.index(pickletools.markobject)
        if count > len(self.stack):
            raise Refused("it is damaged: an instruction lacks its operands")
        start = len(self.stack) - count
        below = self.stack[start:]
        del self.stack[start:]
        return below + above

    def add_storage(self, reference: Any) -> None:
        """Note the data to which a tensor refers: ("storage", type, key, device, count[, None])."""
        match reference:
            case ("storage", _Global() as kind, str() as key, str(), int() as count, *_):
                size = count * _STORAGE_BYTES[kind]
            case _:
                raise Refused("it is damaged: it refers to data in a way torch.save does not")
        if self.storages.setdefault(key, size) != size or size < 0:
            raise Refused(f"it is damaged: its index gives data {some([key])} two sizes")


def _allowed(name: str) -> _Global:
    if name not in _ALLOWED:
        raise Refused(
            f"refused, and nothing in it was run: it asks for {some([name])}, but weights need "
            "only plain tensors; get a file of weights alone, best as .safetensors"
        )
    return _Global(name)


def _flat_enough(items: list[Any]) -> tuple[Any, ...]:
    inner = [item for item in items if isinstance(item, tuple)]
    too_deep = any(isinstance(value, tuple) for item in inner for value in item)
    if len(items) > _MAX_TUPLE or too_deep:
        raise Refused("it nests values deeper than torch.save does for tensors")
    return tuple(items)

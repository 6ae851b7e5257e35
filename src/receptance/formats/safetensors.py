"""One safetensors file. The format runs no code on load; only damage has to be dealt with.

The library's own writer wants all tensors in memory at once and aligns to 8 bytes; its reader, and
everybody else's, reads what is written here too.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from receptance.formats.files import check_file, reason
from receptance.formats.writing import Schema, pieces

ALIGNMENT = 64
"""The bytes of a cache line; tensors begin at multiples of it where they can."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file under the names it gives them; they stay mapped, nothing is copied.

    ValueError, starting with the path, when the file can't be read or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    check_file(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # The library raises its own error and passes on those that torch raises for impossible shapes.
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: damaged, cut short or no safetensors file ({reason(error)}); get it again"
        ) from None


def write_safetensors(path: Path, layout: Schema, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors one at a time, in any order, each as the layout has it; none may be missing.

    Tensors whose size is a multiple of 64 bytes come first and begin at such a multiple; the format
    allows no gaps between tensors. ValueError when one has values too large for its type.
    """
    header, places = _header(layout)
    missing = set(layout)
    with path.open("wb") as file:
        file.write(header)
        for name, tensor in tensors:
            dtype, shape = layout[name]
            assert tuple(tensor.shape) == shape, name
            assert tensor.dtype.is_floating_point == dtype.is_floating_point, name
            file.seek(len(header) + places[name])
            for piece in pieces(name, tensor, dtype):
                file.write(piece)
            missing.remove(name)
            del tensor  # The memory is freed before the next tensor is made.
    assert not missing, missing


def _header(layout: Schema) -> tuple[bytes, dict[str, int]]:
    """The header of the file, and the place of each tensor behind it."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in layout.items()}
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for name in sorted(sizes, key=lambda name: sizes[name] % ALIGNMENT != 0):
        places[name], end = end, end + sizes[name]
        dtype, shape = layout[name]
        fields[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [places[name], end],
        }
    content = json.dumps(fields, separators=(",", ":")).encode()
    content += b" " * (-(8 + len(content)) % ALIGNMENT)
    return len(content).to_bytes(8, "little") + content, places

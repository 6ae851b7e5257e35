"""A safetensors file for kernels: each large tensor begins a line of the cache when it is mapped.

The library's own writer wants all tensors in memory at once and aligns to 8 bytes; its reader, and
everybody else's, reads this one too. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

ALIGNMENT = 64

_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
}

Plan = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""By name, the type and shape of every tensor that a file is to hold."""


def write_aligned(path: Path, plan: Plan, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors one at a time, in any order; each must be as planned, none may be missing.

    Those with a multiple of 64 bytes begin at one; the format has no room between tensors.
    """
    header, places = _header(plan)
    missing = set(plan)
    with path.open("wb") as file:
        file.write(header)
        for name, tensor in tensors:
            assert (tensor.dtype, tuple(tensor.shape)) == plan[name], name
            file.seek(len(header) + places[name])
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            missing.remove(name)
    assert not missing, missing


def _header(plan: Plan) -> tuple[bytes, dict[str, int]]:
    """The first bytes of the file, and where behind them each tensor begins."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in plan.items()}
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for name in sorted(sizes, key=lambda name: sizes[name] % ALIGNMENT != 0):
        places[name], end = end, end + sizes[name]
        dtype, shape = plan[name]
        fields[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [places[name], end],
        }
    content = json.dumps(fields, separators=(",", ":")).encode()
    content += b" " * (-(8 + len(content)) % ALIGNMENT)
    return len(content).to_bytes(8, "little") + content, places

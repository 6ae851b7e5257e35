"""What the gguf package does here: it writes headers, and knows the blocks of 256 values.

gguf_header.py says why it does not read headers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from receptance.formats.ggml import Bytes, Floats
from receptance.formats.gguf_header import SUPER_BYTES
from receptance.formats.gguf_tokenizer import Field
from receptance.model.architecture import Shape

# This many blocks are handled at a time, so that intermediate results stay small.
_AT_ONCE = 1 << 12


def super_blocks(data: Bytes, kind: str) -> Floats:
    """The values of whole blocks of a kind such as Q4_K: [bytes] -> [values] float32."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    step = SUPER_BYTES[kind] * _AT_ONCE
    # Scales that are not finite are passed on, for the checks of the weights to find.
    with np.errstate(invalid="ignore", over="ignore"):
        parts = [
            dequantize(data[at : at + step][None], GGMLQuantizationType[kind])[0]
            for at in range(0, len(data), step)
        ]
    return np.concatenate(parts)


def write_header(
    path: Path,
    architecture: str,
    fields: Mapping[str, Field],
    tensors: Mapping[str, tuple[str, Shape, int]],
) -> None:
    """Write all that stands before the data: the keys, and each tensor's type, shape and bytes.

    The file is replaced. The data follow in the order of the tensors, each from a multiple of
    gguf_header.ALIGNMENT on.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, architecture)
    add: dict[type, Callable[[str, Any], None]] = {
        str: writer.add_string,
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        list: writer.add_array,
    }
    for key, value in fields.items():
        add[type(value)](key, value)
    anything = np.dtype(np.float32)  # The writer looks at the other type that it is given.
    for name, (kind, shape, size) in tensors.items():
        writer.add_tensor_info(name, shape, anything, size, GGMLQuantizationType[kind])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()

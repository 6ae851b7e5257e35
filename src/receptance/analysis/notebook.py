"""Pictures of numbers for notebooks, as HTML that needs nothing else."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

# From nothing to all: white to dark violet, like the pictures of the paper.
_RAMP = torch.tensor([[255, 255, 255], [158, 154, 200], [63, 0, 125]], dtype=torch.float32)
_LARGEST = 320  # pixels of the longer side of a picture


def image(values: Tensor) -> str:
    """An <img> of a matrix [R,C], whose smallest value is white and whose largest is dark."""
    rows, columns = values.shape
    scale = max(1, _LARGEST // max(rows, columns))
    size = f"width:{columns * scale}px;height:{rows * scale}px"
    data = base64.b64encode(as_png(values)).decode()
    return (
        f'<img alt="heat map of {rows} x {columns} values" src="data:image/png;base64,{data}" '
        f'style="image-rendering:pixelated;max-width:none;border:1px solid gray;{size}">'
    )


def as_png(values: Tensor) -> bytes:
    """A matrix [R,C] as a PNG with one pixel for each value."""
    values = values.detach().float().cpu().nan_to_num()
    spread = values.max() - values.min() if values.numel() else torch.tensor(0.0)
    at = (values - values.min()) / spread * 2 if spread > 0 else torch.zeros_like(values)
    low = at.long().clamp(max=1)
    pixels = torch.lerp(_RAMP[low], _RAMP[low + 1], (at - low)[..., None]).round().byte()
    # Each row begins with the number of its filter, which is none.
    rows = torch.cat([torch.zeros(len(pixels), 1, dtype=torch.uint8), pixels.flatten(1)], dim=1)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows.numpy().tobytes())), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def row_of_figures(figures: Mapping[str, str]) -> str:
    """Pictures beside each other, each with its caption below."""
    shown = "".join(
        f'<figure style="margin:6px">{picture}<figcaption>{html.escape(caption)}</figcaption>'
        "</figure>"
        for caption, picture in figures.items()
    )
    return f'<div style="display:flex;flex-wrap:wrap">{shown}</div>'


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table of texts."""
    cells = ["".join(f"<td>{html.escape(text)}</td>" for text in row) for row in rows]
    top = "".join(f"<th>{html.escape(text)}</th>" for text in header)
    return f"<table><tr>{top}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

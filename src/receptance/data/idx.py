"""Image sets in the idx format of MNIST, such as Debian's dataset-fashion-mnist, as sequences.

An idx file has two zero bytes, a type, the number of axes, their sizes as big-endian integers, and
the values. It may be packed with gzip.
"""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np

from receptance.data.labeled import Part, Problem, Split, StoredExamples, split_off

_BYTES = 0x08  # the type of unsigned bytes
_STEMS = {"train": "train", "test": "t10k"}
_VALIDATION = 0.1
_PACKED = b"\x1f\x8b"


def is_idx_folder(folder: Path) -> bool:
    """Whether a folder holds the images of a set like MNIST."""
    return any(folder.glob("train-images*idx3-ubyte*"))


def read_idx(file: Path) -> np.ndarray:
    """The values of an idx file of unsigned bytes; ValueError if it is none, or cut short."""
    try:
        content = file.read_bytes()
        content = gzip.decompress(content) if content.startswith(_PACKED) else content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _BYTES:
        raise ValueError(f"{file} is no idx file of bytes")
    axes = content[3]
    start = 4 + 4 * axes
    if not axes or len(content) < start:
        raise ValueError(f"{file} is cut short: its header is not whole")
    shape = struct.unpack(f">{axes}I", content[4:start])
    values = np.frombuffer(content, np.uint8, offset=start)
    wanted = 1
    for size in shape:  # Python's integers: a damaged header could name sizes beyond any other.
        wanted *= size
    if len(values) != wanted:
        raise ValueError(f"{file} has {len(values):,} values; its header says {list(shape)}")
    return values.reshape(shape)


def read_idx_folder(folder: Path, *, seed: int = 0) -> StoredExamples:
    """Gray images read pixel by pixel, row after row: [T,1] bytes and a class each.

    The test part is the set's own; a tenth of the training part is kept for validation.
    """
    found, digest = {}, hashlib.sha256()
    for split, stem in _STEMS.items():
        images, labels = (read_idx(_file(folder, f"{stem}-{x}")) for x in ("images", "labels"))
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{folder}: {stem} has images {list(images.shape)} and labels "
                f"{list(labels.shape)}; wanted [N,H,W] and [N]"
            )
        digest.update(images.tobytes() + labels.tobytes())
        found[split] = Part(list(images.reshape(len(images), -1, 1)), labels.astype(np.int64))
    classes = 1 + max(int(part.targets.max(initial=0)) for part in found.values())
    problem = Problem(kind="classify", outputs=classes, channels=1)
    train, validation = split_off(found["train"], _VALIDATION, seed, problem)
    parts: dict[Split, Part] = {"train": train, "validation": validation, "test": found["test"]}
    about = {"task": "images", "sha256": digest.hexdigest(), "pixels": images[0].size}
    return StoredExamples(problem, parts, about)


def _file(folder: Path, stem: str) -> Path:
    """The file of a set, packed or not."""
    found = sorted(folder.glob(f"{stem}-idx*-ubyte*"))
    if not found:
        raise ValueError(f"{folder} has no {stem}-idx*-ubyte file")
    return found[0]

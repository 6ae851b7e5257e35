"""The versions of RWKV that there are."""

from __future__ import annotations

import reprlib

from receptance.model.architecture import Architecture
from receptance.model.v4 import RWKV4

VERSIONS: dict[int, Architecture] = {4: RWKV4()}


def architecture(version: int) -> Architecture:
    """The version of that number; ValueError lists those there are."""
    if version not in tuple(VERSIONS):  # a tuple, because what is asked for may be unhashable
        known = ", ".join(map(str, VERSIONS))
        raise ValueError(
            f"RWKV version {reprlib.repr(version)} is not supported; "
            f"this release builds version {known}"
        )
    return VERSIONS[version]

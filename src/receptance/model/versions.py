"""The table of the versions of RWKV that this release can build."""

from __future__ import annotations

import reprlib

from receptance.model.architecture import Architecture
from receptance.model.v4 import RWKV4
from receptance.model.v7 import RWKV7

VERSIONS: dict[int, Architecture] = {4: RWKV4(), 7: RWKV7()}


def architecture(version: int) -> Architecture:
    """The architecture of a version, by number; ValueError lists the known versions."""
    if version not in tuple(VERSIONS):  # This is a tuple, because `version` may be unhashable.
        known = ", ".join(map(str, VERSIONS))
        raise ValueError(
            f"RWKV version {reprlib.repr(version)} is not supported; "
            f"this release builds versions {known}"
        )
    return VERSIONS[version]

"""The table of the versions of RWKV that this release can build."""

from __future__ import annotations

import reprlib

from receptance.model.architecture import Architecture
from receptance.model.v4 import RWKV4
from receptance.model.v5 import RWKV50, RWKV51, RWKV52
from receptance.model.v6 import RWKV6
from receptance.model.v7 import RWKV7

VERSIONS: dict[float, Architecture] = {
    version.number: version for version in (RWKV4(), RWKV50(), RWKV51(), RWKV52(), RWKV6(), RWKV7())
}


def architecture(version: float) -> Architecture:
    """The architecture of a version, by number; ValueError lists the known versions."""
    if version not in tuple(VERSIONS):  # This is a tuple, because `version` may be unhashable.
        known = ", ".join(map(str, VERSIONS))
        raise ValueError(
            f"RWKV version {reprlib.repr(version)} is not supported; "
            f"this release builds versions {known}"
        )
    return VERSIONS[version]

"""The table of the architectures that can be compared."""

from __future__ import annotations

import difflib

from receptance.evaluation.compare.baselines import Llama, NeoX
from receptance.evaluation.compare.families import RWKV, Family
from receptance.model.versions import VERSIONS

FAMILIES: dict[str, Family] = {
    family.name: family for family in (*map(RWKV, VERSIONS), NeoX(), Llama())
}


def family(name: str) -> Family:
    """The architecture of that name; ValueError names the nearest one, and all."""
    if name in FAMILIES:
        return FAMILIES[name]
    near = difflib.get_close_matches(name, FAMILIES, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"models= has {name!r}; {hint}there are {', '.join(FAMILIES)}")

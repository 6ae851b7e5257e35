"""Receptance: RWKV language models, trained in parallel and run with constant memory."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from receptance.version import __version__

if TYPE_CHECKING:
    from receptance.config import ModelConfig
    from receptance.engine import load_engine
    from receptance.inference.batching import Slots
    from receptance.inference.generation import Generation, generate
    from receptance.inference.rows import Request
    from receptance.inference.sampling import Sampling
    from receptance.model import Model
    from receptance.state import State
    from receptance.storage.checkpoint import load, save

__all__ = [
    "Generation",
    "Model",
    "ModelConfig",
    "Request",
    "Sampling",
    "Slots",
    "State",
    "__version__",
    "generate",
    "load",
    "load_engine",
    "save",
]

# The module of each public name. It is imported with the name's first use (PEP 562), because torch
# takes seconds to import and `receptance --version` needs none of it.
_HOMES = {
    "Generation": "receptance.inference.generation",
    "Model": "receptance.model",
    "ModelConfig": "receptance.config",
    "Request": "receptance.inference.rows",
    "Sampling": "receptance.inference.sampling",
    "Slots": "receptance.inference.batching",
    "State": "receptance.state",
    "generate": "receptance.inference.generation",
    "load": "receptance.storage.checkpoint",
    "load_engine": "receptance.engine",
    "save": "receptance.storage.checkpoint",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # so that this function is asked once for each name
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

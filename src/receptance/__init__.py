"""Receptance: RWKV language models, trained in parallel and run with constant memory."""

from receptance.config import ModelConfig
from receptance.engine import load_engine
from receptance.inference.batching import Slots
from receptance.inference.generation import Generation, generate
from receptance.inference.rows import Request
from receptance.inference.sampling import Sampling
from receptance.model import Model
from receptance.state import State
from receptance.storage.checkpoint import load, save
from receptance.version import __version__

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

"""Receptance: RWKV language models, trained in parallel and run with constant memory."""

from receptance.batching import Slots
from receptance.checkpoint import load, save
from receptance.config import ModelConfig
from receptance.engine import load_engine
from receptance.generation import Generation, generate
from receptance.model import Model
from receptance.rows import Request
from receptance.sampling import Sampling
from receptance.state import State
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

"""Receptance: RWKV language models, trained in parallel and run with constant memory."""

from receptance.checkpoint import load, save
from receptance.config import ModelConfig
from receptance.generation import Generation, generate
from receptance.model import Model
from receptance.sampling import Sampling
from receptance.state import State
from receptance.version import __version__

__all__ = [
    "Generation",
    "Model",
    "ModelConfig",
    "Sampling",
    "State",
    "__version__",
    "generate",
    "load",
    "save",
]

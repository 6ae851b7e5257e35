"""Engines run a model: their interface, and the kernels that own packed weights."""

from receptance.engine.base import Engine
from receptance.engine.load import EngineOptions, load_engine, native_engine
from receptance.engine.native import NativeEngine

__all__ = ["Engine", "EngineOptions", "NativeEngine", "load_engine", "native_engine"]

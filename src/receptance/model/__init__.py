"""The model: what all versions of RWKV share, and one module for each version."""

from receptance.model.rwkv import Model, starting_values

__all__ = ["Model", "starting_values"]

"""The model, one module per RWKV version."""

from receptance.model.rwkv import Model, starting_values

__all__ = ["Model", "starting_values"]

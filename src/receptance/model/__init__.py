"""The model, one module per RWKV version."""

from receptance.model.rwkv import Model

__all__ = ["Model"]

"""The recurrence and its kernels. Knows only torch."""

from receptance.ops.backends import OPERATORS, available_backends
from receptance.ops.wkv import WKVState, wkv4
from receptance.ops.wkv7 import wkv7

__all__ = ["OPERATORS", "WKVState", "available_backends", "wkv4", "wkv7"]

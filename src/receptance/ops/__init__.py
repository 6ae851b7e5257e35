"""The recurrence and its kernels. Knows only torch."""

from receptance.ops.sources import Sources, wkv4_sources
from receptance.ops.wkv import WKVState, available_backends, wkv4

__all__ = ["Sources", "WKVState", "available_backends", "wkv4", "wkv4_sources"]

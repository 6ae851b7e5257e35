"""The recurrence and its kernels. Knows only torch."""

from receptance.ops.wkv import WKVState, available_backends, wkv4

__all__ = ["WKVState", "available_backends", "wkv4"]

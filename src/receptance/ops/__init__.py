"""The recurrence and its kernels. Knows only torch."""

from receptance.ops.backends import OPERATORS, available_backends
from receptance.ops.sources import Sources, wkv4_sources, wkv6_sources, wkv7_sources
from receptance.ops.wkv import WKVState, wkv4
from receptance.ops.wkv6_operator import wkv6
from receptance.ops.wkv7_operator import wkv7

__all__ = [
    "OPERATORS",
    "Sources",
    "WKVState",
    "available_backends",
    "wkv4",
    "wkv4_sources",
    "wkv6",
    "wkv6_sources",
    "wkv7",
    "wkv7_sources",
]

"""What a request may ask for, and how long anything may take."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

MOST_CHOICES = 16
"""Continuations of one prompt."""
MOST_STOPS = 16
"""Stop strings of one request."""
LONGEST_STOP = 256
"""Characters of a stop string."""
MOST_LIKELIEST = 20
"""Alternatives that are told in each place."""
MOST_PROMPTS = 256
"""Prompts of one request."""
MOST_BIASES = 1024
"""Entries of logit_bias."""
MOST_MESSAGES = 4096
"""Messages of a conversation."""
MOST_TOOLS = 64
"""Tools of a conversation."""
DEEPEST_SCHEMA = 32
"""Levels of a JSON schema."""
LARGEST_SCHEMA = 64 << 10
"""Bytes of a JSON schema."""
MOST_HEADERS = 64 << 10
"""Bytes of a request's headers."""
LARGEST_STATE = 64 << 20
"""Bytes of a state that a client hands in."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds that depend on the machine and on who uses the server."""

    max_body: int = 2 << 20
    """Refuse a request whose body has more than this number of bytes."""
    max_tokens: int = 16384
    """Refuse a request for more than this number of tokens in one answer."""
    max_waiting: int = 512
    """Refuse a request if more than this number of prompts wait for their turn."""
    max_waiting_tokens: int = 1 << 20
    """Refuse a request if the prompts that wait hold more than this number of tokens."""
    max_connections: int = 1024
    """Accept at most this number of connections."""
    wait_seconds: float = 60
    """Give a request up if its turn has not come after this time."""
    send_seconds: float = 30
    """Give a client up that does not take what is sent, or does not send its request, in this
    time."""
    drain_seconds: float = 20
    """When the server is to end, let answers go on for this time."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 < getattr(self, field.name) < math.inf:
                raise ValueError(
                    f"{field.name} is {getattr(self, field.name)}; it must be over 0 and finite"
                )

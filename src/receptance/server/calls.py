"""A request as the endpoints see it, and what they answer."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from receptance.server.errors import ApiError, refusal
from receptance.server.models import Models

Body = TypeVar("Body", bound=msgspec.Struct)

JSON = "application/json"


@dataclass(frozen=True)
class Call:
    """One request whose sender may ask."""

    models: Models
    body: bytes = b""
    owner: str = ""
    """Whose key it has; nothing if the server needs none."""
    path: Mapping[str, str] = field(default_factory=dict)
    """The variable parts of the path."""
    query: Mapping[str, str] = field(default_factory=dict)

    def decode(self, kind: type[Body]) -> Body:
        """The body as a struct; ApiError names what is wrong in it."""
        try:
            try:
                return msgspec.json.decode(self.body, type=kind)
            except msgspec.ValidationError:
                return _without_nulls(msgspec.json.decode(self.body), kind)
        except msgspec.ValidationError as error:
            raise _invalid(str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            said = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise refusal(
                f"the body is not valid JSON: {said[:200]}", code="invalid_json"
            ) from None


@dataclass(frozen=True)
class Reply:
    """A whole answer."""

    body: bytes
    media_type: str = JSON
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Streamed:
    """An answer that comes in events.

    The pieces are those of server-sent events; `end` follows them, and an error in their midst is
    told by `failure`.
    """

    pieces: AsyncIterator[bytes]
    end: bytes = b"data: [DONE]\n\n"
    anthropic: bool = False

    def failure(self, error: ApiError) -> bytes:
        """The event that tells of an error."""
        if self.anthropic:
            return event(error.anthropic, "error")
        return event(error.openai)


def reply(value: Any, status: int = 200) -> Reply:
    """A value as JSON."""
    return Reply(msgspec.json.encode(value), status=status)


def event(value: Any, name: str | None = None) -> bytes:
    """A value as a server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + msgspec.json.encode(value) + b"\n\n"


STILL_HERE = b": still here\n\n"
"""A comment between events, which readers pass over."""


async def first(streamed: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same pieces, after waiting for the first of them.

    An error before it can still be answered with a status of its own.
    """
    iterator = aiter(streamed)
    begun = await anext(iterator, None)

    async def pieces() -> AsyncIterator[bytes]:
        try:
            if begun is not None:
                yield begun
            async for piece in iterator:
                yield piece
        finally:
            close = getattr(iterator, "aclose", None)
            if close is not None:
                await asyncio.shield(close())

    return pieces()


def _without_nulls(value: Any, kind: type[Body]) -> Body:
    """A parsed body as a struct, in which unknown fields may be null.

    Such a field says nothing, and clients that send an earlier answer back send all of its fields.
    ValidationError for anything else that is wrong.
    """
    while True:
        try:
            return msgspec.convert(value, type=kind)
        except msgspec.ValidationError as error:
            said, _, place = str(error).partition(" - at `")
            if not said.startswith("Object contains unknown field `"):
                raise
            # Such as $.input[1].content[0]; all entries of a list are mended at once.
            steps = re.findall(r"[^$.`\[\]]+|\[", place)
            if not _drop(value, steps, said.split("`")[1]):
                raise


def _drop(value: Any, steps: list[str], name: str) -> bool:
    """Remove what has this name and is null wherever these steps lead; whether there was any."""
    places = [value]
    for step in steps:
        if step == "[":
            lists = [place for place in places if isinstance(place, list)]
            places = [inner for entries in lists for inner in entries]
        elif not step.isdigit() and step != "...":
            places = [place[step] for place in places if isinstance(place, dict) and step in place]
    objects = [p for p in places if isinstance(p, dict) and name in p and p[name] is None]
    for place in objects:
        del place[name]
    return bool(objects)


def _invalid(message: str) -> ApiError:
    """What msgspec says of a wrong body, with the parameter's name.

    It says for example: Object contains unknown field `foo` - at `$.stream_options`.
    """
    said, _, place = message.partition(" - at `")
    param = place.rstrip("`").removeprefix("$").removeprefix(".") or None
    if said.startswith("Object contains unknown field `"):
        name = said.split("`")[1]
        param = f"{param}.{name}" if param else name
        return refusal(f"unknown parameter: {param}", param, "unknown_parameter")
    if said.startswith("Object missing required field `"):
        name = said.split("`")[1]
        param = f"{param}.{name}" if param else name
        return refusal(f"{param} is missing", param, "missing_required_parameter")
    said = said[:1].lower() + said[1:]
    return refusal(f"{param or 'the body'}: {said}", param, "invalid_value")

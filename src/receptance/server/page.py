"""The chat page: a few static files that load nothing from elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from receptance.server.calls import Call, Reply
from receptance.server.routes import Endpoint

_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "chat.css": "text/css; charset=utf-8",
    "chat.js": "text/javascript; charset=utf-8",
    "store.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
# Scripts, styles and answers come from this server alone, and no other page may frame this one.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def page_endpoints() -> Sequence[Endpoint]:
    """The page at / and the files that it loads."""
    return tuple(
        Endpoint(
            "GET", "/" if name == "index.html" else f"/page/{name}", _sender(name), public=True
        )
        for name in _TYPES
    )


def _sender(name: str):  # type: ignore[no-untyped-def]
    async def file(call: Call) -> Reply:
        """A file of the chat page."""
        content, tag = _content(name)
        headers = {
            "content-security-policy": _POLICY,
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
            "etag": tag,
        }
        return Reply(content, _TYPES[name], headers=headers)

    return file


@cache
def _content(name: str) -> tuple[bytes, str]:
    content = (files("receptance.server") / "static" / name).read_bytes()
    return content, f'"{hashlib.sha256(content).hexdigest()[:32]}"'

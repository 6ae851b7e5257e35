"""API keys: who may ask, and whose texts share the cache."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_SHORTEST = 16


@dataclass(frozen=True)
class Keys:
    """The keys that open the server; without any, everybody may ask."""

    digests: tuple[bytes, ...] = field(default=(), repr=False)

    @classmethod
    def read(cls, path: Path) -> Keys:
        """The keys in a file, one on each line; # at its beginning or behind a space is a comment.

        ValueError if the file has none, one that is so short that it could be guessed, or one that
        cannot stand in a header.
        """
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise ValueError(f"cannot read the keys in {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not text; it should hold one key on each line") from None
        keys = [key for line in lines if (key := re.split(r"(?:^|\s)#", line)[0].strip())]
        for number, key in enumerate(keys, 1):
            if not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(
                    f"key {number} in {path} has other characters than letters, digits and signs "
                    "of ASCII; clients could not send it"
                )
            if len(key) < _SHORTEST:
                raise ValueError(
                    f"key {number} in {path} has {len(key)} characters; use at least {_SHORTEST}, "
                    "such as those of `openssl rand -hex 24`"
                )
        if not keys:
            raise ValueError(f"{path} holds no key; write one on each line")
        return cls(tuple(_digest(key) for key in keys))

    def owner(self, headers: Mapping[str, str]) -> str | None:
        """Who a request is from, as a name that does not tell the key; None if it has no good key.

        The key stands in Authorization (Bearer) or in x-api-key. All keys are compared, each in a
        time that does not depend on where it differs.
        """
        if not self.digests:
            return ""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest, found = _digest(given), None
        for known in self.digests:
            if hmac.compare_digest(known, digest):
                found = known.hex()
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()

"""The text of a row that is generated token by token: what is certain, and where it stops."""

from __future__ import annotations

from collections.abc import Sequence

from receptance.tokenizer import Tokenizer


class TextStream:
    """The text of a row; it holds back incomplete characters and what may become a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str] = ()) -> None:
        self._decoder = tokenizer.stream()
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        self._held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """The text that is certain after one more token, and whether a stop string ended it."""
        text = self._decoder.push(token)
        if not self._stop:
            return text, False
        self._held += text
        # The stop string that is complete first ends the text, however it is cut into tokens.
        found = [(at + len(s), at) for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            text, self._held = self._held[: min(found)[1]], ""
            return text, True
        certain = len(self._held) - max(_overlap(self._held, s) for s in self._stop)
        text, self._held = self._held[:certain], self._held[certain:]
        return text, False

    def finish(self) -> str:
        """The text that is still held back when the row ends without a stop string."""
        text, self._held = self._held + self._decoder.flush(), ""
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text with which the stop string begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)

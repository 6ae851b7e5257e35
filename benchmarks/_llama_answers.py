"""Answers of `receptance serve` in the fields of llama-server (see _llama_shim.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


class Completions:
    """The answers of /v1/completions in the fields of /completion."""

    def __init__(self, shim: Any, prompts: Any, several: bool, told: dict[str, Any]) -> None:
        self.shim, self.prompts, self.several, self.told = shim, prompts, several, told
        self.reason: dict[int, str] = {}
        self.written = dict.fromkeys(range(len(prompts)), 0)

    def __call__(self, value: Any) -> Any:
        if not value.get("object"):
            return value
        if value["choices"] and "usage" not in value:  # a piece of a stream
            choice = value["choices"][0]
            self.reason[choice["index"]] = choice["finish_reason"]
            return self._piece(choice) | {"stop": False}
        if not value["choices"]:  # the end of a stream
            last = [self._end(index, "", [], value["usage"]) for index in self.written]
            return last[0]
        found = []
        for choice in value["choices"]:
            self.reason[choice["index"]] = choice["finish_reason"]
            piece = self._piece(choice)
            tokens = piece["tokens"] if self.told["tokens"] else []
            end = self._end(choice["index"], piece["content"], tokens, value["usage"])
            if "completion_probabilities" in piece:
                end["completion_probabilities"] = piece["completion_probabilities"]
            found.append(self._only(end))
        return found if self.several else found[0]

    def _piece(self, choice: Any) -> dict[str, Any]:
        logprobs = choice["logprobs"] or {"tokens": [], "token_logprobs": [], "top_logprobs": []}
        ids = [self.shim.ids[text] for text in logprobs["tokens"]]
        self.written[choice["index"]] += len(ids)
        piece = {"index": choice["index"], "content": choice["text"], "tokens": ids}
        if self.told["probabilities"]:
            rows = zip(ids, logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
            piece["completion_probabilities"] = [
                self._token(token, score)
                | {"top_logprobs": [self._token(self.shim.ids[t], x) for t, x in best.items()]}
                for token, score, best in rows
            ]
        return piece

    def _token(self, token: int, score: float) -> dict[str, Any]:
        content = self.shim.tokenizer.decode_bytes([token])
        text = content.decode("utf-8", "replace")
        return {"id": token, "token": text, "bytes": list(content), "logprob": score}

    def _end(self, index: int, text: str, tokens: list[int], usage: Any) -> dict[str, Any]:
        cached = usage["prompt_tokens_details"]["cached_tokens"] if not self.several else 0
        read, written = len(self.prompts[index]), self.written[index]
        timings = {"prompt_n": read - cached, "cache_n": cached, "predicted_n": written}
        return {
            "index": index,
            "content": text,
            "tokens": tokens,
            "stop": True,
            "stop_type": "limit" if self.reason[index] == "length" else "word",
            "model": self.shim.flags.alias,
            "prompt": self.shim.tokenizer.decode(self.prompts[index]),
            "tokens_evaluated": read,
            "tokens_predicted": written,
            "tokens_cached": cached,
            "truncated": False,
            "has_new_line": "\n" in text,
            "generation_settings": self.told["settings"],
            "timings": timings,
        }

    def _only(self, end: dict[str, Any]) -> dict[str, Any]:
        """The fields that were asked for; a/b is b in the object a."""
        if not self.told["only"]:
            return end
        found = {}
        for name in self.told["only"]:
            value: Any = end
            for part in name.split("/"):
                value = value.get(part) if isinstance(value, dict) else None
            found[name] = value
        return found


class Back:
    """Sends an answer on whose JSON, or the JSON of whose events, is translated."""

    def __init__(self, send: Any, back: Callable[[Any], Any]) -> None:
        self._send, self._back = send, back
        self._start: Any = None
        self._streams, self._held = False, b""

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._start, self._streams = message, kind.startswith(b"text/event-stream")
            if self._streams:
                await self._send(message)
            return
        self._held += message["body"]
        more = message.get("more_body", False)
        if self._streams:
            *events, self._held = self._held.split(b"\n\n")
            body = b"".join(self._event(event) + b"\n\n" for event in events)
            await self._send(message | {"body": body})
        elif not more:
            if self._start["status"] == 200:
                self._held = json.dumps(self._back(json.loads(self._held))).encode()
            kept = [(n, v) for n, v in self._start["headers"] if n != b"content-length"]
            length = (b"content-length", str(len(self._held)).encode())
            await self._send(self._start | {"headers": [*kept, length]})
            await self._send({"type": "http.response.body", "body": self._held})

    def _event(self, event: bytes) -> bytes:
        head, data, rest = event.partition(b"data: {")
        return (
            head + b"data: " + json.dumps(self._back(json.loads(b"{" + rest))).encode()
            if data
            else event
        )


def first_delta(value: Any) -> Any:
    """llama-server begins a streamed message with null where OpenAI has an empty text."""
    for choice in value.get("choices", ()):
        if choice.get("delta", {}).get("role"):
            choice["delta"]["content"] = None
    return value

"""`receptance serve` in the place of llama-server, for llama.cpp's own tests (see llama_suite.py).

    python benchmarks/_llama_shim.py --model FILE [further flags of llama-server]

It translates forms: flags, paths, and the names of parameters and fields. Whatever answers is our
server. What that does not have is refused, or left out of the answer, and never made up. Flags that
choose how llama.cpp computes are passed over, and so is the length of a context, which has no limit
here.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _llama_answers import Back, Completions, first_delta

PASSED_OVER = {
    **dict.fromkeys(("--batch-size", "--ubatch-size", "--threads", "--n-gpu-layers"), 1),
    **dict.fromkeys(("--ctx-size", "--cache-ram", "-ctk", "-ctv", "-fa", "--reasoning-format"), 1),
    **dict.fromkeys(("--cont-batching", "--kv-unified", "--swa-full", "--offline"), 0),
    **dict.fromkeys(("--no-cache-idle-slots", "--jinja", "--no-jinja", "--verbose"), 0),
    **dict.fromkeys(("--embedding", "--backend-sampling"), 0),
    "--media-path": 1,
}
"""Flags that change no answer to a text, with the numbers of their values."""
WITHOUT_EFFECT = ("id_slot", "timings_per_token", "backend_sampling")
"""Parameters that change no answer."""


def parsed(argv: list[str]) -> argparse.Namespace:
    """The flags of llama-server; SystemExit names one that has no counterpart."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--alias", default="model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--temp", type=float, default=0.8)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--n-predict", type=int, default=-1)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--pooling", choices=["mean", "last"])
    parser.add_argument("--api-key")
    parser.add_argument("--slots", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--metrics", action="store_true")
    for flag, values in PASSED_OVER.items():
        parser.add_argument(flag, **({} if values else {"action": "store_true"}))
    return parser.parse_args(argv)


class Shim:
    """Our server as an ASGI application with llama-server's paths, parameters and fields."""

    def __init__(self, app: Any, flags: argparse.Namespace) -> None:
        from receptance.server.api.tokens import token_text

        self.app, self.flags = app, flags
        self.limits, self.drain = app.limits, app.drain
        served = app.models.loaded()[0]
        self.scheduler, self.tokenizer = served.scheduler, served.tokenizer
        ids = range(self.tokenizer.vocab_size)
        self.ids = {token_text(self.tokenizer, token): token for token in ids}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request (see the ASGI specification)."""
        if scope["type"] != "http" or scope["method"] == "OPTIONS":
            return await self.app(scope, receive, send)
        path, body = scope["path"], b""
        message = {"more_body": True}
        while message.get("more_body"):
            message = await receive()
            body += message.get("body", b"")
        if scope["method"] == "GET" and (own := self._own(path)) is not None:
            return await _send_json(send, *own)
        try:
            fields = json.loads(body)
            assert isinstance(fields, dict)
        except (ValueError, AssertionError):
            fields = None
        path, translate = self._translation(path)
        back: Callable[[Any], Any] | None = None
        if fields is not None and translate is not None:
            try:
                fields, back = translate(fields)
            except (KeyError, TypeError, ValueError) as error:
                said = {"message": f"wrong parameters: {error!r}", "type": "invalid_request_error"}
                return await _send_json(send, {"error": said}, 400)
            body = json.dumps(fields).encode()
        headers = [(n, v) for n, v in scope["headers"] if n != b"content-length"]
        headers += [(b"content-length", str(len(body)).encode())] * bool(body)
        held = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Any:
            return held.pop() if held else await receive()

        scope = scope | {"path": path, "headers": headers}
        await self.app(scope, again, Back(send, back).send if back is not None else send)

    def _own(self, path: str) -> tuple[Any, int] | None:
        """What is told of the server itself."""
        flags = self.flags
        if path == "/props":
            params = {"seed": flags.seed, "temperature": flags.temp, "n_predict": flags.n_predict}
            settings = {"params": params}
            found = {"total_slots": flags.parallel, "model_path": flags.model}
            return found | {"default_generation_settings": settings}, 200
        if path in ("/slots", "/metrics") and not getattr(flags, path[1:]):
            said = {"message": f"start the server with --{path[1:]}", "type": "not_supported_error"}
            return {"error": said}, 501
        if path == "/slots":
            used = self.scheduler.rows
            return [{"id": n, "is_processing": n < used} for n in range(flags.parallel)], 200
        return None

    def _translation(self, path: str) -> tuple[str, Callable[..., Any] | None]:
        """Our path in the place of one of llama-server's, and what translates its requests."""
        v1 = path if path.startswith("/v1/") else f"/v1{path}"
        return {
            "/completion": ("/v1/completions", self._completion),
            "/completions": ("/v1/completions", self._completion),
            "/v1/completions": (v1, self._openai),
            "/chat/completions": (v1, self._chat),
            "/v1/chat/completions": (v1, self._chat),
            "/chat/completions/input_tokens": ("/v1/messages/count_tokens", self._count),
            "/responses": (v1, self._named),
            "/v1/responses": (v1, self._named),
            "/v1/messages": (v1, self._named),
            "/v1/messages/count_tokens": (v1, self._named),
            "/embeddings": (v1, self._embeddings),
            "/v1/embeddings": (v1, self._openai_embeddings),
            "/tokenize": (path, self._tokenize),
            "/detokenize": (path, self._detokenize),
            "/models": (v1, None),
        }.get(path, (path, None))

    # ---- requests, and how their answers are translated back -----------------------------------

    def _defaults(self, fields: dict[str, Any]) -> dict[str, Any]:
        """What all requests for text have in common."""
        fields = {k: v for k, v in fields.items() if k not in WITHOUT_EFFECT and v is not None}
        fields["model"] = self.flags.alias
        if "repeat_penalty" in fields:
            fields["repetition_penalty"] = fields.pop("repeat_penalty")
        if "cache_prompt" in fields and not fields.pop("cache_prompt"):
            fields["cache_salt"] = secrets.token_hex(8)
        if "logit_bias" in fields:
            fields["logit_bias"] = self._bias(fields["logit_bias"])
        return {"temperature": self.flags.temp, "seed": self.flags.seed} | fields

    def _named(self, fields: dict[str, Any]) -> tuple[dict[str, Any], None]:
        """A request in a form that both servers have; llama-server takes any name of a model."""
        kept = {name: value for name, value in fields.items() if name not in WITHOUT_EFFECT}
        return kept | {"model": self.flags.alias}, None

    def _openai(self, fields: dict[str, Any]) -> tuple[dict[str, Any], None]:
        fields = self._defaults(fields)
        limit = fields.pop("n_predict", -1)
        if "max_tokens" not in fields and "max_completion_tokens" not in fields:
            fields["max_tokens"] = self._tokens(limit)
        return fields, None

    def _chat(self, fields: dict[str, Any]) -> tuple[dict[str, Any], Callable[[Any], Any]]:
        fields, _ = self._openai(fields)
        schema, form = fields.pop("json_schema", None), fields.get("response_format", {})
        if (schema := form.get("schema", schema)) is not None:
            form = {"type": "json_schema", "json_schema": {"schema": schema}}
        if isinstance(form.get("json_schema"), dict):
            form["json_schema"].setdefault("name", "schema")
        return fields | ({"response_format": form} if form else {}), first_delta

    def _completion(self, fields: dict[str, Any]) -> tuple[dict[str, Any], Callable[[Any], Any]]:
        fields = self._defaults(fields)
        prompt = fields.pop("prompt")
        several, prompts = self._prompts(prompt)
        limit = fields.pop("n_predict", fields.pop("max_tokens", -1))
        probabilities = fields.pop("n_probs", 0)
        told = {"tokens": fields.pop("return_tokens", False), "probabilities": probabilities}
        told["only"] = fields.pop("response_fields", None)
        asked = fields | {
            "prompt": prompts,
            "max_tokens": self._tokens(limit),
            "logprobs": probabilities,
        }
        if fields.get("stream"):
            asked["stream_options"] = {"include_usage": True}
        told["settings"] = {k: v for k, v in asked.items() if k not in ("prompt", "model")}
        told["settings"]["n_predict"] = asked["max_tokens"]
        bias = asked.get("logit_bias", {}).items()
        told["settings"]["logit_bias"] = [{"token": int(t), "bias": value} for t, value in bias]
        return asked, Completions(self, prompts, several, told)

    def _tokens(self, limit: int) -> int:
        default = self.flags.n_predict
        return limit if limit >= 0 else default if default >= 0 else self.limits.max_tokens

    def _prompts(self, prompt: Any) -> tuple[bool, list[list[int]]]:
        """Whether these are several prompts, and their ids."""
        kinds = {type(one) for one in prompt} if isinstance(prompt, list) else set()
        several = bool(kinds & {list, dict}) or kinds == {str}
        return several, [self._encoded(one) for one in (prompt if several else [prompt])]

    def _encoded(self, prompt: Any) -> list[int]:
        """The ids of a text, of ids, of a mixture, or of an object with a text."""
        if isinstance(prompt, dict):
            if prompt.keys() == {"content"}:
                kinds = {part["type"] for part in prompt["content"]}
                prompt = {"prompt_string": "".join(part["text"] for part in prompt["content"])}
                prompt = prompt if kinds == {"text"} else {}
            if prompt.keys() != {"prompt_string"}:
                raise ValueError("only texts are read")
            prompt = prompt["prompt_string"]
        pieces = [prompt] if isinstance(prompt, str) else prompt
        encode = self.tokenizer.encode
        ids = ([piece] if isinstance(piece, int) else encode(piece) for piece in pieces)
        return [token for piece in ids for token in piece]

    def _bias(self, given: Any) -> dict[str, float]:
        """Pairs, or an object, whose names are ids of tokens or texts."""
        found = {}
        for name, value in given.items() if isinstance(given, dict) else given:
            text = isinstance(name, str) and not name.isdigit()
            for token in self.tokenizer.encode(name) if text else [int(name)]:
                found[str(token)] = -100 if value is False else value
        return found

    def _tokenize(self, fields: dict[str, Any]) -> tuple[dict[str, Any], Callable[[Any], Any]]:
        pieces, decode = fields.get("with_pieces", False), self.tokenizer.decode_bytes

        def back(value: Any) -> Any:
            ids = value["tokens"]
            return {
                "tokens": [{"id": i, "piece": _text(decode([i]))} for i in ids] if pieces else ids
            }

        return {"prompt": fields["content"]}, back

    def _detokenize(self, fields: dict[str, Any]) -> tuple[dict[str, Any], Callable[[Any], Any]]:
        return {"tokens": fields["tokens"]}, lambda value: {"content": value["prompt"]}

    def _openai_embeddings(self, fields: dict[str, Any]) -> tuple[dict[str, Any], None]:
        if fields["input"]:
            fields["input"] = self._prompts(fields["input"])[1]
        if self.flags.pooling is not None:
            fields["pooling"] = self.flags.pooling
        return self._named(fields)

    def _embeddings(self, fields: dict[str, Any]) -> tuple[dict[str, Any], Callable[[Any], Any]]:
        asked, _ = self._openai_embeddings(fields)
        return asked, lambda value: [
            {"index": one["index"], "embedding": [one["embedding"]]} for one in value["data"]
        ]

    def _count(self, fields: dict[str, Any]) -> tuple[dict[str, Any], None]:
        messages = [m for m in fields["messages"] if m["role"] != "system"]
        system = "\n".join(m["content"] for m in fields["messages"] if m["role"] == "system")
        return {"model": self.flags.alias, "messages": messages, "system": system}, None


def _text(content: bytes) -> Any:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return list(content)


async def _send_json(send: Any, value: Any, status: int) -> None:
    body = json.dumps(value).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def main(argv: list[str]) -> None:
    """Serve until a signal."""
    flags = parsed(argv)
    if "," in flags.alias or "," in flags.host:
        sys.exit("a model has one name and a server one address")
    from receptance.apps.serve import Options, make_app
    from receptance.server.running import serve
    from receptance.server.scheduler import SchedulerOptions

    with tempfile.TemporaryDirectory() as folder:
        keys = None
        if flags.api_key:
            keys = Path(folder) / "keys"
            keys.write_text(flags.api_key)
        app = make_app(
            Options(
                models=(f"{flags.alias}={flags.model}",),
                keys=keys,
                scheduler=SchedulerOptions(slots=flags.parallel),
            )
        )
        serve(Shim(app, flags), host=flags.host, port=flags.port, ready=print)


if __name__ == "__main__":
    main(sys.argv[1:])

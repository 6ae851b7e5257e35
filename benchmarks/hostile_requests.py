"""Requests that no honest client sends, against `receptance serve` in a process of its own.

    python benchmarks/hostile_requests.py [MODEL] [--json FILE]

Sends each body to every endpoint that reads JSON, and each piece of bytes as it stands. Every
answer has to be something else than 5xx, a normal request has to succeed after it, and the memory
of the server may not grow. Prints the statuses, the growth and the peak over the memory before, in
MiB, then JSON. Linux only. `tests/server/test_hostile_requests.py` has the same requests.
"""

from __future__ import annotations

import argparse
import gzip
import json
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from _common import report_as_found
from _servers import Server, server

PATHS = (
    *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"),
    *("/v1/messages/count_tokens", "/v1/embeddings", "/tokenize", "/detokenize"),
    "/v1/states/x/fork",
)
ALLOWED = 8 << 20
"""Bytes by which the server may have grown after each of them."""
_MIB = 1 << 20


def _json(**fields: Any) -> bytes:
    """A request that is right but for these fields, whichever endpoint gets it."""
    return json.dumps({"model": "model", **fields}).encode()


def _deep(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "no object": b"[1]",
    "a number": b"1",
    "no UTF-8": b'{"model": "model", "prompt": "\xff\xfe"}',
    "a lone surrogate": b'{"model": "model", "prompt": "\\ud800", "max_tokens": 1}',
    "a lone surrogate as a name": b'{"model": "\\udfff", "prompt": "x"}',
    "NaN": b'{"model": "model", "prompt": "x", "temperature": NaN}',
    "infinity": b'{"model": "model", "prompt": "x", "temperature": 1e309}',
    "a huge number": b'{"model": "model", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    "nesting": b'{"model": "model", "prompt": ' + _deep(100_000) + b"}",
    "nesting of objects": b'{"model": ' * 50_000 + b"1" + b"}" * 50_000,
    "nesting in a schema": b'{"model": "model", "messages": [{"role": "user", "content": "x"}], '
    b'"max_tokens": 1, "response_format": {"type": "json_schema", "json_schema": {"name": "x", '
    b'"schema": ' + b'{"not": ' * 400 + b"{}" + b"}" * 400 + b"}}}",
    "many stops": _json(prompt="x", stop=["s"] * 10_000),
    "a huge n": _json(prompt="x", n=1_000_000),
    "many prompts": _json(prompt=["x"] * 100_000),
    "many lists": _json(prompt=[[1]] * 100_000, input=[[1]] * 100_000),
    "many messages": _json(messages=[{"role": "user", "content": "x"}] * 20_000),
    "many fields": _json(**{f"f{n}": n for n in range(50_000)}),
    "many biases": _json(prompt="x", logit_bias={str(n): 1 for n in range(50_000)}),
    "huge tokens": _json(tokens=[10**30], prompt=[10**30], input=[10**30]),
    "a pattern that explodes": _json(
        messages=[{"role": "user", "content": "x"}],
        max_tokens=2,
        response_format={
            "type": "json_schema",
            "json_schema": {
                "name": "x",
                "schema": {"type": "string", "pattern": "(a{1,900}){900}"},
            },
        },
    ),
    "a NUL": b'{"model": "model", "prompt": "\\u0000\\u0000", "max_tokens": 1}',
    "a wrong type": b'{"model": {"a": 1}, "prompt": true}',
    "two keys": b'{"model": "model", "model": "model", "prompt": "x", "max_tokens": 1}',
    "a name with a path": _json(prompt="x", state="../../etc/passwd", name="../x"),
}

_POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
_GET = b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n"
_BOMB = gzip.compress(b" " * (1 << 24))

WIRE = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,
    "a length of 10^12": _POST + b"Content-Length: 1000000000000\r\n\r\n{",
    "a length of 19 digits": _POST + b"Content-Length: " + b"9" * 19 + b"\r\n\r\n{",
    "a negative length": _POST + b"Content-Length: -1\r\n\r\n{",
    "two lengths": _POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    "a length and pieces": _POST
    + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "a bad piece": _POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "a gzip bomb": _POST
    + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(_BOMB)
    + _BOMB,
    "long headers": _GET[:-2] % b"/health" + b"X: " + b"x" * 200_000 + b"\r\n\r\n",
    "many headers": _GET[:-2] % b"/health" + b"X: y\r\n" * 20_000 + b"\r\n",
    "a long path": _GET % (b"/" + b"x" * 100_000),
    "up": _GET % b"/page/../../../../etc/passwd",
    "up, encoded": _GET % b"/page/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "up, twice encoded": _GET % b"/page/%252e%252e/keys.py",
    "two slashes": _GET % b"//etc/passwd",
    "a NUL in the path": _GET % b"/v1/states/%00",
    "no UTF-8 in the path": _GET % b"/v1/models/%ff%fe",
    "a state above": _GET % b"/v1/states/..%2f..%2fetc",
    "an empty method": b" / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "an upgrade": _GET[:-2] % b"/health" + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
}


def send(address: tuple[str, int], content: bytes, more: bytes = b"", times: int = 0) -> bytes:
    """What a server answers to bytes, with more behind them for as long as it takes them."""
    with socket.create_connection(address, timeout=120) as connection, suppress(OSError):
        with suppress(OSError):  # it may close before it has read everything
            connection.sendall(content)
            for _ in range(times):
                connection.sendall(more)
        return connection.recv(65536)
    return b""


def status(answer: bytes) -> int:
    """The status of an answer; 0 if the connection was closed without one."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def main() -> None:
    """Send everything, and compare the memory before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny-python")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    with server(options.model, "--cache", "0") as found:
        report_as_found(attacks(found), options.json)


def attacks(found: Server) -> Iterator[tuple[str, dict[str, Any]]]:
    """What came of each attack; AssertionError if one of them did harm."""
    with httpx.Client(base_url=found.url, timeout=300) as client:
        for _ in range(20):
            _usual(client)
        before = found.resident()
        for title, statuses in _all(found, client):
            _usual(client)
            time.sleep(1)  # memory is given back a moment after a large request
            assert not any(number >= 500 for number in statuses), f"{title}: {statuses}"
            grown = found.resident() - before
            peak = (found.peak() - before) / _MIB
            yield title, {"grown, MiB": grown / _MIB, "peak, MiB": peak, "statuses": statuses}
            assert grown <= ALLOWED, f"{title}: the server has grown by {grown / _MIB:.1f} MiB"


def _all(found: Server, client: httpx.Client) -> Iterator[tuple[str, dict[int, int]]]:
    headers = {"content-type": "application/json"}
    for title, body in BODIES.items():
        found.forget_peak()
        answers = [client.post(path, content=body, headers=headers) for path in PATHS]
        yield title, dict(Counter(answer.status_code for answer in answers))
    for title, content in WIRE.items():
        found.forget_peak()
        yield title, {status(send(found.address, content)): 1}
    million = b" " * 1_000_000
    length = _POST + b"Content-Length: 400000000\r\n\r\n"
    yield "400 MB", {status(send(found.address, length, million, 400)): 1}
    pieces = _POST + b"Transfer-Encoding: chunked\r\n\r\n"
    piece = b"f4240\r\n" + million + b"\r\n"
    yield "400 MB in pieces", {status(send(found.address, pieces, piece, 400)): 1}


def _usual(client: httpx.Client) -> None:
    """What honest clients ask, which has to succeed."""
    talk = {"model": "model", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "boolean"}}}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"model": "model", "prompt": "x" * 3000, "max_tokens": 3}),
        ("/v1/chat/completions", {**talk, "response_format": form}),
        ("/v1/messages", talk),
        ("/v1/embeddings", {"model": "model", "input": "x"}),
    ]
    for path, body in asked:
        answer = client.post(path, json=body)
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text[:300]}"


if __name__ == "__main__":
    main()

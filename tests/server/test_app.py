"""Doors, bounds and endings of the server, asked by hand."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from running_server import Running, make_served, start

from receptance.server.app import App
from receptance.server.keys import Keys
from receptance.server.limits import Limits
from receptance.server.models import Models, Source
from receptance.server.running import _Server, settings

KEY, OTHER = "0123456789abcdef", "fedcba9876543210"
JSON = {"content-type": "application/json"}
SECRET = "what nobody may see"
LONG = {"model": "tiny", "prompt": SECRET, "max_tokens": 16000, "ignore_eos": True}
PUBLIC = {"/", "/health", "/openapi.json", "/docs"}


@pytest.fixture(scope="module")
def locked(tmp_path_factory) -> Iterator[Running]:
    """A server with two keys."""
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text(f"# ours\n{KEY}\n{OTHER}  # theirs\n")
    yield from start([make_served()], keys=Keys.read(file), origins=["https://page.example"])


@contextmanager
def own(**limits: Any) -> Iterator[Running]:
    """A server with limits of its own."""
    yield from start([make_served(slots=2, **limits)])


# ---- doors --------------------------------------------------------------------------------------


def test_every_route_but_a_few_needs_a_key(locked):
    with locked.client() as client:
        for endpoint in locked.app.endpoints:
            path = endpoint.path.replace("{model:path}", "tiny").replace("{name}", "x")
            public = path in PUBLIC or path.startswith("/page/")
            assert endpoint.public == public, path
            for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": KEY[:-1]}):
                found = client.request(endpoint.method, path, headers=headers)
                assert (found.status_code == 401) != public, path
                assert public or found.json()["error"]["type"] == "authentication_error"
        for method, path in (("GET", "/nowhere"), ("PUT", "/v1/models"), ("TRACE", "/")):
            assert client.request(method, path).status_code == 401


def test_a_key_opens(locked):
    with locked.client(KEY) as client:
        assert client.get("/v1/models").status_code == 200
        assert client.get("/nowhere").status_code == 404
        refused = client.put("/v1/models")
        assert refused.status_code == 405 and refused.headers["allow"] == "GET, HEAD"
        for path in ("/health", "/v1/models", "/openapi.json", "/"):
            asked, got = client.head(path), client.get(path)
            assert (asked.status_code, asked.content) == (200, b"")
            assert asked.headers["content-length"] == str(len(got.content))
        assert client.head("/v1/completions").status_code == 405
    with locked.client() as client:
        assert client.get("/v1/models", headers={"x-api-key": OTHER}).status_code == 200


def test_keys_share_no_states_and_no_cache(locked):
    request = {"model": "tiny", "prompt": "a long text about many foxes", "max_tokens": 2}
    with locked.client(KEY) as mine, locked.client(OTHER) as theirs:
        saved = {**request, "save_state": "s"}
        for client, wanted in ((mine, 0), (mine, 8), (theirs, 0)):
            found = client.post("/v1/completions", json=saved).json()
            cached = found["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert (cached >= wanted) if wanted else cached == 0
            if client is mine:
                assert theirs.get("/v1/states/s").status_code == 404
        theirs.delete("/v1/states/s")
        assert mine.get("/v1/states/s").status_code == 200


def test_files_of_keys_are_checked(tmp_path):
    for content, said in (("", "no key"), ("# x\n", "no key"), ("short", "characters")):
        (tmp_path / "keys").write_text(content)
        with pytest.raises(ValueError, match=said):
            Keys.read(tmp_path / "keys")
    for key in ("ключключключключключ", "two words are no key"):
        (tmp_path / "keys").write_text(key, encoding="utf-8")
        with pytest.raises(ValueError, match="clients could not send it"):
            Keys.read(tmp_path / "keys")
    with pytest.raises(ValueError, match="cannot read"):
        Keys.read(tmp_path / "none")


def test_a_file_of_keys_from_any_editor(tmp_path):
    (tmp_path / "keys").write_bytes(b"\xef\xbb\xbfabcdefghijklmnop#qrstuv  # mine\r\n")
    keys = Keys.read(tmp_path / "keys")
    assert keys.owner({"x-api-key": "abcdefghijklmnop#qrstuv"})
    assert keys.owner({"x-api-key": "abcdefghijklmnop"}) is None


def test_pages_of_other_sites_cannot_ask(running, locked):
    with running.client() as client:
        # A name that another site points here, and a form that needs no permission.
        assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
        for name in ("[::1]", "[::1]:80", "LocalHost:1", "127.0.0.1"):
            assert client.get("/v1/models", headers={"host": name}).status_code == 200
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            found = client.post("/tokenize", content=b"{}", headers={"content-type": kind})
            assert found.status_code == 415
        found = client.get("/v1/models", headers={"origin": "https://page.example"})
        assert "access-control-allow-origin" not in found.headers
    with locked.client() as client:
        headers = {"origin": "https://page.example", "access-control-request-method": "POST"}
        found = client.options("/v1/completions", headers=headers)
        assert found.status_code == 204
        assert found.headers["access-control-allow-origin"] == "https://page.example"
        headers["origin"] = "https://evil.example"
        assert client.options("/v1/completions", headers=headers).status_code == 401


# ---- hostile requests: test_hostile_requests.py has more ----------------------------------------


def test_a_body_that_is_too_large_is_not_read(http):
    def endless() -> Iterator[bytes]:
        while True:
            yield b" " * 65536

    for content in (b" " * (2 << 20) + b"{}", endless()):
        try:
            found = http.post("/v1/completions", content=content, headers=JSON)
            assert found.status_code == 413
        except httpx.TransportError:  # it was still sending when the answer came
            assert isinstance(content, Iterator)
    headers = {**JSON, "content-encoding": "gzip"}
    assert http.post("/v1/completions", content=b"x", headers=headers).status_code == 415


def raw(running: Running, request: bytes) -> bytes:
    """The answer to bytes on the wire."""
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=500) as connection:
        connection.sendall(request)
        return connection.recv(65536)


def test_nothing_of_a_request_is_in_the_log(running, http):
    http.post("/v1/completions", json={"model": "tiny", "prompt": SECRET, "max_tokens": 1})
    http.get(f"/v1/models/{SECRET}")
    http.get("/secret/path?secret=1")
    lines = "\n".join(running.lines)
    assert "POST /v1/completions 200" in lines
    for private in (SECRET, "secret", "127.0.0.1", running.url.rpartition(":")[2]):
        assert private not in lines


def test_an_error_of_our_own_tells_nothing(running, http, monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError(SECRET)

    served = running.app.models.sources["tiny"].served
    with monkeypatch.context() as patch:
        patch.setattr(served.tokenizer, "encode", fails)
        found = http.post("/tokenize", json={"prompt": SECRET})
    assert found.status_code == 500
    assert found.json()["error"]["message"] == "internal error"
    assert SECRET not in "\n".join(running.lines)
    assert "internal error: ZeroDivisionError in fails" in "\n".join(running.lines)


# ---- coming and going ---------------------------------------------------------------------------


def idle(running: Running) -> bool:
    """Whether nothing is left of any request."""
    served = running.app.models.sources["tiny"].served
    scheduler = served.scheduler
    counts = served.thread.call(lambda: (scheduler.active, scheduler.waiting, scheduler.rows))
    return counts.result(500) == (0, 0, 0) and not served.busy


def wait_until(true: Any) -> None:
    """Wait for something that another thread does."""
    for _ in range(50_000):
        if true():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came")


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_is_forgotten_in_every_phase(stream):
    with own() as running, running.client() as client:
        body = json.dumps({**LONG, "stream": stream}).encode()
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        host, port = running.url.removeprefix("http://").split(":")
        # Two of these are written, and the others wait.
        sockets = [socket.create_connection((host, int(port))) for _ in range(5)]
        for each in sockets:
            each.sendall(head + body)
        wait_until(lambda: running.app.models.sources["tiny"].served.thread.queued == 3)
        for each in sockets:
            each.close()
        wait_until(lambda: idle(running))
        found = client.post("/v1/completions", json={**LONG, "max_tokens": 10})
        assert found.json()["usage"]["completion_tokens"] == 10
        wait_until(lambda: running.app.metrics.in_flight._value.get() == 0)


def test_a_full_queue_and_a_long_wait_are_told():
    with own(max_waiting=1, wait_seconds=0.2) as running, running.client() as client:
        streams, readers = [], []
        for _ in range(2):
            stream = client.stream("POST", "/v1/completions", json={**LONG, "stream": True})
            streams.append(stream)
            readers.append(stream.__enter__().iter_bytes())
            next(readers[-1])
        late = client.post("/v1/completions", json=LONG)
        assert late.status_code == 503 and late.headers["retry-after"]
        prompts = {**LONG, "prompt": ["x"] * 3}
        full = client.post("/v1/completions", json=prompts)
        assert full.status_code == 429 and full.headers["retry-after"]
        assert full.json()["error"]["type"] == "rate_limit_error"
        for stream in streams:
            stream.__exit__(None, None, None)


def test_a_body_that_does_not_come_is_given_up():
    with own(send_seconds=0.2) as running:
        head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        answer = raw(running, head + b"Content-Length: 10\r\n\r\n{")
        assert answer.startswith(b"HTTP/1.1 408")


def test_a_reader_that_takes_nothing_is_given_up():
    body = json.dumps({**LONG, "stream": True}).encode()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
    scope |= {"headers": [(b"content-type", b"application/json")]}
    served = make_served(send_seconds=0.1)
    sent: list[Any] = []

    async def run() -> None:
        app = App(Models([Source("tiny", lambda: served, served=served)], served.limits))
        served.start()
        messages = [{"type": "http.request", "body": body}]

        async def receive() -> Any:
            if not messages:
                await asyncio.Event().wait()
            return messages.pop()

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) == 5:
                await asyncio.Event().wait()

        await app(scope, receive, send)
        assert not served.busy
        active = served.thread.call(lambda: served.scheduler.active)
        assert await asyncio.wrap_future(active) == 0
        await app.models.close()

    asyncio.run(run())
    assert len(sent) == 5


def test_the_end_lets_answers_end_and_tells_those_that_cannot():
    with own(drain_seconds=0.3) as running, running.client() as client:
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            running.server.should_exit = True
            said = [line for line in lines if line]
        assert said[-1] == "data: [DONE]"
        assert json.loads(said[-2].removeprefix("data: "))["error"]["code"] == "shutdown"
    with pytest.raises(httpx.TransportError), running.client() as client:
        client.get("/health")


def test_limits_are_checked():
    with pytest.raises(ValueError, match="max_body"):
        Limits(max_body=0)
    with pytest.raises(ValueError, match="drain_seconds is inf; it must be over 0 and finite"):
        Limits(drain_seconds=float("inf"))


def test_a_second_signal_of_any_kind_ends_the_server(running):
    for again in (signal.SIGTERM, signal.SIGINT):
        server = _Server(settings(running.app), running.app, print)
        server.handle_exit(signal.SIGTERM, None)
        assert server.should_exit and not server.force_exit
        server.handle_exit(again, None)
        assert server.force_exit


# ---- states over HTTP ---------------------------------------------------------------------------


def test_states_are_saved_continued_and_handed_over(http):
    saved = {"model": "tiny", "prompt": "3 little", "max_tokens": 5, "temperature": 0}
    found = http.post("/v1/completions", json={**saved, "save_state": "one"}).json()
    text = found["choices"][0]["text"]
    assert http.get("/v1/states/one").json()["tokens"] == found["usage"]["total_tokens"]
    more = {**saved, "prompt": " foxes", "state": "one"}
    wanted = http.post("/v1/completions", json=more).json()["choices"][0]["text"]
    file = http.get("/v1/states/one/file").content
    assert http.put("/v1/states/two/file", content=file).status_code == 201
    assert http.post("/v1/states/two/fork", json={"name": "three"}).status_code == 201
    for name in ("two", "three"):
        again = http.post("/v1/completions", json={**more, "state": name}).json()
        assert again["choices"][0]["text"] == wanted
    listed = [state["id"] for state in http.get("/v1/states").json()["data"]]
    assert {"one", "two", "three"} <= set(listed)
    for name in ("one", "two", "three"):
        assert http.delete(f"/v1/states/{name}").status_code == 200
        assert http.delete(f"/v1/states/{name}").status_code == 404
    assert isinstance(text, str)


def test_the_state_behind_a_prompt_that_is_only_scored_is_saved(http):
    ask = {"model": "tiny", "prompt": "3 little", "max_tokens": 0, "echo": True, "logprobs": 1}
    for name, stream in (("whole", False), ("streamed", True)):
        body = {**ask, "save_state": name, "stream": stream}
        assert http.post("/v1/completions", json=body).status_code == 200
        assert http.get(f"/v1/states/{name}").json()["tokens"] > 1
        assert http.delete(f"/v1/states/{name}").status_code == 200


@pytest.mark.parametrize("stop", [None, "e"])
@pytest.mark.parametrize("number", [1, 40])
def test_a_saved_conversation_goes_on_as_the_whole_one_does(stop, number, http):
    """Also where the answer ended inside of a token, or before its turn did."""
    talk = [{"role": "user", "content": "Why so little?"}]
    ask = {"model": "tiny", "max_tokens": number, "temperature": 0, "logit_bias": {"0": -100}}
    first = {**ask, "messages": talk, "save_state": "talk", "stop": stop}
    said = http.post("/v1/chat/completions", json=first).json()["choices"][0]["message"]
    answered = [said] if said["content"] else []
    new = [{"role": "user", "content": "And then?"}]
    found = []
    for more in ({"messages": new, "state": "talk"}, {"messages": [*talk, *answered, *new]}):
        body = {**ask, **more, "max_tokens": 4, "logprobs": True}
        found.append(http.post("/v1/chat/completions", json=body).json()["choices"][0])
    one, two = (choice["logprobs"]["content"] for choice in found)
    assert [token["bytes"] for token in one] == [token["bytes"] for token in two]
    wanted = pytest.approx([token["logprob"] for token in two], abs=1e-5)
    assert [token["logprob"] for token in one] == wanted


def test_states_of_other_models_and_damaged_ones_are_refused(http):
    request = {"model": "tiny", "prompt": "x", "max_tokens": 1, "save_state": "mine"}
    http.post("/v1/completions", json=request)
    wrong = {"model": "other", "prompt": "y", "state": "mine"}
    assert http.post("/v1/completions", json=wrong).status_code == 409
    file = http.get("/v1/states/mine/file").content
    assert http.put("/v1/states/a/file?model=other", content=file).status_code == 409
    damaged = file[:-9] + bytes([file[-9] ^ 1]) + file[-8:]
    for content in (damaged, b"", b"x" * 100):
        found = http.put("/v1/states/a/file", content=content)
        assert found.status_code == 400 and "/tmp" not in found.text
    for name in ("..", "a%20b", ".x", "x" * 200):
        assert http.put(f"/v1/states/{name}/file", content=file).status_code in (400, 404, 405)
    assert http.post("/v1/completions", json={**wrong, "state": "gone"}).status_code == 404
    many = {**request, "n": 2}
    assert http.post("/v1/completions", json=many).status_code == 400


# ---- the rest -----------------------------------------------------------------------------------


def test_tokens_and_back(http):
    text = "a fox, naïvely — 狐"
    tokens = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": text}
    assert http.post("/detokenize", json={"tokens": [10**6]}).status_code == 400
    info = http.get("/tokenizer_info").json()
    first = http.post("/tokenize", json={"prompt": info["eos_token"]}).json()["tokens"][0]
    assert first == info["eos_token_id"]


def test_models_are_unloaded_and_loaded(http, running):
    assert http.post("/v1/load/gone").status_code == 404
    assert http.post("/v1/load/other").json()["loaded"] is True


def test_metrics_add_up(http):
    def values() -> dict[str, float]:
        lines = http.get("/metrics").text.splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    before = values()
    request = {"model": "tiny", "prompt": "metrics metrics metrics", "max_tokens": 3}
    found = [http.post("/v1/completions", json=request).json()["usage"] for _ in range(2)]
    after = values()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    own = '{model="tiny"}'
    assert grown(f"receptance_prompt_tokens_total{own}") == sum(u["prompt_tokens"] for u in found)
    written = sum(u["completion_tokens"] for u in found)
    assert grown(f"receptance_generated_tokens_total{own}") == written
    cached = sum(u["prompt_tokens_details"]["cached_tokens"] for u in found)
    assert grown(f"receptance_cached_tokens_total{own}") == cached
    assert after[f"receptance_slots_used{own}"] == 0
    assert after[f"receptance_waiting_requests{own}"] == 0
    assert after["receptance_requests_in_flight"] == 1  # this one


def test_the_description_names_every_endpoint(running, http):
    described = http.get("/openapi.json").json()
    for endpoint in running.app.endpoints:
        path = endpoint.path.replace(":path", "")
        assert endpoint.method.lower() in described["paths"][path]
    page = http.get("/docs").text
    assert "/v1/chat/completions" in page and "http" not in page.replace("http-equiv", "")

"""Hub ids, against a server on this machine that speaks what we use of the hub's protocol."""

import hashlib
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import receptance.formats
from receptance.formats import hub
from receptance.formats.names import to_hf

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """One model, `owner/tiny`, with these files; counts which of them are fetched."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = self.path.split("?")[0]
        api, resolve = "/api/models/owner/tiny", f"/owner/tiny/resolve/{COMMIT}/"
        file = path.removeprefix(resolve)
        if path.startswith("/api/models/owner/gated"):
            self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path.startswith(f"{api}/revision/nowhere"):
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(f"{api}/tree/"):
            self.send(200, json.dumps([self.entry(name) for name in self.server.files]).encode())
        elif path.startswith(api):
            siblings = [{"rfilename": name} for name in self.server.files]
            info = {"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}
            self.send(200, json.dumps(info).encode())
        elif path.startswith(resolve) and file in self.server.files:
            self.server.fetched += [file] * with_body
            etag = self.entry(file)["oid"]
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
            self.send(200, self.server.files[file], headers, with_body)
        else:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def entry(self, name: str) -> dict[str, object]:
        content = self.server.files[name]
        digest = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "oid": digest, "size": len(content)}

    def send(self, status: int, body: bytes, headers=None, with_body: bool = True) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(official, monkeypatch) -> Iterator[Hub]:
    # What the environment of the tests may have set.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    tensors = {to_hf(name): tensor for name, tensor in official.items()}
    config = {"model_type": "rwkv", "hidden_size": 8, "num_hidden_layers": 3}
    server = Hub(
        {
            "config.json": json.dumps(config).encode(),
            "model.safetensors": save(tensors),
            "pytorch_model.bin": b"\x80\x02cposix\nsystem\n.",
            "tokenizer.json": b"{}",
            "rwkv-4.pth": b"",
            "README.md": b"# tiny",
        }
    )
    threading.Thread(target=partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_is_fetched_once_and_then_read_without_a_server(server, tmp_path, official):
    resolve = partial(hub.resolve, "owner/tiny", endpoint=server.url, cache=tmp_path)
    directory = resolve()
    wanted = ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(server.fetched) == wanted
    assert resolve() == directory
    assert sorted(server.fetched) == wanted

    server.shutdown()
    server.server_close()
    assert resolve() == directory
    weights = receptance.formats.read(directory)
    assert weights.tokenizer == directory / "tokenizer.json"
    assert all(torch.equal(weights.tensors[name], official[name]) for name in official)


def test_pickled_weights_are_fetched_only_when_there_is_nothing_else(server, tmp_path):
    del server.files["model.safetensors"]
    directory = hub.resolve("owner/tiny", endpoint=server.url, cache=tmp_path)
    assert sorted(server.fetched) == ["config.json", "pytorch_model.bin", "tokenizer.json"]
    with pytest.raises(ValueError, match=r"posix\.system"):
        receptance.formats.read(directory)


def test_every_failure_says_what_to_do(server, tmp_path):
    def refusal(name: str, revision: str | None = None, url: str = server.url) -> str:
        with pytest.raises(ValueError) as caught:
            hub.resolve(name, revision=revision, endpoint=url, cache=tmp_path)
        message = str(caught.value)
        assert type(caught.value) is ValueError and "\n" not in message and name in message
        return message

    assert "check the spelling" in refusal("owner/absent")
    assert "ask for access" in refusal("owner/gated")
    assert "no revision 'nowhere'" in refusal("owner/tiny", "nowhere")
    assert "not a hub id" in refusal("tiny")
    assert "not a hub id" in refusal("../owner/tiny")
    assert "out of reach" in refusal("owner/tiny", url="http://127.0.0.1:9")
    server.files = {"rwkv-4.pth": b""}
    assert "has .pth files" in refusal("owner/tiny")


def test_offline_mode_is_heeded(server, tmp_path, monkeypatch):
    resolve = partial(hub.resolve, "owner/tiny", endpoint=server.url, cache=tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        resolve()
    assert server.fetched == []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    directory = resolve()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve() == directory


def test_read_takes_names_of_this_form_for_hub_ids(monkeypatch, tmp_path):
    asked = []

    def resolve(name: str, *, revision: str | None = None) -> Path:
        asked.append((name, revision))
        raise ValueError("not today")

    monkeypatch.setattr(hub, "resolve", resolve)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="not today"):
        receptance.formats.read("RWKV/rwkv-4-169m-pile", revision="main")
    assert asked == [("RWKV/rwkv-4-169m-pile", "main")]
    for local in ("models/absent.pth", Path("RWKV/rwkv-4-169m-pile"), "/RWKV/model", "./a/b", "a"):
        with pytest.raises(ValueError, match="no such file or directory"):
            receptance.formats.read(local)
    (tmp_path / "RWKV/empty").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"found neither"):
        receptance.formats.read("RWKV/empty")
    assert len(asked) == 1

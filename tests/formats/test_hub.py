"""Hub ids, against a server on this machine that speaks what we use of the hub's protocol."""

import hashlib
import io
import json
import re
import threading
import warnings
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from safetensors.torch import save

import receptance.formats
from receptance.checking.contents import find
from receptance.conversion.source import open_source
from receptance.formats import hub
from receptance.formats.names_hf import to_hf

# Whether a download is announced, the tests of that check.
pytestmark = pytest.mark.filterwarnings("ignore::receptance.formats.hub.DownloadWarning")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """One model, `owner/tiny`, with these files; counts which of them are fetched.

    `owner/private` is the same model for those who have the token.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.fetched: list[str] = []
        self.revisions: set[str] = set()
        """What was asked for."""
        self.sent: list[tuple[str, int, int]] = []
        """Of each file that was fetched its name, where it was begun, and how much was sent."""
        self.cuts: list[int] = []
        """After so many bytes of a body the connection breaks, once for each."""

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
        path = unquote(self.path.split("?")[0])
        if "owner/private" in path and self.headers["Authorization"] == "Bearer hf_secret":
            path = path.replace("owner/private", "owner/tiny")
        if found := re.match(r"/api/models/owner/tiny/revision/(.*)", path):
            self.server.revisions.add(found[1])
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
            self.send_file(file, headers, with_body)
        else:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def entry(self, name: str) -> dict[str, object]:
        content = self.server.files[name]
        digest = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "oid": digest, "size": len(content)}

    def send_file(self, file: str, headers: dict[str, str], with_body: bool) -> None:
        content = self.server.files[file]
        begin = int(re.sub(r"\D", "", self.headers["Range"] or "0"))
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        body = content[begin:]
        sent = len(body)
        if with_body:
            fits = [cut for cut in self.server.cuts if cut < len(body)]
            for cut in fits[:1]:
                self.server.cuts.remove(cut)
                sent = cut
            self.server.sent.append((file, begin, sent))
        self.send(206 if begin else 200, body, headers, with_body, sent)
        self.close_connection = sent < len(body)

    def send(
        self,
        status: int,
        body: bytes,
        headers=None,
        with_body: bool = True,
        sent: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body[:sent])

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
        assert type(caught.value) is ValueError and "\n" not in message
        assert re.split("@|/other", name)[0] in message
        return message

    assert "check the spelling" in refusal("owner/absent")
    assert "ask for access" in refusal("owner/gated")
    assert "no revision 'nowhere'" in refusal("owner/tiny", "nowhere")
    assert "not a hub id" in refusal("tiny")
    assert "not a hub id" in refusal("../owner/tiny")
    assert "out of reach" in refusal("owner/tiny", url="http://127.0.0.1:9")
    assert "is no revision" in refusal("owner/tiny", "../../elsewhere")
    assert "is no revision" in refusal("owner/tiny@a//b")
    assert "disagree" in refusal("owner/tiny@main", "v1")
    assert (
        "has no file 'other.pth'; name one of its files: owner/tiny/model.safetensors"
        in refusal("owner/tiny/other.pth")
    )


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


def test_a_repository_without_weights_says_so(server, tmp_path):
    server.files = {"README.md": b""}
    with pytest.raises(ValueError, match=r"'owner/tiny' .* there are no weights in it"):
        hub.resolve("owner/tiny", endpoint=server.url, cache=tmp_path)


def save_pth(tensors: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


NAMES = ["RWKV-4-Pile-169M-20220807-8023.pth", "RWKV-4-Raven-7B-v12-Eng98%-Other2%.pth"]


def test_of_several_pth_files_one_is_named(server, tmp_path, official):
    server.files = {"README.md": b""}
    for number, name in enumerate(NAMES):  # files of the same content would be one in the cache
        server.files[name] = save_pth(official | {"ln_out.bias": torch.full((8,), float(number))})
    resolve = partial(hub.resolve, endpoint=server.url, cache=tmp_path)
    with pytest.raises(ValueError, match="name one of its files") as caught:
        resolve("owner/tiny")
    assert all(f"owner/tiny/{name}" in str(caught.value) for name in NAMES)
    assert server.fetched == []
    for name in NAMES:
        file = resolve(f"owner/tiny/{name}")
        assert (file.name, server.fetched) == (name, [name])
        assert receptance.formats.read(file).config.width == 8
        server.fetched.clear()
    server.shutdown()
    server.server_close()
    assert resolve(f"owner/tiny/{NAMES[0]}") == file.with_name(NAMES[0])
    with pytest.raises(ValueError, match="name one of its files") as caught:
        resolve("owner/tiny")
    assert all(f"owner/tiny/{name}" in str(caught.value) for name in NAMES)


def test_a_single_pth_file_is_taken_with_the_tokenizer_beside_it(server, tmp_path, official):
    files = {"rwkv_vocab_v20230424.txt": b"1", "it.pth": save_pth(official), "README.md": b""}
    server.files = files
    file = hub.resolve("owner/tiny", endpoint=server.url, cache=tmp_path)
    assert sorted(server.fetched) == ["it.pth", "rwkv_vocab_v20230424.txt"]
    weights = receptance.formats.read(file)
    assert weights.tokenizer == file.with_name("rwkv_vocab_v20230424.txt")
    server.shutdown()
    server.server_close()
    assert hub.resolve("owner/tiny", endpoint=server.url, cache=tmp_path) == file


@pytest.mark.parametrize(
    ("name", "revision", "asked"),
    [
        ("owner/tiny", None, "main"),
        ("owner/tiny@v1.0", None, "v1.0"),
        ("owner/tiny", "v1.0", "v1.0"),
        ("owner/tiny@refs/pr/7", "refs/pr/7", "refs/pr/7"),
        ("owner/tiny/model.safetensors@v1.0", None, "v1.0"),
    ],
)
def test_a_revision_is_asked_for(server, tmp_path, name, revision, asked):
    found = hub.resolve(name, revision=revision, endpoint=server.url, cache=tmp_path)
    assert server.revisions == {asked}
    assert COMMIT in found.parts


def test_a_commit_is_asked_for_as_it_is(server, tmp_path):
    hub.resolve(f"owner/tiny@{COMMIT}", endpoint=server.url, cache=tmp_path)
    assert server.revisions == set()


def test_the_token_is_that_of_huggingface_hub(server, tmp_path, monkeypatch):
    fetch = partial(hub.resolve, "owner/private", endpoint=server.url, cache=tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ValueError, match="`hf auth login` if it is private"):
        fetch()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert (fetch() / "model.safetensors").is_file()


def test_a_broken_download_goes_on_where_it_broke(
    server, tmp_path, official, assert_same, monkeypatch
):
    # It keeps whole blocks of what it got, usually of 10 MB.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    whole = len(server.files["model.safetensors"])
    server.cuts = [whole // 2]
    directory = hub.resolve("owner/tiny", endpoint=server.url, cache=tmp_path)
    sent = [(begin, count) for file, begin, count in server.sent if file == "model.safetensors"]
    assert sent[0] == (0, whole // 2)
    assert sent[1] == (whole // 2 // 1000 * 1000, whole - sent[1][0])
    assert_same(receptance.formats.read(directory).tensors, official)


def test_progress_goes_to_stderr(server, tmp_path, capfd):
    hub.resolve("owner/tiny", endpoint=server.url, cache=tmp_path)
    out, err = capfd.readouterr()
    assert out == "" and "100%" in err


def test_a_download_is_announced_and_a_cached_copy_is_not(server, tmp_path):
    resolve = partial(hub.resolve, endpoint=server.url, cache=tmp_path)
    line = "downloading owner/tiny from the Hugging Face hub"
    with pytest.warns(hub.DownloadWarning, match=f"^{line}$"):
        directory = resolve("hf:owner/tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve("owner/tiny") == resolve("hf:owner/tiny") == directory
        # Before anything was fetched.
        with pytest.raises(hub.DownloadWarning, match=r"downloading owner/tiny/rwkv-4\.pth from"):
            resolve("hf:owner/tiny/rwkv-4.pth")
    assert "rwkv-4.pth" not in server.fetched


def test_nothing_is_announced_when_nothing_can_be_downloaded(server, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
            hub.resolve("owner/tiny", endpoint=server.url, cache=tmp_path)


def test_a_prefix_or_a_name_that_can_be_no_path_means_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/there.pth").touch()
    for name in ("hf:owner/name", "hf:runs/demo", "hf:models/there.pth", "hf:nonsense", "o/n@v1"):
        assert hub.means_hub(name), name
    for path in ("runs/demo", "runs/demo@v1", "models/absent", "models/x/there.pth", "~/demo"):
        assert not hub.means_hub(path), path
        assert not hub.means_hub(Path("owner/name"))
    assert not hub.means_hub(Path("hf:owner/name"))
    with pytest.raises(ValueError, match="'hf:nonsense' is not a hub id; one looks like 'hf:RWKV"):
        receptance.formats.read("hf:nonsense")


def test_a_mistyped_run_is_no_hub_model(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "resolve", lambda *_, **__: pytest.fail("the hub was asked"))
    for source in ("runs/demo", Path("runs/demo"), Path("owner/name")):
        with pytest.raises(ValueError) as caught:
            receptance.formats.read(source)
        assert str(caught.value) == (
            f"no such file or directory: {source}; models of the Hugging Face hub are written "
            "hf:owner/name"
        )


def test_conversion_and_inspection_ask_the_hub_for_no_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "resolve", lambda *_, **__: pytest.fail("the hub was asked"))
    for opener in (open_source, find):
        for source in ("runs/demo", Path("runs/demo"), Path("owner/name")):
            with pytest.raises(ValueError, match=r"are written hf:owner/name$"):
                opener(source)


def test_read_takes_names_of_this_form_for_hub_ids(monkeypatch, tmp_path):
    asked = []

    def resolve(name: str, *, revision: str | None = None) -> Path:
        asked.append((name, revision))
        raise ValueError("not today")

    monkeypatch.setattr(hub, "resolve", resolve)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="not today"):
        receptance.formats.read("RWKV/rwkv-4-169m-pile", revision="main")
    for name in (
        "RWKV/rwkv-4-169m-pile@v1",
        "BlinkDL/rwkv-4-pile-169m/x.pth",
        "hf:BlinkDL/rwkv-4-pile-169m/x.pth",
    ):
        with pytest.raises(ValueError, match="not today"):
            receptance.formats.read(name)
        assert asked.pop() == (name, None)
    assert asked == [("RWKV/rwkv-4-169m-pile", "main")]
    for local in ("models/absent.pth", Path("RWKV/rwkv-4-169m-pile"), "/RWKV/model", "./a/b", "a"):
        with pytest.raises(ValueError, match="no such file or directory"):
            receptance.formats.read(local)
    (tmp_path / "RWKV/empty").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"found neither"):
        receptance.formats.read("RWKV/empty")
    assert len(asked) == 1

"""What is in deploy/: the door before servers elsewhere, the manifests, and Ray."""

from __future__ import annotations

import asyncio
import configparser
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from running_server import Running, make_served, start

from receptance.apps.options import parse
from receptance.apps.serve import Options
from receptance.server.running import _bind

DEPLOY = Path(__file__).parents[2] / "deploy"

pytestmark = pytest.mark.skipif(not DEPLOY.is_dir(), reason="the sources are not here")


def served_options(command: list[str]) -> Options:
    """The options of a command `receptance serve` in a file."""
    at = command.index("serve")
    assert command[:at] == command[at - 1 : at] and command[at - 1].endswith("receptance")
    return parse(Options, command[at + 1 :], "receptance serve")


def test_the_unit_starts_a_server():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "receptance.service")
    options = served_options(shlex.split(unit["Service"]["ExecStart"]))
    assert options.keys is not None and options.cache_dir is not None
    assert int(unit["Service"]["TimeoutStopSec"]) > options.limits.drain_seconds


def test_the_manifests_start_a_server_behind_a_door():
    yaml = pytest.importorskip("yaml")
    found = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    kinds = {(one["kind"], one["metadata"]["name"]): one for one in found}
    pods = kinds["StatefulSet", "receptance"]["spec"]
    [container] = pods["template"]["spec"]["containers"]
    options = served_options(container["command"])
    assert options.host == "0.0.0.0" and options.keys is not None
    assert pods["template"]["spec"]["terminationGracePeriodSeconds"] > options.limits.drain_seconds
    [router] = kinds["Deployment", "router"]["spec"]["template"]["spec"]["containers"]
    urls = [word for word in router["command"] if word.startswith("http://")]
    names = {f"http://receptance-{n}.receptance:{options.port}" for n in range(pods["replicas"])}
    assert set(urls) == names


def test_the_container_file_copies_what_there_is():
    for line in (DEPLOY / "Containerfile").read_text().splitlines():
        if line.startswith("COPY") and "--from" not in line:
            for word in line.split()[1:-1]:
                assert (DEPLOY.parent / word).exists(), word


# ---- the door before servers elsewhere ----------------------------------------------------------


@pytest.fixture
def two() -> Iterator[list[Running]]:
    """Two servers of one model."""
    first = start([make_served()])
    second = start([make_served()])
    yield [next(first), next(second)]
    for each in (first, second):
        next(each, None)


def test_a_door_hands_on_and_finds_the_states_again(two, monkeypatch):
    monkeypatch.syspath_prepend(str(DEPLOY))
    import router

    with opened(router.door([one.url for one in two])) as client:
        cached = []
        for number in range(8):
            text = f"{number} little foxes jump over the lazy dogs of the village"
            for _ in range(2):
                body = {"model": "tiny", "prompt": text, "max_tokens": 2}
                found = client.post("/v1/completions", json=body)
                usage = found.json()["usage"]["prompt_tokens_details"]
            cached.append(usage["cached_tokens"])
        assert all(cached)
        asked = [sum("POST /v1/completions 200" in line for line in one.lines) for one in two]
        assert sum(asked) == 16 and all(count and not count % 2 for count in asked)
        # Streams, errors and paths come through as they are.
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
            assert list(stream.iter_lines())[-2] == "data: [DONE]"
        assert client.post("/v1/completions", json={"model": "gone"}).status_code == 404
        assert client.get("/v1/models/a%2Fb").status_code == 404
        assert client.get("/").text == httpx.get(two[0].url).text
        # One of them ends: the other answers all.
        two[0].server.should_exit = True
        for number in range(8):
            body = {"model": "tiny", "prompt": f"{number} little foxes", "max_tokens": 2}
            assert client.post("/v1/completions", json=body).status_code == 200


@contextmanager
def opened(app: Any) -> Iterator[httpx.Client]:
    """A client of an application that runs in a thread."""
    bound = _bind("127.0.0.1", 0)
    bound.listen()
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="critical", ws="none"))
    thread = threading.Thread(target=lambda: asyncio.run(server._serve([bound])))
    thread.start()
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=500) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(500)


# ---- Ray ----------------------------------------------------------------------------------------

RAY = """
import sys
import ray, ray_app
from ray import serve
ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
serve.run(ray_app.build({"replicas": "2", "options": "tiny-python --anyone"}), name="default")
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
"""


@pytest.mark.slow  # Ray alone takes half a minute
def test_ray_loses_no_request_when_a_server_is_killed(tmp_path):
    pytest.importorskip("ray.serve", reason="Ray is not installed")
    psutil = pytest.importorskip("psutil", reason="psutil is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "run.py").write_text(RAY)
    words = [sys.executable, str(tmp_path / "run.py"), str(port)]
    # Ray's workers have the paths of their parent in this variable alone.
    paths = os.pathsep.join([str(DEPLOY), *sys.path])
    variables = {**os.environ, "PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0"}
    variables["RAY_AUTH_MODE"] = "disabled"
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables, cwd=tmp_path
    )
    try:
        assert process.stdout is not None
        while (line := process.stdout.readline()) and line != "ready\n":
            pass
        assert line == "ready\n", "Ray did not start"
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            ask_and_kill(client, psutil.Process(process.pid))
    finally:
        process.communicate("", timeout=120)


def ask_and_kill(client: httpx.Client, parent: Any) -> None:
    long = {"model": "tiny-python", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    prompts = [f"def f{number}(x):" for number in range(8)]
    ends: dict[str, list[str]] = {}
    begun = threading.Barrier(len(prompts) + 1)

    def stream(prompt: str) -> None:
        with client.stream("POST", "/v1/completions", json={**long, "prompt": prompt}) as answer:
            lines = answer.iter_lines()
            next(lines)
            begun.wait(300)
            ends[prompt] = [line for line in lines if line][-2:]

    threads = [threading.Thread(target=stream, args=(prompt,)) for prompt in prompts]
    for each in threads:
        each.start()
    begun.wait(300)
    family = parent.children(recursive=True)
    servers = [one for one in family if re.search("server-[01]", " ".join(one.cmdline()))]
    assert len(servers) == 2
    servers[0].kill()
    for prompt in prompts:  # whatever comes from now on is answered
        body = {"model": "tiny-python", "prompt": prompt, "max_tokens": 3}
        assert client.post("/v1/completions", json=body).status_code == 200
    for each in threads:
        each.join()
    assert all(end[-1] == "data: [DONE]" for end in ends.values())
    broken = [end for end in ends.values() if '"error"' in end[0]]
    assert 0 < len(broken) < len(prompts) and all("is gone" in end[0] for end in broken)

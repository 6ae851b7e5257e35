"""A plugin of pytest that runs llama.cpp's server tests on one local model (see llama_suite.py).

Nothing is downloaded: every model that a test names becomes the one of --local-model. With --ours
the server is the one of _llama_shim.py, forked from a process in which torch is there already,
because every test starts a server of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import types
from typing import Any

import _llama_shim
import pytest

_PATIENCE = 60
"""Seconds that a server may take to start."""


class Forked:
    """Our server as what `subprocess.Popen` would give, as far as the suite uses that."""

    def __init__(self, command: list[str], **options: Any) -> None:
        forking = multiprocessing.get_context("fork")
        log = options["stdout"].fileno() if options["stdout"] is not sys.stdout else None
        self._process = forking.Process(target=_serve, args=(command[1:], log), daemon=True)
        self._process.start()
        self.pid = self._process.pid
        self.terminate, self.kill = self._process.terminate, self._process.kill

    def poll(self) -> int | None:
        """The status with which it ended; None if it has not."""
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        """The same."""
        return self.poll()

    def wait(self, timeout: float) -> None:
        """Wait for its end; TimeoutExpired if it does not come."""
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("receptance serve", timeout)


def _serve(words: list[str], log: int | None) -> None:
    if log is not None:
        os.dup2(log, 1)
        os.dup2(log, 2)
    _llama_shim.main(words)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The model in the place of all others, and which server is tried."""
    parser.addoption("--local-model", required=True)
    parser.addoption("--ours", action="store_true")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Change how the suite starts servers, before it reads its own modules."""
    sys.path.insert(0, str(early_config.rootpath))
    sys.modules.setdefault("wget", types.ModuleType("wget"))  # which would download
    import utils  # type: ignore[import-not-found]

    options = early_config.known_args_namespace
    start = utils.ServerProcess.start

    def start_locally(server: Any, timeout_seconds: int = _PATIENCE) -> None:
        if server.model_hf_repo is not None:
            server.model_hf_repo = server.model_hf_file = None
            server.model_file = options.local_model
        start(server, timeout_seconds)

    utils.ServerProcess.start = start_locally
    utils.ServerPreset.load_all = staticmethod(lambda: None)
    if options.ours:
        import receptance.apps.serve
        import receptance.server.app
        import receptance.server.running  # noqa: F401

        named = {name: getattr(subprocess, name) for name in subprocess.__all__}
        utils.subprocess = types.SimpleNamespace(**named | {"Popen": Forked})

"""`receptance serve` as a process of its own, for the benchmarks that ask it."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Server:
    """A server that answers at an address."""

    url: str
    pid: int

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def resident(self) -> int:
        """The bytes of memory that it occupies now, on Linux."""
        return self._status("VmRSS")

    def peak(self) -> int:
        """The most that it has occupied since `forget_peak`."""
        return self._status("VmHWM")

    def forget_peak(self) -> None:
        """Let the peak begin anew."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def _status(self, name: str) -> int:
        text = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
        assert found is not None
        return int(found[1]) << 10


@contextlib.contextmanager
def server(model: str, *words: str) -> Iterator[Server]:
    """A server of one model, which is called "model"; words are further options."""
    command = [sys.executable, "-m", "receptance", "serve", f"model={model}", "--port", "0"]
    command += ["--quiet", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            assert found, "the server did not start"
            yield Server(found[0], process.pid)
        finally:
            process.terminate()

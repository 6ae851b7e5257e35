"""The sections of reliability.py that fill a disk: a small one of their own.

    python benchmarks/_disks.py FUNCTION FOLDER [ARGUMENT ...]

is how they call themselves where that disk is mounted.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _checkpoints import refusal, save, step_of
from _runs import run_on_a_full_disk

from receptance.storage.directories import newest_checkpoint

PAGE = 4096
MEGABYTES, INODES = 2, 40
MOUNT = 'mount -t tmpfs -o "$1" tmpfs "$0" && shift && exec "$@"'


def full_disk(folder: Path, count: int = 10_000, stride: int = 1) -> dict[str, Any]:
    """On a small disk of our own: every amount of free space, until a save succeeds."""
    return on_a_small_disk(folder, f"size={MEGABYTES}m,nr_inodes={INODES}", fill, count, stride)


def on_a_small_disk(
    folder: Path, size: str, call: Callable[..., dict[str, Any]], *arguments: object
) -> dict[str, Any]:
    """What call returns in a process that has a small disk of its own mounted at the folder."""
    if shutil.which("unshare") is None:
        return {"not permitted here": "no unshare"}
    inside = [sys.executable, __file__, call.__name__, str(folder), *map(str, arguments)]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", MOUNT, str(folder), size, *inside],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        return {"not permitted here": done.stderr.strip().splitlines()[-1]}
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def fill(folder: Path, count: str, stride: str) -> dict[str, Any]:
    """Leave a little space, then a little more."""
    save(folder / "step-1", 1)
    space = _fill(folder, range(0, int(count), int(stride)), _take_pages, _free_pages)
    shutil.rmtree(folder / "step-2", ignore_errors=True)
    inodes = _fill(folder, range(int(count)), _take_inodes, _free_inodes)
    found = {"saves without space": space.total(), "saves without inodes": inodes.total()}
    return found | {"failed in": dict(space + inodes)}


def _fill(
    folder: Path,
    amounts: range,
    take: Callable[[Path, int], None],
    free: Callable[[Path], int],
) -> Counter[str]:
    stages: Counter[str] = Counter()
    ballast = folder / "ballast"
    for left in amounts:
        ballast.mkdir()
        take(ballast, free(folder) - left)
        message = refusal(lambda: save(folder / "step-2", 2))
        shutil.rmtree(ballast)
        if (folder / "step-2").exists():
            assert step_of(folder / "step-2") == 2 and not message
            break
        assert "step-2" in message and "No space left" in message, message
        stages[_stage(message)] += 1
        assert step_of(newest_checkpoint(folder)[0]) == 1
        assert sorted(p.name for p in folder.iterdir()) == ["step-1"]
    return stages


def _stage(message: str) -> str:
    """What did not fit, as the error tells it."""
    if ".partial/" not in message:
        return "the folder" if ".partial" in message else "the middle of a file"
    file = message.rpartition("/")[2].rstrip("'\"")
    return "tensors" if file.startswith(".tmp") else file


def _free_pages(folder: Path) -> int:
    about = os.statvfs(folder)
    return about.f_bavail * about.f_frsize // PAGE


def _free_inodes(folder: Path) -> int:
    return os.statvfs(folder).f_favail


def _take_pages(ballast: Path, pages: int) -> None:
    (ballast / "file").write_bytes(bytes(pages * PAGE))


def _take_inodes(ballast: Path, inodes: int) -> None:
    for number in range(inodes):
        (ballast / str(number)).touch()


def full_disk_training(folder: Path) -> dict[str, Any]:
    """A run goes on when its disk is full, and gives up when it stays full."""
    disk, home = folder / "disk", folder / "home"
    disk.mkdir()
    home.mkdir()
    return on_a_small_disk(disk, "size=8m", run_on_a_full_disk, home)


if __name__ == "__main__":
    call = {"fill": fill, "run_on_a_full_disk": run_on_a_full_disk}[sys.argv[1]]
    print(json.dumps(call(Path(sys.argv[2]), *sys.argv[3:])))

"""Does a checkpoint survive whatever can happen to it? Every claim of docs/files.md, many times.

    python benchmarks/reliability.py [SECTION ...] [--count N] [--ranks N] [--folder FOLDER]

Sections: crash-points, kills, damage, full-disk, full-disk-training, stops, memory; without any
name all of them, for a quarter of an hour. The first thing that is not as it should be ends it with
an AssertionError. Prints JSON on the last line.
"""

from __future__ import annotations

import argparse
import inspect
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _checkpoints import refusal, save, save_step, step_of, tensors
from _common import report
from _disks import full_disk, full_disk_training
from _runs import memory, stops
from rich.progress import track

from receptance.sealed import MANIFEST
from receptance.storage import checkpoint
from receptance.storage.directories import (
    existing,
    newest_checkpoint,
    step_directories,
    step_number,
)
from receptance.storage.lock import RunLock
from receptance.storage.manifest import verify


def main() -> None:
    """Run the sections named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--count", type=int, help="repetitions instead of each section's own")
    parser.add_argument("--ranks", type=int, default=1, help="processes of each run in stops")
    parser.add_argument("--folder", type=Path, help="on the disk to test (default: temporary)")
    options = parser.parse_args()
    if unknown := set(options.sections) - SECTIONS.keys():
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    results: dict[str, Any] = {}
    for name in options.sections or SECTIONS:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found = SECTIONS[name](Path(folder), **_arguments(SECTIONS[name], options))
            results |= {f"{name}: {what}": value for what, value in found.items()}
    report(results)


def _arguments(section: Callable[..., object], options: argparse.Namespace) -> dict[str, int]:
    """Those of the options that were given and that the section takes."""
    taken = inspect.signature(section).parameters
    given = {"count": options.count, "ranks": options.ranks}
    return {name: value for name, value in given.items() if name in taken and value is not None}


# ---- processes that die -------------------------------------------------------------------------

# Started with torch loaded, so that a process costs milliseconds.
PROCESSES = multiprocessing.get_context("forkserver")

# What Python tells an audit hook before it touches a file.
TOUCHES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.scandir"}


def start(target: Callable[..., None], *arguments: object) -> Any:
    """A process that calls target."""
    PROCESSES.set_forkserver_preload(["receptance.storage.checkpoint", "receptance.storage.lock"])
    process = PROCESSES.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def crash_points(folder: Path, count: int = 10_000, stride: int = 1) -> dict[str, Any]:
    """Die before the n-th touch of a file, for every n, in saves that replace and prune."""
    states: Counter[str] = Counter()
    for step in (1, 2, 3):
        save(folder / f"before/step-{step:08d}", step)
    for point in track(range(0, count, stride), description="crash points", transient=True):
        run = shutil.copytree(folder / "before", folder / "run")
        process = start(_die_at, run, point)
        process.join()
        states[state(run)] += 1
        newest, skipped = newest_checkpoint(run)
        assert step_of(newest) in (3, 4) and not skipped, (point, skipped)
        if step_of(newest) == 3:
            assert step_of(run / "step-00000002") == 2
        with RunLock(run):
            save_step(run, 4)
        assert [step_of(p) for p in step_directories(run)] == [3, 4]
        assert sorted(p.name for p in run.glob(".*")) == [".lock"]
        shutil.rmtree(run)
        if process.exitcode == 0:
            break
    return {"touches of a file": point, "processes": states.total(), "left behind": dict(states)}


def _die_at(run: Path, point: int) -> None:
    touches = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal touches
        if event in TOUCHES and str(run) in str(arguments[0]):
            touches += 1
            if touches > point:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    tensors(3)
    sys.addaudithook(count)
    with RunLock(run):
        save(run / "step-00000003", 3)
        save_step(run, 4)


def state(run: Path) -> str:
    """What a killed process left behind."""
    names = {p.name.rpartition(".")[2]: p for p in run.glob(".step-*")}
    if "old" in names and not (run / names["old"].name[1:-4]).exists():
        return "between the two renames"
    if "partial" in names:
        sealed = (names["partial"] / MANIFEST).exists()
        return "a directory with a manifest" if sealed else "a directory without a manifest"
    return "a replaced directory" if "old" in names else "nothing"


# Seconds: several saves.
LONGEST_LIFE = 0.5


def kills(folder: Path, count: int = 200) -> dict[str, Any]:
    """SIGKILL at random moments of saving: the last checkpoint, or the one being written."""
    shuffled = random.Random(0)
    states: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    for trial in track(range(count), description="kills", transient=True):
        target = _save_steps if trial % 2 else _save_in_place
        told = PROCESSES.Value("q", -1, lock=False)
        process = start(target, folder, told)
        while told.value < 0 and process.is_alive():
            time.sleep(0.001)
        time.sleep(shuffled.random() * LONGEST_LIFE)
        process.kill()
        process.join()
        states[state(folder)] += 1
        newest = newest_checkpoint(folder)[0] if trial % 2 else existing(folder / "model")
        late = step_of(newest) - told.value
        assert late in (0, 1), late
        outcomes["the new one" if late else "the old one"] += 1
    return {"kills": count, "left behind": dict(states), "found": dict(outcomes)}


def _save_steps(run: Path, told: Any) -> None:
    torch.set_num_threads(1)
    with RunLock(run):
        found = step_directories(run)
        step = step_number(newest_checkpoint(run)[0]) if found else 0
        while True:
            step += 1
            save_step(run, step)
            told.value = step


def _save_in_place(folder: Path, told: Any) -> None:
    torch.set_num_threads(1)
    model = folder / "model"
    step = step_of(existing(model)) if existing(model).exists() else 0
    while True:
        step += 1
        save(model, step)
        told.value = step


# ---- damage -------------------------------------------------------------------------------------


def damage(folder: Path, count: int = 200) -> dict[str, Any]:
    """Flipped bytes, truncated, exchanged, missing and surplus files: all refused by name."""
    shuffled = random.Random(0)
    for step in (1, 2):
        save(folder / f"run/step-{step}", step)
    kinds = {_flip: count, _truncate: count // 4, _exchange: 3, _drop: 5, _add: 3}
    refused = {}
    for harm, times in kinds.items():
        name = harm.__name__[1:]
        for turn in track(range(times), description=name, transient=True):
            run = shutil.copytree(folder / "run", folder / "harmed")
            _check_refused(run, harm(run / "step-2", shuffled, turn))
            shutil.rmtree(run)
        refused[f"refused after {name}"] = times
    return refused


def _check_refused(run: Path, file: Path) -> None:
    """The damaged one is refused when it is named, and passed over when the run is.

    A model is loaded although its optimizer's state is damaged; to resume a run is not.
    """
    message = refusal(lambda: verify(run / "step-2"))
    assert str(file) in message, (file, message)
    newest, skipped = newest_checkpoint(run)
    assert newest == run / "step-1" and str(file) in skipped[0]
    if file.name.startswith("optimizer") and file.exists() and "sha256" in message:
        return
    message = refusal(lambda: checkpoint.load(run / "step-2"))
    assert str(file) in message, (file, message)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, _ = checkpoint.load(run)
    assert str(file) in str(caught[0].message)
    assert torch.equal(model.head.weight, tensors(1)["head.weight"])


def _some_file(directory: Path, shuffled: random.Random) -> Path:
    return shuffled.choice(sorted(directory.iterdir()))


def _flip(directory: Path, shuffled: random.Random, _: int) -> Path:
    file = _some_file(directory, shuffled)
    content = bytearray(file.read_bytes())
    content[shuffled.randrange(len(content))] ^= shuffled.randrange(1, 256)
    file.write_bytes(content)
    return file


def _truncate(directory: Path, shuffled: random.Random, _: int) -> Path:
    file = _some_file(directory, shuffled)
    os.truncate(file, shuffled.randrange(file.stat().st_size))
    return file


def _exchange(directory: Path, _: random.Random, turn: int) -> Path:
    name = ("model.safetensors", "optimizer.safetensors", "training.json")[turn]
    shutil.copy(directory.with_name("step-1") / name, directory / name)
    return directory / name


def _drop(directory: Path, _: random.Random, turn: int) -> Path:
    file = sorted(directory.iterdir())[turn]
    file.unlink()
    return file


def _add(directory: Path, _: random.Random, turn: int) -> Path:
    file = directory / ("model-00001-of-00002.safetensors", "notes", "model.pth")[turn]
    if file.name == "notes":
        file.mkdir()
    elif file.suffix == ".pth":
        file.symlink_to("model.safetensors")
    else:
        shutil.copy(directory / "model.safetensors", file)
    return file


SECTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "crash-points": crash_points,
    "kills": kills,
    "damage": damage,
    "full-disk": full_disk,
    "full-disk-training": full_disk_training,
    "stops": stops,
    "memory": memory,
}

if __name__ == "__main__":
    main()

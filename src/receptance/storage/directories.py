"""Directories that are whole or absent: they are written under a hidden name and then renamed.

Every file is forced to disk and read back from there, and the manifest is written last. Only then
does the directory get its name, and only then is the one that it replaces removed.
"""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from receptance.errors import one_line
from receptance.sealed import MANIFEST, Entries, check_outside, read_manifest
from receptance.storage.manifest import (
    check_listing,
    plain_files,
    seal_file,
    sync,
    verify,
    write_manifest,
)

# A run keeps at least two checkpoints: if there were a single one, a disk that damages it would
# end the run.
LEAST_KEPT = 2
# The file in a run's checkpoint that holds the step, the options and the corpus.
ABOUT = "training.json"
_STEP = re.compile(r"step-(\d+)")
# The folder of the models that come with the package.
_INCLUDED = Path(__file__).parents[1] / "weights"
# The suffix of the mark beside a checkpoint that is needed outside its run.
_PIN = ".pinned"


def write_directory(path: str | Path, write: Callable[[Path], object]) -> None:
    """Make a directory appear at path, whole, with the files that `write` puts into it.

    A checkpoint at path is replaced after the new one has been read back from disk; anything else
    is never replaced. ValueError if the directory cannot be written; then path is untouched.
    """
    draft = Draft.begin(path)
    try:
        with one_line(draft.path):
            write(draft.folder)
        draft.finish(draft.seal())
    finally:
        draft.discard()


@dataclass(frozen=True)
class Draft:
    """A directory that is being written, by one process or by several together.

    One process calls `begin` and sends the draft to the others. Each process writes files of its
    own into the folder and seals them. The first process collects what `seal` returned in all of
    them and calls `finish`, or `discard` if any process failed.
    """

    path: Path
    """The path that the finished directory gets."""
    folder: Path
    """The hidden folder beside `path` in which the files are written."""

    @staticmethod
    def begin(path: str | Path) -> Draft:
        """Make an empty folder beside path.

        ValueError if nothing can be written there, or if path is anything but a checkpoint.
        """
        path = expanded(path)
        with one_line(path):
            if path.is_symlink():
                path = path.resolve()  # The link stays, and the directory it names is replaced.
            _check_replaceable(path)
            check_outside(path.parent)
            _make_folder(path.parent)
            _restore(path)
            for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
                if _is_abandoned(leftover):
                    remove(leftover)
            folder = _beside(path)
            folder.mkdir()
        return Draft(path, folder)

    def seal(self, names: Iterable[str] | None = None) -> Entries:
        """Force files (None: all) to disk, read them back and return their manifest entries."""
        with one_line(self.path):
            names = plain_files(self.folder) if names is None else names
            return {name: seal_file(self.folder / name) for name in names}

    def finish(self, entries: Entries) -> None:
        """Write the manifest of all sealed files and give the directory its name.

        ValueError if a file is missing or was not sealed; then path is untouched.
        """
        with one_line(self.path):
            check_listing(self.folder, entries)
            write_manifest(self.folder, entries)
            _check_replaceable(self.path)  # This is checked again: writing may have taken hours.
            _replace(self.folder, self.path)

    def discard(self) -> None:
        """Remove the hidden folder, if `finish` has not renamed it."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Re-raise disk errors inside the block as one ValueError: PATH: cannot be read: REASON."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None


def _check_replaceable(path: Path) -> None:
    """ValueError if anything but a checkpoint of this package or an empty folder is at path."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    try:
        known = {MANIFEST, *read_manifest(path)}
    except (OSError, ValueError):
        if path.is_dir() and _STEP.fullmatch(path.name):
            return  # A run that reaches a step again replaces a damaged checkpoint of that step.
        raise ValueError(
            f"cannot write {path}: what is there is not a checkpoint; choose another name"
        ) from None
    if foreign := sorted({item.name for item in path.iterdir()} - known):
        raise ValueError(
            f"cannot write {path}: {foreign[0]} in it is not part of the checkpoint; move it "
            "elsewhere"
        )


def _make_folder(folder: Path) -> None:
    new = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for parent in new:
        sync(parent.parent)


def _beside(path: Path) -> Path:
    """A new hidden name beside path, which holds the host and the process that made it."""
    owner = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    return path.with_name(f".{path.name}.{owner}.partial")


def _is_abandoned(partial: Path) -> bool:
    """Whether the process in the name of a hidden folder has certainly ended."""
    host, _, process = partial.name.rpartition("-")[0].rpartition("-")
    if not host.endswith(f".{socket.gethostname()}") or not process.isdecimal():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except OSError:  # The process runs as another user.
        return False
    return False


def _replace(folder: Path, path: Path) -> None:
    """Rename the folder to path; a directory there is first set aside and then removed."""
    old = _old(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    try:
        os.rename(folder, path)
    except OSError:
        _restore(path)
        raise
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _restore(path: Path) -> None:
    """Give a checkpoint its name back if a killed process set it aside and did not replace it."""
    if not path.exists() and _old(path).is_dir():
        os.rename(_old(path), path)


def expanded(path: str | Path) -> Path:
    """The path with ~ replaced by the user's home; ~NAME of an unknown user stays as it is.

    ValueError for an empty text, which would otherwise mean the current folder, and for one that
    cannot be a path.
    """
    if "\0" in str(path):
        raise ValueError(f"{str(path)!r} holds a null byte; name a file or folder")
    if path == "":
        raise ValueError('a path is empty; name a file or folder, "." for the current one')
    return Path(os.path.expanduser(path))


def existing(source: str | Path) -> Path:
    """The path of what can be read under this name.

    That is the path itself, or the directory set aside for it if a process was killed while
    replacing it. Where neither exists, a text may be the name of a model that comes with this
    package.
    """
    path = expanded(source)
    with _reading(path):
        if path.exists():
            return path
        if _old(path).is_dir():
            return _old(path)
        if source == path.name:
            included = [each.name for each in _INCLUDED.iterdir() if each.is_dir()]
            if source in included:
                return _INCLUDED / source
            if near := difflib.get_close_matches(source, included, 1, 0.8):
                raise ValueError(f"no such file or directory: {path}; did you mean {near[0]}?")
        return path


def is_included(path: Path) -> bool:
    """Whether a path is that of a model which comes with this package."""
    return path.parent == _INCLUDED


def remove(directory: Path) -> None:
    """Rename a directory, then remove it, so that its name never holds half of it."""
    rubbish = _beside(directory)
    with suppress(OSError):
        os.rename(directory, rubbish)
        shutil.rmtree(rubbish, ignore_errors=True)


# ---- the checkpoints of a run -------------------------------------------------------------------


def is_step(path: Path) -> bool:
    """Whether the name of a path is one that a run gives to a checkpoint."""
    return _STEP.fullmatch(path.name) is not None


def step_number(path: Path) -> int:
    """The step in the name of a run's checkpoint."""
    return int(path.name.removeprefix("step-"))


def step_directories(run: Path) -> list[Path]:
    """The checkpoints of a training run, oldest first."""
    with _reading(run):
        return sorted((p for p in run.iterdir() if is_step(p) and p.is_dir()), key=step_number)


def newest_checkpoint(run: str | Path, *, optimizer: bool = True) -> tuple[Path, list[str]]:
    """The newest whole checkpoint of a run, and why newer ones were passed over.

    `optimizer` means what it means for `manifest.verify`.
    """
    run, skipped = Path(run), []
    found = {*step_directories(run), *filter(is_step, _replaced(run))}
    for directory in map(existing, sorted(found, key=step_number, reverse=True)):
        try:
            verify(directory, optimizer=optimizer)
            _check_step(directory)
        except ValueError as error:
            skipped.append(str(error))
        else:
            return directory, skipped
    raise ValueError(f"no whole checkpoint in {run}: {'; '.join(skipped) or 'it has none'}")


def _check_step(directory: Path) -> None:
    """ValueError if a checkpoint was renamed to another step than it holds."""
    file = directory / ABOUT
    if not file.exists() or not is_step(directory):
        return
    about = json.loads(file.read_bytes())
    step = about.get("step") if isinstance(about, dict) else None
    if step != step_number(directory):
        raise ValueError(f"{directory} holds step {step}; give it back the name of that step")


def put_aside(newest: Path) -> list[Path]:
    """Rename the damaged checkpoints after the newest whole one, and return their new paths.

    Under their old names `prune` would count them. The caller must hold the lock of the run.
    """
    later = [p for p in step_directories(newest.parent) if step_number(p) > step_number(newest)]
    moved = []
    for damaged in later:
        with suppress(OSError):  # If that step was set aside before, this one keeps its name.
            moved.append(damaged.rename(damaged.with_name(damaged.name + ".damaged")))
    return moved


def pin(directory: Path, reason: str) -> None:
    """Keep `prune` from removing a checkpoint, by a file beside it that holds the reason.

    Deleting that file unpins the checkpoint. OSError if it cannot be written.
    """
    with directory.with_name(directory.name + _PIN).open("a", encoding="utf-8") as mark:
        mark.write(reason + "\n")


def prune(newest: Path, keep: int) -> None:
    """Keep the last `keep` checkpoints, counted back from the one just written; remove older ones.

    Pinned checkpoints stay. So do checkpoints of later steps: a run that went back to an older
    step will write them again.
    """
    if keep < LEAST_KEPT:
        raise ValueError(f"keep is {keep}; a run keeps at least {LEAST_KEPT} checkpoints")
    steps = [p for p in step_directories(newest.parent) if step_number(p) <= step_number(newest)]
    for old in steps[:-keep]:
        if not old.with_name(old.name + _PIN).exists():
            remove(old)


def clean(run: Path) -> None:
    """Remove what a killed process left behind. The caller must hold the lock of the run."""
    for path in _replaced(run):
        _restore(path)
        with suppress(ValueError):
            verify(path)
            shutil.rmtree(_old(path), ignore_errors=True)
    for partial in run.glob(".step-*.partial"):
        remove(partial)


def _replaced(run: Path) -> list[Path]:
    """The names of checkpoints that a killed process was about to replace."""
    return [run / old.name[1:].removesuffix(".old") for old in run.glob(".step-*.old")]

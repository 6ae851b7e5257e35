"""Directories that lose nothing, and `load`, which opens every format there is a reader for.

A directory is written beside its final name, every file and then a manifest of lengths and sha256
digests, and renamed when all of it is on disk: under its final name it is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from receptance.config import ModelConfig
from receptance.model import Model
from receptance.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

FORMAT = "receptance"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d+)")

# Rows of the embedding that a tokenizer may leave unused: World pads 65,530 ids to 65,536 and
# others round up to a multiple of 64 or 128. More than that is another vocabulary.
_MAX_UNUSED_ROWS = 128


def write_directory(path: str | Path, write: Callable[[Path], None]) -> None:
    """Make a directory appear at path, whole, with what `write` puts into it.

    A checkpoint that was there is replaced after the new one is on disk; anything else is never
    replaced. ValueError when it cannot be written; then what was there is untouched.
    """
    from safetensors import SafetensorError

    path = Path(path).expanduser()
    _check_replaceable(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        write(partial)
        _write_manifest(partial)
        _replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write {path}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_replaceable(path: Path) -> None:
    """ValueError if something is at path that may be anything but a checkpoint of ours."""
    is_ours = (path / MANIFEST).exists() or _STEP.fullmatch(path.name)
    if path.exists() and not (path.is_dir() and (is_ours or not any(path.iterdir()))):
        raise ValueError(
            f"cannot write {path}: what is there is not a checkpoint; choose another name"
        )


def _write_manifest(directory: Path) -> None:
    files = {}
    listed = sorted(p for p in directory.rglob("*") if p.is_file())
    manifest = directory / MANIFEST
    manifest.touch()
    for file in listed:
        shutil.copymode(manifest, file)  # safetensors makes files that only their owner can read
        _sync(file)
        name = file.relative_to(directory).as_posix()
        files[name] = {"bytes": file.stat().st_size, "sha256": _digest(file)}
    manifest.write_text(json.dumps({"files": files}, indent=1))
    _sync(manifest)
    _sync(directory)


def _replace(partial: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    try:
        os.rename(partial, path)
    except OSError:
        if old.exists():
            os.rename(old, path)
        raise
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify(directory: str | Path) -> None:
    """ValueError names the first file that is missing or differs from the manifest."""
    directory = Path(directory)
    manifest = directory / MANIFEST
    try:
        files = json.loads(manifest.read_text())["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise ValueError(f"{manifest} is missing: {directory} is not a whole checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest} is damaged: {error}") from None
    for name, (size, digest) in expected.items():
        file = directory / name
        if not file.is_file():
            raise ValueError(f"{file} is missing; the checkpoint is incomplete")
        if file.stat().st_size != size:
            raise ValueError(f"{file} has {file.stat().st_size} bytes instead of {size}; truncated")
        if _digest(file) != digest:
            raise ValueError(f"{file} does not match its sha256 digest; it was damaged or edited")


def save(model: Model, directory: str | Path, tokenizer: Tokenizer) -> None:
    """Write a model and its tokenizer as a directory that `load` opens."""
    write_directory(directory, lambda partial: write_model(model, partial, tokenizer))


def write_model(model: Model, directory: Path, tokenizer: Tokenizer) -> None:
    """Put a model's files into a directory that is being written (see write_directory)."""
    from safetensors.torch import save_file

    check_tokenizer(tokenizer, model.config)
    tensors = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": model.config.to_dict(),
        "tokenizer": {
            "kind": tokenizer.kind,
            "files": tokenizer.save(directory),
            "fingerprint": tokenizer.fingerprint,
        },
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """ValueError if the tokenizer cannot be the one these weights were trained with."""
    unused = config.vocab_size - tokenizer.vocab_size
    if not 0 <= unused < _MAX_UNUSED_ROWS:
        raise ValueError(
            f"wrong tokenizer: {tokenizer.kind} has {tokenizer.vocab_size} ids and these weights "
            f"{config.vocab_size}; pass the tokenizer that the model was trained with"
        )


def load(
    source: str | Path,
    *,
    tokenizer: str | Path | Tokenizer | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> tuple[Model, Tokenizer]:
    """A model, ready to run, and its tokenizer, from a path or a hub id.

    Reads a directory of ours or the run folder of a training (its newest whole checkpoint; a
    warning says why newer ones were passed over), an official .pth, a Hugging Face directory, or
    an id such as "RWKV/rwkv-4-169m-pile".
    tokenizer (a file, a directory, "bytes" or an object) overrides the one found beside the
    weights; a directory of ours accepts no other than its own. dtype None keeps that of the
    file, but widens float16, in which RWKV-4 overflows, to float32.
    ValueError says in one line what is wrong.
    """
    from receptance import formats

    check_device(device)
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    path = Path(source).expanduser()
    if path.is_dir() and not (path / "config.json").exists() and step_directories(path):
        path, skipped = newest_checkpoint(path)
        for reason in skipped:
            warnings.warn(f"passed over a damaged checkpoint: {reason}", stacklevel=2)
    # First: a damaged config must not make it look like another format.
    if (path / MANIFEST).is_file() or _own_config(path) is not None:
        verify(path)
    if (config := _own_config(path)) is not None:
        sizes = ModelConfig.from_dict(config["model"])
        tensors = formats.read_safetensors(path / "model.safetensors")
        tokenizer = _own_tokenizer(path, config["tokenizer"], tokenizer)
    else:
        weights = formats.read(path if path.exists() else str(source), revision=revision)
        sizes, tensors = weights.config, weights.tensors
        tokenizer = tokenizer or _found_tokenizer(weights.tokenizer, sizes, source)
    check_tokenizer(tokenizer, sizes)
    if dtype is None and tensors["emb.weight"].dtype == torch.float16:
        dtype = torch.float32
    return Model.from_tensors(sizes, tensors, device=device, dtype=dtype), tokenizer


def _own_config(directory: Path) -> dict[str, Any] | None:
    """The config.json of a directory that we wrote, else None."""
    file = directory / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        return None
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {config.get('format_version')}; this release reads "
            f"{FORMAT_VERSION}, so update receptance"
        )
    return config


def _own_tokenizer(directory: Path, about: dict[str, Any], given: Tokenizer | None) -> Tokenizer:
    if given is not None and given.fingerprint != about["fingerprint"]:
        raise ValueError(
            f"wrong tokenizer: {directory} holds the {about['kind']} tokenizer that its model was "
            f"trained with, which is not the {given.kind} one given; leave out --tokenizer"
        )
    if about["kind"] == "bytes":
        return ByteTokenizer()
    return load_tokenizer(directory / about["files"][0])


def check_device(device: torch.device | str) -> None:
    """ValueError if nothing can be computed there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} cannot be used here: {reason}") from None


def _found_tokenizer(path: Path | None, config: ModelConfig, source: str | Path) -> Tokenizer:
    if path is not None:
        return load_tokenizer(path)
    if config.vocab_size == ByteTokenizer().vocab_size:
        return ByteTokenizer()
    usual = {50277: "20B_tokenizer.json", 65536: "rwkv_vocab_v20230424.txt"}
    name = usual.get(config.vocab_size, "its tokenizer file")
    raise ValueError(
        f"no tokenizer beside {source}, which has a vocabulary of {config.vocab_size}; put {name} "
        "there or pass it with --tokenizer"
    )


def step_directories(run: Path) -> list[Path]:
    """The checkpoints of a training run, oldest first."""
    found = (p for p in run.iterdir() if p.is_dir() and _STEP.fullmatch(p.name))
    return sorted(found, key=lambda p: int(p.name[len("step-") :]))


def newest_checkpoint(run: str | Path) -> tuple[Path, list[str]]:
    """The newest whole checkpoint of a run, and why newer ones were passed over."""
    skipped = []
    for directory in reversed(step_directories(Path(run))):
        try:
            verify(directory)
        except ValueError as error:
            skipped.append(str(error))
        else:
            return directory, skipped
    raise ValueError(f"no whole checkpoint in {run}: {'; '.join(skipped) or 'it has none'}")

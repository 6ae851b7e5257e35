"""The files of Long Range Arena's release, and of the data sets that its tasks are made of.

listops       basic_train.tsv, basic_val.tsv, basic_test.tsv: Source, Target
text          the folder aclImdb: train/pos/*.txt, train/neg/*.txt, test/...
retrieval     new_aan_pairs.train.tsv, .eval.tsv, .test.tsv: label, two ids, two texts
image         the folder cifar-10-batches-bin: data_batch_1.bin ... test_batch.bin
pathfinder    a folder with imgs/N/*.png and metadata/N.npy, such as
              pathfinder32/curv_contour_length_14; Path-X is that of 128 x 128 images
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from receptance.data.labeled import Part, Problem, Split, StoredExamples, split_off

LISTOPS_TOKENS = ("[MIN", "[MAX", "[MED", "[SM", "]", *map(str, range(10)))
"""The tokens of ListOps in the order of their ids."""
_LISTOPS_ID = {token: number for number, token in enumerate(LISTOPS_TOKENS)}
_VALIDATION = 0.1  # the share of images that the benchmark keeps for validation
_CIFAR_SIDE = 32
_CIFAR_TRAINING = tuple(f"data_batch_{n}.bin" for n in range(1, 6))
# The weights of red, green and blue in gray (ITU-R 601-2).
_GRAY = (0.299, 0.587, 0.114)


def read_listops(folder: Path, *, max_length: int = 2000) -> StoredExamples:
    """ListOps of the release, with sequences of at most so many tokens.

    ValueError names a file that is missing or a line that is no example.
    """
    names: dict[Split, str] = {"train": "train", "validation": "val", "test": "test"}
    problem = Problem(kind="classify", outputs=10, vocab_size=len(LISTOPS_TOKENS))
    files = {split: folder / f"basic_{name}.tsv" for split, name in names.items()}
    parts: dict[Split, Part] = {}
    for split, file in files.items():
        rows, targets = [], []
        for number, fields in enumerate(_records(file)):
            if number == 0 and fields == ["Source", "Target"]:
                continue
            with _line(file, number):
                source, target = fields
                words = source.replace("(", " ").replace(")", " ").split()
                rows.append(np.array([_LISTOPS_ID[x] for x in words[:max_length]], np.uint8))
                targets.append(int(target))
        parts[split] = Part(rows, np.array(targets, np.int64))
    return StoredExamples(problem, parts, _about("listops", files.values()))


def read_text(folder: Path, *, max_length: int = 4096, seed: int = 0) -> StoredExamples:
    """Reviews as bytes, positive or not; a tenth of those for training is kept for validation.

    The benchmark validates on its test part, which would choose by what is reported.
    """
    problem = Problem(kind="classify", outputs=2, vocab_size=256)
    found: dict[str, Part] = {}
    files: list[Path] = []
    for split in ("train", "test"):
        rows, targets = [], []
        for label, name in enumerate(("neg", "pos")):
            inside = sorted((folder / split / name).glob("*.txt"))
            if not inside:
                raise ValueError(f"{folder / split / name} has no .txt file; name aclImdb")
            for file in inside:
                rows.append(_bytes(_read(file), max_length))
                targets.append(label)
            files += inside
        found[split] = Part(rows, np.array(targets, np.int64))
    train, validation = split_off(found["train"], _VALIDATION, seed, problem)
    parts: dict[Split, Part] = {"train": train, "validation": validation, "test": found["test"]}
    return StoredExamples(problem, parts, _about("text", files))


def read_retrieval(folder: Path, *, max_length: int = 4000) -> StoredExamples:
    """Pairs of papers' texts as bytes: does one cite the other?"""
    problem = Problem(kind="classify", outputs=2, vocab_size=256, pairs=True)
    names: dict[Split, str] = {"train": "train", "validation": "eval", "test": "test"}
    files = {split: folder / f"new_aan_pairs.{name}.tsv" for split, name in names.items()}
    parts: dict[Split, Part] = {}
    for split, file in files.items():
        rows, targets = [], []
        for number, line in enumerate(_read(file).splitlines()):
            with _line(file, number):
                label, _, _, one, other = line.split(b"\t")
                targets.append(int(float(label)))
                rows += [_bytes(text, max_length) for text in (one, other)]
        parts[split] = Part(rows, np.array(targets, np.int64))
    return StoredExamples(problem, parts, _about("retrieval", files.values()))


def read_image(folder: Path, *, seed: int = 0) -> StoredExamples:
    """CIFAR-10 in gray, row by row: 1,024 pixels and ten classes.

    The files are those of the binary release. A tenth of the training images is kept for
    validation.
    """
    problem = Problem(kind="classify", outputs=10, channels=1)
    size = 1 + 3 * _CIFAR_SIDE**2

    def part(names: tuple[str, ...]) -> Part:
        records = []
        for name in names:
            content = np.frombuffer(_read(folder / name), np.uint8)
            if not len(content) or len(content) % size:
                raise ValueError(
                    f"{folder / name} has {len(content)} bytes, no multiple of {size}; it is no "
                    "batch of CIFAR-10's binary release"
                )
            records.append(content.reshape(-1, size))
        joined = np.concatenate(records)
        colors = joined[:, 1:].reshape(len(joined), 3, -1)
        gray = np.rint(np.einsum("c,ncp->np", np.array(_GRAY), colors)).astype(np.uint8)
        return Part(list(gray[..., None]), joined[:, 0].astype(np.int64))

    train, validation = split_off(part(_CIFAR_TRAINING), _VALIDATION, seed, problem)
    parts: dict[Split, Part] = {
        "train": train,
        "validation": validation,
        "test": part(("test_batch.bin",)),
    }
    files = [folder / name for name in (*_CIFAR_TRAINING, "test_batch.bin")]
    return StoredExamples(problem, parts, _about("image", files))


def read_pathfinder(folder: Path, *, seed: int = 0) -> StoredExamples:
    """Gray images, row by row: are both marks on the same path?

    A tenth of the images each is kept for validation and testing. ValueError if a file is missing
    or no image, or if Pillow is not installed.
    """
    problem = Problem(kind="classify", outputs=2, channels=1)
    lists = sorted((folder / "metadata").glob("*.npy"))
    if not lists:
        raise ValueError(
            f"{folder} has no metadata/*.npy; name a folder such as "
            "pathfinder32/curv_contour_length_14"
        )
    rows, targets = [], []
    for file in lists:
        # These are lines of text in spite of their name.
        for number, line in enumerate(_read(file).decode("latin-1").splitlines()):
            with _line(file, number):
                place, name, _, label, *_ = line.split()
                image = folder / place / name
                targets.append(int(label))
            # One file of the release is empty: curv_baseline/imgs/0/sample_172.png.
            if image.is_file() and not image.stat().st_size:
                targets.pop()
                continue
            rows.append(_gray(image).reshape(-1, 1))
    whole = Part(rows, np.array(targets, np.int64))
    rest, test = split_off(whole, _VALIDATION, seed, problem)
    share = _VALIDATION / (1 - _VALIDATION)
    train, validation = split_off(rest, share, seed, problem)
    parts: dict[Split, Part] = {"train": train, "validation": validation, "test": test}
    about = _about("pathfinder", lists) | {"pixels": len(rows[0]) if rows else 0}
    return StoredExamples(problem, parts, about)


def _gray(file: Path) -> np.ndarray:
    """The gray levels of an image, [H,W] uint8."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ValueError("images need Pillow: pip install pillow") from None
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("L"))
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{file} is not an image: {error}") from None


def _records(file: Path) -> Iterator[list[str]]:
    """The lines of a file as fields, between which there are tabs."""
    for line in _read(file).decode("utf-8", "replace").splitlines():
        yield line.split("\t")


def _bytes(text: bytes, most: int) -> np.ndarray:
    return np.frombuffer(text[:most] or b" ", np.uint8)  # a model cannot read nothing


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None


@contextmanager
def _line(file: Path, number: int) -> Iterator[None]:
    """Turn errors inside the block into one that names a line, counted from 0."""
    try:
        yield
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{file} line {number + 1} is not an example of this task: {error}"
        ) from None


def _about(task: str, files: Iterable[Path]) -> dict[str, Any]:
    digest = hashlib.sha256()
    names = list(files)
    for file in names:
        digest.update(hashlib.sha256(_read(file)).digest())
    return {"task": task, "files": len(names), "sha256": digest.hexdigest()}

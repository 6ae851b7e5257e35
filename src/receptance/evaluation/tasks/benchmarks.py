"""The benchmarks by name: generated, or read from the files of their release.

`BENCHMARKS` says what each is, `benchmark` makes its examples, and `TABLE_4` has the figures that
the paper prints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from receptance.data.arena import (
    read_image,
    read_listops,
    read_pathfinder,
    read_retrieval,
    read_text,
)
from receptance.data.idx import read_idx_folder
from receptance.data.labeled import Examples, Split
from receptance.data.series import SeriesWindows, read_archive, read_columns
from receptance.evaluation.tasks.listops import LISTOPS_SIZES, ListOps, ListOpsDifficulty
from receptance.evaluation.tasks.pathfinder import PATHFINDER, PATHFINDER_SIZES, Pathfinder
from receptance.evaluation.tasks.registry import nearest, parse_setting

BENCHMARKS = {
    "listops": "ListOps, generated, or read from a folder with basic_train.tsv",
    "text": "reviews as bytes, from the folder aclImdb",
    "retrieval": "pairs of papers as bytes, from the folder with new_aan_pairs.train.tsv",
    "image": "CIFAR-10 in gray, from the folder cifar-10-batches-bin",
    "pathfinder": "Pathfinder, generated, or read from a folder with imgs and metadata",
    "path-x": "Pathfinder with 128 x 128 images, generated, or read from such a folder",
    "images": "a set in the format of MNIST, pixel by pixel, from its folder",
    "series": "series with classes, from a NAME_TRAIN.ts",
    "regression": "series with a number each, from a NAME_TRAIN.ts",
    "forecast": "the columns of a .csv file, each value from those before",
}

TABLE_4: dict[str, dict[str, float]] = {
    "Transformer": dict(listops=36.37, text=64.27, retrieval=57.46, image=42.44, pathfinder=71.40),
    "Reformer": dict(listops=37.27, text=56.10, retrieval=53.40, image=38.07, pathfinder=68.50),
    "BigBird": dict(listops=36.05, text=64.02, retrieval=59.29, image=40.83, pathfinder=74.87),
    "Linear Trans.": dict(
        listops=16.13, text=65.90, retrieval=53.09, image=42.34, pathfinder=75.30
    ),
    "Performer": dict(listops=18.01, text=65.40, retrieval=53.82, image=42.77, pathfinder=77.05),
    "FNet": dict(listops=35.33, text=65.11, retrieval=59.61, image=38.67, pathfinder=77.80),
    "Nyströmformer": dict(
        listops=37.15, text=65.52, retrieval=79.56, image=41.58, pathfinder=70.94
    ),
    "Luna-256": dict(listops=37.25, text=64.57, retrieval=79.29, image=47.38, pathfinder=77.72),
    "Hrrformer": dict(listops=39.98, text=65.38, retrieval=76.15, image=50.45, pathfinder=72.17),
    "S4": {
        **dict(listops=59.60, text=86.82, retrieval=90.90, image=88.65, pathfinder=94.20),
        "path-x": 96.35,
    },
    "RWKV": dict(listops=55.88, text=86.04, retrieval=88.34, image=70.53, pathfinder=58.42),
}
"""Table 4 of arXiv 2305.13048v2: accuracy in percent; a model without path-x failed there."""

# What may be set besides the difficulty, by benchmark, with the values of the release.
_COUNTS: dict[str, type] = {"train": int, "validation": int, "test": int, "drawn_from": int}
_SETTINGS: dict[str, dict[str, type]] = {
    "listops": _COUNTS | {field.name: int for field in dataclasses.fields(ListOpsDifficulty)},
    "pathfinder": _COUNTS | {"side": int, "contour_length": int},
    "path-x": _COUNTS | {"contour_length": int},
    "text": {"max_length": int},
    "retrieval": {"max_length": int},
    "forecast": {"history": int, "horizon": int},
}
GENERATED = ("listops", "pathfinder", "path-x")


def benchmark(
    name: str, setting: str, source: str | None, seed: int, columns: tuple[str, ...] = ()
) -> Examples:
    """The examples of a benchmark at a setting such as "train=10000,max_length=600".

    source is the folder or file that it reads; without one it is generated, if it can be. seed
    decides what is kept for validation. columns are those of a forecast; none means all. ValueError
    says what is missing or unknown.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"no benchmark {name!r}{nearest(name, BENCHMARKS)}")
    known = {"max_length": int} if name == "listops" and source else _SETTINGS.get(name, {})
    given = parse_setting(name, setting, known)
    if source is None:
        if name not in GENERATED:
            raise ValueError(f"{name} is read from files ({BENCHMARKS[name]}); name them as source")
        return _generated(name, given)
    path = Path(source).expanduser()
    if not path.exists():
        raise ValueError(f"there is nothing at {path}; {name} is read from {BENCHMARKS[name]}")
    return _read(name, path, given, seed, columns)


def published_rows(name: str) -> dict[str, float]:
    """The accuracies in percent that table 4 has for a benchmark, by model."""
    return {model: row[name] for model, row in TABLE_4.items() if name in row}


def _generated(name: str, given: Mapping[str, Any]) -> Examples:
    seed = given.get("drawn_from", 0)
    own = {key: value for key, value in given.items() if key not in _COUNTS}
    if name == "listops":
        return ListOps(ListOpsDifficulty(**own), _sizes(LISTOPS_SIZES, given), seed)
    side = 128 if name == "path-x" else own.pop("side", 32)
    if side not in PATHFINDER:
        raise ValueError(f"side is {side}; the release has {', '.join(map(str, PATHFINDER))}")
    difficulty = dataclasses.replace(PATHFINDER[side], **own)
    return Pathfinder(difficulty, _sizes(PATHFINDER_SIZES, given), seed)


def _sizes(release: Mapping[Split, int], given: Mapping[str, Any]) -> dict[Split, int]:
    return {split: given.get(split, size) for split, size in release.items()}


def _read(
    name: str, path: Path, given: Mapping[str, Any], seed: int, chosen: tuple[str, ...]
) -> Examples:
    if name == "listops":
        return read_listops(path, **given)
    if name == "text":
        return read_text(path, seed=seed, **given)
    if name == "retrieval":
        return read_retrieval(path, **given)
    if name == "image":
        return read_image(path, seed=seed)
    if name in ("pathfinder", "path-x"):
        return read_pathfinder(path, seed=seed)
    if name == "images":
        return read_idx_folder(path, seed=seed)
    if name in ("series", "regression"):
        kind = "classify" if name == "series" else "regress"
        return read_archive(path, kind, seed=seed)[0]  # type: ignore[arg-type]
    values, columns = read_columns(path, chosen)
    lengths = {"history": 96, "horizon": 24} | dict(given)
    about = {"task": "forecast", "columns": ", ".join(columns)}
    return SeriesWindows(values, about=about, **lengths)

"""Pictures of losses and decays, drawn with matplotlib."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from receptance.plots.pictures import new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = list[tuple[float, float]]
Buffer = bytes | mmap.mmap

_VALIDATION = "validation_bits_per_byte"
# A file of up to this many bytes is read whole. In a longer one the lines at _PLACES places are
# read, _BYTES_PER_PLACE at each, and of its validations at most _MOST_VALIDATIONS.
_READ_WHOLE = 1 << 20
_PLACES = 600
_BYTES_PER_PLACE = 1024
_MOST_VALIDATIONS = 5000
# Up to this many points get a mark each; the marks of more would run together.
_MARKED = 100


def draw_losses(metrics: Path, picture: Path) -> None:
    """Draw loss, validation, learning rate and gradient norm of a metrics.jsonl over its tokens.

    A bounded part of a long file is read. The picture is a PNG that replaces an older one as a
    whole. ValueError if there is no training step to draw yet, if a file that is not a PNG is in
    the way, or if matplotlib is not installed.
    """
    figure = new_figure()
    records = _records(metrics)
    losses = _points(records, "loss")
    if not losses:
        raise ValueError(f"no training step in {metrics} yet")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    _curve(upper, losses, "training loss, nats per token", "tab:blue")
    _dots(upper.twinx(), _points(records, _VALIDATION), "validation, bits per byte")
    _curve(lower, _positive(_points(records, "gradient_norm")), "gradient norm", "tab:gray")
    lower.set_yscale("log")
    _line(lower.twinx(), _points(records, "learning_rate"), "learning rate", "tab:green")
    lower.set_xlabel("tokens read")
    upper.set_title(picture.resolve().parent.name)
    upper.grid(alpha=0.3)
    save(figure, picture)


def draw_decays(
    retentions: Mapping[int, Sequence[float]],
    picture: Path,
    *,
    before: Mapping[int, Sequence[float]] | None = None,
) -> None:
    """Draw the share that each channel keeps from a token to the next, layer by layer, as a PNG.

    The channels of a layer stand in descending order, as in figure 10 of arXiv 2305.13048v2. Those
    of `before`, the shares before training, are dotted. ValueError if a file that is not a PNG is
    in the way, or if matplotlib is not installed.
    """
    figure = new_figure()
    axes = figure.subplots()
    for layer, shares in sorted(retentions.items()):
        shade = 0.9 * layer / max(1, *retentions)
        color = (shade, 0.2, 1 - shade)
        axes.plot(shares, color=color, linewidth=1, label=f"layer {layer + 1}")
        if before is not None:
            axes.plot(before[layer], ":", color=color, linewidth=1)
    axes.set_xlabel("channels, those that remember longest first")
    axes.set_ylabel("kept from a token to the next, exp(-w)")
    axes.legend(fontsize="x-small", ncols=2)
    axes.grid(alpha=0.3)
    save(figure, picture)


def _curve(axes: Axes, points: Points, label: str, color: str) -> None:
    """Draw all points faintly, and their moving mean."""
    axes.plot(*_columns(points), color=color, alpha=0.35, linewidth=0.8)
    _line(axes, _smooth(points), label, color)


def _line(axes: Axes, points: Points, label: str, color: str) -> None:
    axes.plot(*_columns(points), color=color)
    axes.set_ylabel(label, color=color)


def _dots(axes: Axes, points: Points, label: str, color: str = "tab:orange") -> None:
    axes.plot(*_columns(points), "o-" if len(points) <= _MARKED else "-", color=color, markersize=3)
    axes.set_ylabel(label if points else "", color=color)
    if not points:
        axes.set_yticks([])


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [at for at, _ in points], [value for _, value in points]


def _points(records: Iterable[Mapping[str, Any]], name: str) -> Points:
    """(tokens, value) of the records that have both as numbers, in the order of tokens.

    Of a step that was repeated, as after a rollback, the last record counts.
    """
    found = ((record.get("tokens"), record.get(name)) for record in records)
    latest = {float(at): float(y) for at, y in found if _is_number(at) and _is_number(y)}
    return sorted(latest.items())


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _positive(points: Points) -> Points:
    return [(at, value) for at, value in points if value > 0]


def _smooth(points: Points) -> Points:
    """The exponential mean of the points, with a memory of a fiftieth of the run."""
    keep = 1 - 1 / max(1, len(points) // 50)
    mean, out = points[0][1] if points else 0.0, []
    for at, value in points:
        mean = keep * mean + (1 - keep) * value
        out.append((at, mean))
    return out


def _records(metrics: Path) -> list[dict[str, Any]]:
    """The records of a file, or a selection of many from all over it; other lines are skipped."""
    if metrics.stat().st_size <= _READ_WHOLE:
        return list(_parsed(metrics.read_bytes()))
    with (
        metrics.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return [*_sampled(content), *_validations(content)]


def _sampled(content: Buffer) -> Iterator[dict[str, Any]]:
    """Training steps from places all over the file, with its first and its last line."""
    last = len(content) - _BYTES_PER_PLACE
    for place in range(_PLACES):
        at = last * place // (_PLACES - 1)
        begin = content.rfind(b"\n", 0, at) + 1
        for record in _parsed(content[begin : at + _BYTES_PER_PLACE]):
            if _VALIDATION not in record:
                yield record


def _validations(content: Buffer) -> Iterator[dict[str, Any]]:
    """The records of validations, except for those that lie closer than a picture can show."""
    needle, stride = b'"' + _VALIDATION.encode() + b'"', len(content) // _MOST_VALIDATIONS
    at = content.find(needle)
    while at >= 0:
        begin, end = content.rfind(b"\n", 0, at) + 1, content.find(b"\n", at) + 1
        if not end:
            return
        yield from _parsed(content[begin:end])
        at = content.find(needle, max(end, begin + stride))


def _parsed(lines: bytes) -> Iterator[dict[str, Any]]:
    """The objects on whole lines; the last line may be half written and is then skipped."""
    for line in lines.split(b"\n")[:-1]:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record

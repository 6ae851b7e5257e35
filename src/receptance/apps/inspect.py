"""receptance inspect: say what a file or directory of weights is, without running it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from receptance.apps.console import Console
from receptance.apps.options import parse
from receptance.apps.text import visible
from receptance.checking.inspecting import Inspection, inspect
from receptance.plots import draw_decays
from receptance.plots.pictures import check_picture
from receptance.progress import progress_bar, say

_BAR = 40  # the width of the histogram's bars, in characters


@dataclass(frozen=True, kw_only=True)
class Options:
    """Say what a file or directory of weights is: any RWKV, adapters, states, checkpoints.

    The exit code is 1 if it is damaged, and 2 if there is nothing that can be inspected.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = ("receptance inspect model.pth",)

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """The file, directory, training run or hub id to inspect."""
    plot: Path | None = None
    """Draw the decays of all channels, layer by layer, in this PNG file."""
    json: bool = False
    """Print JSON instead of a table."""


def main(argv: list[str]) -> None:
    """Parse, inspect, report; leave with exit code 1 if the contents are damaged."""
    options = parse(Options, argv, "receptance inspect")
    if options.plot is not None:
        check_picture(options.plot)  # A large model takes minutes to inspect.
    found = _looked_at(options)
    if options.json:
        print(json.dumps(as_json(found), indent=1))
    else:
        _show(Console(), found)
    if options.plot is not None:
        if not found.retentions:
            raise ValueError(f"{found.path} has no decays to draw; leave out --plot")
        draw_decays(found.retentions, options.plot)
    if found.damage is not None:
        raise SystemExit(1)


def _looked_at(options: Options) -> Inspection:
    console = Console(stderr=True)
    console.quiet = options.json or not console.is_terminal
    with progress_bar(console) as bar:
        task = bar.add_task("inspect", total=None, note="")
        note = partial(bar.update, task)
        found = inspect(options.path, note=lambda what, size: note(advance=size, note=what))
        bar.remove_task(task)
    return found


def as_json(found: Inspection) -> dict[str, object]:
    """The figures for JSON, without the decays of single channels."""
    fields = dataclasses.asdict(found)
    del fields["retentions"]
    return fields


def _show(console: Console, found: Inspection) -> None:
    for name, text in _rows(found):
        say(console, f"{name:10} {visible(text, one_line=True)}")
    if found.half_lives:
        varies = " where the text adds nothing to its decay" * found.decay_varies
        say(console, f"\nhalf-life of a token in a channel{varies}, in tokens:")
        _show_histogram(console, found.half_lives)


def _rows(found: Inspection) -> list[tuple[str, str]]:
    sizes = [
        f"{value:,} {what}"
        for value, what in (
            (found.layers, "layers"),
            (found.width, "wide"),
            (found.ffn_width, "in channel mixing"),
            (found.vocabulary, "ids"),
        )
        if value is not None
    ]
    types = ", ".join(f"{name} ({count:,})" for name, count in found.dtypes.items())
    rows = [
        ("path", found.path),
        ("holds", found.kind if found.about is None else f"{found.kind}: {found.about}"),
        ("format", found.format),
        ("version", found.version or "not known"),
        ("sizes", ", ".join(sizes) or "not known"),
        ("values", f"{found.parameters:,} in {found.tensors:,} tensors"),
        ("types", types),
        ("bytes", f"{found.bytes:,}"),
        ("tokenizer", found.tokenizer),
        ("finite", _finite(found)),
        *(("sha256", f"{digest}  {name}") for name, digest in found.digests.items()),
    ]
    optional = (("not run", found.problem), ("damaged", found.damage))
    return rows + [(name, text) for name, text in optional if text is not None]


def _finite(found: Inspection) -> str:
    if not found.not_finite:
        return "yes, all values"
    shown = [
        f"{name!r} has {bad.nan} NaN and {bad.inf} infinite"
        for name, bad in list(found.not_finite.items())[:3]
    ]
    more = len(found.not_finite) - len(shown)
    return "NO: " + "; ".join(shown) + (f"; and {more} more tensors" if more else "")


def _show_histogram(console: Console, half_lives: dict[str, int]) -> None:
    most = max(*half_lives.values(), 1)
    for label, count in half_lives.items():
        say(console, f"{label:>15} {'#' * round(_BAR * count / most):{_BAR}} {count:,}")

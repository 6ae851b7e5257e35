"""The page of all experiments of the paper: its claims, our results, pictures and commands."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from receptance.atomic import written
from receptance.errors import one_line
from receptance.evaluation.results import Result
from receptance.plots.panels import Panel, draw_panels
from receptance.reproduce.experiment import Experiment, caption, headline, remarks
from receptance.reproduce.registry import EXPERIMENTS

BEGIN, END = "<!-- made by receptance reproduce --gallery -->", "<!-- end of what was made -->"
_IMAGES = Path("images/reproduce")


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """Something that the paper shows and that another command measures."""

    shows: str
    claim: str
    command: str
    needs: str


ELSEWHERE = (
    Elsewhere(
        shows="Figures 1, 5 and 12",
        claim="Zero-shot accuracy on twelve tasks is that of Transformers of the same FLOPs.",
        command="receptance evaluate RWKV-4-Pile-430M.pth --preset paper",
        needs="published weights, lm-evaluation-harness, and the data of the tasks; the numbers of "
        "version 1 of the paper stand beside ours",
    ),
    Elsewhere(
        shows="Figure 6",
        claim="The loss falls with the position in a document, up to 8,192 tokens.",
        command="receptance evaluate RWKV-4-Pile-7B.pth --text long.jsonl --positions 8192",
        needs="a model trained on long contexts, and documents as long as that",
    ),
    Elsewhere(
        shows="Table 4",
        claim="On Long Range Arena RWKV comes second to S4 in five tasks. That is not so on "
        "Pathfinder, where its 58.42 is the lowest of the column; and its printed average of 72.07 "
        "is not that of its row: its five tasks have 71.84, and with 50 for Path-X, as in most "
        "other rows, it is 68.20.",
        command="receptance train --recipe lra-listops --out runs/listops",
        needs="the data of Long Range Arena, and a GPU; ListOps and Pathfinder can be generated",
    ),
    Elsewhere(
        shows="Table 5",
        claim="On enwik8 12 layers of RWKV have 1.178 bits per character on the test part.",
        command="receptance evaluate runs/enwik8 --enwik8 enwik8",
        needs="enwik8, and a model trained by the recipe enwik8-12",
    ),
    Elsewhere(
        shows="The comparison with Transformers",
        claim="RWKV and Transformers of the same size and data reach about the same loss.",
        command="receptance compare my-texts/ --quick",
        needs="any text",
    ),
)


def write_gallery(results: Path, page: Path) -> None:
    """Write what is in a folder of results between the marks of a page, and the pictures beside it.

    ValueError if there is no such page, or if it has no marks.
    """
    if not page.is_file():
        raise ValueError(
            f"gallery is {page}, which is no file; it needs the lines {BEGIN} and {END}"
        )
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} does not hold the lines {BEGIN} and {END}")
    found = {path.stem: Result.load(path) for path in sorted(results.glob("*.json"))}
    for name, result in found.items():
        if name in EXPERIMENTS:
            _draw(name, result, page.parent / _IMAGES)
    made = f"{before}{begin}\n\n{gallery(found)}\n{end}{after}"
    with one_line(page), written(page) as file:
        file.write(made.encode())


def _draw(name: str, result: Result, folder: Path) -> None:
    with one_line(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if found := panels(name, result):
        draw_panels(found, [folder / f"{name}.svg"], caption(result))


def panels(name: str, result: Result) -> list[Panel]:
    """The picture of the experiment of this name, with the options that a result has."""
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in result.options.items()}
    return EXPERIMENTS[name](**options).panels(result)


def gallery(results: Mapping[str, Result]) -> str:
    """The part of the page that is made: a table of all, and a section for each."""
    lines = ["| experiment | in the paper | ours |", "|---|---|---|"]
    for name, kind in EXPERIMENTS.items():
        ours = results[name].details["verdict"] if name in results else "no result here yet"
        lines.append(f"| [{name}](#{name}) | {kind.SHOWS} | {ours} |")
    lines.append("")
    for name, kind in EXPERIMENTS.items():
        lines += [*_section(name, kind, results.get(name)), ""]
    lines += ["## By other commands", ""]
    for other in ELSEWHERE:
        lines += [f"**{other.shows}.** {other.claim} It needs {other.needs}.", ""]
        lines += ["```sh", other.command, "```", ""]
    return "\n".join(lines)


def _section(name: str, kind: type[Experiment], result: Result | None) -> Iterator[str]:
    quick, full = kind.TAKES
    yield f"## {name}\n"
    yield f"**{kind.SHOWS}.** {kind.CLAIM}\n"
    yield f"The command {kind.DOES}. It needs {kind.NEEDS}. Quick: {quick}; full: {full}.\n"
    yield f"```sh\n{command(name, kind, result)}\n```\n"
    if result is None:
        yield "There is no result here yet."
        return
    yield f"Ours: **{headline(result)}**.\n"
    yield "| the paper | what was measured | rule | verdict |\n|---|---|---|---|"
    for check in result.details["checks"]:
        cells = (check["claim"], check["found"], check["rule"], check["verdict"])
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield f"\n![{name}: {kind.SHOWS}]({_IMAGES}/{name}.svg)\n"
    yield f"{caption(result)}\n"
    yield from (f"- {note}" for note in remarks(result))


def command(name: str, kind: type[Experiment], result: Result | None) -> str:
    """The command that made a result, or that would make it."""
    words = ["receptance", "reproduce", name]
    options, usual = ({} if result is None else result.options), _plain(kind())
    if result is not None and is_quick(kind, result):
        return shlex.join([*words, "--quick"])
    for option, value in options.items():
        for each in (
            () if value == usual[option] else value if isinstance(value, list) else (value,)
        ):
            words += [f"--{option.replace('_', '-')}", str(each)]
    return shlex.join(words)


def is_quick(kind: type[Experiment], result: Result) -> bool:
    """Whether a result is of the quick form, which not all experiments have."""
    return result.options == _plain(kind.quick()) and kind.quick() != kind()


def _plain(experiment: Experiment) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(experiment)))
    return found

"""The page of results with the experiments of the paper in its order, as pictures and tables."""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping
from typing import ClassVar

from receptance.apps.gallery import ELSEWHERE, command, is_quick, panels
from receptance.evaluation.report import Page, drawn, head, origin, tables, text
from receptance.evaluation.results import Result
from receptance.plots.panels import panel_pictures
from receptance.reproduce.experiment import caption, headline, remarks
from receptance.reproduce.registry import EXPERIMENTS

_HEADS = ("the paper", "what was measured", "rule", "verdict")


class PaperPage(Page):
    """Results of `reproduce` are told as the gallery of the documentation tells them."""

    STYLE: ClassVar[str] = """
.pictures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.pictures img { width: 100%; max-width: 40rem; height: auto; background: #ffffff; }
.checks { table-layout: fixed; width: 100%; } .checks th, .checks td { overflow-wrap: anywhere; }
.checks th + th { min-width: 0; } .checks th:last-child { width: 6.5rem; }
@media (max-width: 40rem) {
.checks thead { display: none; } .checks, .checks tbody, .checks tr, .checks td { display: block; }
.checks tr { border-bottom: 1px solid; padding: 0.5rem 0; }
.checks td { border: none; padding: 0.15rem 0; }
.checks td::before { content: attr(data-head) ": "; font-weight: 600; }
.wide::before { content: "wider than the screen: move it sideways"; font-size: 0.8rem; }
}
"""

    def arranged(self, results: Mapping[str, Result]) -> dict[str, Result]:
        """Those of the paper first, in its order."""
        places = {name: n for n, name in enumerate(EXPERIMENTS)}
        return dict(sorted(results.items(), key=lambda x: places.get(_name(x[1]), len(places))))

    def front(self, results: Mapping[str, Result]) -> Iterator[str]:
        """A table of all experiments, what is not among them, and the list of other results."""
        ours = {n: it for n, (_, it) in enumerate(results.items()) if _name(it)}
        if not ours:
            yield from super().front(results)
            return
        yield "<p>Experiments of the paper (arXiv 2305.13048v2) by <code>receptance reproduce"
        yield "</code>, in its order. A verdict follows from the figures by the rule beside it.</p>"
        yield _table(
            ("experiment", "in the paper", "ours", "form"),
            (
                (
                    f'<a href="#r{n}">{text(_name(it))}</a>',
                    text(EXPERIMENTS[_name(it)].SHOWS),
                    text(headline(it)),
                    _form(it),
                )
                for n, it in ours.items()
            ),
        )
        there = {_name(it) for it in ours.values()}
        yield "<p>Not among them:</p><ul>"
        for name, kind in EXPERIMENTS.items():
            if name not in there:
                why = "it was not run" if kind.READY else f"it needs {kind.NEEDS}"
                yield f"<li>{text(name)} ({text(kind.SHOWS)}): {text(why)}.</li>"
        for other in ELSEWHERE:
            yield f"<li>{text(other.shows)}, by <code>{text(other.command)}</code>: "
            yield f"it needs {text(other.needs)}.</li>"
        yield "</ul>"
        if len(ours) < len(results):
            items = (
                f'<li><a href="#r{n}">{text(it.what)}</a></li>'
                for n, it in enumerate(results.values())
                if n not in ours
            )
            yield f"<p>Other results:</p><ul>{''.join(items)}</ul>"

    def section(self, name: str, result: Result) -> Iterator[str]:
        """Claim, pictures with their caption, checks and remarks; the figures are folded."""
        if not (experiment := _name(result)):
            yield from super().section(name, result)
            return
        kind = EXPERIMENTS[experiment]
        yield from head(name, result)
        yield f"<p><strong>{text(kind.SHOWS)}.</strong> {text(kind.CLAIM)}</p>"
        yield f"<p>The command {text(kind.DOES)}. This is its {_form(result)}: "
        yield f"<code>{text(command(experiment, kind, result))}</code></p>"
        yield from _pictures(experiment, result)
        checks = result.details["checks"]
        yield _table(
            _HEADS,
            (tuple(text(x[key]) for key in ("claim", "found", "rule", "verdict")) for x in checks),
        )
        yield f"<ul>{''.join(f'<li>{text(note)}</li>' for note in remarks(result))}</ul>"
        yield "<details><summary>All figures, models, data and machine</summary>"
        yield from tables(result)
        yield from origin(result)
        yield "</details>"


def _name(result: Result) -> str:
    """The experiment of a result, if it is one that this version knows, with its options."""
    name = str(result.details.get("experiment", ""))
    if result.kind != "reproduce" or name not in EXPERIMENTS:
        return ""
    options = {field.name for field in dataclasses.fields(EXPERIMENTS[name])}
    return name if options == {*result.options} else ""


def _form(result: Result) -> str:
    kind = EXPERIMENTS[_name(result)]
    if kind.quick() == kind():
        return "only form"
    return "quick form (--quick)" if is_quick(kind, result) else "full form, or one of yours"


def _pictures(name: str, result: Result) -> Iterator[str]:
    """The picture of the experiment, a panel beside the other, or charts of its curves.

    A browser runs nothing and loads nothing in a picture that is an image.
    """
    there = importlib.util.find_spec("matplotlib") is not None
    if there and (found := panels(name, result)):
        yield '<figure class="pictures" style="margin: 0">'
        for panel, picture in zip(found, panel_pictures(found), strict=True):
            data = base64.b64encode(picture).decode()
            yield f'<img alt="{text(panel.title)}" src="data:image/svg+xml;base64,{data}">'
        yield "</figure>"
    else:
        yield from drawn(result)
    yield f'<p class="quiet">{text(caption(result))}</p>'


def _table(heads: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """A table whose rows are blocks on a narrow screen; cells are HTML."""
    top = "".join(f"<th>{text(head)}</th>" for head in heads)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-head="{text(h)}">{cell}</td>' for h, cell in zip(heads, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<table class="checks"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'

"""README.md and docs: the Python runs, the commands parse, the links lead somewhere."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import receptance
from receptance.__main__ import APPS
from receptance.apps.options import parse
from receptance.config import PUBLISHED_SIZES
from receptance.tokenizer import ByteTokenizer

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *ROOT.glob("CONTRIBUTING.md"),
    *sorted((ROOT / "docs").glob("*.md")),
]

pytestmark = pytest.mark.skipif(len(PAGES) < 2, reason="the sources are not here")


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """The fenced blocks of a language: the line each begins in, and its text."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S):
        yield text.count("\n", 0, found.start(1)), found[1]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory) -> Path:
    """A folder with a tiny model at runs/demo, which the README loads."""
    folder = tmp_path_factory.mktemp("docs")
    model = receptance.Model(receptance.ModelConfig(vocab_size=256, width=32, num_layers=2))
    receptance.save(model, folder / "runs/demo", ByteTokenizer())
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_runs(page, demo_run, tmp_path, monkeypatch):
    monkeypatch.chdir(demo_run if page.name == "README.md" else tmp_path)
    names = {"__name__": page.stem}
    for line, source in blocks(page, "python"):
        # Empty lines in front, so that a traceback shows the page's own line.
        exec(compile("\n" * line + source, page, "exec"), names)


def test_the_readme_has_six_lines_of_python():
    _, first = next(blocks(ROOT / "README.md", "python"))
    assert sum(bool(line) for line in first.splitlines()) == 6


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command line in the page's shell blocks and second columns of tables."""
    for _, source in blocks(page, "sh"):
        for line in source.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words
    for cell in re.findall(r"^\|[^|]*\|([^|]*)\|$", prose(page), re.M):
        for line in re.findall(r"`(receptance [^`]*)`", cell):
            if len(words := shlex.split(line)) > 2:  # more than the name of a command
                yield words


COMMANDS = [(page.name, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(
    "words",
    [pytest.param(words, id=f"{name}: {' '.join(words)}") for name, words in COMMANDS],
)
def test_commands_parse(words):
    command, *rest = words
    if Path(command).name == "receptance":
        check_app(*rest)
    elif command == "make":
        check_make(rest)
    elif Path(command).name == "python" and rest[0].endswith(".py"):
        assert (ROOT / rest[0]).is_file()


def check_app(app: str, *arguments: str) -> None:
    """The options are those of the app; nothing is run."""
    if app != "--version":
        assert app in APPS
        other = "compare_tasks" if app == "compare" and "--task" in arguments else app
        module = importlib.import_module(f"receptance.apps.{other}")
        if arguments and arguments[0] in getattr(module, "COMMANDS", {}):
            command, *arguments = arguments
            parse(module.COMMANDS[command], arguments, app)
        else:
            parse(module.Options, arguments, app)


def check_make(arguments: list[str]) -> None:
    """The targets and variables are in the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    for word in arguments:
        name, is_variable, _ = word.partition("=")
        rule = rf"^{name} [:?]=" if is_variable else rf"^{name}:"
        assert re.search(rule, makefile, re.M), f"make {word}"


def options(kind: type) -> Iterator[str]:
    """The flags that tyro makes of a dataclass, nested ones included."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        for inner in (field.default_factory, *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(inner):
                yield from options(inner)
        yield "--" + field.name.replace("_", "-")
        if hints[field.name] is bool:
            yield "--no-" + field.name.replace("_", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_the_text_exist(page):
    known = {
        "--help",
        "--help-all",
        "--version",
        "--extra-index-url",
        *options(receptance.Sampling),
    }
    for app in APPS:
        module = importlib.import_module(f"receptance.apps.{app}")
        for kind in getattr(module, "COMMANDS", {"": getattr(module, "Options", None)}).values():
            known |= set(options(kind))
    for script in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r'"(--[a-z-]+)"', script.read_text(encoding="utf-8")))
    assert set(re.findall(r"`(--[a-z-]+)", prose(page))) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_in_the_text_exist(page):
    named = re.findall(r"`((?:src|tests|benchmarks|docs)/[\w./-]+)`", prose(page))
    assert [name for name in named if not (ROOT / name).exists()] == []


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives the page's headings."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not anchor or anchor in headings(found), target


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"{page.name})" not in index] == ["index.md"]


def test_the_table_of_sizes_is_exact():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for name, sizes in PUBLISHED_SIZES.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} "))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1:5] == [
            str(sizes.num_layers),
            str(sizes.width),
            f"{sizes.num_parameters:,}",
            f"{sizes.forward_flops_per_token:,}",
        ]

"""The documentation site: all pages are on it, all public names, and nothing from elsewhere."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

import receptance

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
REFERENCE = [DOCS / "api.md", *sorted((DOCS / "api").glob("*.md"))]

pytestmark = pytest.mark.skipif(not PAGES, reason="the sources are not here")


def settings() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))


def listed(nav: Any) -> Iterator[str]:
    """The pages in a part of the navigation."""
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from listed(part)


def test_the_navigation_has_every_page_once_and_no_other():
    hooks = runpy.run_path(str(DOCS / "theme/hooks.py"))
    there = {hooks["uri_of"](page) for page in {*PAGES, *hooks["MOVED"]} if page.is_file()}
    assert {"index.md", "documentation.md", "contributing.md", "api/data.md"} <= there
    assert sorted(listed(settings()["nav"])) == sorted(there)


def test_every_file_of_the_theme_is_there():
    own = settings()
    for name in (*own["extra_css"], *own["extra"]["polyfills"]):
        assert (DOCS / name).is_file()
    for name in own["hooks"]:
        assert (ROOT / name).is_file()


# ---- the reference ------------------------------------------------------------------------------


@functools.cache
def documented() -> dict[str, Any]:
    """The names that the pages of the reference are made of, and what they name."""
    names = []
    for page in REFERENCE:
        entries = re.findall(r"^::: ([\w.]+)\n((?: {4}.*\n)*)", page.read_text("utf-8"), re.M)
        for name, options in entries:
            members = (yaml.safe_load(options) or {}).get("options", {}).get("members", [])
            names += [name, *(f"{name}.{member}" for member in members)]
    assert len(names) == len(set(names))
    return {name: resolved(name) for name in names}


def resolved(name: str) -> Any:
    """What a dotted name stands for; ModuleNotFoundError if it stands for nothing."""
    module, _, last = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), last)
    except AttributeError:
        return importlib.import_module(name)


def is_documented(value: Any) -> bool:
    return any(value is known for known in documented().values())


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "api.md").read_text("utf-8")
    for name in receptance.__all__:
        assert f"receptance.{name}" in text, name
        assert name == "__version__" or f"receptance.{name}" in documented(), name


def test_every_name_in_the_reference_has_a_docstring():
    for name, value in documented().items():
        if inspect.ismodule(value) or inspect.isclass(value) or inspect.isfunction(value):
            # A dataclass without one would get its signature.
            assert value.__doc__ and not value.__doc__.startswith(f"{name.split('.')[-1]}("), name


def test_modules_in_the_reference_hide_no_public_name():
    text = "".join(page.read_text("utf-8") for page in REFERENCE)
    for room, value in documented().items():
        for name in getattr(value, "__all__", ()) if inspect.ismodule(value) else ():
            assert is_documented(getattr(value, name)) or f"{name}`" in text, f"{room}.{name}"


def imported(page: Path) -> Iterator[str]:
    """What a page's Python imports from this package."""
    for source in re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("receptance"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_pages_import_is_in_the_reference(page):
    assert [name for name in imported(page) if not is_documented(resolved(name))] == []


# ---- the site as it is built --------------------------------------------------------------------


class Links(HTMLParser):
    """The addresses that a page loads by itself, those that it leads to, and its anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: set[str] = set()
        self.leads: set[str] = set()
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if place := found.get("id"):
            self.anchors.add(place)
        for name in ("src", "srcset", "href"):
            if address := found.get(name):
                (self.leads if tag == "a" else self.loads).add(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name, reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def read(page: Path) -> Links:
    links = Links()
    links.feed(page.read_text("utf-8"))
    return links


@pytest.mark.slow
def test_the_site_is_whole_and_loads_nothing_from_elsewhere(site):
    pages = {page: read(page) for page in site.rglob("*.html") if page.name != "404.html"}
    names = {page.relative_to(site).with_suffix(".md").as_posix() for page in pages}
    assert set(listed(settings()["nav"])) <= names
    for page, links in pages.items():
        assert [x for x in links.loads if re.match(r"(\w+:)?//", x)] == [], page
        assert 'class="mermaid"' not in page.read_text("utf-8")  # loads a library
        for address in {*links.loads, *links.leads}:
            path, _, anchor = address.partition("#")
            target = (page.parent / path.partition("?")[0]).resolve() if path else page
            if not re.match(r"\w+:", address):
                assert target.exists(), f"{page}: {address}"
                assert not anchor or target not in pages or anchor in pages[target].anchors, address
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(\w+:)?//", style.read_text("utf-8")), style


@pytest.mark.slow
def test_every_name_of_the_reference_is_on_the_site(site):
    pages = [site / page.relative_to(DOCS).with_suffix(".html") for page in REFERENCE]
    anchors = {anchor for page in pages for anchor in read(page).anchors}
    assert [name for name in documented() if name not in anchors] == []


@pytest.mark.slow
def test_pages_opened_as_files_can_be_searched(site):
    # The index is a script, because a page that is a file can load no other data.
    assert "receptance.generate" in (site / "search/search_index.js").read_text("utf-8")
    front = (site / "index.html").read_text("utf-8")
    assert 0 < front.find("theme/iframe-worker.js") < front.find("/bundle.")

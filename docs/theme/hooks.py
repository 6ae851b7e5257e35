"""The site beyond docs/: pages from the root of the repository, and source files that pages link.

On a page of the repository a link may lead to any file, but mkdocs knows only those in docs/. So
the pages of the root and all source files that are linked become pages of the site, and links are
changed to where these stand. README.md is the front page.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# The pages that stand elsewhere on the site than in the repository.
MOVED = {
    ROOT / "README.md": "index.md",
    DOCS / "index.md": "documentation.md",
    ROOT / "CHANGELOG.md": "changelog.md",
    ROOT / "CONTRIBUTING.md": "contributing.md",
}
# What stands before a link, the link without its anchor, the anchor, and what stands behind.
LINK = re.compile(r'(\]\(|\bsrc="|\bsrcset=")([^)"\s#]+)(#[^)"\s]*)?([)"])')
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that stand elsewhere, and the files outside of docs/ that pages link to."""
    from mkdocs.structure.files import File

    files.remove(files.src_uris["index.md"])
    pages = [DOCS / file.src_uri for file in files.documentation_pages()]
    for path, uri in MOVED.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    linked = {target for page in {*pages, *MOVED} for target in outside(page)}
    for path in sorted(linked - {*MOVED}):
        files.append(File.generated(config, uri_of(path), content=source_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with each link to a file leading to where that stands on the site."""
    uri = page.file.src_uri
    path = next((path for path, moved in MOVED.items() if moved == uri), DOCS / uri)
    return LINK.sub(lambda link: moved_link(link, path, uri), markdown)


def outside(page: Path) -> Iterator[Path]:
    """The files outside of docs/ that a page links to."""
    for link in LINK.finditer(FENCED.sub("", page.read_text(encoding="utf-8"))):
        target = (page.parent / link[2]).resolve()
        if target.is_file() and not target.is_relative_to(DOCS):
            yield target


def moved_link(link: re.Match[str], page: Path, uri: str) -> str:
    """The link, if it is one to a file, as it is written on a page that stands at this place."""
    target = (page.parent / link[2]).resolve()
    if not target.is_file():
        return link[0]
    place = os.path.relpath(uri_of(target), os.path.dirname(uri))
    return f"{link[1]}{place}{link[3] or ''}{link[4]}"


def uri_of(path: Path) -> str:
    """The place of a file of the repository on the site."""
    if path in MOVED:
        return MOVED[path]
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return f"source/{path.relative_to(ROOT).as_posix()}.md"


def source_page(path: Path) -> str:
    """A page that shows a source file; the search leaves it out."""
    name, language = path.relative_to(ROOT).as_posix(), LANGUAGES.get(path.suffix, "text")
    text = path.read_text(encoding="utf-8").rstrip()
    front = f"---\ntitle: {name}\nsearch:\n  exclude: true\n---\n"
    return f"{front}\n# `{name}`\n\n````{language}\n{text}\n````\n"

"""Files of pictures: what may be replaced, and PNG and SVG that are written whole."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING

from receptance.atomic import check_replaceable, written

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PNG = b"\x89PNG\r\n\x1a\n"  # the first bytes of every PNG
_SNIFFED = 1000  # an SVG says what it is within so many bytes


def check_picture(path: Path) -> None:
    """ValueError if something at path is not of the kind of picture that would replace it."""
    kind = "an SVG" if path.suffix == ".svg" else "a PNG"
    check_replaceable(path, "the picture", kind, _is_svg if kind == "an SVG" else _is_png)


def _is_png(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_PNG)) == _PNG


def _is_svg(path: Path) -> bool:
    with path.open("rb") as file:
        return b"<svg" in file.read(_SNIFFED)


def drawable(text: str) -> str:
    """The text with characters that the font of pictures lacks as escapes."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    return "".join(
        c if font.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in text
    )


def new_figure() -> Figure:
    """An empty figure; ValueError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("no plot without matplotlib: pip install matplotlib") from None
    return Figure(figsize=(8, 6), layout="constrained")


def save(figure: Figure, picture: Path) -> None:
    """Write a figure as the kind of picture that its name says; see check_picture for errors."""
    check_picture(picture)
    if picture.suffix != ".svg":
        with written(picture) as file:
            figure.savefig(file, format="png", dpi=120)
        return
    with written(picture) as file:
        save_svg(figure, file)


def save_svg(figure: Figure, file: IO[bytes]) -> None:
    """Write a figure as SVG."""
    from matplotlib import rc_context

    # The same figures make the same file: no date, and no names drawn at random.
    with rc_context({"svg.hashsalt": "receptance"}):
        figure.savefig(file, format="svg", metadata={"Date": None})

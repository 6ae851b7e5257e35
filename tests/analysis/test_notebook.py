"""The example notebook runs, and shows what it says."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples/looking_inside.ipynb"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not NOTEBOOK.is_file(), reason="the sources are not here"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def shown() -> list[dict]:
    """What each cell of code shows last, by type."""
    for name in ("nbclient", "ipykernel"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell.outputs[-1].get("data", {}) for cell in cells]


def test_every_cell_shows_something(shown):
    assert all(shown)
    assert int(shown[0]["text/plain"]) > 100


def test_rich_representations(shown):
    rich = [data.get("text/html", "") for data in shown]
    assert "blocks.5.att.wkv" in rich[1] and "<table>" in rich[1]
    assert rich[2].count("data:image/png;base64,") == 6
    assert rich[3].count("<tr>") == 8
    assert rich[-1].startswith("<iframe srcdoc=")


def test_it_is_stored_without_outputs():
    import json

    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells)

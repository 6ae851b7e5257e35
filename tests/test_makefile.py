"""What `make demo` and `make clean` delete: their own folders, and nothing else of that name."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"

pytestmark = pytest.mark.skipif(
    shutil.which("make") is None or not MAKEFILE.is_file(), reason="make or the sources are absent"
)


@pytest.fixture
def project(tmp_path) -> Path:
    """A folder with the Makefile and an environment, installed, whose programs do nothing."""
    folder = tmp_path / "project"
    (folder / "src").mkdir(parents=True)
    shutil.copy(MAKEFILE, folder)
    for name in ("pyproject.toml", "constraints.txt", "CMakeLists.txt"):
        (folder / name).touch()
    make_environment(folder / ".venv")
    return folder


def make_environment(folder: Path) -> None:
    (folder / "bin").mkdir(parents=True)
    for name in ("python", "receptance"):
        (folder / "bin" / name).write_text("#!/bin/sh\n")
        (folder / "bin" / name).chmod(0o755)
    for name in ("pyvenv.cfg", ".installed"):
        (folder / name).touch()


def full(folder: Path, *names: str) -> Path:
    """The folder with some files in it."""
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    return folder


def make(project: Path, *words: str, **exported: object) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"]} | {n: str(x) for n, x in exported.items()}
    return subprocess.run(
        ["make", *words], cwd=project, env=environment, capture_output=True, text=True
    )


def test_what_the_environment_names_is_not_deleted(project, tmp_path):
    run = full(tmp_path / "my run", "metrics.jsonl")
    environment = full(tmp_path / "my environment", "pyvenv.cfg")
    own = full(project / "runs/demo", "metrics.jsonl")
    assert make(project, "demo", RUN=run, VENV=environment).returncode == 0
    assert not own.exists()
    assert make(project, "clean", RUN=run, VENV=environment).returncode == 0
    assert not (project / ".venv").exists()
    assert list(run.iterdir()) and list(environment.iterdir())


@pytest.mark.parametrize("mark", ["metrics.jsonl", ".lock", None])
def test_a_run_named_on_the_command_line_is_begun_again(project, tmp_path, mark):
    run = full(tmp_path / "another run", *([mark] if mark else []))
    done = make(project, "demo", f"RUN={run}")
    assert (done.returncode, run.exists()) == (0, False)


def test_what_is_no_run_is_not_deleted(project, tmp_path):
    thesis = full(tmp_path / "my thesis", "thesis.tex")
    done = make(project, "demo", f"RUN={thesis}")
    assert done.returncode != 0
    assert f"make does not delete {thesis}, which holds no metrics.jsonl" in done.stderr
    assert (thesis / "thesis.tex").exists()


def test_what_is_no_environment_is_not_deleted(project, tmp_path):
    other = full(tmp_path / "other", "thesis.tex")
    done = make(project, "clean", f"VENV={other}")
    assert done.returncode != 0
    assert f"make does not delete {other}, which holds no pyvenv.cfg" in done.stderr
    assert (other / "thesis.tex").exists()
    environment = tmp_path / "environment"
    make_environment(environment)
    assert make(project, "clean", f"VENV={environment}").returncode == 0
    assert not environment.exists()

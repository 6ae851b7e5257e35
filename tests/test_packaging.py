"""What goes into a wheel, where wheels are built, and what the public CI runs."""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

import receptance
from receptance.apps.generate import Options
from receptance.apps.options import parse

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/receptance"
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PYTHONS = ["3.11", "3.12", "3.13"]

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="the sources are not here"
)


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_one_version(settings):
    assert settings["project"]["version"] == receptance.__version__


class TestContents:
    def test_only_native_sources_stay_out(self, settings):
        excluded = settings["tool"]["scikit-build"]["wheel"]["exclude"]
        for path in PACKAGE.rglob("*"):
            name = f"receptance/{path.relative_to(PACKAGE).as_posix()}"
            source = path.suffix in (".cpp", ".h")
            assert any(fnmatch(name, pattern) for pattern in excluded) == source, name

    def test_recipes_and_types_go_in(self, settings):
        assert settings["tool"]["scikit-build"]["wheel"]["packages"] == ["src/receptance"]
        assert (PACKAGE / "training/recipes/169m.toml").is_file()
        assert (PACKAGE / "py.typed").read_bytes() == b""

    def test_kernels_need_no_particular_processor(self):
        """Flags are for named instruction sets, and what several objects share is portable."""
        cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
        assert not re.search(r"-m(arch|cpu|tune)=", cmake)
        assert re.findall(r"^\s*add_kernels\((\w+)", cmake, re.M)[0] == "portable"


class TestTable:
    """[tool.cibuildwheel]"""

    @pytest.mark.parametrize("python", PYTHONS)
    @pytest.mark.parametrize("platform", ["manylinux_x86_64", "manylinux_aarch64", "macosx_arm64"])
    def test_builds(self, settings, python, platform):
        assert built(settings, f"cp{python.replace('.', '')}-{platform}")

    @pytest.mark.parametrize(
        "identifier",
        [
            *("cp310-manylinux_x86_64", "cp313t-manylinux_x86_64", "pp311-manylinux_x86_64"),
            *("cp312-musllinux_x86_64", "cp312-manylinux_i686", "cp312-macosx_x86_64"),
        ],
    )
    def test_leaves_out_what_torch_does_not_support(self, settings, identifier):
        assert not built(settings, identifier)

    def test_tries_the_native_kernels(self, settings):
        program, app, *rest = shlex.split(settings["tool"]["cibuildwheel"]["test-command"])
        assert (program, app) == ("receptance", "generate")
        assert parse(Options, rest, "receptance generate").engine.backend == "native"


def built(settings: dict[str, Any], identifier: str) -> bool:
    return any(fnmatch(identifier, x) for x in settings["tool"]["cibuildwheel"]["build"])


def read(name: str) -> dict[str, Any]:
    # BaseLoader, because YAML 1.1 takes the word "on" for true, and 3.10 for 3.1.
    text = (ROOT / ".github/workflows" / name).read_text(encoding="utf-8")
    return yaml.load(text, yaml.BaseLoader)


def steps(workflow: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for job in workflow["jobs"].values():
        yield from job["steps"]


class TestWorkflows:
    @pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
    def test_use_actions_by_major_version_and_no_secrets(self, path):
        workflow = read(path.name)
        actions = [step["uses"] for step in steps(workflow) if "uses" in step]
        assert actions and all(re.fullmatch(r"actions/[\w-]+@v\d+", x) for x in actions)
        assert workflow["permissions"] == {"contents": "read"}
        assert "secrets" not in path.read_text(encoding="utf-8")

    def test_ci_runs_everything_on_every_python(self):
        workflow = read("ci.yml")
        assert set(workflow["on"]) == {"push", "pull_request"}
        (job,) = workflow["jobs"].values()
        assert job["strategy"]["matrix"]["python"] == PYTHONS
        assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]

    @pytest.mark.parametrize("name", ["run", "wheel"])
    def test_scripts_can_be_run(self, name):
        assert os.access(ROOT / ".ci" / name, os.X_OK)

    def test_ci_tries_the_wheel(self):
        assert "\n.ci/wheel " in (ROOT / ".ci/run").read_text(encoding="utf-8")

    def test_tags_build_wheels(self):
        workflow = read("wheels.yml")
        assert workflow["on"]["push"] == {"tags": ["v*"]}
        commands = [step["run"] for step in steps(workflow) if "run" in step]
        assert any(command.startswith("python -m cibuildwheel") for command in commands)
        assert "python -m build --sdist" in commands
        uploads = [step["with"] for step in steps(workflow) if "upload" in step.get("uses", "")]
        assert [upload["path"] for upload in uploads] == ["wheelhouse/*.whl", "dist/*.tar.gz"]

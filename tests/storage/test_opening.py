"""What lies at a path is looked at and compared with its manifest once, as far as it is read."""

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import make_model, same_bits, small_bpe

from receptance.checking.verifying import Subject
from receptance.conversion.converting import convert
from receptance.conversion.source import open_source
from receptance.conversion.target import Target
from receptance.engine import load_engine
from receptance.storage import manifest
from receptance.storage.checkpoint import load, write_model
from receptance.storage.directories import write_directory
from receptance.storage.opening import open_path

MODEL_FILES = {"config.json", "model.safetensors", "tokenizer.json"}
OPTIMIZER = "optimizer.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """A run that no test may change."""

    def write(partial: Path) -> None:
        write_model(make_model(300, seed=int(partial.name.split("-")[1][:1])), partial, small_bpe())
        (partial / OPTIMIZER).write_bytes(bytes(1000))

    run = tmp_path_factory.mktemp("pristine") / "run"
    for step in (1, 2):
        write_directory(run / f"step-{step}", write)
    return run


@pytest.fixture
def run(pristine, tmp_path) -> Path:
    return shutil.copytree(pristine, tmp_path / "run")


@pytest.fixture
def digested(monkeypatch) -> Counter[Path]:
    """How often each file was read for its digest."""
    count: Counter[Path] = Counter()
    entry = manifest._entry

    def counted(file: Path) -> manifest.Entry:
        count[file] += 1
        return entry(file)

    monkeypatch.setattr(manifest, "_entry", counted)
    return count


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def step(number: int) -> dict[str, torch.Tensor]:
    return make_model(300, seed=number).state_dict()


@pytest.mark.parametrize(("optimizer", "wanted"), [(False, set()), (True, {OPTIMIZER})])
@pytest.mark.parametrize("inside", ["", "step-2"])
def test_an_optimizer_is_compared_only_when_it_is_asked_for(
    run, digested, inside, optimizer, wanted
):
    opened = open_path(run / inside, optimizer=optimizer)
    assert (opened.path, opened.kind, opened.verified) == (run / "step-2", "checkpoint", True)
    assert digested == Counter(run / "step-2" / name for name in MODEL_FILES | wanted)


def test_a_changed_optimizer_does_not_concern_a_model(run):
    flip(run / "step-2" / OPTIMIZER)
    for opener in (load, load_engine):
        model, _ = opener(run)  # a warning would be an error
        assert model.fingerprint() == make_model(300, seed=2).fingerprint()
    with pytest.warns(UserWarning, match=rf"passed over a damaged.*step-2/{OPTIMIZER}"):
        assert open_path(run, optimizer=True).path == run / "step-1"


def test_the_length_of_an_optimizer_is_always_compared(run):
    os.truncate(run / "step-2" / OPTIMIZER, 999)
    with pytest.warns(UserWarning, match=rf"step-2/{OPTIMIZER} has 999 bytes instead of 1000"):
        model, _ = load(run)
    assert same_bits(model.state_dict(), step(1))


@pytest.mark.parametrize("inside", ["", "step-2"])
@pytest.mark.parametrize(
    "use",
    [
        load,
        load_engine,
        Subject.open,
        open_source,
        lambda run: convert(open_source(run), Target(path=run.parent.parent / "out.pth")),
    ],
    ids=["load", "load_engine", "verify", "open_source", "convert"],
)
def test_every_file_is_read_once_for_its_digest(
    run: Path, digested: Counter[Path], inside: str, use: Callable[[Path], object]
):
    use(run / inside)
    read = Counter({file.name: n for file, n in digested.items() if run in file.parents})
    assert {name: read[name] for name in MODEL_FILES} == dict.fromkeys(MODEL_FILES, 1)
    assert read[OPTIMIZER] <= 1
    assert {file.parent for file in digested} == {run / "step-2"}

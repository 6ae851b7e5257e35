"""Models that come with the package are opened by their names."""

import re
from pathlib import Path

import pytest
import torch
from tiny import make_model

import receptance
from receptance.engine import load_engine
from receptance.inference.scoring import bits_per_byte, negative_log_likelihood
from receptance.storage import directories
from receptance.storage.opening import open_path
from receptance.tokenizer import ByteTokenizer

TINY = "tiny-python"
CODE = b'''
class Stack:
    """A list whose last item is taken first."""

    def __init__(self, items=()):
        self._items = list(items)

    def push(self, item):
        self._items.append(item)

    def pop(self):
        if not self._items:
            raise IndexError("pop from an empty stack")
        return self._items.pop()
'''


@pytest.fixture
def included(tmp_path, monkeypatch):
    """A model with the name "small" in the place of those of the package."""
    monkeypatch.setattr(directories, "_INCLUDED", tmp_path / "weights")
    model = make_model()
    receptance.save(model, tmp_path / "weights/small", ByteTokenizer())
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return model


def test_a_name_opens_it(included):
    found, tokenizer = receptance.load("small")
    assert found.fingerprint() == included.fingerprint()
    assert tokenizer is not None and tokenizer.same_as(ByteTokenizer())
    assert load_engine("small")[0].fingerprint() == included.fingerprint()


def test_a_folder_of_that_name_comes_first(included):
    own = make_model(seed=3)
    receptance.save(own, "small", ByteTokenizer())
    assert receptance.load("small")[0].fingerprint() == own.fingerprint() != included.fingerprint()


@pytest.mark.parametrize("source", [Path("small"), "./small", "../here/small", "smal", ".."])
def test_nothing_else_does(included, source):
    with pytest.raises(ValueError, match=re.escape(str(Path(source)))):
        receptance.load(source)


def test_saving_under_the_name_writes_here(included):
    receptance.save(make_model(seed=2), "small", ByteTokenizer())
    assert Path("small/model.safetensors").is_file()
    assert open_path("small").path == Path("small")


class TestTinyPython:
    def test_it_is_small_and_whole(self):
        opened = open_path(TINY)
        assert opened.verified and opened.kind == "quantized"
        size = sum(file.stat().st_size for file in opened.path.iterdir())
        assert size <= 5_000_000

    def test_it_knows_python(self):
        """A stranger to Python needs 2.3 bits and more for a byte of this, as xz does."""
        engine, tokenizer = load_engine(TINY)
        tokens = torch.tensor(tokenizer.encode(CODE))
        nats = negative_log_likelihood(engine, tokens, start=tokenizer.end_of_text)
        assert bits_per_byte(nats, len(CODE)) < 1.6

    def test_every_backend_reads_it(self):
        texts = {
            backend: receptance.generate(
                *load_engine(TINY, backend=backend), "import ", max_tokens=8, temperature=0
            )
            for backend in ("auto", "torch")
        }
        assert texts["auto"] == texts["torch"]

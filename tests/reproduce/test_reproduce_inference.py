"""Figure 7: constant cost is found in RWKV, and not in an RWKV that reads all again.

Time is counted in operations here, since a clock depends on what else the machine does.
"""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from receptance.engine.base import Engine
from receptance.evaluation.compare.families import EngineDecoder
from receptance.evaluation.results import Result
from receptance.reproduce import inference
from receptance.reproduce.experiment import DIFFERS, Work
from receptance.reproduce.generators import (
    CACHE,
    NO_CACHE,
    RWKV,
    STATE,
    TRANSFORMERS,
    Setting,
    decoder,
    parameters,
    watched,
)
from receptance.reproduce.inference import Inference
from receptance.reproduce.mechanisms import Counter

TINY = Inference(width=32, layers=2, vocabulary=64, tokens=48, windows=4, device="cpu")
SETTING = Setting(width=32, layers=2, vocabulary=64, positions=99, device="cpu", dtype="float32")


class Rereading(EngineDecoder):
    """RWKV without its recurrent form: it keeps the text, and reads all of it for every token."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.tokens = self.next

    def read(self, tokens):
        self.tokens = torch.cat([self.tokens, tokens[None]], dim=1)

    @torch.no_grad()
    def step(self):
        logits, _ = self.engine(self.tokens)
        self.tokens = torch.cat([self.tokens, logits[:, -1:].argmax(-1)], dim=1)

    @property
    def remembered(self):
        return [self.tokens]


@pytest.fixture
def by_operations(monkeypatch):
    """The decoders that torch runs, and a clock that counts operations."""
    monkeypatch.setattr(inference, "decoder", lambda *named: watched(*named)[0])

    def counted(step):
        with Counter([]) as counter:
            step()
        return counter.operations * 1e-9

    monkeypatch.setattr(inference, "seconds", counted)


def run(tmp_path) -> Result:
    found = [(piece, TINY.measure(piece, Work(tmp_path))) for piece in TINY.pieces()]
    return TINY.result(found, 0.0)


def verdicts(result):
    return [check["agrees"] for check in result.details["checks"]]


@pytest.mark.slow  # Nine models generate, and every operation is counted.
def test_constant_cost_is_that_of_the_state(tmp_path, by_operations, monkeypatch):
    right = run(tmp_path)
    assert verdicts(right) == [True] * 5
    assert len(right.curves) == 27 and [len(x.lines) for x in TINY.panels(right)] == [9] * 3
    cached = [note for note in right.notes if note.startswith("With its KV cache")]
    assert len(cached) == len(TRANSFORMERS)

    def without_state(model: str, how: str, setting: Setting) -> tuple[object, nn.Module]:
        made, module = watched(model, how, setting)
        return (Rereading(made.engine) if model == RWKV else made), module

    monkeypatch.setattr(inference, "watched", without_state)
    monkeypatch.setattr(inference, "decoder", lambda *named: without_state(*named)[0])
    wrong = run(tmp_path)
    assert wrong.details["verdict"] == DIFFERS
    assert verdicts(wrong)[0] is False and verdicts(wrong)[2] is False


@pytest.mark.parametrize("model", TRANSFORMERS)
def test_a_cache_changes_nothing_but_the_cost(model):
    ids = torch.arange(1, 9)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cached = decoder(model, CACHE, SETTING)
        torch.manual_seed(0)
        again = decoder(model, NO_CACHE, SETTING)
    again.tokens = again.tokens[:, :0]
    cached.read(ids)
    again.read(ids)
    written = []
    for _ in range(4):
        written.append(int(cached.next))
        cached.step()
        again.step()
    assert again.tokens[0, -4:].tolist() == written
    assert sum(x.nbytes for x in cached.remembered) == 2 * 2 * 12 * 32 * 4


def test_models_are_of_one_size():
    sizes = [parameters(model, SETTING) for model in (RWKV, *TRANSFORMERS)]
    assert sizes[0] == 2 * 64 * 32 + 13 * 32 * 32 * 2 + 32 * (11 * 2 + 4)
    assert max(sizes) < 1.5 * min(sizes)
    state, _ = watched(RWKV, STATE, SETTING)
    assert state.remembered == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": 2}, "windows is 2; wanted 3 or more"),
        ({"tokens": 20}, "windows is 16; wanted 3 or more, of at least 2 of the 20 tokens"),
        ({"layers": 3}, "layers is 3; GPT-Neo needs an even number"),
    ],
)
def test_mistakes(change, message):
    with pytest.raises(ValueError, match=message):
        Inference(**change)

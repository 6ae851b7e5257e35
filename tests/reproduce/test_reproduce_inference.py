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
from receptance.reproduce import inference, inference_runs
from receptance.reproduce.experiment import DIFFERS, Work
from receptance.reproduce.generators import (
    CACHE,
    NO_CACHE,
    RWKV,
    STATE,
    TORCH,
    TRANSFORMERS,
    Setting,
    decoder,
    parameters,
    watched,
)
from receptance.reproduce.inference import Inference
from receptance.reproduce.inference_runs import ALL_MEMORY, ALL_TIME, Run
from receptance.reproduce.mechanisms import Counter

TINY = Inference(sizes=("16x2", "32x2"), vocabulary=64, tokens=48, windows=4, device="cpu")
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


@pytest.mark.slow  # Twenty models generate, and every operation is counted.
def test_constant_cost_is_that_of_the_state(tmp_path, by_operations, monkeypatch):
    right = run(tmp_path)
    assert verdicts(right) == [True] * 7
    assert {x.name for x in right.curves if x.x_name == "parameters"} == {ALL_TIME, ALL_MEMORY}
    # Over tokens, those of the largest size; plain torch has the memory of RWKV already.
    assert [len(x.lines) for x in TINY.panels(right)] == [10, 10, 9, 10, 9]
    counts = [x for x in right.figures if x.name.startswith("memory")]
    assert counts and all(x.low is None for x in counts), "what is counted has no interval"
    cached = [note for note in right.notes if note.startswith("With its KV cache")]
    assert len(cached) == len(TRANSFORMERS)

    def without_state(model: str, how: str, setting: Setting) -> tuple[object, nn.Module]:
        made, module = watched(model, how, setting)
        return (Rereading(made.engine) if model == RWKV else made), module

    monkeypatch.setattr(inference, "watched", without_state)
    monkeypatch.setattr(inference, "decoder", lambda *named: without_state(*named)[0])
    wrong = run(tmp_path)
    assert wrong.details["verdict"] == DIFFERS
    time, _, memory, _, linear, more, least = verdicts(wrong)
    assert time is False and memory is False and linear is False and more is True
    assert least is False


@pytest.mark.parametrize("model", TRANSFORMERS)
def test_a_cache_takes_the_bytes_of_its_keys_and_values(model):
    """And those of the keys of the layer at which a step is, whose old ones are still there."""
    made, module = watched(model, CACHE, SETTING)
    first, second = inference.remembered(made, module, 64, 2, SETTING)
    wanted = 4 * 32 * (2 * SETTING.layers * SETTING.width + SETTING.width)
    assert wanted <= second - first <= 1.1 * wanted


@pytest.mark.parametrize(("power", "wanted"), [(1.0, True), (1.15, None), (2.0, False)])
def test_the_power_of_time_decides(power, wanted):
    """Of RWKV; a Transformer has to have another."""
    tokens = [16, 32, 48, 64]
    parts = [1e-3 * (n**power - (n - 16) ** power) / 16 for n in tokens]
    found = {"tokens": tokens, "step": parts, "seconds": [1, 2, 3, 900]}  # It was stopped once.
    one = Run({"model": RWKV, "how": STATE, "size": "16x2"}, found)
    assert one.power() == pytest.approx(power)
    assert inference_runs._linear(one).agrees is wanted
    more = {True: False, None: None, False: True}
    assert inference_runs._more_than_linear([one]).agrees is more[wanted]


def test_who_computes_is_said():
    assert inference.runs_by(decoder(RWKV, TORCH, SETTING)) == "plain torch"
    assert inference.runs_by(decoder("OPT", CACHE, SETTING)) == "plain torch"


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
        ({"sizes": ("16x3",)}, "sizes has 16x3; GPT-Neo needs an even number of layers"),
        ({"sizes": ("16x2", "16x2")}, "name each once"),
        ({"dtypes": ("int8",)}, "wanted first one that transformers run as well"),
    ],
)
def test_mistakes(change, message):
    with pytest.raises(ValueError, match=message):
        Inference(**change)

"""Small embeddings and starting values: shown where they matter, and not where they do not."""

import pytest
import torch
from tiny import TEXT

from receptance.config import ModelConfig
from receptance.evaluation.intervals import Estimate
from receptance.model import Model
from receptance.reproduce import initialization, small_init
from receptance.reproduce.experiment import AGREES, DIFFERS, NOT_SHOWN, Work, verdict
from receptance.reproduce.initialization import CODE, PRINTED, Initialization, dead
from receptance.reproduce.small_init import BARE, NORMAL, SMALL, SmallInit

TINY = {
    "tokenizer": "bytes",
    "context": 16,
    "batch": 2,
    "held_out": 64,
    "validation": 0.2,
    "size": "16x2",
    "steps": 10,
    "seeds": 2,
}


def done(kind, folder, **options):
    (folder / "text").write_text(TEXT)
    experiment = kind(data=(str(folder / "text"),), **TINY | options)
    work = Work(folder / "work")
    experiment.prepare(work)
    found = [(piece, experiment.measure(piece, work)) for piece in experiment.pieces()]
    return experiment.result(found, 0.0), found


# ---- the recipe that is printed -----------------------------------------------------------------


def test_the_printed_recipe_kills_channel_mixing(tmp_path):
    result, found = done(Initialization, tmp_path)
    runs = {name: [it for piece, it in found if piece["start"] == name] for name in (CODE, PRINTED)}
    names = {f"{layer}.ffn.{part}" for layer in "01" for part in ("key", "value", "receptance")}
    assert {*dead(runs[PRINTED])} == names and not dead(runs[CODE])
    printed, _ = result.details["checks"]
    assert not printed["agrees"] and "exactly 0 for 0.ffn.key" in printed["found"]
    assert result.details["verdict"] == DIFFERS
    assert "does not agree: the recipe that the paper prints stops channel mixing" in result.what
    assert any("the deviation √(d/s) is 2." in note for note in result.notes)
    assert {curve.name for curve in result.curves} == {
        "training loss",
        "gradient of channel mixing",
    }


def test_a_recipe_with_a_key_is_not_called_dead(tmp_path, monkeypatch):
    def repaired(model, generator):
        initialization.printed(model, generator)
        for name, matrix in initialization.matrices(model).items():
            if name.endswith("ffn.key"):
                torch.nn.init.normal_(matrix, 0, 0.1, generator=generator)

    monkeypatch.setitem(initialization.STARTS, PRINTED, repaired)
    result, _ = done(Initialization, tmp_path)
    assert result.details["checks"][0]["agrees"] and "stops" not in result.what


def test_starting_values_that_kill_are_found_out_under_any_name():
    gap = Estimate(0.1, 0.05, 0.15, "")
    assert verdict(initialization.checks({CODE: [], PRINTED: ["a"]}, gap, 9)) == DIFFERS
    assert verdict(initialization.checks({CODE: ["a"], PRINTED: []}, gap, 9)) == DIFFERS
    assert verdict(initialization.checks({CODE: [], PRINTED: []}, gap, 9)) == AGREES


def test_the_printed_values_are_those_of_the_appendix():
    model = Model(ModelConfig(vocab_size=8, width=64, num_layers=2))
    with torch.no_grad():
        initialization.printed(model, torch.Generator().manual_seed(0))
    for name, matrix in initialization.matrices(model).items():
        wanted = 2.0 if name.endswith(("att.output", "ffn.value")) else 0.0
        assert float(matrix.detach().std()) == pytest.approx(wanted, rel=0.05)


# ---- the embedding ------------------------------------------------------------------------------


def test_three_embeddings_are_trained_on_the_same_text(tmp_path):
    result, found = done(SmallInit, tmp_path)
    assert [piece["start"] for piece, _ in found] == [SMALL, NORMAL, BARE] * 2
    first = [it["losses"][0] for _, it in found]
    # All start at about ln V, as the head's output is small.
    assert max(first) - min(first) < 2 and len(found[0][1]["losses"]) == 10
    assert found[0][1]["losses"] != found[3][1]["losses"]
    assert [curve.model for curve in result.curves] == [SMALL, NORMAL, BARE, NORMAL, BARE]
    small, usual, _, more, _ = (curve.y for curve in result.curves)
    assert more == pytest.approx([b - a for a, b in zip(small, usual, strict=True)])
    # The layer norm on the embedding is gone: a weight and a bias.
    sizes = {x.name: x.about["parameters"] for x in result.models}
    assert sizes[SMALL] - sizes[BARE] == 2 * 16


def test_a_small_embedding_that_is_not_small_shows_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(small_init.STARTS, SMALL, small_init.normal)
    result, _ = done(SmallInit, tmp_path)
    assert result.details["verdict"] == NOT_SHOWN


def falling(gaps, seeds=3, steps=100):
    """Losses that fall to 1 from `gap` above it, alike in all seeds but for a little."""
    return [
        [1 + gap * 0.9**step + 0.001 * seed for step in range(steps)]
        for seed, gap in zip(range(seeds), gaps, strict=True)
    ]


def test_the_verdict_follows_from_the_curves():
    fast, slow = falling((1.0, 1.1, 1.0)), falling((2.0, 2.1, 2.1))
    assert verdict(small_init.checks(fast, slow)) == AGREES
    assert verdict(small_init.checks(slow, fast)) == DIFFERS
    assert verdict(small_init.checks(fast, falling((1.1, 1.0, 1.05)))) == NOT_SHOWN
    apart = [[x + 1 for x in run] for run in slow]
    assert verdict(small_init.checks(fast, apart)) == NOT_SHOWN


def test_mistakes():
    with pytest.raises(ValueError, match="1 seeds, 1500 steps; wanted at least 2 and 10"):
        SmallInit(seeds=1)
    with pytest.raises(ValueError, match="wanted WIDTHxLAYERS"):
        Initialization(size="large")

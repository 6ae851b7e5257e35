"""Decays: their numbers, their order, and those before training."""

import dataclasses
import math

import pytest
import torch
from tiny import make_model

from receptance.analysis import (
    decay_result,
    half_lives,
    log_decays,
    retentions,
    starting_log_decays,
)
from receptance.config import ModelConfig
from receptance.evaluation.results import Result
from receptance.model import Model
from receptance.plots import draw_decays


def test_a_half_life_is_where_half_is_left():
    found = log_decays(make_model(layers=3))
    assert found.shape == (3, 16) and bool((found < 0).all())
    torch.testing.assert_close(
        found.double().exp() ** half_lives(found.double()), torch.tensor(0.5).double().expand(3, 16)
    )
    assert float(half_lives(torch.zeros(()))) == pytest.approx(1e12)
    assert float(half_lives(torch.tensor(-math.inf))) == 0
    shares = retentions(found)
    assert [*shares] == [0, 1, 2] and all(
        row == sorted(row, reverse=True) for row in shares.values()
    )


def test_before_training_is_the_recipe():
    """exp(-exp(-5 + 8 (h / (C - 1))^(0.7 + 1.3 l / (L - 1)))), whatever else the model holds."""
    config = ModelConfig(vocab_size=300, width=16, num_layers=3, ffn_width=48)
    found = starting_log_decays(config)
    assert torch.equal(found, log_decays(Model(config, seed=7)))
    fraction = torch.arange(16, dtype=torch.float64) / 15
    for layer in range(3):
        wanted = -torch.exp(-5 + 8 * fraction ** (0.7 + 1.3 * layer / 2))
        torch.testing.assert_close(found[layer].double(), wanted, atol=0, rtol=1e-5)


def test_the_result_and_the_picture(tmp_path):
    model = make_model(layers=2)
    decay_result(model, "tiny").save(tmp_path / "decays.json")
    found = Result.load(tmp_path / "decays.json")
    now = [c for c in found.curves if c.about == {"layer": 1, "when": "now"}]
    assert [c.name for c in now] == ["share kept per token", "half-life"]
    shares = retentions(log_decays(model))
    assert now[0].y == pytest.approx(shares[1])
    assert now[1].y[0] == pytest.approx(math.log(2) / -math.log(shares[1][0]), rel=1e-3)
    assert len(found.figures) == 4 and found.figures[0].unit == "tokens"
    before = retentions(starting_log_decays(model.config))
    draw_decays(shares, tmp_path / "decays.png", before=before)
    assert (tmp_path / "decays.png").read_bytes().startswith(b"\x89PNG")
    assert dataclasses.asdict(found)["models"][0]["fingerprint"] == model.fingerprint()

"""Figure 10 is confirmed for what shows it, and not where all layers forget alike."""

import math

import torch

from receptance.analysis import starting_log_decays
from receptance.config import ModelConfig
from receptance.reproduce.decays import BEFORE, NOW, Decays, checks
from receptance.reproduce.experiment import AGREES, NOT_SHOWN, Work, verdict

CONFIG = ModelConfig(vocab_size=4, width=64, num_layers=6)


def test_the_model_in_the_box_shows_it(tmp_path):
    experiment = Decays()
    (piece,) = experiment.pieces()
    found = experiment.measure(piece, Work(tmp_path))
    assert found[NOW] != found[BEFORE]
    result = experiment.result([(piece, found)], 0.0)
    assert result.details["verdict"] == AGREES
    assert [panel.y for panel in experiment.panels(result)] == ["share", "tokens"]
    for check in result.details["checks"]:
        assert "Before training it was " in check["found"]
    assert "agrees: the starting values alone have this form" in result.what
    assert {x.about["layer"] for x in result.figures} == set(range(1, 7))
    layers = len(found[NOW])
    assert all(len(panel.lines) == 2 * layers for panel in experiment.panels(result))


def test_layers_that_forget_alike_do_not_show_it():
    alike = torch.full((6, 64), math.log(0.9))
    assert [check.agrees for check in checks(alike)] == [False, False]
    mixed = starting_log_decays(CONFIG)[:1].expand(6, -1)
    assert [check.agrees for check in checks(mixed)] == [False, False]
    turned = starting_log_decays(CONFIG).flip(0)
    assert [check.agrees for check in checks(turned)] == [False, False]


def test_too_few_layers_show_nothing():
    assert verdict(checks(starting_log_decays(CONFIG)[:2])) == NOT_SHOWN

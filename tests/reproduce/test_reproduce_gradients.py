"""Appendix H holds for RWKV, and not for a wkv that sums where it should average."""

import math

import pytest
import torch

from receptance.analysis import starting_log_decays
from receptance.config import ModelConfig
from receptance.evaluation.results import Curve
from receptance.reproduce import bounds, gradients, norms
from receptance.reproduce.bounds import IDENTITIES, SHARES, derivatives, weights
from receptance.reproduce.experiment import AGREES, DIFFERS, Work, verdict
from receptance.reproduce.gradients import (
    BACK,
    FIRST,
    WHOLE,
    Gradients,
    bound_checks,
    stability_checks,
    starting_weights,
)
from receptance.reproduce.norms import NETWORKS, backward, network

TINY = Gradients(
    width=16, lengths=(8, 16, 64), layers=2, depths=(1, 2, 8), length=8, rows=2, seeds=2
)


def results(folder):
    found = [(piece, TINY.measure(piece, Work(folder))) for piece in TINY.pieces()]
    return TINY.result(found, 0.0)


def test_rwkv_shows_it(tmp_path):
    result = results(tmp_path)
    assert [check["agrees"] for check in result.details["checks"][:4]] == [True] * 4
    assert [panel.x for panel in TINY.panels(result)] == [
        *("T, tokens", "T, tokens", "layers", "tokens between")
    ]


def test_the_shares_are_those_that_the_equation_has():
    generator = torch.Generator().manual_seed(0)
    decay, bonus, key = (torch.randn(n, 4, generator=generator) for n in (1, 1, 6))
    decay = -decay.exp()
    found = weights(decay[0], bonus[0], key)
    for c in range(4):
        parts = [math.exp((4 - t) * decay[0, c] + key[t, c]) for t in range(5)]
        parts.append(math.exp(bonus[0, c] + key[5, c]))
        wanted = [part / sum(parts) for part in parts]
        assert found[:, c].tolist() == pytest.approx(wanted, rel=1e-5)


def summed(log_decay, bonus, key, value):
    """The numerator alone, as in linear attention without a denominator."""
    numerator, out = torch.zeros_like(key[:, 0]), []
    for k, v in zip(key.unbind(1), value.unbind(1), strict=True):
        out.append(numerator + (bonus + k).exp() * v)
        numerator = log_decay.exp() * numerator + k.exp() * v
    return torch.stack(out, 1)


def test_a_sum_in_place_of_the_average_breaks_the_bounds(monkeypatch):
    monkeypatch.setattr(bounds, "average", summed)
    found = [derivatives(16, t, 0) for t in (16, 64, 256)]
    assert found[-1][SHARES[0]] > 2 and found[-1][IDENTITIES[0]] > 0.1
    curves = [
        Curve(
            name=name,
            x_name="T",
            x=[16, 64, 256],
            y_name="",
            y=[it[name] for it in found],
            model="wkv",
        )
        for name in (*IDENTITIES, *SHARES)
    ]
    assert [check.agrees for check in bound_checks(curves)] == [False, False]


def test_an_lstm_under_the_name_of_rwkv_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setitem(NETWORKS, "RWKV", norms.LSTM)
    result = results(tmp_path)
    assert result.details["verdict"] == DIFFERS
    depth, back = (check["agrees"] for check in result.details["checks"][3:])
    assert depth is False and back is False


def test_the_weights_of_the_decays_are_those_of_the_average():
    """A channel's share of a token is a geometric series; a root mean square is taken of all."""
    weight = starting_weights(8, 2)
    rates = -starting_log_decays(ModelConfig(vocab_size=1, width=8, num_layers=2)).double()
    for distance in (1, 5):
        by_hand = [(1 - math.exp(-w)) * math.exp(-w * (distance - 1)) for w in rates.flatten()]
        wanted = math.sqrt(sum(x * x for x in by_hand) / len(by_hand))
        assert weight(distance) == pytest.approx(wanted)


def test_what_float32_cannot_hold_has_no_point():
    curve = gradients._curve(BACK, "", {1: [1.0, 2.0], 2: [1e-3, 1e-4], 4: [1e-39, 0.0]}, "LSTM")
    assert curve.x == [1, 2] and min(curve.y) > 1e-4


def test_a_gradient_that_falls_faster_than_the_decays_is_found_out():
    def check(far):
        curves = {
            model: Curve(name=BACK, x_name="", x=[1, 64], y_name="", y=[1, y], model=model)
            for model, y in (("RWKV", far), ("LSTM", 1e-9), ("Transformer", 1.0))
        }
        return gradients._vanishes_with_the_decay(curves, lambda d: 1 / d)

    assert check(1 / 64).agrees and not check(1 / 64 / 4).agrees
    assert "LSTM keeps 1.00e-09" in check(1 / 64).found


def test_the_verdict_follows_from_the_curves():
    def curves(rwkv):
        return [
            Curve(name=name, x_name="", x=[1, 2], y_name="", y=y, model=model)
            for name in (WHOLE, FIRST, BACK)
            for model, y in (("RWKV", rwkv), ("LSTM", [1, 1e-6]), ("Transformer", [1, 1]))
        ]

    assert verdict(stability_checks(curves([1, 0.5]))) == AGREES
    assert verdict(stability_checks(curves([1, 20]))) == DIFFERS
    assert verdict(stability_checks(curves([1, 1e-6]))) == DIFFERS


@pytest.mark.parametrize("name", NETWORKS)
def test_a_seed_decides_a_network_and_its_gradients(name):
    one, same, other = (network(name, 16, 2, seed) for seed in (1, 1, 2))
    pairs = zip(one.parameters(), same.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)
    assert backward(name, 16, 2, (2, 16), 1) == backward(name, 16, 2, (2, 16), 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_causal(name):
    net = network(name, 16, 2, 0).eval()
    tokens = torch.arange(12)[None] % 64
    with torch.no_grad():
        before, whole = net(tokens[:, :8]), net(tokens)
        assert not torch.allclose(before, whole)
    assert len(net.layers()) == 2


def test_mistakes():
    with pytest.raises(ValueError, match=r"depths are \(1, 2\); give three or more"):
        Gradients(depths=(1, 2))
    with pytest.raises(ValueError, match="width is 12; wanted a multiple of 8"):
        Gradients(width=12)

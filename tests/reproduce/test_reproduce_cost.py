"""Tables 1 and 2: what is counted is right, and a mechanism with another cost is found out."""

import dataclasses

import pytest
import torch

from receptance.config import PUBLISHED_SIZES, ModelConfig
from receptance.evaluation.intervals import Estimate, Line
from receptance.reproduce import complexity, mechanisms
from receptance.reproduce.complexity import COUNTED, Complexity
from receptance.reproduce.experiment import AGREES, DIFFERS, Work, verdict
from receptance.reproduce.mechanisms import MECHANISMS, drawn
from receptance.reproduce.mechanisms import counted as counted_bytes
from receptance.reproduce.sizes import FLOPS, PARAMETERS, PRINTED, Sizes, checks, counted, slips

TINY = Complexity(
    lengths=(32, 64, 128),
    widths=(16, 32, 64),
    timed_lengths=(64, 128, 192),
    timed_width=32,
    length=64,
    width=32,
)


def test_the_table_of_sizes_is_ours(tmp_path):
    experiment = Sizes()
    assert [piece["size"] for piece in experiment.pieces()] == list(PRINTED)
    piece = experiment.pieces()[0]
    found = experiment.measure(piece, Work(tmp_path))
    assert found[PARAMETERS] == 169_342_464 and found["tensors"] == 18 * 12 + 6
    assert found[FLOPS] == PUBLISHED_SIZES["169m"].forward_flops_per_token
    result = experiment.result([(piece, found)], 0.0)
    assert result.details["verdict"] == AGREES
    slip = "2(2VD + 13D²L) FLOPs per token, which is 3.385e8 for 169m; its table has 2.613e8"
    assert any(slip in note for note in result.notes)


def test_a_model_that_looks_its_head_up_as_well_is_found_out():
    found = counted(PUBLISHED_SIZES["169m"])
    assert verdict(checks({"169m": found | {FLOPS: found[FLOPS] - 2 * 50277 * 768}})) == DIFFERS
    narrow = counted(ModelConfig(vocab_size=50277, width=768, num_layers=12, ffn_width=768))
    assert [check.agrees for check in checks({"169m": narrow})][:2] == [False, False]
    assert checks({"169m": found | {FLOPS: found[FLOPS] // 2}})[2].agrees is False
    assert "Slip" in slips({"169m": found})[1]


@pytest.mark.parametrize("name", ["Transformer", "Linear Transformer", "RWKV"])
def test_two_forms_of_a_mechanism_are_the_same(name):
    row, (q, k, v, out) = MECHANISMS[name], drawn(128, 16)
    row.read(q, k, v, out)
    other = torch.empty_like(out)
    row.fast(q, k, v, other)
    torch.testing.assert_close(out, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_mechanism_reads_causally(name):
    q, k, v, out = drawn(24, 8)
    MECHANISMS[name].read(q, k, v, out)
    again = torch.empty_like(out)
    k[16:], v[16:] = 0, 9
    MECHANISMS[name].read(q, k, v, again)
    torch.testing.assert_close(out[:16], again[:16])
    assert not torch.allclose(out[16:], again[16:])


def test_what_is_counted_is_what_there_is():
    """A product of [T,d] and [d,T] has 2T²d operations and makes T² numbers."""
    given = counted_bytes(lambda q, k, v, out: q @ k.T, 32, 8)
    assert given == {"operations": 2 * 32 * 32 * 8, "bytes": 4 * 32 * 32}
    held = counted_bytes(lambda q, k, v, out: (q + k, q + v), 32, 8)
    assert held == {"operations": 2 * 32 * 8, "bytes": 2 * 4 * 32 * 8}
    released = counted_bytes(lambda q, k, v, out: [(q + k).sum().item() for _ in range(3)], 32, 8)
    assert released["bytes"] <= 4 * (32 * 8 + 2)


def results(tmp_path):
    pieces = [piece for piece in TINY.pieces() if piece["how"] == COUNTED]
    found = [(piece, TINY.measure(piece, Work(tmp_path))) for piece in pieces]
    # Seconds are those of a machine without noise, as a test cannot wait for one.
    power = {"RWKV": 1, "Transformer": 2, "Linear Transformer": 1}
    timed = [piece for piece in TINY.pieces() if piece["how"] != COUNTED]
    found += [(x, {"seconds": 1e-6 * x["T"] ** power[x["model"]]}) for x in timed]
    return TINY.result(found, 0.0)


@pytest.mark.slow  # Thousands of small operations are counted one by one.
def test_rwkv_has_the_slopes_of_the_table_and_attention_under_its_name_has_not(
    tmp_path, monkeypatch
):
    def of_rwkv(result):
        return next(x for x in result.details["checks"] if x["claim"].startswith("RWKV:"))

    right = results(tmp_path)
    assert of_rwkv(right)["agrees"] and right.details["checks"][-1]["agrees"]
    assert "Td counts inputs and is left out" in right.details["checks"][0]["claim"]
    assert all(x.low is None or "seconds" in x.name for x in right.figures)
    swapped = dataclasses.replace(MECHANISMS["RWKV"], read=mechanisms.attention)
    monkeypatch.setitem(MECHANISMS, "RWKV", swapped)
    wrong = results(tmp_path)
    assert not of_rwkv(wrong)["agrees"] and wrong.details["verdict"] == DIFFERS


@pytest.mark.parametrize(
    ("ours", "theirs", "wanted"),
    [
        ((0.9, 1.1), (1.5, 2.5), True),
        ((0.5, 1.5), (1.5, 2.5), None),
        ((0.9, 1.1), (1.1, 2.5), None),
        ((1.8, 2.2), (1.5, 2.5), False),
        ((0.9, 1.1), (0.9, 1.1), False),
    ],
)
def test_intervals_of_time_decide(ours, theirs, wanted):
    slopes = {
        (name, "seconds", "T"): (Line(Estimate(sum(x) / 2, *x, ""), 0, 1), None)
        for name, x in (("RWKV", ours), ("Transformer", theirs))
    }
    assert complexity._in_seconds(slopes).agrees is wanted


def test_mistakes():
    with pytest.raises(ValueError, match=r"lengths are \(8, 9\); give three or more"):
        Complexity(lengths=(8, 9))
    with pytest.raises(ValueError, match="timed_lengths has 100; wanted multiples of 64"):
        Complexity(timed_lengths=(64, 100, 128))

"""Parameters are those of a count by hand, FLOPs those of torch's counter, and models match."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from receptance.config import ModelConfig
from receptance.evaluation.compare.baselines import head_width
from receptance.evaluation.compare.families import Shape
from receptance.evaluation.compare.matching import TOLERANCE, counts, matched
from receptance.evaluation.compare.table import FAMILIES, family
from receptance.training import TrainOptions

V, C, L, F, T = 96, 32, 3, 56, 24
SHAPE = Shape(vocab_size=V, width=C, layers=L, ffn_width=F)
# By hand, without embedding and head. NeoX: four matrices of attention and two of the network, all
# with biases, and two layer norms with biases in each layer, one at the end. Llama: the same
# attention without biases, three matrices of the network, norms without biases.
BY_HAND = {
    "neox": L * (4 * C * C + 4 * C + 2 * C * F + F + C + 4 * C) + 2 * C,
    "llama": L * (4 * C * C + 3 * C * F + 2 * C) + C,
    "rwkv4": L * (5 * C * C + 2 * C * F + 5 * C + 2 * C + 4 * C) + 2 * C + 2 * C,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_parameters_are_those_of_a_count_by_hand(name):
    found = counts(family(name), SHAPE, T)
    assert found.non_embedding == BY_HAND[name]
    assert found.parameters == BY_HAND[name] + 2 * V * C


def test_every_architecture_is_counted_here():
    assert set(FAMILIES) >= set(BY_HAND) and set(BY_HAND) >= {"neox", "llama", "rwkv4"}


def test_rwkv_has_the_parameters_of_the_paper():
    usual = dataclasses.replace(SHAPE, ffn_width=4 * C)
    paper = 2 * V * C + 13 * C * C * L + C * (11 * L + 4)
    assert counts(family("rwkv4"), usual, T).parameters == paper
    config = ModelConfig(vocab_size=V, width=C, num_layers=L)
    assert config.num_parameters == paper


@pytest.mark.parametrize("name", ["neox", "llama"])
def test_flops_of_transformers_are_those_that_torch_counts(name):
    """torch counts all pairs of positions in attention, of which a causal model needs half."""
    model = family(name).objective(SHAPE, TrainOptions()).model
    model.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, T, dtype=torch.int64), use_cache=False)
    pairs, needed = T * T, T * (T + 1) // 2
    unneeded = L * 4 * C * (pairs - needed)
    rotation = 2 * (head_width(C) // (8 if name == "neox" else 2)) * T  # angles, once
    assert counts(family(name), SHAPE, T).forward_flops * T == pytest.approx(
        counter.get_total_flops() - unneeded, abs=rotation
    )


def test_flops_of_rwkv_are_those_of_its_matrices_and_its_state():
    found = counts(family("rwkv4"), SHAPE, T)
    matrices = ModelConfig(vocab_size=V, width=C, num_layers=L, ffn_width=F).forward_flops_per_token
    state = 4 * L * 5 * C
    assert found.forward_flops == matrices + state
    assert found.training_flops == 3 * found.forward_flops


@pytest.mark.parametrize("by", ["parameters", "flops"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("width", "layers"), [(64, 3), (128, 2), (192, 5)])
def test_matched_models_are_equal_within_two_percent(by, name, width, layers):
    reference = family("rwkv4")
    shape = Shape(vocab_size=V, width=width, layers=layers, ffn_width=4 * width)
    fitted = matched(family(name), reference, shape, T, by)
    ours, theirs = counts(family(name), fitted, T), counts(reference, shape, T)
    assert (fitted.width, fitted.layers) == (width, layers)
    if by == "parameters":
        assert ours.non_embedding == pytest.approx(theirs.non_embedding, rel=TOLERANCE)
    else:
        assert ours.training_flops == pytest.approx(theirs.training_flops, rel=TOLERANCE)


def test_the_reference_keeps_its_shape():
    reference = family("neox")
    assert matched(reference, reference, SHAPE, T) is SHAPE


def test_what_cannot_match_is_refused():
    """At a context of a million no network is narrow enough to make up for the attention."""
    with pytest.raises(ValueError, match="neox cannot have the flops of rwkv4"):
        matched(family("neox"), family("rwkv4"), SHAPE, 1_000_000, "flops")


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean llama\?"):
        family("lama")


@pytest.mark.parametrize(
    ("width", "wanted"), [(512, 64), (256, 64), (128, 32), (96, 16), (32, 8), (8, 8), (40, 8)]
)
def test_heads_have_a_usual_width(width, wanted):
    assert head_width(width) == wanted


def test_a_width_without_heads_is_refused():
    with pytest.raises(ValueError, match="multiple of 8"):
        head_width(20)

"""Sizes, what they count to and cost, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from receptance.config import PUBLISHED_SIZES, ModelConfig, published
from receptance.model import Model

# Table 2 of arXiv 2305.13048: layers, width, parameters (rounded in the paper, exact as
# recomputed), FLOPs per token, and EFLOPs of training on 332.1e9 tokens.
PAPER = {
    "169m": (12, 768, 1.693e8, 169_342_464, 2.613e8, 260),
    "430m": (24, 1024, 4.304e8, 430_397_440, 7.573e8, 754),
    "1.5b": (24, 2048, 1.515e9, 1_515_106_304, 2.823e9, 2813),
    "3b": (32, 2560, 2.985e9, 2_984_627_200, 5.710e9, 5689),
    "7b": (32, 4096, 7.393e9, 7_392_649_216, 1.437e10, 14318),
    "14b": (40, 5120, 1.415e10, 14_148_597_760, 2.778e10, 27676),
}
SIZES = {"vocab_size": 11, "width": 8, "num_layers": 2}


def test_all_published_sizes_are_there():
    names = [name for name in PUBLISHED_SIZES if not name.startswith("rwkv")]
    assert names == [*PAPER]


@pytest.mark.parametrize("name", PAPER)
def test_published_numbers(name):
    layers, width, rounded, parameters, flops, training = PAPER[name]
    config = published(name)
    assert (config.num_layers, config.width, config.vocab_size) == (layers, width, 50277)
    assert config.ffn_width == 4 * width
    assert config.num_parameters == parameters
    assert float(f"{config.num_parameters:.3e}") == rounded
    assert float(f"{config.forward_flops_per_token:.3e}") == flops
    total = config.training_flops_per_token * 332.1e9 / 1e18
    assert total == pytest.approx(training, rel=3e-3 if training < 1000 else 1e-4)


@pytest.mark.parametrize("name", PAPER)
def test_counts_are_those_of_the_real_model(name):
    config = published(name)
    with torch.device("meta"):
        model = Model(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters
    assert len(model.state_dict()) == 18 * config.num_layers + 6
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    embedding = config.vocab_size * config.width
    assert config.forward_flops_per_token == 2 * (matrices - embedding)


@pytest.mark.parametrize("ffn_width", [0, 5, 64])
def test_counts_with_another_feed_forward(ffn_width):
    config = ModelConfig(**SIZES, ffn_width=ffn_width)
    assert config.ffn_width == (ffn_width or 32)
    count = sum(p.numel() for p in Model(config).parameters())
    assert count == config.num_parameters


def test_names_of_sizes_in_any_case():
    assert published("1.5B") is PUBLISHED_SIZES["1.5b"]
    with pytest.raises(ValueError, match="unknown model size '2b'; the published sizes are 169m, "):
        published("2b")


def test_a_config_is_a_value():
    config = ModelConfig(**SIZES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.width = 9
    assert config == ModelConfig(**SIZES) and hash(config) == hash(ModelConfig(**SIZES))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_missing_and_unknown_fields_are_named():
    with pytest.raises(ValueError, match=r"model fields \['num_layers'\] are missing"):
        ModelConfig.from_dict({"vocab_size": 11, "width": 8})
    with pytest.raises(ValueError, match=r"unknown model fields \['heads'\]; known ones are \['"):
        ModelConfig.from_dict({**SIZES, "heads": 4})


NOT_SIZES = [-1, 2.0, "8", None, True, [8]]


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, 0) for name in SIZES]  # a feed-forward width of 0 means 4 times the width
    + [(name, value) for name in (*SIZES, "ffn_width") for value in NOT_SIZES],
)
def test_sizes_must_be_whole_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} is .*; it must be a whole number of at least 1"):
        ModelConfig(**{**SIZES, name: value})


@pytest.mark.parametrize("value", [0, 1, -1e-5, math.nan, math.inf, "1e-5", None])
def test_epsilon_must_be_small_and_positive(value):
    with pytest.raises(ValueError, match=r"layer_norm_epsilon is .*; it must lie between 0 and 1"):
        ModelConfig(**SIZES, layer_norm_epsilon=value)


@pytest.mark.parametrize("version", [8, 5.3, "4", None])
def test_versions_to_come_are_refused(version):
    with pytest.raises(ValueError, match=f"version {version!r} is not supported; this"):
        ModelConfig(**SIZES, version=version)

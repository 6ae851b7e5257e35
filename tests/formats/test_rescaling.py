"""Weights that transformers altered in evaluating them, and what can be told and undone of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import RwkvConfig, RwkvForCausalLM

from receptance.conversion.source import open_source
from receptance.formats.hf import read_hf
from receptance.formats.rescaling import Unscaled, exponent, looks_rescaled

LAYERS, EVERY = 8, 3
TOKENS = torch.arange(9)[None]


def saved(folder: Path, *, evaluated: bool, dtype: torch.dtype = torch.float32) -> Path:
    """What a user of transformers leaves behind."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": LAYERS}
    model = RwkvForCausalLM(RwkvConfig(**sizes, rescale_every=EVERY))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    model = model.to(dtype)
    if evaluated:
        with torch.no_grad():
            model.eval()(TOKENS)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_comes_back(tmp_path, assert_same: Callable, dtype):
    wanted = read_hf(saved(tmp_path / "fresh", evaluated=False, dtype=dtype)).tensors
    source = open_source(saved(tmp_path / "altered", evaluated=True, dtype=dtype))
    changed = {name for name, x in source.open().items() if not torch.equal(x, wanted[name])}
    assert changed == {name for name in wanted if exponent(name, EVERY)}
    assert_same(dict(source.unscaled().open()), wanted)
    assert_same(read_hf(tmp_path / "altered").tensors, dict(source.open()))


def test_float16_had_no_room_for_the_smallest(tmp_path):
    wanted = read_hf(saved(tmp_path / "fresh", evaluated=False)).tensors
    rounded = {name: x.half() for name, x in wanted.items()}
    altered = {name: x / 2 ** exponent(name, EVERY) for name, x in rounded.items()}
    back = Unscaled(altered, EVERY)
    for name, x in rounded.items():
        # Below 2**-14 float16 has steps of 2**-24.
        assert (back[name].float() - x.float()).abs().max() <= 2.0**-25 * 2 ** exponent(name, EVERY)


def test_any_number_of_blocks():
    name = "blocks.90.att.output.weight"
    assert Unscaled({name: torch.full((1,), 2.0**-90)}, 1)[name].item() == 1


def test_what_it_looks_like(tmp_path):
    for evaluated in (False, True):
        source = open_source(saved(tmp_path / str(evaluated), evaluated=evaluated))
        assert source.looks_rescaled() == evaluated
        assert not source.unscaled().looks_rescaled()


def outputs(sizes: list[float]) -> dict[str, Tensor]:
    return {
        f"blocks.{layer}.{kind}": torch.full((4, 4), size)
        for layer, size in enumerate(sizes)
        for kind in ("att.output.weight", "ffn.value.weight")
    }


@given(st.lists(st.floats(0.9, 1.1), min_size=8, max_size=20), st.integers(2, 7))
def test_models_that_change_slowly_from_block_to_block(sizes, every):
    assert not looks_rescaled(outputs(sizes), len(sizes), every)
    halved = [size / 2 ** (layer // every) for layer, size in enumerate(sizes)]
    assert looks_rescaled(outputs(halved), len(sizes), every)
    # A model that halves with every block was never rescaled.
    falling = [size / 2**layer for layer, size in enumerate(sizes)]
    assert not looks_rescaled(outputs(falling), len(sizes), every)


@pytest.mark.parametrize("every", [-1, 0, 8, 9])
def test_where_nothing_is_divided_nothing_is_seen(every):
    assert not looks_rescaled(outputs([1.0] * 8), 8, every)
    assert not looks_rescaled(outputs([0.0] * 8), 8, 2), "starting values"


@pytest.mark.parametrize("every", [0, -2, None, "six"])
def test_a_directory_that_divides_nothing_cannot_be_unscaled(tmp_path, every):
    config = saved(tmp_path, evaluated=False) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rescale_every": every}))
    with pytest.raises(ValueError, match=r"whose config\.json has a rescale_every"):
        open_source(tmp_path).unscaled()


def test_only_a_directory_of_transformers_can_be_unscaled(tmp_path, official):
    torch.save(official, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model.pth: only a transformers directory"):
        open_source(tmp_path / "model.pth").unscaled()

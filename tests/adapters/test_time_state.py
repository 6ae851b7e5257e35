"""The official files of learned states, which hold the matrices of RWKV-7 layer by layer."""

from __future__ import annotations

import pytest
import torch
from command import call
from tiny import make_model

import receptance
from receptance.adapters import StateTuningOptions, load_adapter, make_adapter
from receptance.adapters.time_state import read_time_state, write_time_state
from receptance.tokenizer import ByteTokenizer

MODEL = make_model(version=7, width=32, layers=3, head_size=8)


def official(seed: int = 0, heads: int = 4, layers: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randn(heads, 8, 8, generator=generator) for _ in range(layers))
    return {f"blocks.{i}.att.time_state": x.bfloat16() for i, x in enumerate(draws)}


def test_a_file_is_the_state_in_which_texts_begin(tmp_path):
    torch.save(official(), tmp_path / "s.pth")
    adapter = load_adapter(tmp_path / "s.pth", MODEL)
    state = adapter.initial_state(2)
    for layer, (name, matrices) in enumerate(official().items()):
        found = state.tensors["value_by_key"][layer]
        assert torch.equal(found, matrices.float().expand(2, -1, -1, -1)), name
    assert not state.tensors["time_shift"].any() and not state.tensors["channel_shift"].any()
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        changed = MODEL(tokens, adapter.initial_state(1))[0]
    assert not torch.allclose(changed, MODEL(tokens)[0])


def test_what_is_written_is_read_back(tmp_path):
    torch.save(official(), tmp_path / "s.pth")
    adapter = read_time_state(tmp_path / "s.pth", MODEL)
    write_time_state(tmp_path / "t.pth", adapter, MODEL)
    found, wanted = torch.load(tmp_path / "t.pth"), official()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], wanted[n].float()) for n in wanted)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (official(layers=2), "a learned state of this model has 'blocks.0"),
        (official(heads=2), r"time_state is \[2, 8, 8\]; this model wants \[4, 8, 8\]"),
        ({"x": torch.zeros(3)}, "has the tensors 'x'"),
    ],
)
def test_a_file_of_another_model_is_refused(tensors, message, tmp_path):
    torch.save(tensors, tmp_path / "s.pth")
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path / "s.pth", MODEL)


def test_version_4_has_no_such_files(tmp_path):
    torch.save(official(), tmp_path / "s.pth")
    with pytest.raises(ValueError, match=r"no \.pth files of learned states for RWKV-4; take"):
        load_adapter(tmp_path / "s.pth", make_model())


def test_the_command_writes_one(tmp_path):
    receptance.save(MODEL, tmp_path / "m", ByteTokenizer())
    adapter = make_adapter(MODEL, StateTuningOptions())
    with torch.no_grad():
        adapter.tensors()["value_by_key"].fill_(0.25)
    adapter.save(tmp_path / "a.safetensors", MODEL.fingerprint())
    done = call("merge", tmp_path / "m", tmp_path / "a.safetensors", "--out", tmp_path / "s.pth")
    assert done.code == 0, done.err
    found = torch.load(tmp_path / "s.pth")
    assert [*found] == [f"blocks.{i}.att.time_state" for i in range(3)]
    assert all(bool((x == 0.25).all()) for x in found.values())
    words = ("generate", tmp_path / "m", "a", "--max-tokens", 3, "--temperature", 0)
    one = call(*words, "--adapter", tmp_path / "s.pth")
    other = call(*words, "--adapter", tmp_path / "a.safetensors")
    assert one.code == 0 and one.out == other.out

"""RWKV-7 in training: it learns, goes on to the bit, and may be cut into chunks; so do 5 and 6."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from command import call
from tiny import same_bits

from receptance.adapters import LoRAOptions, make_adapter
from receptance.config import ModelConfig
from receptance.data.batches import Batches
from receptance.model import Model
from receptance.training import Trainer, TrainOptions

TEXT = b"the quick brown fox jumps over the lazy dog. " * 40
CONFIG = ModelConfig(version=7, vocab_size=256, width=32, num_layers=2, extras={"head_size": 16})


SIX = ModelConfig(version=6, vocab_size=256, width=32, num_layers=2, extras={"head_size": 16})
FIVE = ModelConfig(version=5.1, vocab_size=256, width=32, num_layers=2, extras={"head_size": 16})


def trainer(config: ModelConfig = CONFIG, **changes) -> Trainer:
    given = {"batch": 4, "context": 40, "steps": 40, "learning_rate": 3e-3} | changes
    tokens = np.frombuffer(TEXT, np.uint8).astype(np.uint16)
    batches = Batches(tokens, context=40, batch=4, seed=0)
    return Trainer(Model(config, seed=3), batches, TrainOptions(**given))


def weights(of: Trainer) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in of.model.named_parameters()}


@pytest.mark.parametrize(
    ("config", "dtype"),
    [(CONFIG, "float32"), (CONFIG, "bfloat16"), (SIX, "bfloat16"), (FIVE, "float32")],
)
def test_it_learns(config, dtype):
    run = trainer(config, dtype=dtype)
    losses = [run.run_step().loss for _ in range(40)]
    assert losses[-1] < losses[0] - 2


def test_it_goes_on_to_the_bit():
    whole = trainer()
    for _ in range(6):
        whole.run_step()
    first = trainer()
    for _ in range(3):
        first.run_step()
    saved = first.snapshot()
    assert saved.parameters.keys() == dict(first.model.named_parameters()).keys()
    second = trainer()
    second.model.load_state_dict(saved.parameters)
    second.restore(saved.about, saved.optimizer.items())
    for _ in range(3):
        second.run_step()
    assert same_bits(weights(second), weights(whole))
    start = trainer()
    unused = CONFIG.architecture.unused(CONFIG)
    assert all(torch.equal(weights(start)[name], weights(whole)[name]) for name in unused)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (CONFIG, {"chunk": 7}),
        (CONFIG, {"micro_batch": 1}),
        (CONFIG, {"recompute": True}),
        (SIX, {"chunk": 7}),
    ],
)
def test_pieces_and_recomputation_change_nothing_but_rounding(config, changes):
    whole, pieces = trainer(config), trainer(config, **changes)
    for _ in range(2):
        whole.run_step()
        pieces.run_step()
    wanted, found = weights(whole), weights(pieces)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=2e-4)


def test_lora_finds_its_matrices():
    model = Model(CONFIG, seed=3)
    adapter = make_adapter(model, LoRAOptions())
    names = {name.removeprefix("blocks.0.") for name in adapter.tensors() if "blocks.0." in name}
    assert {name.split(".")[1] for name in names} >= {"receptance", "key", "value", "output"}


@pytest.mark.parametrize("version", [5.2, 7])
def test_the_command_trains_it(version, tmp_path):
    (tmp_path / "t.txt").write_bytes(TEXT)
    words = ("--tokenizer", "bytes", "--width", 64, "--layers", 1, "--batch", 2, "--context", 16)
    done = call(
        *("train", tmp_path / "t.txt", "--out", tmp_path / "run", "--version", version),
        *(*words, "--steps", 2, "--device", "cpu"),
    )
    assert done.code == 0, done.err
    again = call("train", "--resume", "--out", tmp_path / "run", "--steps", 3)
    assert again.code == 0, again.err
    assert f"RWKV-{version}" in call("inspect", tmp_path / "run").out
    other = call("train", "--resume", "--out", tmp_path / "run", "--version", 4)
    assert f"the run was started with version {version}, not 4" in other.err
    tuned = call("train", tmp_path / "t.txt", "--init", tmp_path / "run", "--version", 4,
                 "--out", tmp_path / "other")  # fmt: skip
    assert f"the model of init has version {version}, not 4" in tuned.err

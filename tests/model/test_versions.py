"""A sibling version is one module: this one is loaded, trained, generated from and quantized."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import receptance
from receptance.adapters import StateTuningOptions, make_adapter
from receptance.analysis import ablate, attention, patch, record
from receptance.analysis.page import analyze
from receptance.config import ModelConfig
from receptance.data.batches import Batches
from receptance.model import Model
from receptance.model.architecture import Architecture
from receptance.model.parts import Linear
from receptance.model.versions import VERSIONS
from receptance.quantize import check_group
from receptance.quantize.weights import quantize_tensors
from receptance.storage.quantized import About, write_quantized
from receptance.tokenizer import ByteTokenizer
from receptance.training import Trainer, TrainOptions
from receptance.training.estimate import estimate

# ---- the version ---------------------------------------------------------------------------------


class ToyState(NamedTuple):
    """Not of version 4: other names, and a part that is no vector."""

    memory: Tensor  # [B,H,N] float32


class ToyTimeMix(nn.Module):
    """A fading sum of values by heads. The first block's value is handed to all later ones."""

    def __init__(self, sizes, layer):
        super().__init__()
        self.first, self.heads = layer == 0, sizes.extras["heads"]
        self.backend = None
        self.fade = nn.Parameter(torch.zeros(self.heads))
        self.narrow = nn.Parameter(torch.zeros(sizes.width, sizes.extras["rank"]))
        self.widen = nn.Parameter(torch.zeros(sizes.extras["rank"], sizes.width))
        self.value = Linear(sizes.width, sizes.width)
        self.output = Linear(sizes.width, sizes.width)

    def initialize(self, generator):
        for matrix in (self.value, self.output):
            matrix.orthogonal_(1, generator=generator)
        for low in (self.narrow, self.widen):
            nn.init.uniform_(low, -0.1, 0.1, generator=generator)

    def learning_rate_scales(self):
        return {"fade": 2.0}

    def forward(self, x, state, reading, *handed):
        value = self.value(x) + (x @ self.narrow.to(x.dtype)) @ self.widen.to(x.dtype)
        first = handed[0] if handed else value
        values = (value + 0.5 * first).unflatten(-1, (self.heads, -1)).float()
        memory, keep = state.memory, self.fade.float().sigmoid()[:, None]
        outputs = []
        for t in range(x.shape[1]):
            before = memory
            if reading.resets is not None:
                before = before.masked_fill(reading.resets[:, t, None, None], 0)
            after = keep * before + values[:, t]
            if reading.lengths is not None:
                after = torch.where((t < reading.lengths)[:, None, None], after, memory)
            memory = after
            outputs.append(memory.flatten(1))
        out = torch.stack(outputs, 1) if outputs else value.float()
        return self.output(out.to(x.dtype)), ToyState(memory), first


class ToyChannelMix(nn.Module):
    """A feed-forward network without a state."""

    def __init__(self, sizes, layer):
        super().__init__()
        self.key = Linear(sizes.width, sizes.ffn_width)
        self.value = Linear(sizes.ffn_width, sizes.width)

    def initialize(self, generator):
        for matrix in (self.key, self.value):
            matrix.orthogonal_(1, generator=generator)

    def learning_rate_scales(self):
        return {}

    def forward(self, x, state, reading):
        return self.value(torch.relu(self.key(x))), state


class Toy(Architecture):
    number = 99
    time_mix, channel_mix, layer_state = ToyTimeMix, ToyChannelMix, ToyState
    matrices = dict.fromkeys(("att.value", "att.output", "ffn.key", "ffn.value"), "tiles")
    residual_outputs = ("att.output", "ffn.value")
    float32_parameters = ("att.fade",)

    def default_extras(self, width):
        return {"heads": 2, "rank": 3}

    def default_ffn_width(self, width):
        return 3 * width

    def check(self, sizes):
        if sizes.width % sizes.extras["heads"]:
            raise ValueError(f"width is {sizes.width}; it must be a multiple of the heads")

    def infer(self, shapes):
        rank = shapes["blocks.0.att.narrow"][1]
        return super().infer(shapes) | {"extras": {"rank": rank}}

    def block_shapes(self, sizes, layer):
        width, rank = sizes.width, sizes.extras["rank"]
        return {
            "att.fade": (sizes.extras["heads"],),
            "att.narrow": (width, rank),
            "att.widen": (rank, width),
            "att.value.weight": (width, width),
            "att.output.weight": (width, width),
            "ffn.key.weight": (sizes.ffn_width, width),
            "ffn.value.weight": (width, sizes.ffn_width),
        }

    def kept_per_position(self, sizes, element_bytes, *, inputs):
        return element_bytes * 8 * sizes.width

    def state_shapes(self, sizes):
        heads = sizes.extras["heads"]
        return {"memory": (heads, sizes.width // heads)}

    def empty_layer(self, sizes, batch, like):
        shape = (batch, *self.state_shapes(sizes)["memory"])
        return ToyState(torch.zeros(shape, device=like.device))

    def is_weight_decayed(self, name, shape):
        return super().is_weight_decayed(name, shape) and name.endswith(".weight")


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    monkeypatch.setitem(VERSIONS, 99, Toy())


SIZES = {"version": 99, "vocab_size": 256, "width": 16, "num_layers": 3}
TEXT = b"the quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture
def model() -> Model:
    return Model(ModelConfig(**SIZES, extras={"rank": 4}), seed=3).eval()


# ---- what it can do ------------------------------------------------------------------------------


def test_its_sizes(model):
    config = model.config
    assert config.ffn_width == 48
    assert config.extras == {"rank": 4, "heads": 2}
    assert config.num_parameters == sum(x.numel() for x in model.parameters())
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="multiple of the heads"):
        ModelConfig(**SIZES, extras={"heads": 3})
    with pytest.raises(ValueError, match="RWKV-99 has no size 'depth'; it has heads, rank"):
        ModelConfig(**SIZES, extras={"depth": 3})
    with pytest.raises(ValueError, match="RWKV-4 has no size 'rank'; it has none"):
        ModelConfig(**SIZES | {"version": 4}, extras={"rank": 3})


def test_the_law(model):
    tokens = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(0))
    whole, end = model(tokens)
    for cut in (0, 1, 7, 20):
        left, state = model(tokens[:, :cut])
        right, last = model(tokens[:, cut:], state)
        torch.testing.assert_close(torch.cat([left, right], 1), whole, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(last.tensors["memory"], end.tensors["memory"])
    assert end.tensors["memory"].shape == (3, 3, 2, 8)
    lengths = torch.tensor([5, 20, 0])
    _, ragged = model(tokens, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        _, alone = model(tokens[row : row + 1, :length])
        torch.testing.assert_close(ragged.rows(row).tensors["memory"], alone.tensors["memory"])
    resets = torch.zeros(3, 20, dtype=torch.bool)
    resets[:, 9] = True
    again = model(tokens[:, 9:])[0]
    torch.testing.assert_close(model(tokens, resets=resets)[0][:, 9:], again)


def test_a_state_of_version_4_is_refused(model):
    other = Model(ModelConfig(vocab_size=256, width=16, num_layers=3))
    with pytest.raises(ValueError, match="memory of the state is none"):
        model(torch.zeros(1, 1, dtype=torch.int64), other.empty_state())


def test_it_is_saved_and_loaded(model, tmp_path):
    receptance.save(model, tmp_path / "m", ByteTokenizer())
    loaded, _ = receptance.load(tmp_path / "m")
    assert loaded.config == model.config
    assert loaded.fingerprint() == model.fingerprint()
    narrow, _ = receptance.load(tmp_path / "m", dtype=torch.bfloat16)
    assert narrow.blocks[1].att.fade.dtype == torch.float32
    assert narrow.blocks[1].att.narrow.dtype == torch.bfloat16
    state = model(torch.arange(5)[None])[1]
    state.save(tmp_path / "s", model.fingerprint())
    again = receptance.State.load(tmp_path / "s", loaded.fingerprint())
    assert torch.equal(again.tensors["memory"], state.tensors["memory"])


def test_it_is_trained_and_generates(model):
    options = TrainOptions(
        batch=4, context=32, chunk=16, steps=30, learning_rate=3e-3, weight_decay=0.1
    )
    tokens = np.frombuffer(TEXT, np.uint8).astype(np.uint16)
    batches = Batches(tokens, context=32, batch=4, seed=0)
    trainer = Trainer(model, batches, options)
    decayed = {
        id(p) for g in trainer.optimizer.param_groups if g["weight_decay"] for p in g["params"]
    }
    assert id(model.blocks[0].att.value.weight) in decayed
    assert id(model.blocks[0].att.narrow) not in decayed
    scales = {id(p): g["scale"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert scales[id(model.blocks[2].att.fade)] == 2
    losses = [trainer.run_step().loss for _ in range(30)]
    assert losses[-1] < losses[0] - 1
    found = estimate(model.config, options, device_name="h100")
    assert found.memory.activations > 0
    trainer.switch(training=False)
    text = receptance.generate(model, ByteTokenizer(), "the quick", max_tokens=20, temperature=0)
    assert len(text) == 20


def test_its_state_is_tuned(model):
    adapter = make_adapter(model, StateTuningOptions())
    with torch.no_grad():
        adapter.tensors()["memory"].fill_(0.5)
    state = adapter.initial_state(2)
    assert state.tensors["memory"].shape == (3, 2, 2, 8)
    logits, _ = model(torch.zeros(2, 4, dtype=torch.int64), state)
    logits.sum().backward()
    assert adapter.tensors()["memory"].grad is not None


def test_it_is_quantized_and_runs_through_torch(model, tmp_path):
    receptance.save(model, tmp_path / "m", ByteTokenizer())
    config, tensors = model.config, dict(model.state_dict())
    weights = quantize_tensors(tensors, "int8", None, None, config.architecture.layouts(config))
    about = About(kind="int8", group=check_group("int8", None), source=model.fingerprint())
    write_quantized(tmp_path / "q", config, ByteTokenizer(), about, weights)
    exact, _ = receptance.load_engine(tmp_path / "m")
    engine, _ = receptance.load_engine(tmp_path / "q")
    assert isinstance(exact, Model)
    assert isinstance(engine, Model)
    # Low-rank matrices are no matrices that are quantized.
    assert torch.equal(engine.blocks[0].att.narrow, model.blocks[0].att.narrow)
    assert not torch.equal(engine.blocks[0].att.value.weight, model.blocks[0].att.value.weight)
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        wanted, found = exact(tokens)[0], engine(tokens)[0]
    assert float((wanted - found).abs().max() / wanted.abs().max()) < 0.05
    assert engine.fingerprint() == model.fingerprint()


def test_its_inside_can_be_seen(model):
    tokens = torch.arange(9)[None]
    with record(model, "**") as cache:
        wanted, state = model(tokens)
    assert "blocks.2.resid_mid" in cache and "blocks.0.att.wkv" not in cache
    memory = cache.stack("state.memory")
    torch.testing.assert_close(memory[:, :, -1], state.tensors["memory"])
    with patch(model, "blocks.1.state.memory", memory[1], where=[4]):
        torch.testing.assert_close(model(tokens)[0], wanted, atol=1e-5, rtol=1e-5)
    assert same_tensors(ablate(model, state, parts=["memory"]), model.empty_state())
    with pytest.raises(ValueError, match="RWKV-99 does not tell what its layers read from"):
        attention(model, tokens)
    assert "null" in analyze(model, ByteTokenizer(), "abc").html()


def same_tensors(one, other):
    return all(torch.equal(x, other.tensors[name]) for name, x in one.tensors.items())


def test_an_engine_that_does_not_know_it_says_so(model, tmp_path):
    receptance.save(model, tmp_path / "m", ByteTokenizer())
    if receptance.ops.native.is_available():
        with pytest.raises(ValueError, match="native kernels do not run RWKV-99; pass"):
            receptance.load_engine(tmp_path / "m", backend="native")
    assert isinstance(receptance.load_engine(tmp_path / "m", backend="torch")[0], Model)


def test_a_version_that_there_is_not():
    with pytest.raises(ValueError, match="RWKV version 98 is not supported; this release builds"):
        ModelConfig(**SIZES | {"version": 98})

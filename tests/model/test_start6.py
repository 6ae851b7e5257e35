"""A new RWKV-6 model: its starting values, which gradients reach it, and its sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from model_cases import token_ids

from receptance.config import ModelConfig, published
from receptance.model import Model
from receptance.training import TrainOptions
from receptance.training.trainer import make_optimizer


def new_model(layers: int = 3, width: int = 32, head_size: int = 8) -> Model:
    extras = {"head_size": head_size, "mix_rank": 4, "decay_rank": 6}
    config = ModelConfig(version=6, vocab_size=30, width=width, num_layers=layers, extras=extras)
    return Model(config)


@pytest.mark.parametrize(("layers", "width", "head_size"), [(3, 32, 8), (6, 64, 64)])
def test_vectors_follow_the_official_formulas(layers, width, head_size):
    """As RWKV-v5/src/model.py computes them, number by number."""
    tensors = new_model(layers, width, head_size).state_dict()
    for layer in range(layers):
        late, early = layer / (layers - 1), 1 - layer / layers
        share = [i / width for i in range(width)]
        bonus = [late * (1 - n / (width - 1)) + ((n + 1) % 3 - 1) * 0.1 for n in range(width)]
        ramp = [-6 + 5 * (n / (width - 1)) ** (0.7 + 1.3 * late) for n in range(width)]
        want = {
            **{f"att.time_maa_{x}": [1 - s**early for s in share] for x in "xwk"},
            "att.time_maa_v": [1 - (s**early + 0.3 * late) for s in share],
            **{f"att.time_maa_{x}": [1 - s ** (0.5 * early) for s in share] for x in "rg"},
            **{f"ffn.time_maa_{x}": [1 - s**early for s in share] for x in "kr"},
            "att.time_decay": ramp,
            "att.time_faaaa": bonus,
            "att.ln_x.weight": [((1 + layer) / layers) ** 0.7] * width,
            "att.ln_x.bias": [0.0] * width,
        }
        for name, values in want.items():
            found = tensors[f"blocks.{layer}.{name}"]
            assert found.flatten().tolist() == pytest.approx(values, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("version", [5.0, 5.1, 5.2])
def test_those_of_rwkv_5(version):
    config = ModelConfig(
        version=version, vocab_size=30, width=32, num_layers=3, extras={"head_size": 8}
    )
    tensors = Model(config).state_dict()
    count, share = 32 if version == 5.2 else 4, [i / 32 for i in range(32)]
    for layer in range(3):
        late, early = layer / 2, 1 - layer / 3
        zigzag = [((n + 1) % 3 - 1) * 0.1 * (version == 5.2) for n in range(count)]
        want = {
            "att.time_mix_k": [s**early for s in share],
            "att.time_mix_v": [s**early + 0.3 * late for s in share],
            "att.time_mix_r": [s ** (0.5 * early) for s in share],
            "ffn.time_mix_r": [s**early for s in share],
            "att.time_decay": [
                -6 + 5 * (n / (count - 1)) ** (0.7 + 1.3 * late) for n in range(count)
            ],
            "att.time_faaaa": [late * (1 - n / (count - 1)) + zigzag[n] for n in range(count)],
        }
        for name, values in want.items():
            found = tensors[f"blocks.{layer}.{name}"]
            assert found.flatten().tolist() == pytest.approx(values, rel=1e-5, abs=1e-6), name
    assert ("blocks.0.att.gate.weight" in tensors) == (version > 5)
    assert Model(config).learning_rate_scales() == {
        f"blocks.{layer}.att.time_decay": 2.0 for layer in range(3)
    }


def test_matrices():
    tensors = new_model().state_dict()
    zero = {name for name, tensor in tensors.items() if not tensor.any()}
    parts = ("att.time_maa_w1", "att.time_decay_w1", "att.output.weight", "ffn.value.weight",
             "ffn.receptance.weight")  # fmt: skip
    norms = [f"blocks.{i}.{norm}.bias" for i in range(3) for norm in ("ln1", "ln2", "att.ln_x")]
    wanted = {f"blocks.{i}.{part}" for i in range(3) for part in parts}
    assert zero == wanted | {*norms, "ln_out.bias", "blocks.0.ln0.bias"}
    for name, gain in {"receptance": 1, "key": 0.1, "value": 1, "gate": 0.1}.items():
        matrix = tensors[f"blocks.1.att.{name}.weight"].double()
        torch.testing.assert_close(
            matrix @ matrix.T, gain**2 * torch.eye(32).double(), rtol=1e-5, atol=1e-5
        )
    for name in ("time_maa_w2", "time_decay_w2"):
        broad = tensors[f"blocks.1.att.{name}"]
        assert 0.009 < broad.abs().max() <= 0.01 and abs(broad.mean()) < 2e-3


def test_everything_learns():
    model, tokens = new_model(), token_ids(0, 4, 20, vocab_size=30)
    for _ in range(4):
        model.zero_grad()
        logits, _ = model(tokens)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.5 * parameter.grad
    assert not [n for n, x in model.named_parameters() if not x.grad.any()]
    assert model.config.num_trained == model.config.num_parameters


def test_what_decays_and_what_learns_faster():
    model = new_model()
    is_decayed = model.config.architecture.is_weight_decayed
    optimizer = make_optimizer(
        model.named_parameters(),
        model.learning_rate_scales(),
        TrainOptions(weight_decay=0.1),
        is_decayed,
    )
    names = {id(x): n for n, x in model.named_parameters()}
    decayed, fast = set(), set()
    for group in optimizer.param_groups:
        found = {
            names[id(x)].split(".", 2)[-1] for x in group["params"] if "blocks" in names[id(x)]
        }
        decayed |= found if group["weight_decay"] else set()
        fast |= found if group["scale"] == 2 else set()
    att = ("receptance", "key", "value", "gate", "output")
    matrices = {f"att.{x}.weight" for x in att}
    assert decayed == matrices | {f"ffn.{x}.weight" for x in ("key", "receptance", "value")}
    assert fast == {"att.time_decay"}


PUBLISHED = {
    "rwkv6-0.1b": 196_955_136,
    "rwkv6-0.4b": 472_780_800,
    "rwkv6-1.6b": 1_599_873_024,
    "rwkv6-3b": 3_099_863_040,
    "rwkv6-7b": 7_635_746_816,
    "rwkv6-14b": 14_069_088_256,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_parameters_of_their_files(name):
    config = published(name)
    assert config.num_parameters == PUBLISHED[name]
    with torch.device("meta"):
        model = Model(config)
    assert sum(x.numel() for x in model.parameters()) == PUBLISHED[name]
    low_rank = ("maa_w1", "maa_w2", "decay_w1", "decay_w2")
    matrices = [
        x for n, x in model.named_parameters()
        if n.endswith(low_rank) or (n.endswith(".weight") and x.dim() == 2)
    ]  # fmt: skip
    count = sum(x.numel() for x in matrices) - model.emb.weight.numel()
    assert config.forward_flops_per_token == 2 * count

"""A new RWKV-7 model: its starting values, which gradients reach it, and what is never trained."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from model_cases import token_ids

from receptance.config import ModelConfig, published
from receptance.model import Model
from receptance.training import TrainOptions
from receptance.training.trainer import make_optimizer


def new_model(layers: int = 3, width: int = 32, head_size: int = 8, **options) -> Model:
    extras = {"head_size": head_size, "decay_rank": 4, "gate_rank": 12}
    config = ModelConfig(version=7, vocab_size=30, width=width, num_layers=layers, extras=extras)
    return Model(config, **options)


@pytest.mark.parametrize(("layers", "width", "head_size"), [(3, 32, 8), (6, 64, 64), (2, 12, 3)])
def test_vectors_follow_the_official_formulas(layers, width, head_size):
    """As RWKV-v7/train_temp computes them, number by number."""
    tensors = new_model(layers, width, head_size).state_dict()
    for layer in range(layers):
        late, early = layer / (layers - 1), 1 - layer / layers
        share = [i / width for i in range(width)]
        line = [i / (width - 1) - 0.5 for i in range(width)]
        zigzag = [
            ((i % head_size) - (head_size - 1) / 2) / ((head_size - 1) / 2) for i in range(width)
        ]
        bend = [z * abs(z) for z in zigzag]
        ramp = [-6 + 6 * (i / (width - 1)) ** (1 + late**0.3) for i in range(width)]
        powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
        want = {
            **{f"att.x_{x}": [1 - s ** (p * early) for s in share] for x, p in powers.items()},
            "ffn.x_k": [1 - s ** (early**4) for s in share],
            "att.w0": [r + 0.5 + 2.5 * z for r, z in zip(ramp, bend, strict=True)],
            "att.a0": [-0.19 + 0.3 * z + 0.4 * n for z, n in zip(bend, line, strict=True)],
            "att.v0": [0.73 - 0.4 * n for n in line],
            "att.k_k": [0.71 - 0.1 * n for n in line],
            "att.k_a": [1.02] * width,
            "att.r_k": [-0.04] * width,
            "att.ln_x.weight": [((1 + layer) / layers) ** 0.7] * width,
            "att.ln_x.bias": [0.0] * width,
        }
        for name, values in want.items():
            found = tensors[f"blocks.{layer}.{name}"]
            assert found.flatten().tolist() == pytest.approx(values, rel=1e-5, abs=1e-6), name


def test_which_matrices_are_zero():
    tensors = new_model().state_dict()
    zero = {name for name, tensor in tensors.items() if not tensor.any()}
    parts = ("att.w1", "att.a1", "att.v1", "att.g1", "att.output.weight", "ffn.value.weight")
    norms = [f"blocks.{i}.{norm}.bias" for i in range(3) for norm in ("ln1", "ln2", "att.ln_x")]
    wanted = {f"blocks.{i}.{part}" for i in range(3) for part in parts}
    assert zero == wanted | {*norms, "ln_out.bias", "blocks.0.ln0.bias"}


def test_orthogonal_matrices_and_their_gains():
    tensors = new_model().state_dict()
    gains = {"receptance.weight": 1, "key.weight": 0.1, "value.weight": 1}
    gains |= dict.fromkeys(("w2", "a2", "v2", "g2"), 0.1)
    for name, gain in gains.items():
        matrix = tensors[f"blocks.1.att.{name}"].double()
        smaller = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        product = smaller @ smaller.T
        wanted = gain**2 * torch.eye(len(product)).double()
        torch.testing.assert_close(product, wanted, rtol=1e-5, atol=1e-5)
    wide = tensors["blocks.1.ffn.key.weight"].double()
    torch.testing.assert_close(wide.T @ wide, 4 * torch.eye(32).double(), rtol=1e-5, atol=1e-5)


def test_all_but_the_first_block_s_value_share_learns():
    model, tokens = new_model(), token_ids(0, 4, 20, vocab_size=30)
    for _ in range(4):
        model.zero_grad()
        logits, _ = model(tokens)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
    asleep = {n for n, x in model.named_parameters() if x.grad is None or not x.grad.any()}
    unused = set(model.config.architecture.unused(model.config))
    assert asleep == unused == {f"blocks.0.att.v{i}" for i in range(3)}
    sizes = model.config
    learning = sum(x.numel() for x in model.parameters() if x.requires_grad)
    assert sizes.num_trained == learning < sizes.num_parameters


def test_what_decays_and_what_learns_faster():
    model = new_model()
    is_decayed = model.config.architecture.is_weight_decayed
    scales = model.learning_rate_scales()
    optimizer = make_optimizer(
        model.named_parameters(), scales, TrainOptions(weight_decay=0.1), is_decayed
    )
    names = {id(x): n for n, x in model.named_parameters()}
    decayed, fast = set(), set()
    for group in optimizer.param_groups:
        found = {
            names[id(x)].split(".", 2)[-1] for x in group["params"] if "blocks" in names[id(x)]
        }
        decayed |= found if group["weight_decay"] else set()
        fast |= found if group["scale"] == 2 else set()
    matrices = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
    assert decayed == {f"{x}.weight" for x in matrices}
    assert fast == {"att.w0"}


def test_decays_are_never_narrower_than_float32():
    before = {k: v.clone() for k, v in new_model().state_dict().items()}
    model = new_model().half().bfloat16()
    for name, tensor in model.state_dict().items():
        if name.endswith("att.w0"):
            assert torch.equal(tensor, before[name]), "went through the narrow type"
        else:
            assert tensor.dtype == torch.bfloat16, name
    logits, state = model(token_ids(0, 1, 4, vocab_size=30))
    assert logits.dtype == state.tensors["time_shift"].dtype == torch.bfloat16
    assert state.tensors["value_by_key"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_key_of_zero_is_no_nan_in_half_precision(dtype):
    model = new_model()
    with torch.no_grad():
        model.blocks[1].att.key.weight.zero_()
    logits, _ = model.to(dtype)(token_ids(0, 2, 9, vocab_size=30))
    assert logits.isfinite().all()


# ---- sizes --------------------------------------------------------------------------------------

PUBLISHED = {
    "rwkv7-0.1b": 191_084_544,
    "rwkv7-0.4b": 450_834_432,
    "rwkv7-1.5b": 1_527_668_736,
    "rwkv7-2.9b": 2_948_065_280,
    "rwkv7-7.2b": 7_199_932_416,
    "rwkv7-13.3b": 13_270_298_624,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_parameters_of_their_files(name):
    config = published(name)
    assert config.num_parameters == PUBLISHED[name]
    with torch.device("meta"):
        model = Model(config)
    assert sum(x.numel() for x in model.parameters()) == PUBLISHED[name]
    low = [
        n for n in dict(model.named_parameters()) if n[-2:] in ("w1", "w2", "a1", "a2", "g1", "g2")
    ]
    matrices = [x for n, x in model.named_parameters() if n.endswith(".weight") and x.dim() == 2]
    matrices += [model.get_parameter(n) for n in low]
    layers = range(1, config.num_layers)
    matrices += [model.get_parameter(f"blocks.{i}.att.v{j}") for i in layers for j in (1, 2)]
    count = sum(x.numel() for x in matrices) - model.emb.weight.numel()
    assert config.forward_flops_per_token == 2 * count


def test_the_width_is_whole_heads():
    with pytest.raises(
        ValueError, match="the width is 100; it must be a multiple of the head size, 64"
    ):
        ModelConfig(version=7, vocab_size=9, width=100, num_layers=1)
    with pytest.raises(ValueError, match="group_norm_epsilon is 2; it must lie between 0 and 1"):
        ModelConfig(
            version=7, vocab_size=9, width=64, num_layers=1, extras={"group_norm_epsilon": 2}
        )
    assert math.isclose(published("rwkv7-0.1b").extras["group_norm_epsilon"], 64e-5)


def test_the_epsilon_of_the_group_norm_is_data():
    usual = new_model()
    other = ModelConfig.from_dict(
        usual.config.to_dict() | {"extras": {**usual.config.extras, "group_norm_epsilon": 1e-5}}
    )
    again = Model.from_tensors(other, usual.state_dict())
    assert {block.att.ln_x.epsilon for block in again.blocks} == {1e-5}

"""A new model: its starting values, which gradients reach it, what casting and dropout do."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from model_cases import token_ids

from receptance.config import ModelConfig
from receptance.model import Model


def new_model(layers: int = 3, width: int = 12, vocab_size: int = 30, **options) -> Model:
    config = ModelConfig(vocab_size=vocab_size, width=width, num_layers=layers)
    return Model(config, **options)


# ---- starting values ----------------------------------------------------------------------------

SIZES = [(3, 12), (6, 32), (2, 7)]


@pytest.mark.parametrize(("layers", "width"), SIZES)
def test_vectors_follow_the_official_formulas(layers, width):
    """As the official code computes them, number by number; the paper's appendix prints others."""
    tensors = new_model(layers, width).state_dict()
    for layer in range(layers):
        r01, r10 = layer / (layers - 1), 1 - layer / layers
        c, h = [i / width for i in range(width)], [i / (width - 1) for i in range(width)]
        want = {
            "att.time_decay": [-5 + 8 * x ** (0.7 + 1.3 * r01) for x in h],
            "att.time_first": [0.5 * ((i + 1) % 3 - 1) + math.log(0.3) for i in range(width)],
            "att.time_mix_k": [x**r10 for x in c],
            "att.time_mix_v": [x**r10 + 0.3 * r01 for x in c],
            "att.time_mix_r": [x ** (0.5 * r10) for x in c],
            "ffn.time_mix_k": [x**r10 for x in c],
            "ffn.time_mix_r": [x**r10 for x in c],
        }
        for name, values in want.items():
            found = tensors[f"blocks.{layer}.{name}"]
            assert found.flatten().tolist() == pytest.approx(values, rel=1e-6, abs=1e-6), name


def test_the_first_bonuses_are_the_printed_ones():
    bonus = new_model().state_dict()["blocks.0.att.time_first"]
    base = math.log(0.3)
    assert bonus[:4].tolist() == pytest.approx([base, base + 0.5, base - 0.5, base])


@pytest.mark.parametrize(("layers", "width"), SIZES)
def test_which_matrices_are_zero(layers, width):
    tensors = new_model(layers, width).state_dict()
    zero = {name for name, tensor in tensors.items() if not tensor.any()}
    matrices = ("att.key", "att.receptance", "att.output", "ffn.receptance", "ffn.value")
    norms = {f"blocks.{i}.{norm}.bias" for i in range(layers) for norm in ("ln1", "ln2")}
    norms |= {"ln_out.bias", "blocks.0.ln0.bias"}
    wanted = {f"blocks.{i}.{m}.weight" for i in range(layers) for m in matrices}
    assert zero == wanted | norms


@pytest.mark.parametrize(("vocab_size", "width"), [(50, 12), (12, 12), (7, 12)])
def test_orthogonal_matrices_and_their_gains(vocab_size, width):
    tensors = new_model(2, width, vocab_size).state_dict()
    gains = {
        "blocks.1.att.value.weight": 1,
        "blocks.1.ffn.key.weight": 2,  # sqrt(4): it widens four times
        "head.weight": 0.5 * math.sqrt(max(1, vocab_size / width)),
    }
    for name, gain in gains.items():
        matrix = tensors[name].double()
        smaller = matrix if matrix.shape[0] < matrix.shape[1] else matrix.T
        product = smaller @ smaller.T
        torch.testing.assert_close(
            product, gain**2 * torch.eye(len(product)).double(), rtol=1e-5, atol=1e-5
        )


def test_norms_start_as_the_identity_and_the_embedding_tiny():
    model = new_model(vocab_size=1000)
    for name, tensor in model.state_dict().items():
        if ".ln" in name or name.startswith("ln"):
            assert torch.equal(tensor, torch.full_like(tensor, name.endswith("weight"))), name
    embedding = model.emb.weight.detach()
    assert 0.99e-4 < embedding.abs().max() <= 1e-4
    assert float(embedding.mean()) == pytest.approx(0, abs=3e-6)
    assert float(embedding.std()) == pytest.approx(1e-4 / math.sqrt(3), rel=0.05)
    wider = Model(model.config, embedding_bound=6e-4)
    assert 5.9e-4 < wider.emb.weight.abs().max() <= 6e-4


@pytest.mark.parametrize(("layers", "width", "vocab_size"), [(1, 8, 9), (3, 1, 9), (1, 1, 1)])
def test_the_smallest_sizes_do_not_divide_by_zero(layers, width, vocab_size):
    model = new_model(layers, width, vocab_size)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    logits, state = model(token_ids(0, 2, 5, vocab_size=vocab_size))
    assert logits.isfinite().all() and all(x.isfinite().all() for x in state.tensors.values())


def test_the_seed_decides_everything_and_no_global_generator_is_touched():
    before = torch.get_rng_state()
    one, same, other = new_model(seed=7), new_model(seed=7), new_model(seed=8)
    assert torch.equal(torch.get_rng_state(), before)
    tensors = zip(one.state_dict().values(), same.state_dict().values(), strict=True)
    assert all(torch.equal(x, y) for x, y in tensors)
    assert not torch.equal(one.head.weight, other.head.weight)
    assert not torch.equal(one.emb.weight, other.emb.weight)


def test_nothing_is_drawn_for_a_model_without_memory():
    with torch.device("meta"):
        assert {p.device.type for p in new_model().parameters()} == {"meta"}


# ---- which gradients reach a new model ----------------------------------------------------------


def parameters_without_gradient(model: Model, steps: int) -> set[str]:
    """Names whose gradient is exactly 0 after that many steps of plain descent."""
    tokens = token_ids(0, 4, 20, vocab_size=30)
    for step in range(steps + 1):
        model.zero_grad()
        logits, _ = model(tokens)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        with torch.no_grad():
            for parameter in model.parameters() if step < steps else ():
                parameter -= 0.5 * parameter.grad
    names = dict(model.named_parameters())
    return {name for name, parameter in names.items() if not parameter.grad.any()}


def names_of(*parts: str, layers: int = 3) -> set[str]:
    return {f"blocks.{layer}.{part}" for layer in range(layers) for part in parts}


NORMS = [f"ln{i}.{part}" for i in (1, 2) for part in ("weight", "bias")]


def test_at_first_only_the_outputs_of_the_blocks_learn():
    asleep = parameters_without_gradient(new_model(), 0)
    vectors = ["time_decay", "time_first", "time_mix_k", "time_mix_v", "time_mix_r"]
    matrices = ["key.weight", "value.weight", "receptance.weight"]
    channel_mix = ["ffn.key.weight", "ffn.receptance.weight", "ffn.time_mix_k", "ffn.time_mix_r"]
    assert asleep == names_of(*(f"att.{x}" for x in vectors + matrices), *channel_mix, *NORMS)


def test_after_one_step_channel_mixing_learns():
    """With the paper's printed values, where its key matrix starts at 0, it never would."""
    asleep = parameters_without_gradient(new_model(), 1)
    assert asleep == names_of("att.time_mix_k", "att.time_mix_r", "ffn.time_mix_r")


def test_after_two_steps_everything_learns():
    assert parameters_without_gradient(new_model(), 2) == set()


def test_with_the_printed_starting_values_channel_mixing_stays_dead():
    """Why the code of RWKV-LM is followed and not the appendix."""
    model = new_model()
    generator = torch.Generator().manual_seed(0)
    for block in model.blocks:
        torch.nn.init.zeros_(block.ffn.key.weight)
        torch.nn.init.normal_(block.ffn.value.weight, std=2, generator=generator)
    matrices = [f"ffn.{name}.weight" for name in ("key", "value", "receptance")]
    vectors = ["ffn.time_mix_k", "ffn.time_mix_r", "ln2.weight", "ln2.bias"]
    assert parameters_without_gradient(model, 3) == names_of(*matrices, *vectors)


# ---- casting ------------------------------------------------------------------------------------

CASTS = {
    "bfloat16()": lambda model: model.bfloat16(),
    "half()": lambda model: model.half(),
    "to(bfloat16)": lambda model: model.to(torch.bfloat16),
    "to('cpu', float16)": lambda model: model.to("cpu", torch.float16),
    "twice": lambda model: model.half().bfloat16(),
}


@pytest.mark.parametrize("name", CASTS)
def test_decays_are_never_narrower_than_float32(name):
    before = {k: v.clone() for k, v in new_model().state_dict().items()}
    model = CASTS[name](new_model())
    for key, tensor in model.state_dict().items():
        if key.endswith(("time_decay", "time_first")):
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, before[key]), "went through the narrow type"
        else:
            assert tensor.dtype.itemsize == 2, key
    logits, state = model(token_ids(0, 1, 4, vocab_size=30))
    assert logits.dtype == model.emb.weight.dtype
    assert state.tensors["time_shift"].dtype == logits.dtype
    assert state.tensors["numerator"].dtype == torch.float32


def test_casting_up_and_back():
    model = new_model().double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    _, state = model(token_ids(0, 1, 4, vocab_size=30))
    assert {x.dtype for x in state.tensors.values()} == {torch.float64}
    assert {p.dtype for p in model.float().parameters()} == {torch.float32}


def test_a_cast_model_can_go_on_training():
    model = new_model().bfloat16()
    tokens = token_ids(0, 2, 9, vocab_size=30)
    model(tokens)[0].float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == parameter.dtype, name


def test_float32_masters_with_bfloat16_activations():
    model = new_model()
    logits, state = model(token_ids(0, 2, 9, vocab_size=30), dtype=torch.bfloat16)
    assert logits.dtype == state.tensors["channel_shift"].dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


# ---- dropout and learning rates -----------------------------------------------------------------


def test_dropout_acts_after_the_embedding_and_on_both_sums_while_training(monkeypatch):
    calls = []

    def spy(x, p, training):
        calls.append((p, training))
        return real(x, p, training)

    real = F.dropout
    monkeypatch.setattr(F, "dropout", spy)
    model, tokens = new_model(dropout=0.25), token_ids(0, 2, 9, vocab_size=30)
    model.train()(tokens)
    assert calls == [(0.25, True)] * (1 + 2 * 3)
    calls.clear()
    model.eval()(tokens)
    assert not any(training for _, training in calls)


def test_dropout_changes_nothing_in_evaluation():
    with_dropout, without = new_model(dropout=0.5), new_model()
    tokens = token_ids(0, 2, 9, vocab_size=30)
    assert torch.equal(with_dropout.eval()(tokens)[0], without(tokens)[0])
    assert not torch.equal(with_dropout.train()(tokens)[0], without(tokens)[0])


@pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan])
def test_impossible_dropout_is_refused(dropout):
    with pytest.raises(ValueError, match="dropout is"):
        new_model(dropout=dropout)


def test_learning_rate_scales_name_existing_parameters():
    model = new_model()
    scales = model.learning_rate_scales()
    assert scales.keys() == names_of("att.time_decay", "att.time_first")
    assert scales.keys() <= dict(model.named_parameters()).keys()
    assert {scales[name] for name in names_of("att.time_decay")} == {2.0}
    assert {scales[name] for name in names_of("att.time_first")} == {3.0}

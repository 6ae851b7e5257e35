"""transformers' RwkvForCausalLM as an oracle: the same weights, the same numbers.

Its pitfalls, avoided here: with rescale_every > 0 an eval forward rewrites the weights; one token
with a state and more than one row broadcasts rows against each other; a state given in is written
to; training mode returns no state; one layer divides by zero in its own starting values.
"""

from __future__ import annotations

import functools
from unittest import mock

import pytest
import torch
from model_cases import randomize, token_ids
from torch import Tensor

from receptance.config import ModelConfig
from receptance.formats.names_hf import to_hf
from receptance.model import Model
from receptance.ops import available_backends
from receptance.state import State

transformers = pytest.importorskip("transformers")

BOUND = 1e-4
SIZES = {
    # name: (layers, width, vocabulary, feed-forward width or 0, epsilon)
    "1 layer": (1, 8, 11, 0, 1e-5),
    "2 layers": (2, 32, 257, 0, 1e-5),
    "4 layers, narrow feed-forward": (4, 48, 101, 72, 1e-5),
    "6 layers, large epsilon": (6, 96, 313, 0, 1e-3),
}
every_size = pytest.mark.parametrize("name", SIZES)


@functools.cache
def models(name: str):
    """Ours and theirs with the same random weights."""
    layers, width, vocab_size, ffn_width, epsilon = SIZES[name]
    config = ModelConfig(
        vocab_size=vocab_size,
        width=width,
        num_layers=layers,
        ffn_width=ffn_width,
        layer_norm_epsilon=epsilon,
    )
    ours = randomize(Model(config), seed=layers)
    their_config = transformers.RwkvConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=config.ffn_width,
        layer_norm_epsilon=epsilon,
        rescale_every=0,
    )
    with mock.patch.object(transformers.RwkvPreTrainedModel, "_init_weights"):
        theirs = transformers.RwkvForCausalLM(their_config)
    weights = {to_hf(name): tensor.clone() for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(weights)
    return ours, theirs


def their_state(state: State) -> list[Tensor]:
    """Our state in their layout: five times [B,C,L]."""
    order = ("channel_shift", "time_shift", "numerator", "denominator", "exponent")
    return [state.tensors[part].permute(1, 2, 0).contiguous() for part in order]


def our_state(state: list[Tensor], tokens: Tensor) -> State:
    """The other way round."""
    order = ("channel_shift", "time_shift", "numerator", "denominator", "exponent")
    tensors = {n: x.permute(2, 0, 1).clone() for n, x in zip(order, state, strict=True)}
    return State(tensors, torch.full(tokens.shape[:1], tokens.shape[1]))


def assert_close(got, want) -> None:
    torch.testing.assert_close(got, want, rtol=BOUND, atol=BOUND)


@every_size
@pytest.mark.parametrize("backend", available_backends())
def test_logits_loss_and_all_gradients(name, backend):
    ours, theirs = models(name)
    theirs.train()  # the mode without a state, in which their gradients are defined
    tokens = token_ids(0, 3, 45, vocab_size=ours.config.vocab_size)
    try:
        ours.backend = backend
        logits, _ = ours(tokens)
    finally:
        ours.backend = None
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    want = theirs(input_ids=tokens, labels=tokens)
    assert_close(logits, want.logits)
    assert_close(loss, want.loss)

    names, parameters = zip(*ours.named_parameters(), strict=True)
    grads = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    their_parameters = dict(theirs.named_parameters())
    assert {to_hf(name) for name in names} == set(their_parameters)
    wanted = torch.autograd.grad(want.loss, [their_parameters[to_hf(name)] for name in names])
    for name, expected in zip(names, wanted, strict=True):
        assert expected.any(), f"{name}: nothing to compare"
        difference = (grads[name] - expected).abs().max()
        assert difference <= BOUND * max(1, expected.abs().max()), name


@every_size
@torch.no_grad()
def test_after_a_cut_with_the_state(name):
    ours, theirs = models(name)
    theirs.eval()
    tokens = token_ids(1, 3, 30, vocab_size=ours.config.vocab_size)
    _, state = ours(tokens[:, :17])
    first = theirs(input_ids=tokens[:, :17], use_cache=True)
    for got, want in zip(their_state(state), first.state, strict=True):
        assert_close(got, want)
    # Read theirs before it is given back to them: they write into it.
    continued_from_theirs, _ = ours(tokens[:, 17:], our_state(first.state, tokens[:, :17]))
    continued, state = ours(tokens[:, 17:], state)
    second = theirs(input_ids=tokens[:, 17:], state=first.state, use_cache=True)
    assert_close(continued, second.logits)
    assert_close(continued_from_theirs, second.logits)
    for got, want in zip(their_state(state), second.state, strict=True):
        assert_close(got, want)


@every_size
@torch.no_grad()
def test_decoding_token_by_token_at_batch_one(name):
    ours, theirs = models(name)
    theirs.eval()
    tokens = token_ids(2, 1, 12, vocab_size=ours.config.vocab_size)
    state = their = None
    for t in range(12):
        logits, state = ours(tokens[:, t : t + 1], state)
        output = theirs(input_ids=tokens[:, t : t + 1], state=their, use_cache=True)
        their = output.state
        assert_close(logits, output.logits)
    for got, want in zip(their_state(state), their, strict=True):
        assert_close(got, want)

"""The loss through the head against that of all logits at once, whatever the number of parts."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import random_batch, small

from receptance.training import head_loss, objective

PENALTIES = [
    {},
    {"max_logit_penalty": 1e-2},
    {"z_loss": 1e-2},
    {"max_logit_penalty": 3e-2, "z_loss": 2e-2},
]


def draw(dtype: torch.dtype = torch.float32, vocab: int = 100) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(3, 7, 16, generator=generator).to(dtype)
    weight = torch.randn(vocab, 16, generator=generator)
    targets = torch.randint(vocab, (3, 7), generator=generator)
    if dtype == torch.float64:
        weight = weight.double()
    return features.requires_grad_(), weight.requires_grad_(), targets


def reference(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    *,
    total: float | None = None,
    max_logit_penalty: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The definitions, in float64, with all logits."""
    logits = (features.double() @ weight.double().T).flatten(0, 1)
    entropy = F.cross_entropy(logits, targets.flatten(), reduction="none")
    value = entropy + max_logit_penalty / 2 * logits.max(-1).values.square()
    value = value + z_loss * logits.logsumexp(-1).square()
    counts = torch.ones_like(value) if mask is None else mask.flatten().double()
    total = float(counts.sum()) if total is None else total
    return (value * counts).sum() / total, (entropy * counts).sum() / total


@pytest.fixture(params=[1, 300, 3000, 1 << 24])
def _parts(request, monkeypatch) -> None:
    monkeypatch.setattr(objective, "LOGITS_AT_ONCE", request.param)


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("penalties", PENALTIES, ids=lambda x: "+".join(x) or "plain")
@pytest.mark.parametrize("masked", [False, True])
def test_value_and_gradients(penalties, masked):
    features, weight, targets = draw()
    mask = targets % 3 > 0 if masked else None
    found = head_loss(features, weight, targets, mask, **penalties)
    wanted = reference(features, weight, targets, mask, **penalties)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, atol=1e-6, rtol=1e-6)
    gradients = torch.autograd.grad(found[0], (features, weight))
    for one, other in zip(
        gradients, torch.autograd.grad(wanted[0], (features, weight)), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("penalties", PENALTIES, ids=lambda x: "+".join(x) or "plain")
def test_torch_finds_the_same_gradients_by_differences(penalties):
    features, weight, targets = draw(torch.float64, vocab=9)

    def value(x: Tensor, w: Tensor) -> Tensor:
        return head_loss(x, w, targets % 9, targets % 2 == 0, **penalties)[0]

    torch.autograd.gradcheck(value, (features, weight))


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_bfloat16_features_and_an_upstream_scale(scale, fast, monkeypatch):
    """Where products of bfloat16 are fast the gradients' factors are rounded, never the loss."""
    monkeypatch.setattr(objective, "cpu_multiplies_bfloat16", lambda: fast)
    features, weight, targets = draw(torch.bfloat16)
    value, _ = head_loss(features, weight, targets)
    found = torch.autograd.grad(value * scale, (features, weight))
    assert [x.dtype for x in found] == [torch.bfloat16, torch.float32]
    wanted, _ = reference(features.float(), weight, targets)
    torch.testing.assert_close(value.double(), wanted, atol=1e-6, rtol=1e-6)
    for one, other in zip(
        found, torch.autograd.grad(wanted * scale, (features, weight)), strict=True
    ):
        if fast:
            assert (one - other).norm() < 5e-3 * other.norm()
        else:
            torch.testing.assert_close(one, other, atol=1e-6 * scale, rtol=1e-5)


def test_the_penalty_is_the_official_one():
    """RWKV-LM's L2Wrap adds 1e-4 / (B T) times the largest logit to the gradient, where it is."""
    logits = torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets, head = torch.zeros(2, 5, dtype=torch.int64), torch.eye(30)
    found, plain = (
        torch.autograd.grad(head_loss(logits, head, targets, max_logit_penalty=p)[0], logits)[0]
        for p in (1e-4, 0.0)
    )
    largest, place = logits.detach().max(-1, keepdim=True)
    wanted = torch.zeros_like(found).scatter_(-1, place, largest * 1e-4 / (2 * 5))
    torch.testing.assert_close(found - plain, wanted, atol=1e-8, rtol=0)


@given(st.integers(1, 20), st.sampled_from(PENALTIES))
def test_parts_add_up_when_each_divides_by_the_whole(cut, penalties):
    features, weight, targets = draw(torch.float64)
    mask = targets % 4 > 0
    whole = torch.autograd.grad(head_loss(features, weight, targets, mask, **penalties)[0], weight)
    flat = features.flatten(0, 1)[None], targets.flatten()[None], mask.flatten()[None]
    parts = [[x[:, :cut] for x in flat], [x[:, cut:] for x in flat]]
    total = float(mask.sum())
    values = [head_loss(x, weight, t, m, total=total, **penalties)[0] for x, t, m in parts]
    torch.testing.assert_close(torch.autograd.grad(sum(values), weight), whole)


def test_nothing_to_learn_is_zero_and_has_zero_gradients():
    features, weight, targets = draw()
    value, entropy = head_loss(features, weight, targets, torch.zeros(3, 7, dtype=torch.bool))
    assert float(value.detach()) == float(entropy) == 0
    assert all((x == 0).all() for x in torch.autograd.grad(value, (features, weight)))


def test_equal_tokens_among_the_targets_add_up():
    features, weight, _ = draw()
    targets = torch.full((3, 7), 5)
    head_loss(features, weight, targets)[0].backward()
    (wanted,) = torch.autograd.grad(reference(features, weight, targets)[0], weight)
    torch.testing.assert_close(weight.grad, wanted, atol=1e-6, rtol=1e-5)


def test_a_frozen_head_gets_none():
    features, weight, targets = draw()
    head_loss(features, weight.detach(), targets)[0].backward()
    (wanted,) = torch.autograd.grad(reference(features, weight, targets)[0], features)
    torch.testing.assert_close(features.grad, wanted, atol=1e-6, rtol=1e-5)


def test_without_gradients():
    features, weight, targets = draw()
    with torch.no_grad():
        value, _ = head_loss(features, weight, targets)
    assert not value.requires_grad
    assert torch.equal(value, head_loss(features, weight, targets)[0])


def test_extreme_logits_stay_finite():
    features, weight, targets = draw()
    value, _ = head_loss(features * 1e4, weight, targets, max_logit_penalty=1e-4, z_loss=1e-4)
    assert torch.isfinite(value)
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(value, (features, weight)))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        found = function(*arguments, **keywords or {})
        for x in found if isinstance(found, tuple | list) else [found]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return found


def test_the_logits_never_exist_as_a_whole(monkeypatch):
    monkeypatch.setattr(objective, "LOGITS_AT_ONCE", 2000)
    features, weight, targets = draw(vocab=400)
    with Largest() as all_at_once:
        reference(features, weight, targets)[0].backward()
    with Largest() as found:
        head_loss(features, weight, targets, max_logit_penalty=1e-4, z_loss=1e-4)[0].backward()
    assert all_at_once.elements == 21 * 400
    assert found.elements <= weight.numel() < 21 * 400


@given(st.integers(100, 3000), st.sampled_from(PENALTIES))
def test_the_result_does_not_depend_on_how_many_logits_there_are_at_a_time(count, penalties):
    features, weight, targets = draw(torch.float64)
    found = []
    for many in (count, 1 << 24):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(objective, "LOGITS_AT_ONCE", many)
            value, entropy = head_loss(features, weight, targets, **penalties)
        found.append((entropy, value, *torch.autograd.grad(value, (features, weight))))
    torch.testing.assert_close(*found)


def test_a_gpu_has_more_of_them_at_a_time():
    assert objective.logits_at_once("cpu") == objective.LOGITS_AT_ONCE
    assert objective.logits_at_once("cuda") == objective.CUDA_LOGITS_AT_ONCE == 1 << 26


@pytest.mark.parametrize("masked", [False, True])
def test_the_module_is_model_and_loss(masked):
    """With the state in and out, so that a sequence may be cut."""
    model, batch = make_model(), random_batch(masked=masked, reset=True)
    options = small(max_logit_penalty=1e-3, z_loss=1e-3)
    module = objective.Objective(model, options)
    logits, _ = model(batch.inputs, resets=batch.resets)
    wanted = reference(
        logits, torch.eye(256), batch.targets, batch.mask, max_logit_penalty=1e-3, z_loss=1e-3
    )
    value = entropy = torch.zeros(())
    state = None
    for at in (slice(0, 5), slice(5, 13)):
        one, other, state = module(batch.part(time=at), state, float(batch.learned))
        value, entropy = value + one, entropy + other
    torch.testing.assert_close(value.double(), wanted[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(entropy.double(), wanted[1], rtol=1e-5, atol=0)

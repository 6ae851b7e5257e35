"""What a forward pass saves for its backward pass, and that the gradients stay the same."""

import pytest
import torch
from tiny import make_model
from training_cases import Keeping

from receptance.training.recomputing import Recomputing

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def draw(*shape, seed=0, grad=True):
    """Numbers in [0, 1), which gradients are wanted of."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator).requires_grad_(grad)


def gradients(model, tokens, *, watched, resets=None):
    """Features' gradients by parameter, with and without the context."""
    model.zero_grad(set_to_none=True)
    if watched:
        with Recomputing():
            features, _ = model.features(tokens, resets=resets)
    else:
        features, _ = model.features(tokens, resets=resets)
    (features.float() * torch.linspace(-1, 1, features.shape[-1])).sum().backward()
    return features.detach(), {name: x.grad for name, x in model.named_parameters()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_resets", [False, True])
def test_gradients_are_the_same_to_the_bit(dtype, with_resets):
    model = make_model(width=32, layers=3).to(dtype).train()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (3, 17), generator=generator)
    resets = torch.rand(3, 17, generator=generator) < 0.2 if with_resets else None
    plain, wanted = gradients(model, tokens, watched=False, resets=resets)
    features, found = gradients(model, tokens, watched=True, resets=resets)
    assert torch.equal(features, plain)
    for name, grad in wanted.items():
        assert (grad is None) == (found[name] is None)
        assert grad is None or torch.equal(found[name], grad), name


def bytes_saved(function, *, watched):
    """Bytes of the distinct storages that are kept because a backward pass will want them."""
    watching = Keeping(watched)
    with watching:
        out = function()
    assert out.requires_grad
    return watching.nbytes


def test_mixtures_products_and_squares_are_not_saved():
    x, y = (draw(50, 64, seed=seed) for seed in range(2))
    weight = draw(8, 64, seed=2)

    def layer():
        mixed = torch.lerp(x, y, 0.3) @ weight.T
        product = (x * y) @ weight.T
        return mixed + product + torch.relu(x).square() @ weight.T

    inputs = x.nbytes + y.nbytes + weight.nbytes
    assert bytes_saved(layer, watched=True) == inputs + x.nbytes  # and the relu
    assert bytes_saved(layer, watched=False) == inputs + 4 * x.nbytes


def test_what_was_concatenated_is_saved_once():
    first, x = draw(2, 1, 64, grad=False), draw(2, 50, 64)
    share = draw(64, seed=2)

    def shift():
        own = x * 2
        whole = torch.cat([first, own], dim=1)
        return torch.lerp(whole[:, :-1], own, share)

    extra = 2 * 64 * 4
    assert bytes_saved(shift, watched=True) <= x.nbytes + extra + share.nbytes + 4
    assert bytes_saved(shift, watched=False) >= 2 * x.nbytes


def test_an_address_that_is_used_again_is_not_mistaken():
    weight, x = draw(64, 64), draw(64, 64, seed=1)
    with Recomputing():
        torch.lerp(x, x, 0.5)  # freed at once; the next tensor may lie where it was
        other = (x.exp() @ weight).sum()
    other.backward()
    torch.testing.assert_close(weight.grad, x.detach().exp().T @ torch.ones(64, 64))


def test_nothing_is_noted_without_gradients():
    with torch.no_grad(), Recomputing() as context:
        torch.lerp(draw(4), draw(4, seed=1), 0.5)
        assert not context._known


def test_the_context_ends_with_an_error():
    with pytest.raises(ZeroDivisionError), Recomputing() as context:
        raise ZeroDivisionError
    assert not context._known

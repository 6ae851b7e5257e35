"""Recording and patching: the same numbers in both forms, what is written has its effect."""

import functools

import pytest
import torch
from tiny import make_model

from receptance.analysis.hooks import patch, record
from receptance.analysis.places import names

TOKENS = torch.randint(256, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=[4, 6, 7])
def model(request):
    return tiny(request.param)


@functools.cache
def tiny(version):
    extras = {} if version == 4 else {"head_size": 8}
    extras |= {"decay_rank": 3} if version >= 6 else {}
    return make_model(layers=3, version=version, **extras).requires_grad_(False)


def test_both_forms_record_the_same(model):
    with record(model, "**") as whole:
        model(TOKENS)
    with record(model, "**") as steps:
        state = None
        for t in range(12):
            _, state = model(TOKENS[:, t : t + 1], state)
    assert [*whole] == names(model) == [*steps]
    for name in whole:
        assert whole[name].shape[:2] == (3, 12), name
        torch.testing.assert_close(whole[name], steps[name], atol=1e-5, rtol=1e-5, msg=name)
    for field, last in state.tensors.items():
        torch.testing.assert_close(whole.stack(f"state.{field}")[:, :, -1], last)


def test_what_is_recorded_is_what_the_model_computes():
    model = tiny(4)
    with record(model, "**") as cache:
        logits, _ = model(TOKENS)
    block = model.blocks[1]
    assert torch.equal(cache["head"], logits)
    assert torch.equal(cache["emb"], model.emb(TOKENS))
    x, middle = cache["blocks.1.resid_pre"], cache["blocks.1.resid_mid"]
    assert torch.equal(cache["blocks.0.resid_post"], x)
    torch.testing.assert_close(x + cache["blocks.1.att"], middle)
    torch.testing.assert_close(middle + cache["blocks.1.ffn"], cache["blocks.1.resid_post"])
    torch.testing.assert_close(cache["blocks.1.ln1"], block.ln1(x))
    gated = cache["blocks.1.att.receptance"].sigmoid() * cache["blocks.1.att.wkv"]
    torch.testing.assert_close(cache["blocks.1.att.gated"], gated)
    torch.testing.assert_close(cache["blocks.1.ffn.hidden"], cache["blocks.1.ffn.key"].relu() ** 2)
    mixed = cache["blocks.1.att.mix_k"]
    torch.testing.assert_close(cache["blocks.1.att.key"], block.att.key(mixed))


def test_watching_changes_nothing_and_leaves_nothing(model):
    before = {id(m): dict(m.__dict__) for m in model.modules()}
    wanted, end = model(TOKENS)
    with record(model, "**"):
        found, state = model(TOKENS)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for name, tensor in end.tensors.items():
        torch.testing.assert_close(state.tensors[name], tensor, atol=1e-5, rtol=1e-5)
    with pytest.raises(ZeroDivisionError), record(model, "**"), patch(model, "emb", 0.0):
        raise ZeroDivisionError
    assert {id(m): dict(m.__dict__) for m in model.modules()} == before
    assert torch.equal(model(TOKENS)[0], wanted)


def test_contexts_may_end_in_any_order(model):
    first, second = record(model, "blocks.0.att"), record(model, "blocks.0.att")
    one, two = first.__enter__(), second.__enter__()
    model(TOKENS)
    first.__exit__(None, None, None)
    model(TOKENS)
    second.__exit__(None, None, None)
    assert (one["blocks.0.att"].shape[1], two["blocks.0.att"].shape[1]) == (12, 24)
    assert "att" not in model.blocks[0].__dict__


@pytest.mark.parametrize("lengths", [None, torch.tensor([12, 0, 7])])
def test_lengths_and_resets_hold_token_by_token(model, lengths):
    resets = torch.zeros(3, 12, dtype=torch.bool)
    resets[1, 4] = resets[2, 5] = True
    wanted, end = model(TOKENS, lengths=lengths, resets=resets)
    with record(model, "blocks.*.state.*"):
        found, state = model(TOKENS, lengths=lengths, resets=resets)
    real = torch.arange(12) < (torch.full((3,), 12) if lengths is None else lengths)[:, None]
    torch.testing.assert_close(found[real], wanted[real], atol=1e-5, rtol=1e-5)
    for name, tensor in end.tensors.items():
        torch.testing.assert_close(state.tensors[name], tensor, atol=1e-5, rtol=1e-5)


# ---- writing -------------------------------------------------------------------------------------


NAMES = [(version, name) for version in (4, 5.2, 6, 7) for name in names(tiny(version))]


@pytest.mark.parametrize(("version", "name"), NAMES)
def test_a_recording_written_back_is_no_change(version, name):
    """Of every name: the old value changes nothing, another value changes the logits."""
    model = tiny(version)
    with record(model, name) as cache:
        wanted, _ = model(TOKENS)
    with patch(model, name, cache[name], where=range(12)):
        torch.testing.assert_close(model(TOKENS)[0], wanted, atol=1e-5, rtol=1e-5)
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(cache[name].shape[1:], generator=g)
    with patch(model, name, cache[name] + noise, where=[4]):
        found, _ = model(TOKENS)
    torch.testing.assert_close(found[:, :4], wanted[:, :4], atol=1e-5, rtol=1e-5)
    changed = (found - wanted).abs().amax((0, 2)) > 1e-4
    assert bool(changed[5 if ".state." in name else 4 :].any())  # A state acts on later tokens.


def test_the_text_may_be_read_in_pieces(model):
    mask = torch.rand(3, 12, generator=torch.Generator().manual_seed(2)) < 0.4
    for name in ("blocks.1.att.wkv", "blocks.1.state.time_shift", "blocks.0.resid_mid"):
        with record(model, name) as cache:
            model(TOKENS)
        other = torch.randn(cache[name].shape, generator=torch.Generator().manual_seed(1))
        with patch(model, name, other, where=mask), record(model, name) as seen:
            whole, _ = model(TOKENS)
        assert torch.equal(seen[name][mask], other[mask])
        for sizes in ([1] * 12, [5, 7], [3, 0, 9]):
            state, parts = None, []
            with patch(model, name, other, where=mask):
                for piece in TOKENS.split(sizes, dim=1):
                    logits, state = model(piece, state)
                    parts.append(logits)
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


def test_a_patched_text_is_another_text(model):
    """Writing the embedding of other tokens is reading those tokens."""
    other = TOKENS.roll(1, 0)
    wanted, _ = model(other)
    with patch(model, "emb", model.emb(other)):
        assert torch.equal(model(TOKENS)[0], wanted)


def test_a_written_state_is_that_state(model):
    """All fields of all layers, written after token 5, are as if another text had been read."""
    other = TOKENS.roll(1, 0)
    with record(model, "blocks.*.state.*") as cache:
        model(other)
    patches = [patch(model, name, cache[name], where=[5]) for name in cache]
    for context in patches:
        context.__enter__()
    found, _ = model(TOKENS)
    for context in reversed(patches):
        context.__exit__(None, None, None)
    _, state = model(other[:, :6])
    torch.testing.assert_close(found[:, 6:], model(TOKENS[:, 6:], state)[0], atol=1e-5, rtol=1e-5)


def test_readers_see_what_was_written_whoever_came_first(model):
    with record(model, "blocks.0.att") as cache, patch(model, "blocks.0.att", 2.0):
        model(TOKENS)
    assert bool((cache["blocks.0.att"] == 2).all())
    with patch(model, "blocks.0.att", 2.0), record(model, "blocks.0.att") as cache:
        model(TOKENS)
    assert bool((cache["blocks.0.att"] == 2).all())


def test_gradients_reach_what_was_recorded(model):
    tap = torch.zeros(3, 12, 16, requires_grad=True)
    with (
        patch(model, "blocks.1.att.gated", lambda x: x + tap),
        record(model, "blocks.2.ln1", detach=False) as cache,
    ):
        logits, _ = model(TOKENS)
    (grad,) = torch.autograd.grad(logits[:, -1].sum(), tap, retain_graph=True)
    assert bool(grad.any())
    assert cache["blocks.2.ln1"].requires_grad


def test_what_an_adapter_adds_is_seen():
    """Hooks of torch on a module, such as those of LoRA, come before what is recorded."""
    model = tiny(4)
    handle = model.blocks[1].att.key.register_forward_hook(lambda module, given, out: out + 3)
    with record(model, "blocks.1.att.*") as cache:
        model(TOKENS)
    handle.remove()
    mixed = cache["blocks.1.att.mix_k"]
    torch.testing.assert_close(cache["blocks.1.att.key"], model.blocks[1].att.key(mixed) + 3)


# ---- mistakes ------------------------------------------------------------------------------------


def test_names_that_there_are_not(model):
    with pytest.raises(ValueError, match=r"called 'blocks.3.att'; did you mean blocks.\d.att"):
        record(model, "blocks.3.att").__enter__()
    with pytest.raises(ValueError, match=r"nothing in this model is called 'blocks\.att'"):
        patch(model, "blocks.att", 0.0).__enter__()
    with pytest.raises(ValueError, match=r"load the model with receptance\.load"):
        record(object(), "emb").__enter__()
    with record(model, "emb") as cache, pytest.raises(KeyError, match="call the model inside"):
        cache["emb"]
    with pytest.raises(KeyError, match="head was not recorded; these were: emb"):
        cache["head"]


@pytest.mark.parametrize(
    ("change", "where", "message"),
    [
        (torch.zeros(16), [12], "emb was not changed at position 12: the model read 12 tokens"),
        (torch.zeros(3, 5, 16), None, r"emb is \[3, 12, 16\] at position 0"),
        (torch.zeros(3, 5, 16), [6], r"what is to be written is \[3, 5, 16\]"),
        (torch.zeros(17), None, r"what is to be written is \[17\]"),
        (lambda x: x[:1], None, r"what is to be written is \[1, 12, 16\]"),
        (lambda x: None, None, "what is to be written is NoneType"),
        (0.0, torch.ones(2, 12, dtype=torch.bool), "where has 2 rows and the text 3"),
        (0.0, torch.ones(12, dtype=torch.bool), r"where is bools \[12\]; wanted \[B or 1, T\]"),
        (0.0, [-1], r"where is \[-1\]; wanted numbers of positions"),
    ],
)
def test_changes_that_do_not_fit(model, change, where, message):
    with pytest.raises(ValueError, match=message), patch(model, "emb", change, where=where):
        model(TOKENS)
    assert "emb" not in model.__dict__


def test_recomputing_is_refused(model):
    model.recompute = True
    with pytest.raises(ValueError, match=r"set model\.recompute = False"):
        record(model, "emb").__enter__()
    model.recompute = False

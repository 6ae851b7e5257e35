"""The model's door, its two halves, models around existing tensors, and what identifies one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from model_cases import randomize, token_ids

from receptance.config import ModelConfig
from receptance.model import Model
from receptance.state import State

CONFIG = ModelConfig(vocab_size=23, width=8, num_layers=2)


@pytest.fixture(scope="module")
def model() -> Model:
    return randomize(Model(CONFIG)).eval().requires_grad_(False)


def ids(*shape: int) -> torch.Tensor:
    return token_ids(0, *shape, vocab_size=23)


# ---- one call -----------------------------------------------------------------------------------


def test_shapes_of_what_comes_back(model):
    logits, state = model(ids(3, 5))
    assert logits.shape == (3, 5, 23)
    assert state.batch == 3
    assert state.tokens.tolist() == [5, 5, 5]
    assert {x.shape for x in state.tensors.values()} == {(2, 3, 8)}
    assert model(ids(3, 0))[0].shape == (3, 0, 23)


def test_features_are_the_model_without_its_head(model):
    features, state = model.features(ids(2, 5))
    logits, same = model(ids(2, 5))
    assert features.shape == (2, 5, 8)
    assert torch.equal(model.head(features), logits)
    assert all(torch.equal(state.tensors[n], same.tensors[n]) for n in state.tensors)


def test_reading_nothing_leaves_the_state_as_it_was(model):
    _, state = model(ids(2, 5))
    _, same = model(ids(2, 0), state)
    assert torch.equal(same.tokens, state.tokens)
    for name, tensor in state.tensors.items():
        assert torch.equal(same.tensors[name], tensor), name


def test_an_absent_state_is_the_empty_one(model):
    assert torch.equal(model(ids(2, 5), model.empty_state(2))[0], model(ids(2, 5))[0])


def test_tokens_of_a_narrow_integer_type(model):
    assert torch.equal(model(ids(2, 5).int())[0], model(ids(2, 5))[0])


OTHER = Model(ModelConfig(vocab_size=23, width=8, num_layers=3))


def changed(change: Callable[[torch.Tensor], torch.Tensor | None]) -> State:
    """A state of one row in which one tensor is not what it was; None takes it out."""
    state = Model(CONFIG).empty_state()
    numerator = change(state.tensors["numerator"])
    rest = {name: x for name, x in state.tensors.items() if name != "numerator"}
    return State(rest if numerator is None else rest | {"numerator": numerator}, state.tokens)


REFUSED = {
    "tokens without a batch": ((ids(5),), {}, r"tokens are torch.int64 \[5\]; wanted ids \[B,T\]"),
    "tokens that are numbers": ((torch.zeros(1, 5),), {}, "tokens are torch.float32"),
    "tokens that are bytes": ((ids(1, 5).byte(),), {}, "tokens are torch.uint8"),
    "tokens that are bools": ((ids(1, 5).bool(),), {}, "tokens are torch.bool"),
    "a token beyond the vocabulary": (
        (torch.tensor([[0, 23]]),),
        {},
        "token id 23 is out of range; this model knows 0 to 22",
    ),
    "a negative token": ((torch.tensor([[0, -1]]),), {}, "token id -1 is out of range"),
    "a state of another model": (
        (ids(1, 5), OTHER.empty_state()),
        {},
        "a model of 3 layers and width 8; this one has 2 layers and width 8",
    ),
    "a state of other rows": (
        (ids(2, 5), Model(CONFIG).empty_state(3)),
        {},
        r"the state holds 3 rows and tokens 2; select rows with State.rows\(\)",
    ),
    "a state with a part too few": (
        (ids(1, 5), changed(lambda x: None)),
        {},
        r"numerator of the state is none; wanted \[\d, 1, 8\]",
    ),
    "a state with a flat part": (
        (ids(1, 5), changed(lambda x: x[0])),
        {},
        r"numerator of the state is \[1, 8\]; wanted \[\d, 1, 8\]",
    ),
    "a state with a narrow part": (
        (ids(1, 5), changed(lambda x: x[..., :4])),
        {},
        "a model of 2 layers and width 4",
    ),
    "a state with a part of other rows": (
        (ids(1, 5), changed(lambda x: x.repeat(1, 2, 1))),
        {},
        "the state holds 2 rows and tokens 1",
    ),
    "a state elsewhere": (
        (ids(1, 5), changed(lambda x: x.to("meta"))),
        {},
        r"the state is on meta and tokens on cpu; move it with State.to\(\)",
    ),
    "lengths of other rows": (
        (ids(2, 5),),
        {"lengths": torch.tensor([1])},
        r"lengths are torch.int64 \[1\]",
    ),
    "lengths beyond the tokens": (
        (ids(2, 5),),
        {"lengths": torch.tensor([1, 6])},
        "lengths run from 1 to 6; tokens have 5 positions",
    ),
    "negative lengths": (
        (ids(2, 5),),
        {"lengths": torch.tensor([-1, 5])},
        "lengths run from -1 to 5",
    ),
    "lengths that are no integers": (
        (ids(2, 5),),
        {"lengths": torch.tensor([1.0, 2.0])},
        r"lengths are torch.float32 \[2\]",
    ),
    "resets of another shape": (
        (ids(2, 5),),
        {"resets": torch.zeros(2, 4, dtype=torch.bool)},
        r"resets are torch.bool \[2, 4\]; tokens \[2, 5\] want one bool each",
    ),
    "resets that are no bools": (
        (ids(2, 5),),
        {"resets": torch.zeros(2, 5)},
        "resets are torch.float32",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_door_refuses(model, name):
    arguments, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as refusal:
        model(*arguments, **options)
    assert "\n" not in str(refusal.value)


def test_a_named_backend_that_is_not_there_is_refused():
    model = Model(CONFIG)
    model.backend = "triton"
    with pytest.raises(ValueError, match="no wkv4 backend 'triton' on cpu; available: "):
        model(ids(1, 2))


# ---- compiled -----------------------------------------------------------------------------------


def test_compiled_blocks_share_their_programs():
    """The first has a layer norm more; more than 8 of one function torch gives up on."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = randomize(Model(ModelConfig(vocab_size=23, width=8, num_layers=12)))
    model.requires_grad_(False)
    wanted = model(ids(2, 5))[0]
    for block in model.blocks:
        block.compile(backend="eager")
    assert torch.equal(model(ids(2, 5))[0], wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_as_one_graph_with_gradients(dtype):
    model = randomize(Model(CONFIG))

    def loss(tokens):
        logits, _ = model(tokens, dtype=dtype)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())

    tokens, parameters = ids(2, 9), list(model.parameters())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(tokens), parameters) for f in (loss, compiled)]
    torch.testing.assert_close(grads[1], grads[0])


# ---- models around existing tensors -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_from_tensors(model, dtype):
    tensors = model.state_dict()
    built = Model.from_tensors(CONFIG, tensors, dtype=dtype)
    assert not built.training
    for name, tensor in built.state_dict().items():
        exact = dtype is None or name.endswith(("time_decay", "time_first"))
        assert torch.equal(tensor, tensors[name] if exact else tensors[name].to(dtype)), name
    assert built.fingerprint() == model.fingerprint()


def test_from_tensors_keeps_the_dtype_it_finds(model):
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    built = Model.from_tensors(CONFIG, tensors)
    assert built.emb.weight.dtype == torch.float16
    assert built.blocks[0].att.time_decay.dtype == torch.float32


def test_from_tensors_takes_flat_mixes(model):
    tensors = {
        name: tensor.flatten() if "time_mix" in name else tensor
        for name, tensor in model.state_dict().items()
    }
    assert torch.equal(Model.from_tensors(CONFIG, tensors)(ids(1, 4))[0], model(ids(1, 4))[0])


@pytest.mark.parametrize("change", [lambda x: x[None], lambda x: x[..., None], torch.squeeze])
def test_from_tensors_takes_axes_of_size_1_or_their_absence(model, change):
    tensors = {name: change(tensor) for name, tensor in model.state_dict().items()}
    built = Model.from_tensors(CONFIG, tensors)
    for name, tensor in model.state_dict().items():
        assert torch.equal(built.get_parameter(name), tensor), name


@pytest.mark.parametrize("name", ["blocks.1.ffn.key.weight", "emb.weight"])
def test_from_tensors_refuses_a_transposed_matrix(model, name):
    """It has the right number of values, all in wrong places."""
    right = model.state_dict()[name]
    tensors = model.state_dict() | {name: right.t().contiguous()}
    wrong, wanted = (rf"\[{x.shape[0]}, {x.shape[1]}\]" for x in (right.t(), right))
    with pytest.raises(ValueError, match=rf"^{name} is {wrong}; .* want {wanted}$"):
        Model.from_tensors(CONFIG, tensors)


def test_from_tensors_names_what_does_not_fit(model):
    tensors = dict(model.state_dict())
    with pytest.raises(ValueError, match=r"1 unexpected tensors, first \['extra'\]"):
        Model.from_tensors(CONFIG, tensors | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"head.weight is \[23, 7\].*want \[23, 8\]"):
        Model.from_tensors(CONFIG, tensors | {"head.weight": torch.zeros(23, 7)})
    del tensors["head.weight"]
    with pytest.raises(ValueError, match=r"1 tensors are missing, first \['head.weight'\]"):
        Model.from_tensors(CONFIG, tensors)


# ---- fingerprints -------------------------------------------------------------------------------


def test_a_fingerprint_tells_models_apart_and_not_their_types(model):
    assert len(model.fingerprint()) == 64
    assert randomize(Model(CONFIG)).fingerprint() == model.fingerprint()
    assert randomize(Model(CONFIG)).bfloat16().fingerprint() == model.fingerprint()
    for name in ("emb.weight", "blocks.1.att.time_decay", "head.weight"):
        other = randomize(Model(CONFIG))
        with torch.no_grad():
            other.get_parameter(name).view(-1)[0] += 1
        assert other.fingerprint() != model.fingerprint(), name


def test_the_fingerprint_includes_the_sizes(model):
    other = ModelConfig(vocab_size=23, width=8, num_layers=2, layer_norm_epsilon=1e-3)
    changed = Model.from_tensors(other, model.state_dict())
    assert changed.fingerprint() != model.fingerprint()


def test_an_empty_state_has_read_nothing(model):
    state = model.empty_state(4)
    assert isinstance(state, State) and state.batch == 4
    assert state.tokens.tolist() == [0] * 4
    assert not any(state.tensors[n].any() for n in state.tensors if n != "exponent")
    assert model.empty_state(dtype=torch.bfloat16).tensors["time_shift"].dtype == torch.bfloat16
    assert model.empty_state(dtype=torch.bfloat16).tensors["numerator"].dtype == torch.float32

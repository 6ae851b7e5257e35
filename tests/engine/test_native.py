"""The native engine against the torch model with the same weights, and its own exactness."""

import copy
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model, same_bits

from receptance.config import ModelConfig
from receptance.engine import NativeEngine, native_engine
from receptance.engine.native import POSITIONS
from receptance.model import Model
from receptance.ops import native
from receptance.quantize import quantize
from receptance.quantize.packing import FLOATS, Packed, pack

pytestmark = pytest.mark.skipif(not native.is_available(), reason="kernels not built")

KINDS = ["float32", "bfloat16", "float16", "int8", "int4"]
# The odd sizes of every version fill no vector, tile, block or group.
SIZES = [
    ModelConfig(vocab_size=50, width=16, num_layers=2),
    ModelConfig(vocab_size=101, width=33, num_layers=3, ffn_width=77),
    ModelConfig(vocab_size=67, width=160, num_layers=1, ffn_width=300),
    ModelConfig(version=7, vocab_size=50, width=128, num_layers=2, ffn_width=64),
    ModelConfig(
        version=7,
        vocab_size=101,
        width=33,
        num_layers=3,
        ffn_width=77,
        extras={"head_size": 11, "decay_rank": 5, "rate_rank": 70, "value_rank": 17},
    ),
    ModelConfig(
        version=7,
        vocab_size=67,
        width=160,
        num_layers=1,
        ffn_width=300,
        extras={"head_size": 32, "group_norm_epsilon": 1e-5},
    ),
    ModelConfig(version=5.2, vocab_size=71, width=96, num_layers=2, extras={"head_size": 24}),
    ModelConfig(
        version=6,
        vocab_size=67,
        width=128,
        num_layers=2,
        extras={"mix_rank": 8, "decay_rank": 20},
    ),
    ModelConfig(
        version=6,
        vocab_size=61,
        width=72,
        num_layers=1,
        ffn_width=300,
        extras={"head_size": 12, "mix_rank": 5, "group_norm_epsilon": 1e-5},
    ),
]
every_size = pytest.mark.parametrize("config", SIZES, ids=lambda c: f"v{c.version}-C{c.width}")
every_version = pytest.mark.parametrize("version", [4, 6, 7])
# Relative to the size of all logits: after a reset, the norm of a head in RWKV-7 magnifies what is
# almost zero. Integer products are exact, but activations are rounded to 15 bits of the largest
# of 128.
ERRORS = {kind: 4e-4 if kind.startswith("int") else 1e-5 for kind in KINDS}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module", autouse=True)
def _threads_even_for_little_work():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("receptance.engine.native._PRODUCTS_PER_THREAD", 1)
        yield


def random_model(config: ModelConfig) -> Model:
    """Random weights of a trained model's scale: outputs of matrices near one."""
    model = Model(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                inputs = parameter.shape[0 if is_factor(config, name) else 1]
                parameter.copy_(noise / inputs**0.5)
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def is_factor(config: ModelConfig, name: str) -> bool:
    """Whether a tensor is a matrix [in,out] that the engine never quantizes."""
    return name.partition(".")[2].partition(".")[2] in config.architecture.native_factors


def engine_of(model: Model, kind: str, **options: object) -> NativeEngine:
    return native_engine(model.config, dict(model.state_dict()), kind, **options)


def packed(model: Model, kind: str) -> dict[str, Packed]:
    """Its matrices in a type of weights."""
    weights = {
        name: model.get_parameter(name).detach()
        for name in model.config.architecture.layouts(model.config)
    }
    return {
        name: pack(w.to(FLOATS[kind]) if kind in FLOATS else quantize(w, kind), layout)
        for (name, layout), w in zip(
            model.config.architecture.layouts(model.config).items(), weights.values(), strict=True
        )
    }


def rounded(model: Model, kind: str) -> Model:
    """A float32 model with the weights that the engine has."""
    model = copy.deepcopy(model)
    for name in model.config.architecture.layouts(model.config):
        weight = model.get_parameter(name)
        narrow = (
            weight.to(FLOATS[kind]).float()
            if kind in FLOATS
            else quantize(weight.detach(), kind).dequantize()
        )
        weight.data = narrow
    for name, weight in model.named_parameters():
        if is_factor(model.config, name):
            weight.data = weight.detach().to(FLOATS.get(kind, torch.float16)).float()
    return model


def tokens(config: ModelConfig, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, shape, generator=generator)


# ---- the model ----------------------------------------------------------------------------------


@every_kind
@every_size
@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_equals_the_torch_model(kind, config, instruction_set):
    model = random_model(config)
    engine = NativeEngine(
        config, packed(model, kind), model.state_dict(), "", instruction_set=instruction_set
    )
    ids, lengths = tokens(config, 3, 21), torch.tensor([21, 0, 8])
    resets = torch.rand(3, 21, generator=torch.Generator().manual_seed(1)) < 0.1
    with torch.no_grad():
        wanted, wanted_state = rounded(model, kind)(ids, lengths=lengths, resets=resets)
    logits, state = engine(ids, lengths=lengths, resets=resets)
    real = torch.arange(21) < lengths[:, None]
    assert relative_error(logits[real], wanted[real]) < ERRORS[kind]
    for name, tensor in state.tensors.items():
        error = (tensor - wanted_state.tensors[name]).abs() / (1 + wanted_state.tensors[name].abs())
        # States of RWKV-5 and 6 add up products of two numbers, each made of rounded activations.
        assert error.max() < 2 * ERRORS[kind], name
    assert state.tokens.tolist() == [21, 0, 8]


def test_every_float16_is_widened_as_torch_does():
    everything = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = everything[everything.isfinite()].unflatten(0, (-1, 16)).contiguous()
    config = ModelConfig(vocab_size=len(finite), width=16, num_layers=1)
    for instruction_set in native.instruction_sets():
        model = random_model(config)
        matrices = {
            name: pack((finite if name == "head.weight" else w.half()).contiguous(), layout)
            for name, layout in config.architecture.layouts(config).items()
            for w in [model.get_parameter(name).detach()]
        }
        engine = NativeEngine(
            config, matrices, model.state_dict(), "", instruction_set=instruction_set
        )
        assert torch.equal(engine.head(torch.eye(16)), finite.float().T)


@every_version
def test_tokens_may_lie_apart_in_memory(version):
    model = make_model(version=version)
    engine, ids = engine_of(model, "float32"), tokens(model.config, 4, 6)
    for part in (ids[:, 2:3], ids[1:2, ::2], ids.T[:1], ids.T[::2]):
        assert torch.equal(engine(part)[0], engine(part.contiguous().clone())[0])


@every_version
def test_states_go_from_one_engine_to_the_other(version):
    model = make_model(version=version)
    engine = engine_of(model, "float32")
    ids = tokens(model.config, 2, 12)
    with torch.no_grad():
        wanted, _ = model(ids)
        _, of_model = model(ids[:, :5])
        _, of_engine = engine(ids[:, :5])
        assert of_engine.tensors.keys() == of_model.tensors.keys()
        torch.testing.assert_close(engine(ids[:, 5:], of_model)[0], wanted[:, 5:])
        torch.testing.assert_close(model(ids[:, 5:], of_engine)[0], wanted[:, 5:])
    assert engine.fingerprint() == model.fingerprint()


@every_kind
@pytest.mark.parametrize("where", ["ln1", "ln2"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@every_version
def test_what_is_not_finite_is_not_hidden(kind, version, where, value):
    model = make_model(version=version)
    with torch.no_grad():
        model.get_parameter(f"blocks.1.{where}.bias")[0] = value
    ids = tokens(model.config, 1, 9)
    assert not engine_of(model, kind)(ids)[0].isfinite().any()
    assert not engine_of(model, kind)(ids[:, :1])[0].isfinite().any()


@every_kind
@every_size
def test_a_row_that_is_not_finite_harms_no_other(kind, config):
    engine, ids = engine_of(random_model(config), kind, threads=1), tokens(config, 2, 6)
    wanted, state = engine(ids)
    state.tensors["time_shift"][0, 0] = torch.nan
    _, clean = engine(ids)
    healthy = engine(ids, clean)[0]
    found = engine(ids, state)[0]
    assert found[0].isnan().all()
    assert torch.equal(found[1], healthy[1])
    for rows in (1, 2):
        assert torch.equal(engine(ids[:rows])[0], wanted[:rows])


def test_tensors_that_no_model_uses_change_nothing():
    model = make_model(version=7)
    engine, ids = engine_of(model, "float32"), tokens(model.config, 1, 9)
    with torch.no_grad():
        for name in model.config.architecture.unused(model.config):
            model.get_parameter(name).fill_(torch.nan)
    assert torch.equal(engine_of(model, "float32")(ids)[0], engine(ids)[0])


def test_a_head_that_is_not_finite_harms_no_other_row():
    """Heads whose state is padded share the memory that they are padded in."""
    model = make_model(version=7, width=33, head_size=11)
    engine, ids = engine_of(model, "float32", threads=1), tokens(model.config, 2, 3)
    _, state = engine(ids)
    wanted, _ = engine(ids, state)
    state.tensors["value_by_key"][0, 0, 0, 0, 0] = torch.inf
    found, _ = engine(ids, state)
    assert not found[0].isfinite().any()
    assert torch.equal(found[1], wanted[1])


def test_an_integer_engine_holds_factors_of_low_rank_as_float16():
    model = make_model(version=7)
    small, large = (engine_of(model, kind).weight_bytes for kind in ("float16", "int8"))
    factors = [x for name, x in model.named_parameters() if is_factor(model.config, name)]
    assert len(factors) == 16
    matrices = {kind: sum(m.nbytes for m in packed(model, kind).values()) for kind in KINDS}
    assert small - matrices["float16"] == large - matrices["int8"]


# ---- the law, to the bit ------------------------------------------------------------------------


@every_kind
@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=4), rows=st.integers(1, 17), data=st.data())
def test_company_cuts_padding_and_threads_change_no_bit(kind, cuts, rows, data):
    config = SIZES[data.draw(st.integers(0, len(SIZES) - 1))]
    model = random_model(config)
    ids, at = tokens(config, rows, 40), data.draw(st.integers(0, rows - 1))
    instructions = data.draw(st.sampled_from(native.instruction_sets()))
    parts = config, packed(model, kind), model.state_dict(), ""
    alone = NativeEngine(*parts, threads=1, instruction_set=instructions)
    wanted, wanted_state = alone(ids[at : at + 1])

    threads = data.draw(st.integers(1, 6))
    engine = NativeEngine(*parts, threads=threads, instruction_set=instructions)
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, 40), min_size=rows, max_size=rows)))
    lengths[at] = 40
    logits, state, borders = [], None, [0, *sorted(cuts), 40]
    for start, stop in itertools.pairwise(borders):
        inside = (lengths - start).clamp(0, stop - start)
        piece, state = engine(ids[:, start:stop], state, lengths=inside)
        logits.append(piece[at])
    assert torch.equal(torch.cat(logits), wanted[0])
    assert same_bits(state.rows(at).tensors, wanted_state.tensors)


@every_kind
@every_size
def test_instruction_sets_that_fuse_multiply_and_add_give_the_same_bits(kind, config):
    sets = [name for name in native.instruction_sets() if name != "portable"]
    if len(sets) < 2:
        pytest.skip(f"this processor has one of them: {sets}")
    model, ids = random_model(config), tokens(config, 7, 5)
    parts = config, packed(model, kind), model.state_dict(), ""
    found = [NativeEngine(*parts, instruction_set=name) for name in sets]
    for rows, length in [(1, 1), (2, 1), (4, 1), (1, 5), (3, 5), (7, 5)]:
        first, *others = [engine(ids[:rows, :length]) for engine in found]
        for logits, state in others:
            assert torch.equal(logits, first[0])
            assert same_bits(state.tensors, first[1].tensors)


@every_kind
@every_version
def test_a_long_prompt_is_read_in_pieces(kind, version):
    config = next(sizes for sizes in SIZES if sizes.version == version)
    engine = engine_of(random_model(config), kind)
    ids = tokens(config, 1, 2 * POSITIONS + 7)
    whole, state = engine(ids)
    _, before = engine(ids[:, :-1])
    last, after = engine(ids[:, -1:], before)
    assert torch.equal(last[0, -1], whole[0, -1])
    assert same_bits(after.tensors, state.tensors)
    many, _ = engine(ids[:, : POSITIONS + 3].expand(3, -1))
    assert torch.equal(many[2], whole[0, : POSITIONS + 3])


# ---- what relu^2 zeroes -------------------------------------------------------------------------


@every_kind
@every_version
def test_zero_activations_are_skipped_and_counted(kind, version):
    config = ModelConfig(version=version, vocab_size=40, width=32, num_layers=1)
    model = rounded(random_model(config), kind)
    engine, ids = engine_of(model, kind), tokens(config, 2, 9)
    zeros = []
    model.get_submodule("blocks.0.ffn.value").register_forward_pre_hook(
        lambda _, inputs: zeros.append((inputs[0] == 0).float().mean().item())
    )
    with torch.no_grad():
        model(ids)
    engine(ids)
    assert 0.2 < engine.skipped < 0.8
    assert engine.skipped == pytest.approx(zeros[0], abs=1e-6)


@every_kind
@every_version
def test_weights_of_zero_activations_change_nothing(kind, version):
    """Inputs of ffn.value that never fire may hold anything."""
    config = ModelConfig(version=version, vocab_size=40, width=32, num_layers=1)
    model = random_model(config)
    ids = tokens(config, 1, 9)
    with torch.no_grad():
        model.get_parameter("blocks.0.ffn.key.weight")[5].zero_()
        clean = engine_of(model, kind)
    matrices = packed(model, kind)
    matrices["blocks.0.ffn.value.weight"].data[5].fill_(torch.nan if kind in FLOATS else 1)
    engine = NativeEngine(config, matrices, model.state_dict(), "")
    for start in range(9):  # few positions at a time are not widened together
        one = ids[:, start : start + 1]
        assert torch.equal(engine(one)[0], clean(one)[0])
    assert torch.equal(engine(ids)[0], clean(ids)[0])


@every_kind
@every_version
def test_more_inputs_than_are_listed_at_once(kind, version):
    """ffn.value's nonzero inputs are found kListed at a time (sparse.h)."""
    config = ModelConfig(version=version, vocab_size=40, width=32, num_layers=1, ffn_width=4100)
    model, ids = random_model(config), tokens(config, 2, 6)
    with torch.no_grad():
        wanted = rounded(model, kind)(ids)[0]
    engine = engine_of(model, kind)
    found = engine(ids)[0]
    assert relative_error(found, wanted) < ERRORS[kind]
    assert torch.equal(engine(ids[:, :1])[0], found[:, :1])


# ---- what is refused ----------------------------------------------------------------------------


def test_calls_that_do_not_fit_are_refused():
    model = make_model()
    engine = engine_of(model, "int8")
    _, state = engine(tokens(model.config, 2, 3))
    for wrong, message in [
        ((torch.tensor([[256]]),), "out of range"),
        ((torch.tensor([[-1]]),), "out of range"),
        ((torch.zeros(1, 1),), "wanted ids"),
        (
            (torch.zeros(1, 1, dtype=torch.int64, device="meta"),),
            "are on meta; the native",
        ),
        ((torch.tensor([[1]]), state), "rows"),
        (
            (
                torch.tensor([[1], [2]]),
                engine_of(make_model(width=32), "int8")(torch.ones(2, 1).long())[1],
            ),
            "width",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            engine(*wrong)
    with pytest.raises(ValueError, match="lengths"):
        engine(torch.tensor([[1]]), lengths=torch.tensor([2]))


@pytest.mark.parametrize("shape", [(1, 2, 32), (2, 15), (8, 160), ()])
def test_features_of_another_width_are_refused(shape):
    engine = engine_of(make_model(), "int8")
    with pytest.raises(ValueError, match=r"wanted \[...,16\] on cpu"):
        engine.head(torch.ones(shape))
    with pytest.raises(ValueError, match="on meta"):
        engine.head(torch.ones(1, 16, device="meta"))


@every_version
def test_threads_may_share_an_engine(version):
    """One has the kernels at a time; what each gets is what it would have got alone."""
    engine = engine_of(make_model(version=version), "int8")
    ids = [tokens(engine.config, 1, length) for length in (40, 300)]
    wanted = [engine(x)[0] for x in ids]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: engine(ids[n % 2])[0], range(200)))
    assert all(torch.equal(one, wanted[n % 2]) for n, one in enumerate(found))


@every_version
def test_no_tokens_leave_the_state_as_it_is(version):
    model = make_model(version=version)
    engine = engine_of(model, "int4")
    _, state = engine(tokens(model.config, 2, 3))
    logits, after = engine(torch.empty(2, 0, dtype=torch.int64), state)
    assert logits.shape == (2, 0, 256)
    assert same_bits(after.tensors, state.tensors)
    assert engine.head(torch.empty(0, 16)).shape == (0, 256)


# Each pair takes the same number of bytes in the workspace and divides them differently.
@pytest.mark.parametrize(
    ("width", "first", "second"), [(96, (18, 13), (2, 21)), (64, (49, 1), (1, 53))]
)
@pytest.mark.parametrize("kind", ["int8", "int4"])
@every_version
def test_another_division_of_the_workspace_starts_from_zeros(kind, version, width, first, second):
    extras = {"head_size": 12} if version > 4 and width % 12 == 0 else {}
    model = random_model(
        ModelConfig(version=version, vocab_size=50, width=width, num_layers=1, extras=extras)
    )
    used, fresh = engine_of(model, kind), engine_of(model, kind)
    generator = torch.Generator().manual_seed(0)
    (positions, used.threads), (later, fresh.threads) = first, second
    used.features(torch.randint(50, (1, positions), generator=generator))
    used.threads = fresh.threads
    tokens = torch.randint(50, (1, later), generator=generator)
    (got, got_state), (want, want_state) = used.features(tokens), fresh.features(tokens)
    assert torch.equal(got, want)
    assert same_bits(got_state.tensors, want_state.tensors)


# ---- threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "given"), [(None, 2), (5, 5)])
def test_threads_are_no_more_than_the_cpus_unless_asked_for(monkeypatch, threads, given):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr("receptance.ops.threads.available_cpus", lambda: 2)
    engine = engine_of(make_model(), "float32")
    engine.threads = threads
    assert engine._num_threads(1 << 30) == given


# ---- what the kernels refuse --------------------------------------------------------------------

MATRIX = (0, 1, 1, 0, 0, 0)
# For every native class: the vectors and matrices of a layer, its own numbers, and the addresses of
# a pass.
CLASSES = [
    ("Rwkv4", 11, 7, [], 14),
    ("Rwkv5", 14, 8, [1, 1e-5], 10),
    ("Rwkv6", 16, 16, [1, 1e-5], 10),
    ("Rwkv7", 19, 14, [1, 1e-5], 10),
]
every_class = pytest.mark.parametrize(
    ("name", "vectors", "matrices", "numbers", "addresses"), CLASSES, ids=lambda x: str(x)
)


def kernels(name: str, numbers: list[float], vectors: int, matrices: int):
    weights = [0] * vectors, [MATRIX] * matrices
    return getattr(native.library(), name)(1, 1, 1, 1e-5, 1e-5, numbers, *weights, "")


@every_class
def test_the_kernels_refuse_another_number_of_weights(name, vectors, matrices, numbers, addresses):
    wanted = f"4 and {vectors} per layer.*2 and {matrices} per layer"
    for more, others in [(0, 1), (-1, 0), (1, 0), (0, -1), (-vectors, -matrices - 2)]:
        found = 4 + vectors + more, 2 + matrices + others
        said = f"was given {found[0]} vectors and {found[1]} matrices"
        with pytest.raises(ValueError, match=f"{wanted}.*{said}"):
            kernels(name, numbers, *found)
    kernels(name, numbers, 4 + vectors, 2 + matrices)


@every_class
def test_the_kernels_refuse_other_numbers(name, vectors, matrices, numbers, addresses):
    with pytest.raises(ValueError, match=f"{name} takes {len(numbers)} numbers and was given 3"):
        kernels(name, [1, 1, 1], 4, 2)


@every_class
def test_the_kernels_refuse_another_number_of_addresses(
    name, vectors, matrices, numbers, addresses
):
    empty = kernels(name, numbers, 4, 2)
    for count in (0, addresses - 1, addresses + 1):
        with pytest.raises(ValueError, match=f"takes {addresses} addresses and was given {count}"):
            empty.features(1, 1, [0] * count, 1)

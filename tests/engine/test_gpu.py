"""The engine for GPUs against the torch model, and what a recorded step must not disturb."""

import contextlib
import dataclasses
import random
from types import SimpleNamespace

import pytest
import torch
from gpu_cases import (
    DEVICE,
    EXACT,
    KINDS,
    LARGE,
    ON_GPU,
    ROUNDING,
    TORCH,
    assert_near,
    engine_of,
    every_kind,
    fake_graph,
    rounded,
    tokens,
)
from tiny import make_model, same_bits

from receptance.config import ModelConfig
from receptance.engine import gpu, gpu_weights, load, native_engine
from receptance.engine.gpu import GpuEngine
from receptance.inference.generation import generate
from receptance.inference.measure import random_tensors
from receptance.model import Model
from receptance.ops import native
from receptance.quantize.weights import quantize_tensors
from receptance.state import State
from receptance.storage.checkpoint import save
from receptance.storage.quantized import About, dequantized_tensors, read_quantized, write_quantized
from receptance.tokenizer import ByteTokenizer

CONFIG = ModelConfig(vocab_size=64, width=16, num_layers=2)
# No vector, tile or group is full.
ODD = ModelConfig(vocab_size=20, width=33, num_layers=2, ffn_width=77)


def trained(config: ModelConfig = CONFIG) -> Model:
    """Of a trained model's scale: rounding is not blown up from layer to layer."""
    return Model.from_tensors(config, random_tensors(config))


def assert_same_state(found: State, wanted: State, limit: float) -> None:
    assert found.tokens.tolist() == wanted.tokens.tolist()
    assert found.tensors.keys() == wanted.tensors.keys()
    for name, tensor in wanted.tensors.items():
        assert_near(found.tensors[name], tensor, limit)


# ---- the model ----------------------------------------------------------------------------------


@pytest.mark.slow
@every_kind
@torch.no_grad()
def test_one_row_step_by_step_equals_the_torch_model(kind):
    """One row is multiplied in float32, whatever the weights."""
    model = trained(dataclasses.replace(ODD, num_layers=1))
    engine, ids = engine_of(model, kind), tokens(ODD, 1, 2)
    wanted, after = rounded(model, kind)(ids)
    state, logits = None, []
    for token in ids.to(DEVICE).split(1, dim=1):
        piece, state = engine(token, state)
        logits.append(piece)
    assert_near(torch.cat(logits, dim=1), wanted, EXACT)
    assert_same_state(state, after, EXACT)


@every_kind
@pytest.mark.parametrize("tiles", [LARGE, TORCH], ids=["triton", "torch"])
@torch.no_grad()
def test_a_batch_step_by_step_equals_the_torch_model(kind, tiles):
    model = trained()
    engine, ids = engine_of(model, kind, tiles=tiles), tokens(CONFIG, 3, 2)
    wanted, after = rounded(model, kind)(ids)
    first, state = engine(ids[:, :1].to(DEVICE))
    second, state = engine(ids[:, 1:].to(DEVICE), state)
    limit = EXACT if tiles is LARGE and not ON_GPU else ROUNDING[kind]
    assert_near(torch.cat([first, second], dim=1), wanted, limit)
    assert_same_state(state, after, limit)


@every_kind
@torch.no_grad()
def test_whole_passes_equal_the_torch_model(kind, monkeypatch):
    monkeypatch.setattr(gpu, "POSITIONS", 18)  # in pieces of 6
    model = trained(ODD)
    ids, lengths = tokens(ODD, 3, 21), torch.tensor([21, 0, 8])
    resets = torch.rand(3, 21, generator=torch.Generator().manual_seed(1)) < 0.1
    wanted, after = rounded(model, kind)(ids, lengths=lengths, resets=resets)
    arguments = {"lengths": lengths.to(DEVICE), "resets": resets.to(DEVICE)}
    logits, state = engine_of(model, kind)(ids.to(DEVICE), **arguments)
    for row, length in enumerate(lengths):
        if length:
            assert_near(logits[row, :length], wanted[row, :length], ROUNDING[kind])
    assert_same_state(state, after, ROUNDING[kind])


@torch.no_grad()
def test_a_prompt_and_steps_equal_the_whole():
    model = make_model(64)
    engine, ids = engine_of(model, "float32"), tokens(CONFIG, 2, 12).to(DEVICE)
    whole, after = engine(ids)
    logits, state = engine(ids[:, :7])
    pieces = [logits]
    for place in range(7, 12):
        logits, state = engine(ids[:, place : place + 1], state)
        pieces.append(logits)
    assert_near(torch.cat(pieces, dim=1), whole, EXACT)
    assert_same_state(state, after, EXACT)


@pytest.mark.slow
@torch.no_grad()
def test_any_sequence_of_calls_equals_the_native_engine():
    """Rows come, go, are doubled and read on, by one token or several."""
    model = make_model(64)
    other = native_engine(CONFIG, dict(model.state_dict())) if native.is_available() else model
    engine, choose = engine_of(model, "float32", tiles=TORCH), random.Random(0)
    ours: State | None = None
    theirs: State | None = None
    rows = 1
    for turn in range(16):
        ids = tokens(CONFIG, rows, choose.choice([1, 1, 1, 3]), seed=turn)
        found, ours = engine(ids.to(DEVICE), ours)
        wanted, theirs = other(ids, theirs)
        assert_near(found, wanted, EXACT)
        index = [choose.randrange(rows) for _ in range(choose.randint(1, 5))]
        ours, theirs, rows = ours.rows(index), theirs.rows(index), len(index)
    assert_same_state(ours, theirs, EXACT)


@torch.no_grad()
def test_states_go_from_one_engine_to_the_other():
    model = make_model(64)
    engine, ids = engine_of(model, "float32"), tokens(CONFIG, 2, 5)
    wanted, _ = model(ids)
    _, of_model = model(ids[:, :4])
    _, of_engine = engine(ids[:, :4].to(DEVICE))
    assert_near(engine(ids[:, 4:].to(DEVICE), of_model.to(DEVICE))[0], wanted[:, 4:], EXACT)
    assert_near(model(ids[:, 4:], of_engine.to("cpu"))[0], wanted[:, 4:], EXACT)
    assert engine.fingerprint() == model.fingerprint()


# ---- what a recorded step must not disturb ------------------------------------------------------


def small_engine(**options: object) -> GpuEngine:
    return engine_of(make_model(64, layers=1), "float32", tiles=TORCH, **options)


def step(engine: GpuEngine, rows: int, state: State | None = None) -> tuple[torch.Tensor, State]:
    return engine(tokens(CONFIG, rows, 1).to(DEVICE), state)


def test_a_recording_serves_all_batches_up_to_its_size():
    recorded = []

    def capture(run):
        recorded.append(run)
        return fake_graph(run) if not ON_GPU else gpu.cuda_graph(run)

    engine = small_engine(capture=capture)
    for rows, count in [(1, 1), (3, 2), (4, 2), (1, 2), (2, 3), (5, 4)]:
        step(engine, rows)
        assert len(recorded) == count


def test_a_recording_is_made_and_replayed_on_the_engines_device(monkeypatch):
    """torch's own stream for recordings belongs to the device of whoever recorded first."""
    calls: list[object] = []
    stream = SimpleNamespace(wait_stream=lambda _: None)
    recording = SimpleNamespace(replay=lambda: calls.append("replay"))

    @contextlib.contextmanager
    def noted(name, *args, **options):
        calls.append((name, *args, *options.items()))
        yield

    cuda = SimpleNamespace(
        Stream=lambda: stream,
        current_stream=lambda: SimpleNamespace(wait_stream=lambda _: None),
        CUDAGraph=lambda: recording,
        stream=lambda *args: noted("stream", *args),
        graph=lambda *args, **options: noted("graph", *args, **options),
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    gpu.cuda_graph(lambda: calls.append("run"))()
    begun = "graph", recording, ("stream", stream), ("capture_error_mode", "thread_local")
    assert calls == [("stream", stream), "run", begun, "run", "replay"]


def test_states_are_values():
    engine = small_engine()
    _, before = step(engine, 3)
    copies = {name: x.clone() for name, x in before.tensors.items()}
    features, after = engine.features(tokens(CONFIG, 3, 1, seed=1).to(DEVICE), before)
    kept = {name: x.clone() for name, x in after.tensors.items()}, features.clone()
    for rows in (3, 4, 5):  # another bucket is recorded in between
        step(engine, rows)
    assert same_bits(before.tensors, copies)
    assert same_bits(after.tensors, kept[0])
    assert torch.equal(features, kept[1])


def test_recording_a_step_does_not_advance_it():
    engine = small_engine()
    first = step(engine, 2)
    assert engine.device == first[0].device  # with its number
    again = step(engine, 2)
    assert torch.equal(first[0], again[0])
    assert same_bits(first[1].tensors, again[1].tensors)


def test_rows_that_fill_up_a_recording_are_harmless():
    engine = small_engine()
    wanted, _ = step(engine, 3)
    buffers, _ = engine._graphs[4]
    buffers.state.fill_(torch.nan)
    buffers.tokens.fill_(-1)
    assert torch.equal(step(engine, 3)[0], wanted)


def test_states_of_any_origin_are_read():
    """Joined tensors are copied at once, others one by one: the same numbers."""
    engine = small_engine()
    _, state = step(engine, 2)
    apart = State({name: x.clone() for name, x in state.tensors.items()}, state.tokens)
    wide = State({name: x.double() for name, x in state.tensors.items()}, state.tokens)
    wanted, _ = step(engine, 2, state)
    for other in (apart, wide, State.cat([state.rows(0), state.rows(1)])):
        assert torch.equal(step(engine, 2, other)[0], wanted)
    assert_near(
        step(engine, 1, state.rows(slice(1, 2)))[0][0], step(engine, 1, apart.rows(1))[0][0], 1e-7
    )


# ---- the rest of an engine ----------------------------------------------------------------------


@torch.no_grad()
def test_rows_without_a_state_begin_in_the_initial_one():
    model, ids = make_model(64), tokens(CONFIG, 3, 1)
    _, initial = model(tokens(CONFIG, 1, 4, seed=3))
    engine = engine_of(model, "float32", initial=initial)
    assert_near(engine(ids.to(DEVICE))[0], model(ids, initial.rows([0, 0, 0]))[0], EXACT)
    two = ids.expand(3, 2)
    assert_near(engine(two.to(DEVICE))[0], model(two, initial.rows([0, 0, 0]))[0], EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4"])
@torch.no_grad()
def test_a_quantized_directory_is_run_as_it_is(kind, tmp_path):
    model = trained(ModelConfig(vocab_size=256, width=17, num_layers=1))
    group = 128 if kind == "int8" else 32
    about = About(kind=kind, group=group, source=model.fingerprint())
    weights = quantize_tensors(model.state_dict(), kind, group)
    write_quantized(tmp_path / "q", model.config, ByteTokenizer(), about, weights)
    found = read_quantized(tmp_path / "q")
    options = {"device": DEVICE, "tiles": LARGE, "capture": None if ON_GPU else fake_graph}
    engine = GpuEngine(found.config, found.matrices, found.vectors, found.about.source, **options)
    exact = Model.from_tensors(model.config, dequantized_tensors(found))
    ids = tokens(model.config, 1, 1)
    assert_near(engine(ids.to(DEVICE))[0], exact(ids)[0], EXACT)
    assert engine.fingerprint() == model.fingerprint()


@torch.no_grad()
def test_generation_runs_on_it():
    model = make_model()
    options = {"max_tokens": 4, "temperature": 0}
    prompts = ["one", "another", "x"]
    wanted = generate(model, ByteTokenizer(), prompts, **options)
    assert generate(engine_of(model, "float32"), ByteTokenizer(), prompts, **options) == wanted


def test_memory_is_that_of_the_weights():
    config = ModelConfig(vocab_size=64, width=128, num_layers=1)
    model = trained(config)
    vectors = sum(x.numel() for x in model.parameters() if x.dim() != 2)
    matrices = config.num_parameters - vectors
    bits = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8.125, "int4": 4.5}
    for kind in KINDS:
        engine = engine_of(model, kind)
        assert engine.weight_bytes == matrices * bits[kind] / 8 + vectors * 4
        assert engine.weight_bytes - engine.bytes_per_token == 64 * 128 * bits[kind] / 8


def test_features_of_another_width_are_refused():
    engine = engine_of(trained(), "int8")
    with pytest.raises(ValueError, match=r"wanted \[...,16\] on"):
        engine.head(torch.ones(1, 2, 32, device=DEVICE))


def test_calls_that_do_not_fit_are_refused():
    engine = small_engine()
    _, state = step(engine, 2)
    with pytest.raises(ValueError, match="rows"):
        step(engine, 1, state)
    with pytest.raises(ValueError, match="lengths"):
        engine(tokens(CONFIG, 1, 1).to(DEVICE), lengths=torch.ones(2).long().to(DEVICE))
    assert engine.head(torch.empty(0, 16, device=DEVICE)).shape == (0, 64)


def test_rows_beyond_the_largest_recording_are_read_like_a_text(monkeypatch):
    monkeypatch.setattr(gpu, "LARGEST_BATCH", 2)
    engine = small_engine()
    assert_near(step(engine, 3)[0], step(small_engine(), 3)[0], EXACT)
    assert not engine._graphs


def test_an_id_that_is_no_token_spoils_its_own_row_of_a_text():
    ids = torch.tensor([[1, 2], [3, 4], [5, 6]], device=DEVICE)
    weights = small_engine()._weights
    found = gpu_weights._Rows(weights.embedding)(ids.masked_fill(ids == 4, 64))
    assert found[1, 1].isnan().all() and found.isnan().sum() == found.shape[-1]


def test_nothing_read_leaves_the_state_as_it_is():
    engine = small_engine()
    _, state = step(engine, 2)
    logits, after = engine(torch.empty(2, 0, dtype=torch.int64, device=DEVICE), state)
    assert logits.shape == (2, 0, 64)
    assert same_bits(after.tensors, state.tensors)


# ---- loading ------------------------------------------------------------------------------------


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Whatever there is, load_engine takes it for a GPU."""
    monkeypatch.setattr(load, "_choose", lambda *_: "triton")
    if not ON_GPU:
        monkeypatch.setattr(gpu, "cuda_graph", fake_graph)


@pytest.mark.parametrize("kind", [None, "int4"])
def test_load_engine_takes_files_of_any_type(kind, on_a_gpu, tmp_path):
    save(model := make_model(256), tmp_path / "model", ByteTokenizer())
    engine, _ = load.load_engine(tmp_path / "model", device=DEVICE, dtype=kind)
    assert isinstance(engine, GpuEngine)
    assert engine.fingerprint() == model.fingerprint()
    ids = torch.tensor([[1, 2, 3]], device=DEVICE)
    assert_near(engine(ids)[0], engine_of(model, kind or "float32")(ids)[0], EXACT)


def test_load_engine_takes_quantized_directories(on_a_gpu, tmp_path):
    model = make_model(256)
    about = About(kind="int4", group=64, source=model.fingerprint())
    weights = quantize_tensors(model.state_dict(), "int4")
    write_quantized(tmp_path / "q", model.config, ByteTokenizer(), about, weights)
    engine, _ = load.load_engine(tmp_path / "q", device=DEVICE)
    ids = torch.tensor([[1, 2, 3]], device=DEVICE)
    assert_near(engine(ids)[0], engine_of(model, "int4")(ids)[0], EXACT)
    with pytest.raises(ValueError, match="holds int4 weights and int8 was asked for"):
        load.load_engine(tmp_path / "q", device=DEVICE, dtype="int8")

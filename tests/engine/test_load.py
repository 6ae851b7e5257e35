"""load_engine: what runs a model, for every source, type and adapter."""

from pathlib import Path

import pytest
import torch
from tiny import make_model, same_bits, small_bpe

from receptance import State, load, save
from receptance.adapters import LoRA, LoRAOptions, StateTuning, StateTuningOptions, make_adapter
from receptance.config import ModelConfig
from receptance.engine import NativeEngine, load_engine, native_engine
from receptance.engine.adapted import AdaptedModel
from receptance.engine.load import _MAPPED_PASSES, check_backend
from receptance.inference.generation import generate
from receptance.model import Model
from receptance.ops import native
from receptance.quantize.weights import quantize_tensors
from receptance.storage.quantized import About, write_quantized
from receptance.tokenizer import ByteTokenizer

needs_kernels = pytest.mark.skipif(not native.is_available(), reason="kernels not built")
IDS = torch.arange(12)[None]


@pytest.fixture
def saved(tmp_path):
    model = make_model(300)
    save(model, tmp_path / "model", small_bpe())
    return tmp_path / "model", model


def quantized(model: Model, directory, kind: str):
    about = About(kind=kind, group=128 if kind == "int8" else 64, source=model.fingerprint())
    weights = quantize_tensors(model.state_dict(), kind)
    write_quantized(directory, model.config, small_bpe(), about, weights)
    return directory


@needs_kernels
@pytest.mark.parametrize("kind", [None, "float32", "bfloat16", "float16", "int8", "int4"])
def test_native_kernels_are_the_choice_on_a_cpu(saved, kind):
    directory, model = saved
    engine, tokenizer = load_engine(directory, dtype=kind)
    assert isinstance(engine, NativeEngine)
    assert tokenizer.fingerprint == small_bpe().fingerprint
    assert engine.fingerprint() == model.fingerprint()
    with torch.no_grad():
        wanted = model(IDS)[0]
    error = (engine(IDS)[0] - wanted).abs().max() / wanted.std()
    limits = {"bfloat16": 0.1, "float16": 0.02, "int8": 0.1, "int4": 1.5}
    assert error < limits.get(kind, 1e-4)


def test_gpu_kernels_are_refused_on_a_cpu(saved):
    with pytest.raises(ValueError, match="run on an NVIDIA GPU, not on cpu"):
        load_engine(saved[0], backend="triton")


def test_torch_when_asked_for(saved):
    engine, _ = load_engine(saved[0], backend="torch", dtype="bfloat16")
    assert isinstance(engine, Model)
    assert engine.emb.weight.dtype == torch.bfloat16


@needs_kernels
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantized_directory_is_mapped_and_the_same_everywhere(saved, tmp_path, kind):
    directory, model = saved
    there = quantized(model, tmp_path / "small", kind)
    engine, tokenizer = load_engine(there)
    assert isinstance(engine, NativeEngine)
    assert engine.fingerprint() == model.fingerprint()
    on_the_fly, _ = load_engine(directory, dtype=kind)
    assert torch.equal(engine(IDS)[0], on_the_fly(IDS)[0])
    with torch.no_grad():
        wide, _ = load(there)
        torch.testing.assert_close(engine(IDS)[0], wide(IDS)[0], atol=2e-3, rtol=0)
        in_torch, _ = load_engine(there, backend="torch")
        assert torch.equal(in_torch(IDS)[0], wide(IDS)[0])
    assert in_torch.fingerprint() == model.fingerprint()  # so that states go on
    assert generate(engine, tokenizer, "fox", max_tokens=3)


@needs_kernels
def test_mapped_weights_are_copied_once_the_engine_is_used_for_long(tmp_path):
    config = ModelConfig(vocab_size=300, width=128, num_layers=1)  # nothing is padded
    engine, _ = load_engine(quantized(Model(config), tmp_path / "small", "int4"))
    maps, file = Path("/proc/self/maps"), tmp_path / "small" / "weights.safetensors"
    wanted, state = engine(IDS)
    for _ in range(_MAPPED_PASSES - 1):
        assert not maps.exists() or str(file) in maps.read_text()
        engine(IDS)
    for _ in range(2):
        found, after = engine(IDS)
        assert not maps.exists() or str(file) not in maps.read_text()
        assert torch.equal(found, wanted)
        assert same_bits(after.tensors, state.tensors)


@needs_kernels
def test_float16_is_kept_as_it_is(saved, tmp_path):
    _, model = saved
    save(model.half(), tmp_path / "half", small_bpe())
    engine, _ = load_engine(tmp_path / "half")
    narrow, _ = load_engine(saved[0], dtype="float16")
    assert engine.weight_bytes == narrow.weight_bytes


@needs_kernels
@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("kind", ["lora", "state"])
def test_an_adapter_shares_what_it_leaves_as_it_is(saved, tmp_path, kind, dtype):
    directory, model = saved
    options = LoRAOptions(targets=("blocks.*.ffn.*",)) if kind == "lora" else StateTuningOptions()
    adapter = make_adapter(model, options)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1)
    file = tmp_path / "adapter.safetensors"
    adapter.save(file, model.fingerprint())
    beside, _ = load_engine(directory, dtype=dtype)
    before, _ = beside(IDS)
    alone, _ = load_engine(directory, dtype=dtype, adapter=file)
    engine, _ = load_engine(directory, dtype=dtype, adapter=file, beside=beside)
    assert torch.equal(engine(IDS)[0], alone(IDS)[0]) and torch.equal(beside(IDS)[0], before)
    shared = {name for name, m in engine.packed.items() if m.data is beside.packed[name].data}
    assert shared == engine.packed.keys() - adapter.changed()
    other, _ = load_engine(directory, dtype="bfloat16")
    apart, _ = load_engine(directory, dtype=dtype, adapter=file, beside=other)
    assert not {m.data_ptr() for m in data(apart)} & {m.data_ptr() for m in data(other)}
    assert torch.equal(apart(IDS)[0], alone(IDS)[0])


def data(engine):
    return [matrix.data for matrix in engine.packed.values()]


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_adapters_become_part_of_the_engine(saved, tmp_path, backend):
    if backend == "native" and not native.is_available():
        pytest.skip("kernels not built")
    directory, model = saved
    for adapter in (
        LoRA(model, LoRAOptions(rank=2)),
        StateTuning(model, StateTuningOptions()),
    ):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        file = tmp_path / f"{adapter.kind}.safetensors"
        adapter.save(file, model.fingerprint())
        engine, _ = load_engine(directory, adapter=file, backend=backend)
        assert isinstance(engine, NativeEngine if backend == "native" else AdaptedModel)
        assert engine.fingerprint() == adapter.fingerprint(model.fingerprint())
        with adapter.attach(model), torch.no_grad():
            wanted, state = model(IDS, adapter.initial_state(1))
        with torch.no_grad():
            logits, after = engine(IDS)
        torch.testing.assert_close(logits, wanted, atol=2e-5, rtol=1e-4)
        assert after.tensors.keys() == state.tensors.keys()


@needs_kernels
def test_states_are_those_of_the_model(saved, tmp_path):
    directory, model = saved
    engine, _ = load_engine(directory, dtype="int8")
    engine(IDS)[1].save(tmp_path / "state", engine.fingerprint())
    state = State.load(tmp_path / "state", model.fingerprint())
    assert same_bits(state.tensors, engine(IDS)[1].tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int2"}, "wanted one of"),
        ({"dtype": "int4", "backend": "torch"}, "native kernels"),
        ({"backend": "native", "device": "meta"}, "'meta' cannot be used here"),
        ({"backend": "bogus"}, "backend is 'bogus'; wanted one of auto, native"),
        ({"backend": None}, "backend is None; wanted one of auto, native"),
        ({"threads": 0}, "threads is 0; wanted 1 to 1024"),
        ({"threads": 10**20}, "wanted 1 to 1024"),
        ({"dtype": "float32", "group": 32}, "float32 weights have none"),
        ({"backend": "torch", "group": 64}, "group is 64; torch runs no integer weights, so leave"),
        ({"backend": "torch", "threads": 2}, "threads is 2; only the native kernels take that"),
    ],
)
def test_what_cannot_be_had_is_refused(saved, options, message):
    with pytest.raises(ValueError, match=message):
        load_engine(saved[0], **options)


def test_the_native_kernels_are_for_the_cpu():
    with pytest.raises(ValueError, match="run on the CPU, not on cuda"):
        check_backend("native", torch.device("cuda"))


@needs_kernels
def test_a_matrix_that_cannot_be_quantized_is_named(tmp_path):
    model = make_model()
    model.blocks[1].ffn.key.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"^blocks.1.ffn.key.weight cannot be quantized: 1 of"):
        native_engine(model.config, dict(model.state_dict()), "int8")


@needs_kernels
def test_a_quantized_directory_is_of_one_type_and_one_tokenizer(saved, tmp_path):
    there = quantized(saved[1], tmp_path / "small", "int4")
    with pytest.raises(ValueError, match="holds int4"):
        load_engine(there, dtype="int8")
    with pytest.raises(ValueError, match="wrong tokenizer"):
        load_engine(there, tokenizer=ByteTokenizer())
    with pytest.raises(ValueError, match="wrong tokenizer"):
        load(there, tokenizer="bytes")
    assert load_engine(there, tokenizer=small_bpe())


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_an_adapter_of_a_quantized_directory_wants_a_float_type(saved, tmp_path, backend):
    """Its weights are floats from then on, of four times the size or more."""
    there = quantized(saved[1], tmp_path / "small", "int4")
    wide, _ = load(there)  # what adapters of the directory are trained on
    tuned = StateTuning(wide, StateTuningOptions())
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1)
    tuned.save(tmp_path / "tuned.safetensors", wide.fingerprint())
    options = {"adapter": tmp_path / "tuned.safetensors", "backend": backend}
    with pytest.raises(ValueError, match=r"small holds int4 weights, which become floats.*dtype"):
        load_engine(there, **options)
    engine, _ = load_engine(there, dtype="float32", **options)
    with torch.no_grad():
        wanted, _ = wide(IDS, tuned.initial_state(1))
        torch.testing.assert_close(engine(IDS)[0], wanted, atol=1e-4, rtol=1e-4)


def test_auto_is_a_device_of_an_engine(saved):
    engine, _ = load_engine(saved[0], device="auto")
    assert engine.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@needs_kernels
def test_without_kernels_a_quantized_directory_runs_in_torch(saved, tmp_path, monkeypatch):
    there = quantized(saved[1], tmp_path / "small", "int8")
    wanted = load_engine(there)[0](IDS)[0]
    monkeypatch.setattr(native, "library", lambda: None)
    engine, _ = load_engine(there)
    assert isinstance(engine, Model)
    with torch.no_grad():
        torch.testing.assert_close(engine(IDS)[0], wanted, atol=2e-3, rtol=0)
    with pytest.raises(ValueError, match="were not built"):
        load_engine(there, backend="native")


def test_types_that_no_kernel_runs_for_a_version(tmp_path):
    save(make_model(width=64, version=5.0), tmp_path / "model", ByteTokenizer())
    with pytest.raises(
        ValueError, match=r"dtype is int8; .* the native kernels do not run RWKV-5.0"
    ):
        load_engine(tmp_path / "model", dtype="int8", device="cpu")

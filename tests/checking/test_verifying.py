"""Verification: good models pass in every format, and each kind of wrong is found where it is."""

import dataclasses
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_model, small_bpe

from receptance import save
from receptance.checking import recorded, verifying
from receptance.checking.verifying import (
    Check,
    Subject,
    difference,
    logits,
    probe_tokens,
    record,
    verify,
)
from receptance.engine.native import NativeEngine
from receptance.formats.ggmf import write_ggmf
from receptance.model import Model
from receptance.ops import chunked, native
from receptance.quantize.weights import quantize_tensors
from receptance.storage.directories import existing
from receptance.storage.quantized import About, write_quantized

MODEL = make_model(300, width=32)
with_kernels = pytest.mark.skipif(not native.is_available(), reason="no native kernels here")


def as_bfloat16(model: Model, path: Path) -> None:
    torch.save({name: x.bfloat16() for name, x in model.state_dict().items()}, path)


def as_quantized(model: Model, path: Path) -> None:
    about = About(kind="int4", group=32, source=model.fingerprint())
    weights = quantize_tensors(model.state_dict(), "int4", 32)
    write_quantized(path, model.config, None, about, weights)


WRITERS: dict[str, Callable[[Model, Path], object]] = {
    "checkpoint": lambda model, path: save(model, path, small_bpe()),
    "model.pth": lambda model, path: torch.save(model.state_dict(), path),
    "narrow.pth": as_bfloat16,
    "fp16.bin": lambda model, path: write_ggmf(path, model.config, model.state_dict(), "FP16"),
    "q8_0.bin": lambda model, path: write_ggmf(path, model.config, model.state_dict(), "Q8_0"),
    "small": as_quantized,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder with the model in every format; not to be changed."""
    folder = tmp_path_factory.mktemp("written")
    for name, write in WRITERS.items():
        write(MODEL, folder / name)
    return folder


@pytest.fixture
def subject(tmp_path) -> Subject:
    torch.save(MODEL.state_dict(), tmp_path / "model.pth")
    return Subject.open(tmp_path / "model.pth")


def failed(subject: Subject, file: Path | None = None) -> set[str]:
    return {check.what for check in verify(subject, file) if not check.passed}


@pytest.mark.parametrize("name", WRITERS)
def test_a_good_model_passes_in_every_format(name, written):
    checks = list(verify(Subject.open(written / name)))
    assert [check.what for check in checks if not check.passed] == []
    exact = {check.what: check for check in checks if check.bound == 0}
    assert all(check.measured == 0 for check in exact.values())
    for instruction_set in native.instruction_sets():
        assert f"native {instruction_set}: cut at random" in exact
    assert "wkv4 chunked = reference" in {check.what for check in checks}


@with_kernels
def test_engines_have_the_type_of_the_file(written):
    kinds = {"checkpoint": "float32", "narrow.pth": "bfloat16", "fp16.bin": "float16"}
    for name, kind in (kinds | {"small": "int4", "q8_0.bin": "float32"}).items():
        assert Subject.open(written / name).kind == kind


# ---- what is wrong is found ---------------------------------------------------------------------


def test_weights_that_are_not_finite(tmp_path):
    tensors = {name: x.clone() for name, x in MODEL.state_dict().items()}
    tensors["ln_out.bias"][3] = torch.nan
    torch.save(tensors, tmp_path / "bad.pth")
    first, second, *others = verify(Subject.open(tmp_path / "bad.pth"))
    assert (first.what, first.measured, first.note) == ("weights finite", 1, "'ln_out.bias'")
    assert (second.what, second.passed) == ("logits finite", False)
    assert not any(check.passed for check in others)


def test_a_wrong_kernel_of_the_recurrence(subject, monkeypatch):
    forward = chunked.forward

    def wrong(*arguments: object) -> tuple[torch.Tensor, ...]:
        out, *state = forward(*arguments)
        return out * 1.001, *state

    monkeypatch.setattr(chunked, "forward", wrong)
    if native.is_available():
        assert failed(subject) == {"wkv4 chunked = reference"}
    else:
        assert "wkv4 chunked = reference" in failed(subject)


@with_kernels
def test_an_engine_that_computes_something_else(subject):
    weight = subject.matrices["blocks.1.ffn.key.weight"]
    weight.data[0] += 0.01
    names = {f"native {name} = torch" for name in native.instruction_sets()}
    assert failed(subject) == names


@with_kernels
def test_an_engine_that_depends_on_where_a_text_is_cut(subject, monkeypatch):
    def forgetful(self: NativeEngine, tokens: torch.Tensor, state=None, *, lengths=None):
        out, state = features(self, tokens, state, lengths=lengths)
        state.tensors["numerator"].mul_(2)
        return out, state

    features = NativeEngine.features
    monkeypatch.setattr(NativeEngine, "features", forgetful)
    found = failed(subject)
    for name in native.instruction_sets():
        assert {f"native {name}: token by token", f"native {name}: cut at random"} <= found
        assert f"native {name} = torch" not in found


def test_a_model_that_sees_its_neighbors(subject, monkeypatch):
    features = Model.features

    def wrong(self: Model, tokens: torch.Tensor, state=None, **options):
        out, state = features(self, tokens, state, **options)
        return out + 0.01 * out.mean(0, keepdim=True) * (len(out) > 1), state

    monkeypatch.setattr(Model, "features", wrong)
    assert failed(subject) == {"torch on cpu: in a ragged batch"}


@pytest.fixture
def gpu(monkeypatch) -> ModuleType:
    """receptance.engine.gpu where it can be made to run, with few tokens, which take long."""
    cases = importlib.import_module("gpu_cases")
    module = importlib.import_module("receptance.engine.gpu")
    monkeypatch.setattr(module, "Tiles", lambda: cases.LARGE)
    tokens = property(lambda subject: probe_tokens(subject.config.vocab_size, 4))
    monkeypatch.setattr(Subject, "tokens", tokens)
    monkeypatch.setattr(verifying, "_RAGGED", (4, 1, 3))
    if not cases.ON_GPU:
        monkeypatch.setattr(verifying, "_has_gpu_engine", lambda device: True)
    return module


def on_gpu(path: Path) -> list[Check]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checks = verify(Subject.open(path), device=device)
    return [check for check in checks if check.what.startswith("triton on")]


@pytest.fixture
def few_weights() -> Model:
    """In Triton's interpreter every output of a product takes a hundredth of a second."""
    return make_model(20, layers=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.pth", "narrow.pth", "small"])
def test_the_engine_for_gpus_is_checked(name, few_weights, gpu, tmp_path):
    WRITERS[name](few_weights, tmp_path / name)
    checks = on_gpu(tmp_path / name)
    assert len(checks) == 4 and all(check.passed for check in checks)


@pytest.mark.slow
def test_a_step_on_a_gpu_that_computes_something_else(few_weights, gpu, tmp_path, monkeypatch):
    """Without native kernels; of one row not even the rounding to bfloat16 is allowed."""
    monkeypatch.setattr(native, "is_available", lambda: False)
    monkeypatch.setattr(native, "instruction_sets", list)
    step = gpu.step

    def wrong(weights, buffers, tiles) -> None:
        step(weights, buffers, tiles)
        buffers.features.mul_(1.001)

    monkeypatch.setattr(gpu, "step", wrong)
    as_bfloat16(few_weights, tmp_path / "narrow.pth")
    (found,) = [check for check in on_gpu(tmp_path / "narrow.pth") if not check.passed]
    assert found.what.endswith("token by token") and found.bound == 1e-4


def test_nan_never_passes():
    assert not Check("", float("nan"), 1e9).passed
    assert Check("", 0, 0).passed and not Check("", 1e-30, 0).passed
    values = torch.tensor([1.0, torch.nan])
    assert not difference(values, torch.ones(2)) <= 1e9


# ---- tokens, and how they are read ---------------------------------------------------------------


@given(st.integers(1, 70000))
def test_tokens_are_a_function_of_the_vocabulary(size):
    tokens = probe_tokens(size)
    assert tokens.tolist() == [(n * n + 7919 * n) % size for n in range(1, 41)]


@given(st.lists(st.integers(1, 50), max_size=5))
def test_reading_in_pieces_reads_all(pieces):
    with torch.no_grad():
        tokens = probe_tokens(300)
        wanted = MODEL(tokens[None])[0][0]
        assert difference(logits(MODEL, tokens, pieces), wanted) < 1e-5


# ---- recorded logits -----------------------------------------------------------------------------


@pytest.fixture
def file(subject) -> Iterator[Path]:
    path = recorded.beside(subject.path)
    record(subject, path)
    return path


def test_what_is_recorded_are_the_models_logits(subject, file):
    found = recorded.read(file)
    with torch.no_grad():
        wanted = MODEL(found.tokens[None])[0][0, found.positions]
    assert torch.allclose(found.logits, wanted, rtol=1e-5, atol=1e-5)
    assert (found.model, found.stored) == (MODEL.fingerprint(), "float32")
    assert file.name == "model.pth.logits"
    assert failed(subject) == set()
    assert list(verify(subject))[-1].what == "logits as recorded"


def test_a_directory_that_one_is_in_has_a_name_too(tmp_path, monkeypatch):
    (tmp_path / "mine/deeper").mkdir(parents=True)
    for inside, path in (("mine", "."), ("mine/deeper", "..")):
        monkeypatch.chdir(tmp_path / inside)
        assert recorded.beside(Path(path)) == tmp_path / "mine.logits"
    assert recorded.beside(Path("mine")) == Path("mine.logits")


def test_the_logits_of_a_model_of_the_package_lie_in_the_current_folder():
    assert recorded.beside(existing("tiny-python")) == Path("tiny-python.logits")


def test_the_logits_of_a_run_lie_beside_its_folder(tmp_path):
    """Whatever checkpoint is its newest: after more training they are those of other weights."""
    run = tmp_path / "runs" / "x"
    save(MODEL, run / "step-5", small_bpe())
    subject = Subject.open(run)
    file = recorded.beside(subject.path)
    assert file == tmp_path / "runs" / "x.logits"
    record(subject, file)
    *_, last = verify(Subject.open(run))
    assert (last.what, last.passed) == ("logits as recorded", True)
    save(make_model(300, width=32, seed=2), run / "step-6", small_bpe())
    *_, last = verify(Subject.open(run))
    assert (last.what, last.passed, last.note) == ("logits as recorded", False, "of other weights")


def test_recording_never_overwrites(subject, file):
    before = file.read_bytes()
    with pytest.raises(ValueError, match="exists; verify against it, or remove it"):
        record(subject, file)
    assert file.read_bytes() == before
    file.unlink()
    record(subject, file)
    assert file.read_bytes() == before


def test_other_weights_do_not_match(file, tmp_path):
    torch.save(make_model(300, width=32, seed=2).state_dict(), tmp_path / "other.pth")
    *_, last = verify(Subject.open(tmp_path / "other.pth"), file)
    assert (last.passed, last.note) == (False, "of other weights")


def test_a_machine_that_computes_something_else_is_noticed(subject, file):
    found = recorded.read(file)
    file.unlink()
    size = found.logits.abs().max()
    whole = torch.zeros(40, 300).index_copy_(0, found.positions, found.logits + 2e-4 * size)
    recorded.write(file, found.tokens, whole, model=found.model, stored=found.stored)
    assert failed(subject) == {"logits as recorded"}


@pytest.mark.parametrize("name", ["narrow.pth", "small"])
def test_narrower_weights_of_the_same_model_have_wider_bounds(name, written, file):
    *_, last = verify(Subject.open(written / name), file)
    assert last.passed and last.bound > 1e-4 and "recorded of float32" in last.note


def test_every_truncation_of_a_record_is_noticed(file):
    for size in range(0, file.stat().st_size, 37):
        content = file.read_bytes()
        os.truncate(file, size)
        with pytest.raises(ValueError, match=r"model\.pth\.logits"):
            recorded.read(file)
        file.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": torch.zeros(40)},
        {"positions": torch.tensor([0, 1, 20, 40])},
        {"positions": torch.tensor([-1, 0, 1, 2])},
        {"positions": torch.tensor([], dtype=torch.int64), "logits": torch.zeros(0, 300)},
        {"logits": torch.zeros(3, 300)},
        {"logits": torch.zeros(300)},
    ],
)
def test_records_that_do_not_fit_together_are_refused(change, file):
    from safetensors.torch import save_file

    found = dataclasses.asdict(recorded.read(file)) | change
    about = '{"format": "receptance-logits", "format_version": "1"}'
    tensors = {name: found[name] for name in ("tokens", "positions", "logits")}
    save_file(tensors, file, metadata={"about": about})
    with pytest.raises(ValueError, match="holds no logits of format 1"):
        recorded.read(file)

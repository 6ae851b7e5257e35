"""Weights from format to format: nothing is lost that can be kept, nothing half-written remains."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_model, same_bits, small_bpe
from torch import Tensor
from transformers import AutoTokenizer

from receptance import Model, ModelConfig, load, save
from receptance.conversion import converting
from receptance.conversion.comparing import equal, near, probe
from receptance.conversion.converting import check, convert
from receptance.conversion.source import Streamed, open_source
from receptance.conversion.target import Target
from receptance.formats import read, read_pth
from receptance.formats.ggml import dequantize, quantize
from receptance.formats.names import tensor_shapes
from receptance.quantize.weights import quantize_tensors
from receptance.storage.quantized import About, write_quantized
from receptance.tokenizer import END_OF_TEXT, BPETokenizer, ByteTokenizer, Tokenizer

BPE = small_bpe()
FORMATS = {"pth": "x.pth", "hf": "x", "st": "x.st", "safetensors": "x.safetensors",
           "ggmf": "x.bin", "receptance": "x"}  # fmt: skip
every_format = pytest.mark.parametrize("format_", FORMATS)


def weights(dtype: torch.dtype = torch.float32) -> Model:
    """Decays are bfloat16 numbers, as in all published models."""
    model = make_model(BPE.vocab_size, width=32)
    with torch.no_grad():
        for block in model.blocks:
            block.att.time_decay.copy_(block.att.time_decay.bfloat16())
    return model.to(dtype)


def official(model: Model, path: Path, tokenizer: Tokenizer | None = BPE) -> Path:
    """A .pth as others publish them."""
    path.parent.mkdir(exist_ok=True)
    torch.save(dict(model.state_dict()), path)
    if tokenizer:
        tokenizer.save(path.parent)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Not to be changed."""
    return official(weights(), tmp_path_factory.mktemp("source") / "model.pth")


def turn(source: Path, target: Path, **options: object) -> Path:
    convert(open_source(source), Target(path=target, **options))
    return target


def tensors(path: Path) -> dict[str, Tensor]:
    return dict(open_source(path).open())


def refused(source: Path, target: Path, **options: object) -> str:
    """The one line that says why nothing was written."""
    with pytest.raises(ValueError) as caught:
        turn(source, target, **options)
    message = str(caught.value)
    assert "\n" not in message and ".partial" not in message
    return message


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ---- what is kept -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_the_way_round(tmp_path, dtype):
    path = first = official(weights(dtype), tmp_path / "0/model.pth")
    for place in ("1/hf", "2/x.st", "3/x.bin"):
        to = "hf" if place.endswith("hf") else None
        path = turn(path, tmp_path / place, format=to)
    assert open_source(path).tokenizer.fingerprint == BPE.fingerprint
    name = str(dtype).removeprefix("torch.")
    last = turn(path, tmp_path / "4/x.pth", dtype=None if name == "float32" else name)
    assert same_bits(read_pth(last), read_pth(first))
    turn(last, tmp_path / "5", format="receptance")
    model, tokenizer = load(tmp_path / "5")
    assert same_bits(model.state_dict(), weights(dtype).state_dict())
    assert tokenizer.fingerprint == BPE.fingerprint


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format_", ["pth", "hf", "st", "safetensors", "receptance"])
def test_types_stay_as_they_are(tmp_path, format_, dtype):
    model = make_model(BPE.vocab_size).to(dtype)
    path = official(model, tmp_path / "0/model.pth")
    back = turn(path, tmp_path / "1" / FORMATS[format_], format=format_)
    assert same_bits(tensors(back), read_pth(path))


@every_format
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_types_are_changed_where_that_was_asked_for(tmp_path, source, format_, dtype):
    if (format_, dtype) == ("ggmf", "bfloat16"):
        return
    report = convert(
        open_source(source), Target(path=tmp_path / FORMATS[format_], format=format_, dtype=dtype)
    )
    assert report.dtypes == (dtype,)
    limits = {"float32": 0.0, "bfloat16": 0.1, "float16": 0.01}
    assert report.difference.relative <= limits[dtype]
    for name, tensor in tensors(tmp_path / FORMATS[format_]).items():
        decay = name.endswith((".time_decay", ".time_first")) and format_ != "st"
        vector = format_ == "ggmf" and tensor.squeeze().dim() == 1
        assert tensor.dtype == (torch.float32 if decay or vector else getattr(torch, dtype)), name


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_quantized_files_are_compared_with_what_they_were_made_from(tmp_path, source, kind):
    report = convert(open_source(source), Target(path=tmp_path / "x.bin", dtype=kind))
    assert report.dtypes == (kind,)
    assert 0 < report.difference.relative < 0.5
    assert report.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    turn(tmp_path / "x.bin", tmp_path / "back" / "x.pth")


def test_an_epsilon_goes_where_there_is_room_for_it(tmp_path, source):
    turn(source, tmp_path / "hf", format="hf")
    config = tmp_path / "hf/config.json"
    config.write_text(config.read_text().replace("1e-05", "1e-03"))
    for format_ in ("hf", "receptance"):
        path = turn(tmp_path / "hf", tmp_path / "1" / format_, format=format_)
        assert open_source(path).config.layer_norm_epsilon == 1e-3
    with pytest.raises(ValueError, match=r"layer_norm_epsilon .* is 0.001, and a file has no plac"):
        turn(path, tmp_path / "x.pth")


class TestSources:
    def test_a_checkpoint_and_a_run(self, tmp_path):
        model = weights()
        save(model, tmp_path / "run/step-1", BPE)
        for n, path in enumerate((tmp_path / "run", tmp_path / "run/step-1")):
            turned = turn(path, tmp_path / f"{n}/x.pth")
            assert same_bits(read_pth(turned), dict(model.state_dict()))
            assert read(turned).tokenizer == tmp_path / f"{n}/tokenizer.json"

    def test_every_value_is_read_as_often_as_announced(self, tmp_path, source):
        read: list[int] = []
        opened = open_source(source)
        convert(opened, Target(path=tmp_path / "x.st"), lambda name, values: read.append(values))
        assert sum(read) == converting.PASSES * opened.config.num_parameters

    def test_a_damaged_checkpoint(self, tmp_path):
        save(weights(), tmp_path / "mine", BPE)
        (tmp_path / "mine/tokenizer.json").write_text("{}")
        with pytest.raises(ValueError, match=r"tokenizer\.json has 2 bytes"):
            turn(tmp_path / "mine", tmp_path / "x.pth")

    def test_a_checkpoint_that_is_not_whole(self, tmp_path):
        for step in (1, 2):
            save(weights(), tmp_path / f"run/step-{step}", BPE)
        (tmp_path / "run/step-2/manifest.json").unlink()
        with pytest.warns(UserWarning, match=r"passed over .*step-2/manifest\.json is missing"):
            turn(tmp_path / "run", tmp_path / "x.pth")
        assert "manifest.json is missing" in refused(tmp_path / "run/step-2", tmp_path / "y.pth")
        (tmp_path / "run/step-2").rename(tmp_path / "mine")
        assert "manifest.json is missing" in refused(tmp_path / "mine", tmp_path / "y.pth")

    def test_what_is_here_has_no_revision(self, tmp_path):
        save(weights(), tmp_path / "mine", BPE)
        for path in (tmp_path / "mine", official(weights(), tmp_path / "0/model.pth")):
            with pytest.raises(ValueError, match="only hub models have them"):
                open_source(path, revision="main")

    def test_quantized_weights_as_what_they_stand_for(self, tmp_path):
        model = weights()
        about = About(kind="int8", group=128, source=model.fingerprint())
        codes = quantize_tensors(model.state_dict(), "int8", None, None)
        write_quantized(tmp_path / "small", model.config, BPE, about, codes)
        turned = turn(tmp_path / "small", tmp_path / "x.pth")
        assert same_bits(read_pth(turned), dict(load(tmp_path / "small")[0].state_dict()))

    def test_no_tokenizer_is_needed(self, tmp_path):
        path = official(weights(), tmp_path / "0/model.pth", tokenizer=None)
        turn(path, tmp_path / "hf", format="hf")
        assert "tokenizer.json" not in listing(tmp_path / "hf")
        turn(path, tmp_path / "bare", format="receptance")
        assert load(tmp_path / "bare")[1] is None
        given = open_source(path, tokenizer=BPE)
        convert(given, Target(path=tmp_path / "mine", format="receptance"))
        assert load(tmp_path / "mine")[1].fingerprint == BPE.fingerprint

    def test_bytes_need_no_file(self, tmp_path):
        path = official(make_model(), tmp_path / "0/model.pth", tokenizer=None)
        turn(path, tmp_path / "mine", format="receptance")
        assert load(tmp_path / "mine")[1].kind == ByteTokenizer.kind

    def test_the_older_format_of_torch(self, tmp_path, monkeypatch):
        monkeypatch.setattr("receptance.conversion.source._MAPPED", 1000)
        tensors = dict(weights().state_dict())
        torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        source = open_source(tmp_path / "old.pth")
        assert source.open() is source.open(), "it would be read again"
        convert(source, Target(path=tmp_path / "new.pth"))
        assert same_bits(read_pth(tmp_path / "new.pth"), tensors)

    def test_what_was_read_is_let_go(self, source, monkeypatch):
        monkeypatch.setattr("receptance.conversion.source._MAPPED", 1000)
        opened = open_source(source)
        streamed, wanted = Streamed(opened, lambda name, values: None), read_pth(source)
        assert len(streamed) == len(wanted) and set(streamed) == set(wanted)
        assert all(torch.equal(streamed[name], x) for name, x in wanted.items())


def test_transformers_finds_the_tokenizer(tmp_path, source):
    turn(source, tmp_path / "hf", format="hf")
    found = AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    fields = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert found.eos_token == fields["eos_token"] == END_OF_TEXT
    assert found("12 little foxes")["input_ids"] == BPE.encode("12 little foxes")


@pytest.mark.parametrize("format_", ["hf", "st", "receptance"])
def test_what_ends_a_text_goes_along(tmp_path, format_):
    told = BPETokenizer(BPE._content, end_of_text="!")
    path = official(weights(), tmp_path / "0/model.pth", told)
    assert open_source(path).tokenizer.fingerprint == told.fingerprint != BPE.fingerprint
    turned = turn(path, tmp_path / "1" / FORMATS[format_], format=format_)
    assert open_source(turned).tokenizer.decode([told.end_of_text]) == "!"
    assert open_source(turned).tokenizer.fingerprint == told.fingerprint
    if format_ == "hf":
        assert AutoTokenizer.from_pretrained(turned, local_files_only=True).eos_token == "!"


@every_format
def test_what_gets_its_name_is_on_disk(tmp_path, source, monkeypatch, format_):
    synced: list[Path] = []
    rename = os.rename

    def checked(before: Path, after: Path) -> None:
        assert {*(before.iterdir() if before.is_dir() else [before])} <= {*synced}
        rename(before, after)
        synced.append(after)

    for module in ("conversion.converting", "storage.directories", "storage.manifest"):
        monkeypatch.setattr(f"receptance.{module}.sync", synced.append)
    monkeypatch.setattr(os, "rename", checked)
    path = turn(source, tmp_path / FORMATS[format_], format=format_)
    assert synced[-2:] == [path, tmp_path]


def test_decays_that_no_exponential_tells_apart(tmp_path):
    decays = torch.linspace(-3, 3, 32)
    model = weights()
    with torch.no_grad():
        model.blocks[1].att.time_decay.copy_(decays)
    path = official(model, tmp_path / "0/model.pth")
    report = convert(open_source(path), Target(path=tmp_path / "1/x.bin"))
    assert report.decays_rounded and report.difference.relative < 1e-6
    report = convert(open_source(tmp_path / "1/x.bin"), Target(path=tmp_path / "2/x.bin"))
    assert not report.decays_rounded
    assert (tmp_path / "1/x.bin").read_bytes() == (tmp_path / "2/x.bin").read_bytes()
    back = tensors(tmp_path / "2/x.bin")["blocks.1.att.time_decay"]
    assert torch.equal(back[decays.abs() >= 1], decays[decays.abs() >= 1])
    assert 0 < (back - decays).abs().max() < 1.2e-7


# ---- what is compared ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_are_those_of_the_model(dtype, monkeypatch):
    monkeypatch.setattr("receptance.conversion.comparing._ROWS", 128)  # of 300
    model = weights(dtype)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, 64), generator=generator)
    with torch.no_grad():
        wanted, _ = model(tokens, dtype=torch.float32)
    torch.testing.assert_close(probe(model.config, model.state_dict()), wanted)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=32, max_size=32),
       st.sampled_from(["Q8_0", "Q4_0"]), st.integers(0, 31))  # fmt: skip
def test_blocks_are_as_near_as_their_kind_has_it(values, kind, at):
    exact = np.array(values, np.float32)
    share = converting._STEPS[kind]
    got = torch.from_numpy(dequantize(quantize(exact, kind), kind))
    there = torch.from_numpy(exact)
    assert near(there, got, 32, share)
    wrong = got.clone()
    wrong[at] += 2.2 * share * float(there.abs().max()) + 1e-5
    assert not near(there, wrong, 32, share)


def test_equal_means_every_bit():
    there = torch.tensor([1.0, 2.0**-20, -3.0])
    assert equal(there, there.bfloat16(), torch.bfloat16)
    assert equal(there, there.double(), torch.float32)
    assert not equal(there, torch.tensor([1.0, 2.0**-20, -3.0000002]), torch.float32)


def test_values_that_are_no_numbers_are_compared_too(tmp_path):
    """In the row of an id that the probe does not read; and zeros keep their sign."""
    model = weights()
    read = set(torch.randint(300, (64,), generator=torch.Generator().manual_seed(0)).tolist())
    row = next(number for number in range(300) if number not in read)
    with torch.no_grad():
        model.emb.weight[row, 0], model.emb.weight[row, 1] = torch.nan, -0.0
    path = official(model, tmp_path / "0/model.pth")
    for n, place in enumerate(("x.st", "x.bin", "x.pth"), start=1):
        path = turn(path, tmp_path / str(n) / place)
    found = read_pth(path)["emb.weight"][row]
    assert found[0].isnan() and found[1].signbit()
    assert not equal(torch.tensor([-0.0]), torch.tensor([0.0]), torch.float32)


@every_format
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("emb.weight", "these tensors differ: 'emb.weight'"),  # a row that no probe looks up
        ("blocks.1.att.time_decay", "differ"),
        ("blocks.0.ffn.value.weight", "differ"),
    ],
)
def test_a_writer_that_errs_is_found_out(tmp_path, source, monkeypatch, format_, name, words):
    class Wrong(Streamed):
        wrong = True

        def __getitem__(self, asked: str) -> Tensor:
            tensor = super().__getitem__(asked)
            if asked != name or not Wrong.wrong:
                return tensor
            Wrong.wrong = False  # what is written is wrong, what is compared with is not
            changed = tensor.clone()
            changed[-1] += 1
            return changed

    monkeypatch.setattr(converting, "Streamed", Wrong)
    path = tmp_path / FORMATS[format_]
    assert words in refused(source, path, format=format_)
    assert listing(tmp_path) == set()


def test_sizes_and_logits_are_compared_too(tmp_path, source, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("receptance.formats.hf.told", lambda *_: {"layer_norm_epsilon": 1e-3})
        assert "has other sizes" in refused(source, tmp_path / "x", format="hf")
    found = iter([torch.ones(3), torch.ones(3) + 2e-5])
    monkeypatch.setattr(converting, "probe", lambda *_: next(found))
    assert "its logits differ by 2.0e-05 of the largest" in refused(source, tmp_path / "x.pth")
    assert listing(tmp_path) == set()


def test_weights_without_finite_logits(tmp_path):
    model = weights()
    with torch.no_grad():
        model.ln_out.weight[0] = torch.nan
    path = official(model, tmp_path / "0/model.pth")
    (tmp_path / "1").mkdir()
    assert "not all finite" in refused(path, tmp_path / "1/x.st")
    assert listing(tmp_path / "1") == set()


# ---- what stands in the way ---------------------------------------------------------------------


@every_format
def test_nothing_is_overwritten(tmp_path, source, format_):
    path = tmp_path / FORMATS[format_]
    for make in (path.touch, path.mkdir, lambda: path.symlink_to("nowhere")):
        make()
        before = listing(tmp_path)
        assert "exists" in refused(source, path, format=format_)
        assert listing(tmp_path) == before
        path.rmdir() if path.is_dir() else path.unlink()


@every_format
def test_what_came_meanwhile_is_not_overwritten(tmp_path, source, format_):
    path = tmp_path / FORMATS[format_]
    target = Target(path=path, format=format_)

    def note(name: str, values: int) -> None:
        if not path.exists():
            save(weights(), path, BPE)  # what else may be replaced

    with pytest.raises(ValueError, match="exists; give another name"):
        convert(open_source(source), target, note)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    load(path)


def test_one_that_was_being_replaced_is_not_overwritten(tmp_path, source):
    save(weights(), tmp_path / "x", BPE)
    os.rename(tmp_path / "x", tmp_path / ".x.old")  # a process was killed here
    assert "exists" in refused(source, tmp_path / "x", format="receptance")
    load(tmp_path / "x")


def test_a_checkpoint_stays_whole(tmp_path, source):
    save(weights(), tmp_path / "mine", BPE)
    assert "write elsewhere" in refused(source, tmp_path / "mine/x.pth")
    load(tmp_path / "mine")


@every_format
def test_an_interrupt_leaves_nothing(tmp_path, source, format_):
    target = Target(path=tmp_path / FORMATS[format_], format=format_)
    reads: list[str] = []
    opened = open_source(source)
    convert(opened, Target(path=tmp_path / "whole.pth"), lambda name, _: reads.append(name))
    before = listing(tmp_path)
    for stop in range(0, len(reads), 60):
        left = iter(range(stop))

        def note(name: str, values: int, left=left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(opened, target, note)
        assert listing(tmp_path) == before


@every_format
def test_a_full_disk_leaves_nothing(tmp_path, source, format_):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / FORMATS[format_]
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        message = refused(source, path, format=format_)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write" in message
    assert listing(tmp_path) == set()


class TestTokenizersBeside:
    def test_one_that_is_there_already_stays(self, tmp_path, source):
        (tmp_path / "20B_tokenizer.json").write_bytes(
            (source.parent / "tokenizer.json").read_bytes()
        )
        turn(source, tmp_path / "x.pth")
        assert listing(tmp_path) == {"20B_tokenizer.json", "x.pth"}

    def test_that_of_another_model_is_in_the_way(self, tmp_path, source):
        small_bpe(280).save(tmp_path)
        assert "write to a folder of its own" in refused(source, tmp_path / "x.pth")
        turn(source, tmp_path / "hf", format="hf")

    def test_bytes_are_not_taken_for_another(self, tmp_path):
        BPE.save(tmp_path)
        path = official(make_model(), tmp_path / "model.pth", tokenizer=None)
        assert open_source(turn(path, tmp_path / "x.st")).tokenizer.kind == "bytes"
        with pytest.raises(ValueError, match="wrong tokenizer: bpe has 300 ids"):
            open_source(path, tokenizer=BPE)


@pytest.mark.parametrize(
    ("path", "options", "words"),
    [
        ("x", {}, "can't be told from its name"),
        ("x.onnx", {}, "can't be told from its name"),
        ("x.pth", {"format": "st"}, "give one that ends in .st"),
        ("x.pth", {"format": "hf"}, "wrong name for hf; give a directory's"),
        ("x", {"format": "pth"}, "ends in .pth or .pt"),
        ("x.bin", {"dtype": "bfloat16"}, "know no bfloat16"),
        ("x.pth", {"dtype": "Q8_0"}, "only files of rwkv.cpp"),
        ("x.pth", {"dtype": "int3"}, "no dtype 'int3'"),
        ("x", {"format": "gguf"}, "give one that ends in .gguf"),
        ("x", {"format": "onnx"}, "no format 'onnx'"),
        ("x", {"format": "hf", "shard_bytes": 0}, "shard_bytes is 0"),
        ("x", {"format": "hf", "shard_bytes": float("nan")}, "shard_bytes is nan"),
    ],
)
def test_targets_are_checked_at_the_door(path, options, words):
    with pytest.raises(ValueError, match=words):
        Target(path=Path(path), **options)
    Target(path=Path("any.name"), format="ggmf")


def test_check_finds_before_what_would_fail_after(tmp_path, source):
    check(open_source(source), Target(path=tmp_path / "new/x.pth"))
    assert listing(tmp_path) == set()


# ---- memory -------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from pathlib import Path
import receptance.storage.quantized, receptance.conversion.source
from receptance.conversion.converting import convert
from receptance.conversion.target import Target
from receptance.conversion.source import open_source

receptance.conversion.source._MAPPED = 16 << 20
here = Path(sys.argv[1])
convert(open_source(here / "small.pth"), Target(path=here / "small.st"))  # what imports cost
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
before = peak()
for name in sys.argv[2:]:
    convert(open_source(here / "large.pth"), Target(path=here / name))
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_is_bounded_by_tensors_not_by_the_model(tmp_path):
    official(make_model(), tmp_path / "small.pth", tokenizer=None)
    large = tmp_path / "large.pth"
    shapes = tensor_shapes(ModelConfig(vocab_size=256, width=512, num_layers=8))
    torch.save({name: torch.full(shape, 0.01) for name, shape in shapes.items()}, large)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), "x.st", "x.bin"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert large.stat().st_size > 105e6
    assert int(done.stdout) < 70e6

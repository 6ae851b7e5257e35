"""What is found in files and directories: sizes, types, decays, digests, damage, other versions."""

import hashlib
import math
import re
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import make_model, small_bpe

from receptance import formats, save
from receptance.adapters import ADAPTER_FILE, LoRAOptions, make_adapter
from receptance.checking.inspecting import NotFinite, half_life, histogram, inspect
from receptance.formats.ggmf import write_ggmf
from receptance.formats.names_hf import to_hf
from receptance.model import Model
from receptance.quantize.weights import quantize_tensors
from receptance.storage.quantized import About, write_quantized
from receptance.tokenizer import ByteTokenizer

MODEL = make_model()
SIZES = (256, 16, 2, 64)


def sizes(path: Path) -> tuple[int | None, ...]:
    found = inspect(path)
    return found.vocabulary, found.width, found.layers, found.ffn_width


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    (save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)
    return path


# ---- every format says the same of the same model ------------------------------------------------


def as_pth(folder: Path) -> Path:
    return write(folder / "m.pth", MODEL.state_dict())


def as_legacy(folder: Path) -> Path:
    torch.save(MODEL.state_dict(), folder / "m.pth", _use_new_zipfile_serialization=False)
    return folder / "m.pth"


def as_safetensors(folder: Path) -> Path:
    return write(folder / "m.safetensors", MODEL.state_dict())


def as_transformers(folder: Path) -> Path:
    (folder / "hf").mkdir()
    tensors = {to_hf(name): x for name, x in MODEL.state_dict().items()}
    write(folder / "hf/model.safetensors", tensors)
    (folder / "hf/config.json").write_text('{"model_type": "rwkv"}')
    return folder / "hf"


def as_rwkv_cpp(folder: Path) -> Path:
    write_ggmf(folder / "m.bin", MODEL.config, MODEL.state_dict(), "FP32")
    return folder / "m.bin"


def as_checkpoint(folder: Path) -> Path:
    save(MODEL, folder / "mine", ByteTokenizer())
    return folder / "mine"


def as_quantized(folder: Path) -> Path:
    about = About(kind="int8", group=128, source=MODEL.fingerprint())
    weights = quantize_tensors(MODEL.state_dict(), "int8", None)
    write_quantized(folder / "small", MODEL.config, ByteTokenizer(), about, weights)
    return folder / "small"


WRITERS = {
    "PyTorch zip file": as_pth,
    "PyTorch legacy file": as_legacy,
    "safetensors": as_safetensors,
    "transformers directory": as_transformers,
    "rwkv.cpp file, version 101": as_rwkv_cpp,
    "receptance directory, version 1": as_checkpoint,
    "receptance quantized directory, version 1": as_quantized,
}


def half_lives_one_by_one(model: Model) -> list[float]:
    """From the recurrence itself: a value of 1 is multiplied by exp(-exp(time_decay))."""
    decays = [b.att.time_decay.tolist() for b in model.blocks]
    return [math.log(2) / math.exp(x) for layer in decays for x in layer]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_known_and_says_the_same(name, tmp_path):
    found = inspect(WRITERS[name](tmp_path))
    assert (found.format, found.version, found.problem, found.damage) == (
        name,
        "RWKV-4",
        None,
        None,
    )
    assert (found.vocabulary, found.width, found.layers, found.ffn_width) == SIZES
    assert found.parameters == MODEL.config.num_parameters == sum(found.dtypes.values())
    assert found.not_finite == {}
    assert "bytes" in found.tokenizer
    wanted = half_lives_one_by_one(MODEL)
    assert sum(found.half_lives.values()) == len(wanted) == 32
    assert found.half_lives["1 to 4"] == sum(1 <= x < 4 for x in wanted)
    assert found.half_lives["16384 and more"] == sum(x >= 16384 for x in wanted)


@given(st.lists(st.floats(-12, 3), min_size=1, max_size=30))
def test_half_lives_are_those_of_the_recurrence(decays):
    kept = [math.exp(-math.exp(x)) for x in decays]
    for decay, share in zip(decays, kept, strict=True):
        assert half_life(share) == pytest.approx(math.log(2) / math.exp(decay), rel=1e-3)
    counts = histogram({0: kept})
    assert sum(counts.values()) == len(decays)
    assert counts["below 1"] == sum(half_life(x) < 1 for x in kept)


def test_retentions_are_by_layer_the_longest_first(tmp_path):
    found = inspect(as_pth(tmp_path))
    assert list(found.retentions) == [0, 1]
    for layer, shares in found.retentions.items():
        decay = MODEL.blocks[layer].att.time_decay.detach().double()
        wanted = torch.exp(-decay.exp()).sort(descending=True).values
        assert torch.equal(torch.tensor(shares, dtype=torch.float64), wanted)


# ---- values, files, tokenizers -------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_values_that_are_not_finite_are_counted_by_tensor(suffix, tmp_path):
    tensors = {name: x.clone() for name, x in MODEL.state_dict().items()}
    tensors["head.weight"][0, :3] = torch.nan
    tensors["blocks.1.ffn.key.weight"][5, 5] = torch.inf
    tensors["blocks.1.ffn.key.weight"][6, 5] = -torch.inf
    found = inspect(write(tmp_path / f"bad{suffix}", tensors))
    assert found.not_finite == {
        "head.weight": NotFinite(3, 0),
        "blocks.1.ffn.key.weight": NotFinite(0, 2),
    }


def test_types_are_counted(tmp_path):
    tensors = {n: x.bfloat16() if x.dim() == 2 else x for n, x in MODEL.state_dict().items()}
    found = inspect(write(tmp_path / "mixed.pth", tensors))
    wide = sum(x.numel() for x in tensors.values() if x.dtype == torch.float32)
    assert found.dtypes == {"bfloat16": found.parameters - wide, "float32": wide}


def test_digests_are_those_of_sha256sum(tmp_path):
    path = as_pth(tmp_path)
    content = path.read_bytes()
    found = inspect(path)
    assert found.digests == {"m.pth": hashlib.sha256(content).hexdigest()}
    assert found.bytes == len(content)
    directory = as_checkpoint(tmp_path)
    assert inspect(directory).digests == {
        name: hashlib.sha256((directory / name).read_bytes()).hexdigest()
        for name in ("config.json", "model.safetensors")
    }


def test_a_damaged_directory_is_described_and_named(tmp_path):
    directory = as_checkpoint(tmp_path)
    content = bytearray((directory / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (directory / "model.safetensors").write_bytes(content)
    found = inspect(directory)
    assert "model.safetensors does not match its sha256" in str(found.damage)
    assert found.digests == {"model.safetensors": hashlib.sha256(content).hexdigest()}


def test_a_directory_without_its_manifest_is_damaged(tmp_path):
    for directory in (as_checkpoint(tmp_path), as_quantized(tmp_path)):
        (directory / "manifest.json").unlink()
        assert "manifest.json is missing" in str(inspect(directory).damage)


def test_of_a_run_the_newest_whole_checkpoint(tmp_path):
    for step in (1, 2):
        save(MODEL, tmp_path / f"run/step-{step}", ByteTokenizer())
    (tmp_path / "run/step-2/config.json").unlink()
    with pytest.warns(UserWarning, match=r"passed over .*step-2/config\.json is missing"):
        found = inspect(tmp_path / "run")
    assert found.path == str(tmp_path / "run/step-1")
    assert found.about == f"the newest whole one of 2 in {tmp_path / 'run'}"


@pytest.mark.parametrize(
    ("vocabulary", "file", "words"),
    [
        (256, None, "bytes"),
        (50277, None, "probably that of the Pile, 20B_tokenizer.json; no file beside it"),
        (50277, "20B_tokenizer.json", "beside it is 20B_tokenizer.json"),
        (65536, "rwkv_vocab_v20230424.txt", "World, .*; beside it is rwkv_vocab_v20230424.txt"),
        (300, None, "not known: one of 300 ids"),
    ],
)
def test_the_tokenizer_is_guessed(vocabulary, file, words, tmp_path):
    model = make_model(vocabulary, width=2, layers=1)
    if file is not None:
        (tmp_path / file).touch()
    found = inspect(write(tmp_path / "m.pth", model.state_dict()))
    assert re.search(words, found.tokenizer)


def test_a_directory_of_ours_knows_its_tokenizer(tmp_path):
    save(make_model(300), tmp_path / "mine", small_bpe())
    assert inspect(tmp_path / "mine").tokenizer == "bpe, in the directory"


# ---- what is not a model -------------------------------------------------------------------------


def test_an_adapter_and_a_state_say_what_they_are(tmp_path):
    (tmp_path / "lora").mkdir()
    fingerprint = MODEL.fingerprint()
    make_adapter(MODEL, LoRAOptions(rank=2)).save(tmp_path / "lora" / ADAPTER_FILE, fingerprint)
    for path in (tmp_path / "lora", tmp_path / "lora" / ADAPTER_FILE):
        found = inspect(path)
        assert (found.kind, found.about) == ("adapter", f"lora, of model {fingerprint[:12]}")
    _, state = MODEL(torch.zeros(3, 4, dtype=torch.int64))
    state.save(tmp_path / "state", fingerprint)
    found = inspect(tmp_path / "state")
    assert (found.kind, found.about) == ("state", f"3 rows, of model {fingerprint[:12]}")


def test_a_directory_with_several_files_asks_for_one(tmp_path):
    as_pth(tmp_path)
    as_safetensors(tmp_path)
    with pytest.raises(ValueError, match=r"name one of its files: m\.pth, m\.safetensors"):
        inspect(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"GGUF" + bytes(40), "a GGUF file"),
        (b"lmgg" + bytes(40), r"an rwkv.cpp \(ggml\) file"),
        (b"<!doctype html>", "a web page"),
        (b"<html><body>", "a web page"),
        (b"some text", "no file of weights that is known here"),
        (b"\x80\x04N.", "protocol 4"),
        (struct.pack("<Q", 10**9) + b'{"a":1}', "damaged"),
    ],
)
def test_files_of_other_kinds_are_refused_in_one_line(content, words, tmp_path):
    (tmp_path / "naïve 狐.pth").write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        inspect(tmp_path / "naïve 狐.pth")
    assert "\n" not in str(caught.value) and "naïve 狐.pth" in str(caught.value)


# ---- other versions of RWKV ----------------------------------------------------------------------
# Names and shapes of their official files, at C = 8 with 2 heads.

C, V, H = 8, 19, 2
EACH = {"ln1.weight": (C,), "ln1.bias": (C,), "ln2.weight": (C,), "ln2.bias": (C,)}
MATRICES = {f"att.{part}.weight": (C, C) for part in ("receptance", "key", "value", "output")}
FFN = {"ffn.key.weight": (28, C), "ffn.receptance.weight": (C, C), "ffn.value.weight": (C, 28)}
MIXES_5 = {f"att.time_mix_{x}": (1, 1, C) for x in "kvrg"}
MIXES_5 |= {f"ffn.time_mix_{x}": (1, 1, C) for x in "kr"}
GATED = {"att.gate.weight": (C, C), "att.ln_x.weight": (C,), "att.ln_x.bias": (C,)}
V5 = EACH | MATRICES | FFN | MIXES_5 | GATED
V5 |= {"att.time_decay": (H,), "att.time_faaaa": (H,)}
V52 = V5 | {"att.time_decay": (H, C // H), "att.time_faaaa": (H, C // H)}
V6 = EACH | MATRICES | FFN | GATED | {f"att.time_maa_{x}": (1, 1, C) for x in "xwkvrg"}
V6 |= {"att.time_maa_w1": (C, 160), "att.time_maa_w2": (5, 32, C), "att.time_decay": (1, 1, C)}
V6 |= {"att.time_decay_w1": (C, 64), "att.time_decay_w2": (64, C), "att.time_faaaa": (H, C // H)}
V6 |= {"ffn.time_maa_k": (1, 1, C), "ffn.time_maa_r": (1, 1, C)}
VERSIONS = {"RWKV-5.1": V5, "RWKV-5.2": V52, "RWKV-6": V6}


def official(version: str) -> dict[str, torch.Tensor]:
    shapes = {f"blocks.{i}.{n}": s for i in range(3) for n, s in VERSIONS[version].items()}
    shapes |= {"emb.weight": (V, C), "head.weight": (V, C)}
    shapes |= {n: (C,) for n in ("ln_out.weight", "ln_out.bias")}
    shapes |= {f"blocks.0.ln0.{n}": (C,) for n in ("weight", "bias")}
    return {name: torch.zeros(shape).bfloat16() for name, shape in shapes.items()}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("rename", [str, to_hf])
@pytest.mark.parametrize("version", VERSIONS)
def test_other_versions_are_named(version, rename, suffix, tmp_path):
    tensors = {rename(name): x for name, x in official(version).items()}
    path = write(tmp_path / f"other{suffix}", tensors)
    found = inspect(path)
    assert (found.version, found.problem) == (version, None)
    assert sizes(path)[:3] == (V, C, 3) and found.tensors == len(tensors)
    assert formats.read(path).config.extras["head_size"] == C // H


def test_a_version_to_come_is_named(tmp_path):
    tensors = official("RWKV-6") | {"blocks.1.ffn.enn.weight": torch.zeros(V, C)}
    found = inspect(write(tmp_path / "other.pth", tensors))
    assert found.version == "RWKV-8" and found.half_lives == {}
    assert "this is an RWKV-8 file; this release reads RWKV-4, 5.0," in str(found.problem)


@pytest.mark.parametrize("stray", [{"head.weight": torch.full((2, 2), math.nan)}, None])
def test_it_reads_the_files_that_loading_reads(stray, tmp_path):
    """Not what else lies there: a copy of before, a shard of another set, rubbish."""
    path = as_transformers(tmp_path)
    before = inspect(path)
    if stray is None:
        (path / "model-00099-of-00099.safetensors").write_bytes(b"rubbish")
    else:
        save_file(stray, path / "model_old.safetensors")
    assert inspect(path) == before

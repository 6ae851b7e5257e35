"""Files of llama.cpp: what is written, what is read, and what is refused.

What is written is read by the gguf package. What is read is also written by it, as llama.cpp's own
conversion does it. llama.cpp itself is asked in test_llama_cpp.py.
"""

import struct
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import gguf
import hostile_files as hostile
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model, same_bits
from torch import Tensor

from receptance import Model, ModelConfig, load
from receptance.checking.inspecting import inspect
from receptance.formats import read
from receptance.formats.gguf import (
    check_gguf,
    open_gguf,
    read_gguf,
    stored_kinds,
    write_gguf,
)
from receptance.formats.gguf_header import MAGIC, SUPER_BYTES, read_header
from receptance.formats.gguf_package import super_blocks
from receptance.tokenizer import ByteTokenizer

MODEL = make_model(256, width=64, layers=2, version=7)
SHARES = "rwkvag"


def official(model: Model) -> dict[str, Tensor]:
    """The tensors as a GGUF file can hold them, in which the unused ones are zero."""
    unused = model.config.architecture.unused(model.config)
    return {n: torch.zeros_like(x) if n in unused else x for n, x in model.state_dict().items()}


def write(path: Path, model: Model = MODEL, kind: str = "F32", tokenizer=None) -> Path:
    kinds = dict.fromkeys(model.config.architecture.layouts(model.config), kind)
    stored = stored_kinds(model.config, kinds)
    write_gguf(path, model.config, model.state_dict(), stored, tokenizer)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Not to be changed."""
    return write(tmp_path_factory.mktemp("gguf") / "x.gguf", tokenizer=ByteTokenizer())


OUTSIDE = {"emb": "token_embd", "blocks.0.ln0": "token_embd_norm", "ln_out": "output_norm",
           "head": "output"}  # fmt: skip
INSIDE = {"ln1": "attn_norm", "ln2": "attn_norm_2", "att.ln_x": "time_mix_ln",
          "ffn.key": "channel_mix_key", "ffn.value": "channel_mix_value"}  # fmt: skip
INSIDE |= {f"att.{x}": f"time_mix_{x}" for x in ("receptance", "key", "value", "output")}


def theirs(model: Model) -> dict[str, np.ndarray]:
    """The tensors as llama.cpp's conversion/rwkv.py renames them and turns them over."""
    state = {n: x.detach().float() for n, x in model.state_dict().items()}
    modules = {f"blocks.{n}.{x}": f"blk.{n}.{y}" for n in range(model.config.num_layers)
               for x, y in INSIDE.items()}  # fmt: skip
    found = {
        f"{name}.{kind}": state[f"{module}.{kind}"]
        for module, name in (OUTSIDE | modules).items()
        for kind in ("weight", "bias")
        if f"{module}.{kind}" in state
    }
    for n in range(model.config.num_layers):
        found |= {f"blk.{n}.{name}.weight": x for name, x in vectors(state, n).items()}
    return {name: np.ascontiguousarray(x.numpy()) for name, x in found.items()}


def vectors(state: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """What is not a module of its own in a block."""
    att = f"blocks.{layer}.att."
    found = {f"time_mix_{x}": state[f"{att}{x}"].flatten() for x in ("k_k", "k_a", "r_k")}
    found["time_mix_lerp_fused"] = torch.stack([state[f"{att}x_{x}"] for x in SHARES])
    found["channel_mix_lerp_k"] = state[f"blocks.{layer}.ffn.x_k"].squeeze()
    for name in ("w0", "w1", "w2", "a0", "a1", "a2", "v0", "v1", "v2", "g1", "g2"):
        # In the first block llama.cpp has others for those that no model uses.
        source = name.replace("v", "a") if layer == 0 else name
        tensor = state[f"{att}{source}"]
        found[f"time_mix_{name}"] = tensor.mT if tensor.dim() == 2 else tensor.flatten()
    return found


def by_the_package(
    path: Path,
    model: Model = MODEL,
    more: Mapping[str, np.ndarray] = MappingProxyType({}),
    **changed: object,
) -> Path:
    """A file as llama.cpp's conversion writes it, with other values of some keys, or none."""
    writer = gguf.GGUFWriter(path, "rwkv7")
    config = model.config
    keys = {
        "context_length": 1 << 20,
        "embedding_length": config.width,
        "block_count": config.num_layers,
        "feed_forward_length": config.ffn_width,
        "attention.layer_norm_epsilon": 1e-5,
        "wkv.head_size": config.extras["head_size"],
        "attention.decay_lora_rank": config.extras["decay_rank"],
        "attention.iclr_lora_rank": config.extras["rate_rank"],
        "attention.value_residual_mix_lora_rank": config.extras["value_rank"],
        "attention.gate_lora_rank": config.extras["gate_rank"],
        "attention.head_count": 0,
    }
    for key, value in (keys | changed).items():
        if value is not None:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add = writer.add_string if isinstance(value, str) else add
            add(key if "split" in key else f"rwkv7.{key}", value)
    for name, tensor in (theirs(model) | dict(more)).items():
        writer.add_tensor(name, tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---- what is written ----------------------------------------------------------------------------


def test_the_package_reads_what_its_own_writer_would_have_been_given(whole):
    reader = gguf.GGUFReader(whole)
    wanted = theirs(MODEL)
    assert {x.name for x in reader.tensors} == set(wanted)
    for found in reader.tensors:
        assert found.tensor_type == gguf.GGMLQuantizationType.F32
        assert np.array_equal(found.data.reshape(-1), wanted[found.name].reshape(-1)), found.name
        shape = tuple(reversed(found.shape.tolist()))
        assert shape == wanted[found.name].shape, found.name
        assert found.data_offset % 32 == 0
    value = lambda key: reader.get_field(key).contents()  # noqa: E731
    assert value("general.architecture") == "rwkv7" and value("general.file_type") == 0
    assert value("rwkv7.wkv.head_size") == 64 and value("rwkv7.attention.head_count") == 0
    assert value("rwkv7.feed_forward_length") == 256
    assert value("rwkv7.attention.layer_norm_epsilon") == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("kind", "head", "file_type"),
    [("F16", "F16", 1), ("BF16", "BF16", 32), ("Q8_0", "Q8_0", 7), ("Q4_0", "Q8_0", 2)],
)
def test_matrices_alone_are_narrow(tmp_path, kind, head, file_type):
    reader = gguf.GGUFReader(write(tmp_path / "x.gguf", kind=kind))
    assert reader.get_field("general.file_type").contents() == file_type
    wanted = theirs(MODEL)
    for found in reader.tensors:
        matrix = found.name.endswith(("key.weight", "value.weight", "receptance.weight",
                                      "mix_output.weight"))  # fmt: skip
        outer = found.name in ("token_embd.weight", "output.weight")
        own = head if outer else kind if matrix else "F32"
        assert found.tensor_type.name == own, found.name
        values = gguf.quants.dequantize(found.data, found.tensor_type).reshape(-1)
        bound = {"F32": 0, "F16": 1e-3, "BF16": 4e-3, "Q8_0": 8e-3, "Q4_0": 0.13}[own]
        exact = wanted[found.name].reshape(-1)
        assert np.abs(values - exact).max() <= bound * np.abs(exact).max(), found.name


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("layers", [1, 3])
def test_it_is_read_back(tmp_path, kind, layers):
    ranks = {"decay_rank": 8, "rate_rank": 16, "value_rank": 24, "gate_rank": 40, "head_size": 16}
    model = make_model(256, width=32, layers=layers, version=7, **ranks)
    file = open_gguf(write(tmp_path / "x.gguf", model, kind, ByteTokenizer()))
    assert file.config == model.config
    assert set(file) == set(model.state_dict()) and len(file) == len(model.state_dict())
    matrices = model.config.architecture.layouts(model.config)
    for name, wanted in official(model).items():
        found = file[name]
        assert found.dtype == file.dtype(name) and found.shape == wanted.shape, name
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
        narrow = name in matrices
        assert found.dtype == (dtype if narrow else torch.float32), name
        if narrow and kind.startswith("Q"):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0.13 * float(wanted.abs().max()))
        else:
            assert torch.equal(found, wanted.to(found.dtype)), name


def test_what_llama_cpp_cannot_run_is_not_written(tmp_path):
    with pytest.raises(
        ValueError, match=r"runs no RWKV-4; this release writes them of RWKV-6 and RWKV-7"
    ):
        check_gguf(ModelConfig(vocab_size=4, width=32, num_layers=1), None)
    sizes = {"vocab_size": 4, "width": 32, "num_layers": 1, "version": 7}
    with pytest.raises(ValueError, match=r"group_norm_epsilon is 1e-05, and llama.cpp always"):
        check_gguf(ModelConfig(**sizes, extras={"group_norm_epsilon": 1e-5}), None)
    with pytest.raises(ValueError, match=r"Q4_0 wants widths that are multiples of 32"):
        check_gguf(ModelConfig(**sizes | {"width": 8}), "Q4_0")
    model = make_model(256, width=64, layers=1, version=7)
    with torch.no_grad():
        model.head.weight[3, 5] = 1e6
    for kind in ("F16", "Q4_0"):
        with pytest.raises(ValueError, match=r"head.weight (has values too|cannot be)"):
            write(tmp_path / "x.gguf", model, kind)
        model.head.weight.data[3, 5] = 1e9
    assert list(tmp_path.iterdir()) == []


# ---- what is read -------------------------------------------------------------------------------


def test_a_file_of_llama_cpps_conversion(tmp_path):
    path = by_the_package(tmp_path / "theirs.gguf")
    assert same_bits(read_gguf(path), official(MODEL))
    model, tokenizer = load(path)
    assert model.config == MODEL.config and tokenizer.kind == "bytes"
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[0], MODEL(tokens)[0], rtol=0, atol=0)


def test_any_suffix_and_a_directory(tmp_path, whole):
    (tmp_path / "weights").write_bytes(whole.read_bytes())
    assert read(tmp_path / "weights").config == MODEL.config
    (tmp_path / "weights").rename(tmp_path / "only.gguf")
    weights = read(tmp_path)
    assert weights.source == tmp_path / "only.gguf" and weights.tokenizer().kind == "bytes"
    found = inspect(tmp_path / "only.gguf")
    assert (found.format, found.version) == ("GGUF file of rwkv7", "RWKV-7")
    assert found.tokenizer == "bytes, in the file" and found.problem is None
    assert found.dtypes == {"F32": MODEL.config.num_parameters} and found.half_lives


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *SUPER_BYTES])
def test_every_kind_of_block_is_what_the_package_makes_of_it(tmp_path, kind, monkeypatch):
    """The file is llama.cpp's own with one matrix of random bytes, whose scales are numbers."""
    monkeypatch.setattr("receptance.formats.gguf_package._AT_ONCE", 5)
    model = make_model(16, width=256, layers=1, version=7)
    rng = np.random.default_rng(0)
    code = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[code]
    data = rng.integers(0, 256, (16, 256 // block * size), dtype=np.uint8)
    blocks = data.reshape(-1, size)
    halves = {"Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82)}.get(kind, (0, 2))
    for at in halves[: 1 if kind in ("Q8_0", "Q4_0", "Q5_0") else None]:
        blocks[:, at : at + 2] = rng.normal(size=len(blocks)).astype("<f2")[:, None].view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "rwkv7")
    writer.add_uint32("rwkv7.wkv.head_size", 64)
    writer.add_uint32("rwkv7.attention.value_residual_mix_lora_rank", 32)
    for name, tensor in theirs(model).items():
        own = {"tensor": data, "raw_dtype": code} if name == "output.weight" else {"tensor": tensor}
        writer.add_tensor(name, **own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "x.gguf")
    assert file.kinds == {"F32", kind} and file.dtype("head.weight") == torch.float32
    wanted = gguf.quants.dequantize(data, code)
    assert np.array_equal(file["head.weight"].numpy(), wanted)


def test_scales_that_are_not_finite_are_passed_on_without_a_warning():
    data = np.full(144, 0xFF, np.uint8)
    assert np.isnan(super_blocks(data, "Q4_K")).all()


def test_values_that_are_no_numbers_are_found_by_inspect(tmp_path):
    model = make_model(256, width=64, layers=1, version=7)
    with torch.no_grad():
        model.ln_out.weight[3] = torch.nan
    assert set(inspect(write(tmp_path / "x.gguf", model)).not_finite) == {"ln_out.weight"}


def test_tensors_stay_mapped(whole):
    open_gguf(whole)["head.weight"]
    tracemalloc.start()
    file = open_gguf(whole)
    tensors = [file[name] for name in ("emb.weight", "head.weight", "blocks.1.ffn.key.weight")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(x.nbytes for x in tensors) > 190_000
    assert peak < 190_000


# ---- what is refused ----------------------------------------------------------------------------


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def key(name: str, code: int, value: bytes) -> bytes:
    return text(name.encode()) + struct.pack("<I", code) + value


def info(name: str, shape: tuple[int, ...], code: int = 0, offset: int = 0) -> bytes:
    numbers = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, code, offset)
    return text(name.encode()) + numbers


ARCHITECTURE = key("general.architecture", 8, text(b"rwkv7"))


def header(
    keys: tuple[bytes, ...] = (ARCHITECTURE,),
    tensors: tuple[bytes, ...] = (),
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: int = 64,
) -> bytes:
    counts = counts or (len(tensors), len(keys))
    start = struct.pack("<4sIQQ", MAGIC, version, *counts)
    content = b"".join((start, *keys, *tensors))
    return content + bytes(-len(content) % 32 + data)


LISTS = {
    "of numbers": struct.pack("<IQ", 0, 1 << 60),
    "of wide numbers": struct.pack("<IQ", 12, (1 << 61) + 1),
    "of texts": struct.pack("<IQ", 8, 1 << 22),
    "of very many texts": struct.pack("<IQ", 8, 1 << 60),
    "of lists": struct.pack("<IQIQ", 9, 1, 0, 1),
}
HOSTILE = {
    "a number of tensors": (header(counts=(1 << 40, 1)), "claims to have .* tensors"),
    "a number of keys": (header(counts=(0, 1 << 62)), "claims to have .* keys"),
    "more keys than there are": (header(counts=(0, 9)), "damaged"),
    "another version": (header(version=1), "GGUF file version 1; this release reads"),
    "the other order of bytes": (header(version=3 << 24), "the other order of bytes"),
    "two keys": (header((ARCHITECTURE, ARCHITECTURE)), "two keys 'general.architecture'"),
    "an unknown value": (header((key("a", 77, b""),)), "a value of the unknown type 77"),
    "a long text": (header((key("a", 8, struct.pack("<Q", 1 << 63)),)), "cut short"),
    "a long key": (header((struct.pack("<Q", 1 << 50),)), "a name of 1125899906842624 bytes"),
    **{f"a list {n}": (header((key("a", 9, x),)), "cut short|claims|9") for n, x in LISTS.items()},
    "two tensors": (header(tensors=(info("a", (1,)), info("a", (1,), 0, 32))), "two tensors named"),
    "tensors in each other": (
        header(tensors=(info("a", (9,)), info("b", (4,), 0, 32))), "tensors 'a' and 'b' overlap"),
    "tensors in the same place": (
        header(tensors=(info("a", (4,)), info("b", (4,)))), "tensors 'a' and 'b' overlap"),
    "a place that is not aligned": (header(tensors=(info("a", (4,), 0, 4),)), "not aligned"),
    "a place beyond the end": (header(tensors=(info("a", (4,), 0, 1 << 62),)), "cut short"),
    "a place that overflows": (header(tensors=(info("a", (4,), 0, (1 << 64) - 32),)), "cut short"),
    "a shape that overflows": (header(tensors=(info("a", (1 << 32, 1 << 32)),)), "cut short"),
    "no values": (header(tensors=(info("a", (0, 1 << 62)),)), "has the shape"),
    "no axes": (header(tensors=(info("a", ()),)), "has 0 axes"),
    "many axes": (header(tensors=(info("a", (1,) * 9),)), "has 9 axes"),
    "an unknown type": (header(tensors=(info("a", (4,), 99),)), "type 99; this release reads F32"),
    "half a block": (header(tensors=(info("a", (33,), 8),)), "Q8_0 and has rows of 33 values"),
    "half a large block": (header(tensors=(info("a", (32,), 12),)), "multiple of 256"),
    "no power of two": (
        header((ARCHITECTURE, key("general.alignment", 4, struct.pack("<I", 3)))), "power of two"),
    "an alignment of nothing": (
        header((ARCHITECTURE, key("general.alignment", 4, bytes(4)))), "power of two"),
    "an alignment that is a text": (
        header((ARCHITECTURE, key("general.alignment", 8, text(b"32")))), "is no number"),
    "an architecture that is a number": (
        header((key("general.architecture", 4, bytes(4)),)), "is no text"),
    "another architecture": (
        header((key("general.architecture", 8, text(b"lla\nma")),)), r"architecture is 'lla\\nma'"),
    "no architecture": (header(()), "architecture is 'None'; this release reads rwkv6, rwkv7"),
    "no tensors": (header(), "wkv.head_size is None"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(tmp_path, refusal, name):
    content, words = HOSTILE[name]
    (tmp_path / "x.gguf").write_bytes(content)
    with hostile.bounded():
        message = refusal(open_gguf, tmp_path / "x.gguf")
    assert message.startswith(str(tmp_path / "x.gguf: "))
    with pytest.raises(ValueError, match=words):
        open_gguf(tmp_path / "x.gguf")


KEYS = {
    "embedding_length": (128, "embedding_length is 128, but its tensors have 64"),
    "block_count": (3, "block_count is 3"),
    "feed_forward_length": (1, "feed_forward_length is 1"),
    "wkv.head_size": (48, "head_size is 48; the width, 64, must be a multiple"),
    "attention.decay_lora_rank": (1, "decay_lora_rank is 1"),
    "attention.gate_lora_rank": (5.5, "gate_lora_rank is 5.5"),
    "attention.value_residual_mix_lora_rank": (7, "value_residual_mix_lora_rank is 7"),
    "attention.layer_norm_epsilon": (float("nan"), "layer_norm_epsilon is nan"),
    "split.count": (4, "one part of several"),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_that_the_tensors_contradict(tmp_path, refusal, name):
    value, words = KEYS[name]
    assert words in refusal(open_gguf, by_the_package(tmp_path / "x.gguf", **{name: value}))


@pytest.mark.parametrize("value", [None, 0, 64.0, float("inf"), 1 << 31, "64"])
def test_the_size_of_a_head_is_needed(tmp_path, refusal, value):
    path = by_the_package(tmp_path / "x.gguf", **{"wkv.head_size": value})
    assert "head_size" in refusal(open_gguf, path)


def test_a_tensor_too_few_and_one_too_many(tmp_path, whole, refusal):
    content = whole.read_bytes()
    for new, words in (
        (b"blk.1.time_mix_keY.weight", "missing are 'blocks.1.att.key.weight'"),
        (b"blk.9.time_mix_key.weight", "missing are"),
        (b"blocks.1.ffn.key.weightzz", "unexpected are 'blocks.1.ffn.key.weightzz'"),
    ):
        changed = content.replace(b"blk.1.time_mix_key.weight", new)
        (tmp_path / "x.gguf").write_bytes(changed)
        assert words in refusal(open_gguf, tmp_path / "x.gguf")


def test_a_tensor_under_two_names(tmp_path, refusal):
    path = by_the_package(tmp_path / "x.gguf", more={"blocks.1.ffn.key.weight": np.ones((256, 64))})
    assert "tensors 'blocks.1.ffn.key.weight' are there under two" in refusal(open_gguf, path)


@settings(max_examples=60)
@given(
    at=st.floats(0, 1),
    size=st.sampled_from([1, 4, 8]),
    number=st.sampled_from(hostile.NUMBERS) | st.integers(0, 255),
)
def test_any_number_of_any_header_changed(tmp_path_factory, whole, at, size, number):
    content = whole.read_bytes()
    _, entries = read_header(np.frombuffer(content, np.uint8))
    place = int(at * (min(entry.offset for entry in entries.values()) - size))
    changed = (number % 256**size).to_bytes(size, "little")
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(content[:place] + changed + content[place + size :])
    found = hostile.outcome(lambda p: (read(p), open_gguf(p).tokenizer()), path)
    assert found is None or found.startswith(str(path))

"""Files of rwkv.cpp: what is written, what is read, and what is refused.

The decoder here takes files apart value by value, from the description of the format alone.
"""

import math
import os
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from receptance.config import ModelConfig
from receptance.formats import read
from receptance.formats.ggmf import open_ggmf, read_ggmf, write_ggmf
from receptance.formats.ggml import KINDS, block_bytes, dequantize, quantize
from receptance.formats.names import tensor_shapes
from receptance.model import Model

SAMPLE = Path(__file__).parents[3] / "shared/data/tiny-rwkv-4v0-660K-FP16.bin"
WIDE = ModelConfig(vocab_size=11, width=32, num_layers=2)
SMALLEST = ModelConfig(vocab_size=3, width=2, num_layers=1, ffn_width=2)
TYPES = {0: "FP32", 1: "FP16", 2: "Q4_0", 3: "Q4_1", 7: "Q5_0", 8: "Q5_1", 9: "Q8_0"}


def weights(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random ones; decays as they are stored in models, in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(s, generator=generator) for n, s in tensor_shapes(config).items()}
    return {n: x.bfloat16().float() if "decay" in n else x for n, x in tensors.items()}


# ---- the format by hand -------------------------------------------------------------------------


def scalar_block(block: bytes, kind: str, version: int) -> list[float]:
    """The 32 values of a block, one by one."""
    old = version == 100
    wide = old and kind in ("Q4_0", "Q4_1", "Q8_0")
    number, size = ("<f", 4) if wide else ("<e", 2)
    (scale,) = struct.unpack_from(number, block)
    minimum, at = 0.0, size
    if kind.endswith("_1"):
        (minimum,), at = struct.unpack_from(number, block, at), 2 * size
    if kind == "Q8_0":
        return [scale * code for code in struct.unpack_from("<32b", block, at)]
    fifth = 0
    if kind.startswith("Q5"):
        (fifth,), at = struct.unpack_from("<I", block, at), at + 4
    zero = {"Q4_0": 8, "Q5_0": 16}.get(kind, 0)
    values = []
    for i in range(32):
        byte, high = (i // 2, i % 2) if old else (i % 16, i // 16)
        code = block[at + byte] >> 4 * high & 15 | (fifth >> i & 1) << 4
        values.append(scale * (code - zero) + minimum)
    return values


def scalar_decode(content: bytes) -> tuple[tuple, dict[str, tuple[str, tuple, list[float]]]]:
    """The header, and of each tensor its type, its shape as torch gives it, and its values."""
    header, at, tensors = struct.unpack_from("<4s5i", content), 24, {}
    while at < len(content):
        axes, length, code = struct.unpack_from("<3i", content, at)
        shape = struct.unpack_from(f"<{axes}i", content, at + 12)[::-1]
        at += 12 + 4 * axes
        name, at = content[at : at + length].decode(), at + length
        count, kind = math.prod(shape), TYPES[code]
        if kind.startswith("FP"):
            letter, size = ("f", 4 * count) if kind == "FP32" else ("e", 2 * count)
            values = list(struct.unpack_from(f"<{count}{letter}", content, at))
        else:
            step = block_bytes(kind, old=header[1] == 100)
            size = count // 32 * step
            blocks = [content[i : i + step] for i in range(at, at + size, step)]
            values = [x for block in blocks for x in scalar_block(block, kind, header[1])]
        tensors[name], at = (kind, shape, values), at + size
    return header, tensors


def assemble(
    config: ModelConfig, data: dict[str, tuple[int, tuple, bytes]], version: int = 101
) -> bytes:
    """A file of tensors given as type, shape and bytes."""
    pieces = [struct.pack("<4s5i", b"fmgg", version, *sizes(config), 0)]
    for name, (code, shape, content) in data.items():
        pieces.append(struct.pack("<3i", len(shape), len(name), code))
        pieces.append(struct.pack(f"<{len(shape)}i", *shape[::-1]) + name.encode() + content)
    return b"".join(pieces)


def sizes(config: ModelConfig) -> tuple[int, int, int]:
    return config.vocab_size, config.width, config.num_layers


def plain(config: ModelConfig) -> dict[str, tuple[int, tuple, bytes]]:
    """All tensors of a model, -1 everywhere, as FP32."""
    shapes = {name: shape[-2:] if "mix" not in name else shape[-1:] for name, shape in
              tensor_shapes(config).items()}  # fmt: skip
    return {n: (0, s, struct.pack("<f", -1) * math.prod(s)) for n, s in shapes.items()}


# ---- writing, and reading it back ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["blocks.0.ffn.key.weight", "emb.weight"])
def test_a_transposed_matrix_is_refused(tmp_path, name):
    """It has as many values as are wanted, in another order."""
    tensors = weights(WIDE)
    tensors[name] = tensors[name].T
    with pytest.raises(ValueError, match=rf"{name} is \[32, \d+\]; the configuration wants"):
        write_ggmf(tmp_path / "x.bin", WIDE, tensors)
    assert list(tmp_path.iterdir()) == []


def test_axes_of_one_may_be_added_or_left_out(tmp_path):
    tensors = weights(WIDE)
    squeezed = {name: x.squeeze() for name, x in tensors.items()}
    deeper = {name: x[None] for name, x in tensors.items()}
    for number, same in enumerate((tensors, squeezed, deeper)):
        write_ggmf(tmp_path / f"{number}.bin", WIDE, same)
    contents = {file.read_bytes() for file in tmp_path.iterdir()}
    assert len(contents) == 1


@pytest.mark.parametrize("kind", ["FP32", "FP16", "Q8_0", "Q4_0"])
def test_an_independent_decoder_finds_what_was_written(tmp_path, kind):
    tensors = weights(WIDE)
    write_ggmf(tmp_path / "model.bin", WIDE, tensors, kind)
    header, found = scalar_decode((tmp_path / "model.bin").read_bytes())
    code = {name: code for code, name in TYPES.items()}[kind]
    assert header == (b"fmgg", 101, *sizes(WIDE), code)
    assert list(found) == list(tensor_shapes(WIDE))
    for name, (stored, shape, values) in found.items():
        wanted = tensors[name]
        assert len(shape) == 1 + (wanted.squeeze().dim() == 2)
        untouched = "FP16" if name in ("emb.weight", "head.weight") and kind[0] == "Q" else kind
        assert stored == ("FP32" if len(shape) == 1 else untouched)
        if "decay" in name:
            wanted = -wanted.double().exp()
        limit = {"FP32": 1e-7, "FP16": 5e-4, "Q8_0": 0.01, "Q4_0": 0.15}[stored]
        error = (torch.tensor(values, dtype=torch.float64) - wanted.flatten()).abs().max()
        assert error <= limit * wanted.abs().max(), name


@pytest.mark.parametrize("kind", ["FP32", "FP16"])
def test_what_is_read_back_is_what_was_written(tmp_path, assert_same, kind):
    tensors = weights(SMALLEST)
    write_ggmf(tmp_path / "model.bin", SMALLEST, tensors, kind)
    if kind == "FP16":
        tensors = {n: x.half() if x.squeeze().dim() == 2 else x for n, x in tensors.items()}
    assert_same(read_ggmf(tmp_path / "model.bin"), tensors)


@given(st.lists(st.floats(-100, 88, width=32), min_size=1, max_size=40))
def test_decays_come_back_as_nearly_as_their_exponential_tells(tmp_path_factory, decays):
    folder = tmp_path_factory.getbasetemp()
    config = replace(SMALLEST, width=len(decays))
    tensors = weights(config) | {"blocks.0.att.time_decay": torch.tensor(decays)}
    write_ggmf(folder / "one.bin", config, tensors, "FP32")
    found = read_ggmf(folder / "one.bin")
    write_ggmf(folder / "two.bin", config, found, "FP32")
    assert (folder / "one.bin").read_bytes() == (folder / "two.bin").read_bytes()
    back, wanted = found["blocks.0.att.time_decay"], torch.tensor(decays)
    # From 1 on, neighboring parameters have different exponentials, until those are subnormal.
    exact = (wanted.abs() >= 1) & (wanted > -87)
    assert torch.equal(back[exact], wanted[exact])
    assert torch.allclose(back.double().exp(), wanted.double().exp(), rtol=2e-7, atol=2e-45)


def test_decays_outside_of_what_float32_has_stay_finite(tmp_path):
    decays = torch.tensor([-torch.inf, -150.0, -50.0, 0.0, 88.0, 95.0])
    config = replace(SMALLEST, width=6)
    tensors = weights(config) | {"blocks.0.att.time_decay": decays}
    write_ggmf(tmp_path / "model.bin", config, tensors, "FP32")
    found = read_ggmf(tmp_path / "model.bin")["blocks.0.att.time_decay"]
    assert found.isfinite().all()
    assert torch.equal(torch.exp(-found.exp()), torch.exp(-decays.exp()))


def test_a_file_becomes_another_tensor_by_tensor(tmp_path):
    model = Model(WIDE, seed=3)
    write_ggmf(tmp_path / "half.bin", WIDE, model.state_dict(), "FP16")
    file = open_ggmf(tmp_path / "half.bin")
    assert file.kinds == {"FP16", "FP32"} and len(file) == 18 * 2 + 6
    write_ggmf(tmp_path / "small.bin", file.config, file, "Q8_0")
    assert read(tmp_path / "small.bin").config == WIDE
    assert (tmp_path / "small.bin").stat().st_size < (tmp_path / "half.bin").stat().st_size


def test_values_stay_mapped_where_the_file_has_them_aligned(tmp_path):
    write_ggmf(tmp_path / "model.bin", WIDE, weights(WIDE), "FP32")
    file = open_ggmf(tmp_path / "model.bin")
    start = file._data.ctypes.data
    for name, entry in file._entries.items():
        if "decay" not in name:
            mapped = file[name].data_ptr() == start + entry.offset
            assert mapped == (entry.offset % 4 == 0), name
            assert file[name].data_ptr() % 4 == 0
    file["emb.weight"].zero_()
    assert read_ggmf(tmp_path / "model.bin")["emb.weight"].any(), "the file itself was changed"


# ---- blocks -------------------------------------------------------------------------------------

finite = st.floats(-1e4, 1e4, width=32)
rows = st.lists(
    st.one_of(finite, st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.5e-6])), min_size=32, max_size=32
)


@given(rows)
def test_q8_0_follows_its_definition(values):
    exact = np.array(values, np.float32)
    block = quantize(exact, "Q8_0").tobytes()
    largest = np.abs(exact).max()
    scale = largest / np.float32(127)
    inverse = np.float32(1) / scale if scale > 1e-38 else np.float32(0)
    codes = [int(math.copysign(math.floor(abs(float(x * inverse)) + 0.5), x)) for x in exact]
    assert block == struct.pack("<e32b", scale, *codes)


@given(rows)
def test_q4_0_follows_its_definition(values):
    exact = np.array(values, np.float32)
    block = quantize(exact, "Q4_0").tobytes()
    scale = exact[np.abs(exact).argmax()] / np.float32(-8)
    inverse = np.float32(1) / scale if abs(scale) > 1e-38 else np.float32(0)
    codes = [min(15, int(x * inverse + np.float32(8.5))) for x in exact]
    packed = [codes[i] | codes[i + 16] << 4 for i in range(16)]
    assert block == struct.pack("<e16B", scale, *packed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", [100, 101])
@given(st.randoms(use_true_random=False))
def test_every_kind_of_block_is_read_as_its_definition_says(kind, version, rng):
    old = version == 100
    size = block_bytes(kind, old=old)
    count = 3
    content = bytearray(rng.randbytes(size * count))
    # Scales and minimums that are ordinary numbers.
    wide = old and kind in ("Q4_0", "Q4_1", "Q8_0")
    for block in range(count):
        for field in range(2 if kind.endswith("_1") else 1):
            at = block * size + field * (4 if wide else 2)
            struct.pack_into("<f" if wide else "<e", content, at, rng.uniform(-2, 2))
    found = dequantize(np.frombuffer(bytes(content), np.uint8), kind, old=old)
    wanted = [
        value
        for block in range(count)
        for value in scalar_block(bytes(content[block * size :][:size]), kind, version)
    ]
    assert np.allclose(found, wanted, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_those_of_ggmls_own_package(kind):
    quants = pytest.importorskip("gguf", reason="ggml's package is not here").quants
    values = np.random.default_rng(0).normal(0, 0.1, (64, 128)).astype(np.float32)
    values[:3, :32] = [[0.0], [1e-7], [0.5]]
    blocks = quants.quantize(values, quants.GGMLQuantizationType[kind]).reshape(-1)
    wanted = quants.dequantize(blocks, quants.GGMLQuantizationType[kind])
    assert np.array_equal(dequantize(blocks, kind), wanted)
    if kind in ("Q8_0", "Q4_0"):
        assert np.array_equal(quantize(values.reshape(-1), kind), blocks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", [100, 101])
def test_quantized_matrices_are_read_in_both_versions(tmp_path, kind, version):
    data = plain(WIDE)
    name, shape = "blocks.1.ffn.key.weight", (128, 32)
    code = {name: code for code, name in TYPES.items()}[kind]
    size = block_bytes(kind, old=version == 100)
    block = b"\0<" * 2 + bytes(range(1, size - 3))  # scale 1.0, also as the half of a float32
    data[name] = (code, shape, block * 128)
    content = assemble(WIDE, data, version)
    (tmp_path / "model.bin").write_bytes(content)
    found = read_ggmf(tmp_path / "model.bin")[name]
    wanted = torch.tensor(scalar_decode(content)[1][name][2]).view(shape)
    assert found.dtype == torch.float32
    assert torch.allclose(found, wanted, rtol=1e-6)


# ---- what is refused ----------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path) -> Path:
    write_ggmf(tmp_path / "small.bin", SMALLEST, weights(SMALLEST), "FP32")
    return tmp_path / "small.bin"


def test_a_file_cut_at_any_byte_is_refused(small, refusal):
    for length in reversed(range(small.stat().st_size)):
        os.truncate(small, length)
        message = refusal(read, small)
        if length >= 4:
            assert any(w in message for w in ("cut short", "missing are", "no RWKV")), length


def fields(content: bytes) -> list[int]:
    """Where every number of the headers is."""
    at, found = 24, [4, 8, 12, 16, 20]
    while at < len(content):
        axes, length, _ = struct.unpack_from("<3i", content, at)
        found += range(at, at + 12 + 4 * axes, 4)
        count = math.prod(struct.unpack_from(f"<{axes}i", content, at + 12))
        at += 12 + 4 * axes + length + 4 * count
    return found


@given(st.data())
def test_any_number_in_any_header_field_is_read_right_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed.bin"
    write_ggmf(path, SMALLEST, weights(SMALLEST), "FP32")
    content = bytearray(path.read_bytes())
    at = data.draw(st.sampled_from(fields(content)))
    numbers = st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(-1, 300))
    struct.pack_into("<i", content, at, data.draw(numbers))
    path.write_bytes(content)
    tracemalloc.start()
    config, message = outcome(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6
    assert config == SMALLEST or (str(path) in message and "\n" not in message)


def outcome(path: Path) -> tuple[ModelConfig | None, str]:
    """What model is in the file, or why there is none."""
    try:
        return read(path).config, ""
    except ValueError as error:
        return None, str(error)


@given(st.binary(max_size=300))
def test_any_bytes_after_the_header_are_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "noise.bin"
    path.write_bytes(struct.pack("<4s5i", b"fmgg", 101, 3, 2, 1, 0) + content)
    with pytest.raises(ValueError, match=r"noise\.bin: "):
        open_ggmf(path)


def test_what_is_wrong_is_said(tmp_path, refusal):
    def refused(content: bytes) -> str:
        (tmp_path / "model.bin").write_bytes(content)
        return refusal(open_ggmf, tmp_path / "model.bin")

    good = plain(SMALLEST)
    assert "file version 99" in refused(assemble(SMALLEST, good, 99))
    assert "its header says" in refused(assemble(replace(SMALLEST, vocab_size=4), good))
    assert "its header says" in refused(assemble(replace(SMALLEST, num_layers=2), good))
    removed = good | {"head.weight": (6, *good["head.weight"][1:])}
    assert "'head.weight' is of type 6" in refused(assemble(SMALLEST, removed))
    narrow = good | {"head.weight": (2, (3, 2), b"")}
    assert "rows of 2 values; they must be a multiple of 32" in refused(assemble(SMALLEST, narrow))
    positive = good | {"blocks.0.att.time_decay": (0, (2,), struct.pack("<2f", 0.5, -1))}
    (tmp_path / "model.bin").write_bytes(assemble(SMALLEST, positive))
    assert "positive values" in refusal(read_ggmf, tmp_path / "model.bin")
    twice = assemble(SMALLEST, good)
    assert "two tensors named 'emb.weight'" in refused(twice + twice[24:])
    newer = good | {"blocks.0.att.ln_x.weight": (0, (2,), bytes(8))}
    assert "a whole RWKV-5.0 model: missing are" in refused(assemble(SMALLEST, newer))
    many = {str(i): (0, (1,), bytes(4)) for i in range(10_002)}
    assert "more than 10000 tensors" in refused(assemble(SMALLEST, many))
    assert "empty" in refused(b"")
    assert "no file of rwkv.cpp" in refused(b"PK\3\4 and so on")
    assert "directory" in refusal(open_ggmf, tmp_path)
    assert "No such file" in refusal(open_ggmf, tmp_path / "absent.bin")


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"precious")
    narrow = weights(SMALLEST)
    with pytest.raises(ValueError, match=r"multiples of 32; these are 2 and 2"):
        write_ggmf(path, SMALLEST, narrow, "Q8_0")
    with pytest.raises(ValueError, match="'Q5_1' cannot be written; choose from FP32, FP16"):
        write_ggmf(path, SMALLEST, narrow, "Q5_1")  # type: ignore[arg-type]
    del narrow["head.weight"]
    with pytest.raises(ValueError, match=r"head\.weight is missing"):
        write_ggmf(path, SMALLEST, narrow)
    wide = weights(WIDE)
    wide["blocks.1.ffn.key.weight"][3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.key\.weight cannot be written as Q4_0"):
        write_ggmf(path, WIDE, wide, "Q4_0")
    wide["blocks.1.ffn.key.weight"][3, 3] = 1e6
    with pytest.raises(ValueError, match=r"key\.weight has values too large for float16"):
        write_ggmf(path, WIDE, wide, "FP16")
    wide["blocks.1.ffn.key.weight"] = wide["blocks.1.ffn.key.weight"].double() * 1e300
    with pytest.raises(ValueError, match=r"key\.weight has values too large for float32"):
        write_ggmf(path, WIDE, wide, "FP32")
    with pytest.raises(ValueError, match=r"head\.weight is \[11, 32\]; .* wants \[12, 32\]"):
        write_ggmf(path, replace(WIDE, vocab_size=12), wide | {"emb.weight": torch.zeros(12, 32)})
    with pytest.raises(ValueError, match="cannot write"):
        write_ggmf(tmp_path / "absent" / "model.bin", WIDE, weights(WIDE))
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["model.bin"]


# ---- through the front door ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.bin", "model.pth", "model.ggmf", "model"])
def test_it_is_known_by_its_first_bytes(tmp_path, name, assert_same):
    tensors = weights(SMALLEST)
    write_ggmf(tmp_path / name, SMALLEST, tensors, "FP32")
    found = read(tmp_path / name)
    assert found.config == SMALLEST and found.source == tmp_path / name
    assert_same(found.tensors, tensors)


@pytest.mark.skipif(not SAMPLE.is_file(), reason="the sample file of rwkv.cpp is not here")
def test_a_file_that_rwkv_cpp_made():
    file = open_ggmf(SAMPLE)
    assert file.version == 100 and file.kinds == {"FP16", "FP32"}
    assert file.config == ModelConfig(vocab_size=256, width=128, num_layers=4, ffn_width=256)
    found = read(SAMPLE)
    model = Model.from_tensors(found.config, found.tensors, dtype=torch.float32)
    with torch.no_grad():
        logits, _ = model(torch.tensor([list(b'"in the beginning')]))
    assert logits.isfinite().all()
    _, by_hand = scalar_decode(SAMPLE.read_bytes())
    assert torch.equal(
        found.tensors["head.weight"].flatten(), torch.tensor(by_hand["head.weight"][2]).half()
    )
    decay = found.tensors["blocks.2.att.time_decay"]
    stored = torch.tensor(by_hand["blocks.2.att.time_decay"][2])
    assert torch.allclose(-decay.exp(), stored, rtol=1e-6)

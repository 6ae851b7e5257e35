"""Files of rwkv.cpp with RWKV-7, which joins some tensors and transposes others."""

import math
from pathlib import Path

import pytest
import torch
from test_ggmf import scalar_decode
from tiny import make_model, same_bits
from torch import Tensor

from receptance import Model
from receptance.formats.ggmf import check_ggmf, open_ggmf, read_ggmf, write_ggmf

MODEL = make_model(19, width=32, layers=2, version=7, head_size=16, value_rank=24)


def converted(model: Model, half: bool) -> dict[str, Tensor]:
    """What rwkv.cpp's convert_pytorch_to_ggml.py makes of the official tensors."""
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if ".att.x_" in name:
            joined = f"{name[: name.index('.att.')]}.att.x_rwkvag"
            before = [found[joined]] if joined in found else []
            found[joined] = torch.cat([*before, tensor])
        else:
            low_rank = name[-2:] in {f"{x}{i}" for x in "wavg" for i in (1, 2)}
            found[name] = tensor.T if low_rank else tensor
    wide = (".k_k", ".k_a", ".r_k", ".x_rwkvag", ".x_k", ".w0", ".a0", ".v0")
    return {
        name: x.half() if half and x.dim() > 1 and not name.endswith(wide) else x
        for name, x in found.items()
    }


@pytest.mark.parametrize("kind", ["FP32", "FP16"])
def test_it_is_what_rwkv_cpps_own_conversion_writes(tmp_path, kind):
    write_ggmf(tmp_path / "x.bin", MODEL.config, MODEL.state_dict(), kind)
    header, tensors = scalar_decode((tmp_path / "x.bin").read_bytes())
    assert header == (b"fmgg", 101, 19, 32, 2, int(kind == "FP16"))
    wanted = converted(MODEL, kind == "FP16")
    assert tensors.keys() == wanted.keys()
    for name, (own, shape, values) in tensors.items():
        tensor = wanted[name]
        assert own == ("FP16" if tensor.dtype == torch.float16 else "FP32"), name
        # Axes of one do not count in ggml.
        assert [n for n in shape if n > 1] == [n for n in tensor.shape if n > 1], name
        assert values == tensor.flatten().tolist(), name


def test_the_matrices_alone_are_quantized(tmp_path):
    write_ggmf(tmp_path / "x.bin", MODEL.config, MODEL.state_dict(), "Q4_0")
    _, tensors = scalar_decode((tmp_path / "x.bin").read_bytes())
    kinds = {name: kind for name, (kind, _, _) in tensors.items()}
    blocks = {name for name, kind in kinds.items() if kind == "Q4_0"}
    names = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
    assert blocks == {f"blocks.{n}.{name}.weight" for n in (0, 1) for name in names}
    assert kinds["head.weight"] == kinds["blocks.1.att.w2"] == "FP16"
    assert kinds["blocks.1.att.r_k"] == kinds["blocks.1.att.x_rwkvag"] == "FP32"


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("layers", [1, 2])
def test_it_is_read_back(tmp_path, heads, layers):
    sizes = {"head_size": 32 // heads, "value_rank": 8, "gate_rank": 40}
    model = make_model(19, width=32, layers=layers, version=7, **sizes)
    write_ggmf(tmp_path / "x.bin", model.config, model.state_dict(), "FP32")
    assert open_ggmf(tmp_path / "x.bin").config == model.config
    assert same_bits(read_ggmf(tmp_path / "x.bin"), model.state_dict())


def without_unused(path: Path) -> None:
    """Take out the three tensors of the first block that no model uses."""
    content = path.read_bytes()
    for name in (b"blocks.0.att.v0", b"blocks.0.att.v1", b"blocks.0.att.v2"):
        at = content.index(name)
        vector = name.endswith(b"v0")
        begin = at - 12 - (4 if vector else 8)
        size = 32 * (1 if vector else 24) * 4
        content = content[:begin] + content[at + len(name) + size :]
    path.write_bytes(content)


def test_tensors_that_no_model_uses_may_be_missing(tmp_path):
    write_ggmf(tmp_path / "x.bin", MODEL.config, MODEL.state_dict(), "FP32")
    without_unused(tmp_path / "x.bin")
    file = open_ggmf(tmp_path / "x.bin")
    assert file.config == MODEL.config and set(file) == set(MODEL.state_dict())
    unused = MODEL.config.architecture.unused(MODEL.config)
    wanted = MODEL.state_dict() | {n: torch.zeros_like(MODEL.state_dict()[n]) for n in unused}
    assert same_bits(dict(file), wanted)


def test_what_rwkv_cpp_computes_otherwise_is_not_written():
    model = make_model(19, width=32, version=7, group_norm_epsilon=1e-5)
    with pytest.raises(ValueError, match=r"1e-05, and rwkv\.cpp always takes 0\.00064"):
        check_ggmf(model.config)


def test_vectors_that_are_not_joined_as_they_must_be(tmp_path, refusal):
    write_ggmf(tmp_path / "x.bin", MODEL.config, MODEL.state_dict(), "FP32")
    content = (tmp_path / "x.bin").read_bytes()
    at = content.index(b"blocks.0.att.x_rwkvag")
    shape = (32).to_bytes(4, "little") + (1).to_bytes(4, "little") + (6).to_bytes(4, "little")
    assert content[at - 12 : at] == shape
    other = (32).to_bytes(4, "little") + (2).to_bytes(4, "little") + (3).to_bytes(4, "little")
    (tmp_path / "x.bin").write_bytes(content[: at - 12] + other + content[at:])
    assert "it must join 6 vectors" in refusal(open_ggmf, tmp_path / "x.bin")
    assert math.prod((32, 2, 3)) == 6 * 32

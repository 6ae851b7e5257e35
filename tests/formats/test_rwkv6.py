"""Files of RWKV-5 and RWKV-6: official ones, transformers directories, rwkv.cpp and GGUF."""

from __future__ import annotations

import functools
import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_ggmf import scalar_decode
from tiny import make_model, same_bits
from torch import Tensor

from receptance import formats, generate, load
from receptance.checking.inspecting import inspect
from receptance.conversion.converting import convert
from receptance.conversion.source import open_source
from receptance.conversion.target import Target
from receptance.formats.ggmf import open_ggmf, read_ggmf, write_ggmf
from receptance.formats.gguf import open_gguf, stored_kinds, write_gguf
from receptance.formats.hf_config import config_fields
from receptance.formats.names import infer_config, tensor_shapes
from receptance.formats.names_hf import to_hf
from receptance.model import Model
from receptance.tokenizer import ByteTokenizer

NUMBERS = (5.0, 5.1, 5.2, 6)
every_version = pytest.mark.parametrize("version", NUMBERS)


@functools.cache
def model(version: float, epsilon: float = 64e-5) -> Model:
    """Weights tame enough to be rounded."""
    extras = {"mix_rank": 32, "decay_rank": 64} if version == 6 else {}
    extras |= {"head_size": 16, "group_norm_epsilon": epsilon}
    made = make_model(256, width=32, layers=8, version=version, **extras)
    with torch.no_grad():
        for matrix in (x for x in made.parameters() if x.dim() == 2 or x.shape[0] == 5):
            matrix.mul_(0.4)
    return made


# ---- official files -----------------------------------------------------------------------------


@every_version
def test_the_version_and_the_sizes_are_read_from_the_shapes(version):
    config = model(version).config
    shapes = tensor_shapes(config)
    assert infer_config(shapes) == config
    squeezed = {n: s[2:] if s[:2] == (1, 1) else s for n, s in shapes.items()}
    assert infer_config(squeezed) == config


@every_version
@pytest.mark.parametrize("target", ["x.pth", "x.st", "x.safetensors", "mine"])
def test_every_format_is_written_and_read_back(version, target, tmp_path):
    torch.save(model(version).state_dict(), tmp_path / "m.pth")
    (tmp_path / "out").mkdir()
    own = "receptance" if target == "mine" else None
    to = Target(path=tmp_path / "out" / target, format=own)
    assert convert(open_source(tmp_path / "m.pth"), to).difference.relative < 1e-5
    again = open_source(to.path)
    assert again.config == model(version).config
    assert same_bits(dict(again.open()), dict(model(version).state_dict()))


@pytest.mark.parametrize("version", [5.0, 5.1])
def test_the_older_name_of_the_bonus_is_its_logarithm(version, tmp_path):
    official = model(version).state_dict()
    older = {}
    for name, tensor in official.items():
        new = name.replace("time_faaaa", "time_first")
        older[new] = tensor.abs().log().bfloat16() if new != name else tensor
    torch.save(older, tmp_path / "m.pth")
    found = formats.read(tmp_path / "m.pth").tensors
    name = "blocks.1.att.time_faaaa"
    assert torch.equal(found[name], older["blocks.1.att.time_first"].float().exp())
    assert found.keys() == official.keys()


@every_version
def test_inspect_names_it(version, tmp_path):
    torch.save(model(version).state_dict(), tmp_path / "m.pth")
    found = inspect(tmp_path / "m.pth")
    assert found.version == f"RWKV-{version}" and found.problem is None
    decays = 8 * (2 if version < 5.2 else 32)
    assert sum(found.half_lives.values()) == decays and found.decay_varies == (version == 6)


# ---- transformers -------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [5.2, 6])
def test_directories_of_transformers(version, tmp_path):
    """The names are those of modeling_rwkv5.py and modeling_rwkv6.py."""
    torch.save(model(version).state_dict(), tmp_path / "m.pth")
    convert(open_source(tmp_path / "m.pth"), Target(path=tmp_path / "hf", format="hf"))
    fields = json.loads((tmp_path / "hf/config.json").read_text())
    assert fields["model_type"] == f"rwkv{int(version)}" and fields["head_size"] == 16
    stored = formats.safetensors.read_safetensors(tmp_path / "hf/model.safetensors")
    assert "rwkv.blocks.0.attention.time_faaaa" in stored and "rwkv.blocks.0.pre_ln.bias" in stored
    gate = "time_mix_gate" if version == 5.2 else "time_maa_g"
    assert f"rwkv.blocks.3.attention.{gate}" in stored
    again = formats.read(tmp_path / "hf")
    assert again.config == model(version).config
    assert same_bits(dict(again.tensors), dict(model(version).state_dict()))


def test_the_divisor_of_the_norm_is_read(tmp_path):
    fields = config_fields(model(6).config, torch.float32) | {"head_size_divisor": 4}
    stored = {to_hf(name, 6): x.clone() for name, x in model(6).state_dict().items()}
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = formats.read(tmp_path).config
    assert config.extras["group_norm_epsilon"] == pytest.approx(16e-5)


def test_what_transformers_cannot_say_is_not_written(tmp_path):
    for number, made in enumerate((model(5.0), make_model(9, version=6, mix_rank=8))):
        torch.save(made.state_dict(), tmp_path / f"{number}.pth")
        with pytest.raises(ValueError, match=r"have no RWKV-5.0, only|the mix_rank is 8, and"):
            convert(
                open_source(tmp_path / f"{number}.pth"), Target(path=tmp_path / "x", format="hf")
            )


# ---- rwkv.cpp -----------------------------------------------------------------------------------


def converted(made: Model) -> dict[str, Tensor]:
    """What rwkv.cpp's convert_pytorch_to_ggml.py makes of the official tensors."""
    found: dict[str, Tensor] = {}
    version = made.config.version
    for name, tensor in made.state_dict().items():
        tensor = tensor.float()
        if ".time_" in name:
            tensor = tensor.squeeze()
        if version == 6 and name.endswith(("time_maa_w1", "decay_w1", "decay_w2", "maa_w2")):
            tensor = tensor.mT
        if version < 6 and name.endswith("time_decay"):
            tensor = (-tensor.double().exp()).exp().float()
            tensor = tensor[..., None] if version == 5.2 else tensor.reshape(-1, 1, 1)
        if name.endswith("time_faaaa"):
            tensor = tensor[..., None]
            if version == 5.0:  # Such files have the older name.
                name, tensor = name.replace("time_faaaa", "time_first"), tensor.reshape(-1, 1, 1)
        found[name] = tensor
    return found


@every_version
def test_a_file_of_rwkv_cpp_is_what_its_own_conversion_writes(version, tmp_path):
    made = model(version, 64e-5 if version == 6 else 1e-5)
    write_ggmf(tmp_path / "x.bin", made.config, made.state_dict(), "FP32")
    _, tensors = scalar_decode((tmp_path / "x.bin").read_bytes())
    wanted = converted(made)
    assert tensors.keys() == wanted.keys()
    for name, (_, shape, values) in tensors.items():
        assert tuple(shape) == tuple(wanted[name].shape), name
        assert values == wanted[name].flatten().tolist(), name
    file = open_ggmf(tmp_path / "x.bin")
    assert file.config == made.config
    found = read_ggmf(tmp_path / "x.bin")
    for name, tensor in made.state_dict().items():
        if name.endswith("time_decay") and version < 6:
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(found[name], tensor), name


def test_the_norm_of_rwkv_cpps_rwkv_5_has_another_epsilon(tmp_path):
    torch.save(model(5.2).state_dict(), tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"0\.00064, and rwkv\.cpp always takes 1e-05"):
        convert(open_source(tmp_path / "m.pth"), Target(path=tmp_path / "x.bin"))


@pytest.mark.parametrize("kind", ["FP16", "Q8_0"])
def test_matrices_of_rwkv_cpp_alone_are_narrow(kind, tmp_path):
    write_ggmf(tmp_path / "x.bin", model(6).config, model(6).state_dict(), kind)
    _, tensors = scalar_decode((tmp_path / "x.bin").read_bytes())
    assert {kind for name, (kind, _, _) in tensors.items() if ".time_" in name} == {"FP32"}
    assert tensors["blocks.1.att.gate.weight"][0] == kind


# ---- GGUF ---------------------------------------------------------------------------------------


def write(path, made: Model, kind: str = "F32"):
    version = made.config.architecture
    kinds = stored_kinds(made.config, dict.fromkeys(version.layouts(made.config), kind))
    write_gguf(path, made.config, made.state_dict(), kinds, ByteTokenizer())
    return path


def theirs(made: Model) -> dict[str, np.ndarray]:
    """What llama.cpp's conversion/rwkv.py makes of the official tensors, with rescale_every 0."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.RWKV6, made.config.num_layers)
    found, shares = {}, {}
    for name, tensor in made.state_dict().items():
        part = to_hf(name, 6)
        new = table.get_name(part, try_suffixes=(".weight", ".bias"))
        assert new is not None, part
        new = new if new.endswith((".weight", ".bias")) else f"{new}.weight"
        if name.endswith(("maa_w1", "maa_w2", "decay_w1", "decay_w2")):
            tensor = tensor.mT
        if new.endswith("time_mix_decay.weight") or "lerp" in new:
            tensor = tensor.squeeze()
        if "time_mix_lerp" in new and "lerp_x" not in new:
            shares[new] = tensor
        else:
            found[new] = tensor.numpy()
    for layer in range(made.config.num_layers):
        rows = [shares[f"blk.{layer}.time_mix_lerp_{x}.weight"] for x in "wkvrg"]
        found[f"blk.{layer}.time_mix_lerp_fused.weight"] = torch.stack(rows)[:, None, None].numpy()
    return found


def test_a_gguf_file_is_what_llama_cpps_own_conversion_writes(tmp_path):
    reader = gguf.GGUFReader(write(tmp_path / "x.gguf", model(6)))
    wanted = theirs(model(6))
    assert {x.name for x in reader.tensors} == wanted.keys()
    for found in reader.tensors:
        assert tuple(found.shape[::-1]) == wanted[found.name].shape, found.name
        assert (found.data.reshape(-1) == wanted[found.name].reshape(-1)).all(), found.name
    value = lambda key: reader.get_field(f"rwkv6.{key}").contents()  # noqa: E731
    assert (value("time_mix_extra_dim"), value("time_decay_extra_dim")) == (32, 64)
    assert (value("wkv.head_size"), value("rescale_every_n_layers")) == (16, 0)
    assert open_gguf(tmp_path / "x.gguf").config == model(6).config
    assert same_bits(dict(open_gguf(tmp_path / "x.gguf")), dict(model(6).state_dict()))


def test_weights_that_llama_cpps_conversion_divided_are_as_they_were(tmp_path, monkeypatch):
    divided = {n: x.clone() for n, x in model(6).state_dict().items()}
    for name, tensor in divided.items():
        if name.endswith(("att.output.weight", "ffn.value.weight")):
            tensor /= 2 ** (int(name.split(".")[1]) // 3)
    monkeypatch.setattr(
        "receptance.formats.gguf.gguf_fixed", lambda config: {"rescale_every_n_layers": 3}
    )
    kinds = stored_kinds(
        model(6).config, dict.fromkeys(model(6).config.architecture.layouts(model(6).config), "F32")
    )
    write_gguf(tmp_path / "x.gguf", model(6).config, divided, kinds)
    assert same_bits(dict(open_gguf(tmp_path / "x.gguf")), dict(model(6).state_dict()))


def test_generate_takes_a_gguf_file_straight(tmp_path):
    write(tmp_path / "x.gguf", model(6), "Q8_0")
    assert isinstance(generate(*load(tmp_path / "x.gguf"), "12", max_tokens=4, temperature=0), str)
    found = inspect(tmp_path / "x.gguf")
    assert (found.format, found.version) == ("GGUF file of rwkv6", "RWKV-6")

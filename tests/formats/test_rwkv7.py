"""Files of RWKV-7: official ones, and the three spellings of packages for transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import make_model, same_bits

from receptance import formats
from receptance.checking.inspecting import inspect
from receptance.conversion.converting import convert
from receptance.conversion.source import open_source
from receptance.conversion.target import Target
from receptance.formats.hf import read_hf
from receptance.formats.hf_config import config_fields
from receptance.formats.names import infer_config, tensor_shapes
from receptance.formats.names_hf import from_hf, is_hf, is_transposed, to_hf
from receptance.model import Model

MODEL = make_model(31, width=128, layers=3, version=7, value_rank=8, gate_rank=24)
CONFIG = MODEL.config
UNUSED = CONFIG.architecture.unused(CONFIG)


def fla(model: Model) -> dict[str, torch.Tensor]:
    """The tensors as flash-linear-attention stores them."""
    found = {}
    for name, tensor in model.state_dict().items():
        if name not in UNUSED:
            theirs = to_hf(name, 7)
            turned = tensor.T if is_transposed(theirs) else tensor
            kept = tensor.dim() < 3 or ".att.x_" in name
            found[theirs] = (turned if kept else turned.flatten()).contiguous()
    return found


def fused(model: Model) -> dict[str, torch.Tensor]:
    """The same of an older release, which held six vectors in one tensor."""
    found = fla(model)
    for layer in range(model.config.num_layers):
        parts = [found.pop(f"model.layers.{layer}.attn.x_{x}").flatten() for x in "rwkvag"]
        found[f"model.layers.{layer}.attn.x_x"] = torch.stack(parts)
    return found


def prefixed(model: Model) -> dict[str, torch.Tensor]:
    """The spelling that is proposed for transformers."""
    tensors = model.state_dict()
    return {n if n.startswith("head") else f"rwkv7.{n}": x for n, x in tensors.items()}


def older(model: Model) -> dict[str, torch.Tensor]:
    """That of Rwkv7ForCausalLM."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in (
            ("blocks.0.ln0", "pre_ln"), ("blocks.", "layers."), (".att.", ".attention."),
            (".ffn.", ".feed_forward."), ("emb.", "embeddings."),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        renamed[
            name.replace("head.", "lm_head.") if name.startswith("head") else f"model.{name}"
        ] = tensor
    return renamed


SPELLINGS = {"fla": fla, "fla, fused": fused, "rwkv7.": prefixed, "Rwkv7ForCausalLM": older}


def directory(path: Path, tensors: dict[str, torch.Tensor], **fields: object) -> Path:
    path.mkdir(exist_ok=True)
    save_file({name: x.clone() for name, x in tensors.items()}, path / "model.safetensors")
    known = config_fields(CONFIG, torch.float32) | fields
    (path / "config.json").write_text(json.dumps(known))
    return path


def test_names_and_shapes_are_those_of_rwkv7_hf():
    package = pytest.importorskip("rwkv7_hf")
    theirs = package.RWKV7ForCausalLM(package.RWKV7Config(**config_fields(CONFIG, torch.float32)))
    wanted = {name: x.shape for name, x in theirs.state_dict().items()}
    assert {name: x.shape for name, x in fla(MODEL).items()} == wanted
    names = [name for name in tensor_shapes(CONFIG) if name not in UNUSED]
    assert [from_hf(to_hf(name, 7)) for name in names] == names
    assert is_hf(wanted) and not is_hf(names)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read(spelling, tmp_path):
    found = read_hf(directory(tmp_path / "m", SPELLINGS[spelling](MODEL)))
    assert found.config == CONFIG
    wanted = dict(MODEL.state_dict())
    if spelling.startswith("fla"):  # These have no place for what is never used.
        wanted |= {name: torch.zeros_like(wanted[name]) for name in UNUSED}
    assert same_bits(found.tensors, wanted)
    assert inspect(tmp_path / "m").version == "RWKV-7"


def test_the_sizes_are_read_from_the_shapes():
    assert infer_config(tensor_shapes(CONFIG)) == CONFIG
    squeezed = {n: s[2:] if len(s) == 3 else s for n, s in tensor_shapes(CONFIG).items()}
    assert infer_config(squeezed) == CONFIG


def test_the_epsilon_of_the_group_norm_follows_the_rule_of_the_packages(tmp_path):
    found = read_hf(directory(tmp_path / "m", fla(MODEL), norm_eps=1e-4))
    assert found.config.layer_norm_epsilon == 1e-4
    assert found.config.extras["group_norm_epsilon"] == pytest.approx(64e-4)
    other = make_model(31, width=16, layers=1, version=7)
    torch.save(other.state_dict(), tmp_path / "x.pth")
    source = open_source(tmp_path / "x.pth")
    with pytest.raises(
        ValueError, match=r"group_norm_epsilon is 0.00064, and the packages .* 0.00016"
    ):
        convert(source, Target(path=tmp_path / "y", format="hf"))


@pytest.mark.parametrize("target", ["x.pth", "x.st", "x.safetensors", "hf"])
def test_every_format_is_written_and_read_back(target, tmp_path):
    torch.save(MODEL.state_dict(), tmp_path / "m.pth")
    (tmp_path / "out").mkdir()
    to = Target(path=tmp_path / "out" / target, format="hf" if target == "hf" else None)
    assert convert(open_source(tmp_path / "m.pth"), to).difference.relative < 1e-5
    again, own = formats.read(to.path), MODEL.state_dict()
    assert again.config == CONFIG
    kept = [n for n in own if target != "hf" or n not in UNUSED]
    assert all(torch.equal(again.tensors[n], own[n]) for n in kept)


def test_rwkv7_hf_loads_what_is_written(tmp_path):
    package = pytest.importorskip("rwkv7_hf")
    torch.save(MODEL.state_dict(), tmp_path / "m.pth")
    convert(open_source(tmp_path / "m.pth"), Target(path=tmp_path / "hf", format="hf"))
    theirs = package.RWKV7ForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.arange(1, 21)[None]
    with torch.no_grad():
        wanted = theirs(tokens, return_dict=True).logits
        torch.testing.assert_close(MODEL(tokens)[0], wanted, rtol=1e-4, atol=1e-4)


def test_a_configuration_of_another_version_is_refused(tmp_path):
    path = directory(tmp_path / "m", fla(MODEL), model_type="rwkv")
    with pytest.raises(ValueError, match=r"model_type is that of RWKV-4, .* are of RWKV-7"):
        read_hf(path)


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("blocks.1.ffn.s_emb.weight", "RWKV-7a"),
        ("blocks.1.qkv.qq", "RWKV-7b"),
        ("blocks.1.ffn.enn.weight", "RWKV-8"),
        ("blocks.1.att.x_rwkvag", "RWKV-7 of rwkv.cpp"),
    ],
)
def test_its_successors_are_named(name, version):
    shapes = tensor_shapes(CONFIG) | {name: (3,)}
    with pytest.raises(
        ValueError, match=f"this is an {version}.* file; this release reads RWKV-4,"
    ):
        infer_config(shapes)


def test_a_missing_tensor_is_named():
    shapes = tensor_shapes(CONFIG)
    del shapes["blocks.1.att.v1"]
    with pytest.raises(ValueError, match=r"whole RWKV-7 model: missing are 'blocks.1.att.v1'"):
        infer_config(shapes)


def test_inspect_shows_the_centers_of_decays(tmp_path):
    torch.save(MODEL.state_dict(), tmp_path / "m.pth")
    found = inspect(tmp_path / "m.pth")
    assert found.decay_varies
    assert sum(found.half_lives.values()) == 3 * 128
    kept = torch.tensor(found.retentions[1])
    assert kept.min() > 0.545 and kept.max() < 1

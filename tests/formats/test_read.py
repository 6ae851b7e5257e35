"""read: which reader a path goes to, and what comes back beside the tensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from receptance.formats import read
from receptance.formats.names_hf import to_hf


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("hf_names", [False, True])
def test_files_are_read_by_their_suffix_under_either_names(
    tmp_path, official, config, assert_same, suffix, hf_names
):
    tensors = {to_hf(name) if hf_names else name: value for name, value in official.items()}
    path = tmp_path / f"model{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(tensors, path)
    weights = read(path)
    assert weights.config == config
    assert weights.source == path and weights.tokenizer is None
    assert_same(weights.tensors, official)
    assert read(str(path)).config == config


def test_a_directory_with_one_file_of_weights_is_that_file(tmp_path, official, assert_same):
    torch.save(official, tmp_path / "rwkv.pth")
    (tmp_path / "rwkv_vocab_v20230424.txt").touch()
    weights = read(tmp_path)
    assert weights.source == tmp_path / "rwkv.pth"
    assert weights.tokenizer == tmp_path / "rwkv_vocab_v20230424.txt"
    assert_same(weights.tensors, official)
    (tmp_path / "another.pth").touch()
    with pytest.raises(ValueError, match=r"found another\.pth, rwkv\.pth$"):
        read(tmp_path)


def test_a_file_of_transformers_is_read_with_the_config_beside_it(tmp_path, official):
    save_file({to_hf(name): value for name, value in official.items()}, tmp_path / "x.safetensors")
    fields = {"model_type": "rwkv", "layer_norm_epsilon": 3e-5}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert read(tmp_path / "x.safetensors").config.layer_norm_epsilon == 3e-5


def test_what_cannot_be_read_is_told(tmp_path, official, refusal):
    assert "absent; models of the Hugging Face hub are written hf:owner/name" in refusal(
        read, tmp_path / "absent"
    )
    (tmp_path / "weights.gguf").touch()
    assert "weights are read from .pth, .pt, .bin, .safetensors" in refusal(
        read, tmp_path / "weights.gguf"
    )
    assert "found neither" in refusal(read, tmp_path)
    assert "File name too long" in refusal(read, tmp_path / ("x" * 500))
    torch.save({name: value.long() for name, value in official.items()}, tmp_path / "long.pth")
    assert "emb.weight is of type torch.int64" in refusal(read, tmp_path / "long.pth")
    with pytest.raises(ValueError, match="only hub models have them"):
        read(tmp_path / "long.pth", revision="main")
    torch.save({"module." + name: value for name, value in official.items()}, tmp_path / "ddp.pth")
    assert "start with 'module.'" in refusal(read, tmp_path / "ddp.pth")


def test_weights_are_frozen(tmp_path, official):
    torch.save(official, tmp_path / "model.pth")
    weights = read(tmp_path / "model.pth")
    with pytest.raises(AttributeError):
        weights.source = Path("elsewhere")

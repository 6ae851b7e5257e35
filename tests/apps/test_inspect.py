"""receptance inspect: the table, JSON, the picture, and one line for what is nothing."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from command import call
from tiny import make_model

from receptance import save
from receptance.checking.inspecting import inspect
from receptance.tokenizer import ByteTokenizer


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    save(make_model(), "modèle 狐", ByteTokenizer())
    torch.save(make_model().state_dict(), "m.pth")
    return tmp_path


@pytest.mark.parametrize("name", ["m.pth", "modèle 狐"])
def test_it_says_what_was_found(name):
    result, found = call("inspect", name), inspect(name)
    assert (result.code, result.err) == (0, "")
    for words in (name, "RWKV-4", "2 layers, 16 wide, 64 in channel mixing, 256 ids", "all values"):
        assert words in result.out
    for file, digest in found.digests.items():
        assert f"{digest}  {file}" in result.out
    bars = [line for line in result.out.splitlines() if " to " in line or "and more" in line]
    counts = [int(line.split()[-1]) for line in bars]
    assert counts == list(found.half_lives.values())[1:]


@pytest.mark.parametrize("option", [(), ("--json",)])
def test_damage_is_said_and_is_the_exit_code(option):
    weights = Path("modèle 狐/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    result = call("inspect", "modèle 狐", *option)
    assert (result.code, result.err) == (1, "")
    said = json.loads(result.out)["damage"] if option else result.out.split("damaged ")[1]
    assert "model.safetensors" in said


def test_json_has_every_figure():
    result = call("inspect", "m.pth", "--json")
    assert (result.code, result.err) == (0, "")
    found, fields = inspect("m.pth"), json.loads(result.out)
    assert "retentions" not in fields
    assert all(getattr(found, name) == value for name, value in fields.items())


def test_what_comes_from_a_file_cannot_command_the_terminal():
    tensors = make_model().state_dict()
    torch.save({"[red]\x1b[31m\nx": torch.full((2,), torch.nan), **tensors}, "odd.pth")
    result = call("inspect", "odd.pth")
    assert result.code == 0
    assert "\x1b" not in result.out and r"[red]\x1b[31m\nx' has 2 NaN" in result.out


def test_a_picture_is_drawn():
    pytest.importorskip("matplotlib")
    assert call("inspect", "m.pth", "--plot", "decays.png").code == 0
    assert Path("decays.png").read_bytes().startswith(b"\x89PNG")
    torch.save({"blocks.0.att.r_k": torch.zeros(2, 4)}, "seven.pth")
    result = call("inspect", "seven.pth", "--plot", "other.png")
    assert (result.code, "no decays to draw" in result.err) == (2, True)
    assert not Path("other.png").exists()


def test_a_picture_replaces_no_weights(monkeypatch):
    """It is refused before the model, which may be large, is looked at."""
    monkeypatch.setattr("receptance.apps.inspect.inspect", lambda *_, **__: pytest.fail("too late"))
    before = Path("m.pth").read_bytes()
    result = call("inspect", "m.pth", "--plot", "m.pth")
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        "receptance: error: cannot write the picture to m.pth: what is there is not a PNG; choose "
        "another name\n"
    )
    assert Path("m.pth").read_bytes() == before


def test_another_version_is_described_and_no_error():
    torch.save({"blocks.0.ffn.enn.weight": torch.zeros(4)}, "eight.pth")
    result = call("inspect", "eight.pth")
    assert result.code == 0
    assert "RWKV-8" in result.out and "this is an RWKV-8 file" in result.out


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("missing", "no such file or directory: missing"),
        ("empty.pth", "empty.pth: the file is empty"),
        ("bare", "there is no model in this directory"),
        ("no/such", "hub model 'no/such' is not in the local cache"),
        ("ünïcode/狐", "no such file or directory: ünïcode/狐"),
    ],
)
def test_a_bad_path_is_one_line(path, words):
    Path("empty.pth").touch()
    Path("bare").mkdir()
    result = call("inspect", path)
    assert (result.code, result.out) == (2, "")
    assert words in result.err and result.err.count("\n") == 1

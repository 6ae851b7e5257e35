"""receptance verify: exit codes, the table, JSON, recording, and one line for what is no model."""

import io
import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from command import call
from rich.console import Console
from tiny import make_model, small_bpe

from receptance import save
from receptance.apps.verify import table
from receptance.checking.verifying import Check, Subject, verify


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    torch.save(make_model(300).state_dict(), "modèle 狐.pth")
    return tmp_path


def test_a_good_model_passes_without_a_tokenizer():
    result = call("verify", "modèle 狐.pth")
    assert (result.code, result.err) == (0, "")
    checks = list(verify(Subject.open("modèle 狐.pth")))
    rows = result.out.splitlines()[1:]
    assert len(rows) == len(checks)
    for row, check in zip(rows, checks, strict=True):
        assert row.startswith(check.what) and "pass" in row


def test_a_bad_one_leaves_with_1():
    tensors = make_model().state_dict() | {"ln_out.bias": torch.full((16,), torch.nan)}
    torch.save(tensors, "bad.pth")
    result = call("verify", "bad.pth")
    assert (result.code, result.err) == (1, "")
    assert "FAIL" in result.out
    result = call("verify", "bad.pth", "--json")
    found = json.loads(result.out)
    assert (result.code, found["passed"]) == (1, False)
    assert found["checks"][1]["passed"] is False
    assert {row["difference"] for row in found["checks"][2:]} == {None}


def test_json_says_what_the_library_found():
    result = call("verify", "modèle 狐.pth", "--json")
    found = json.loads(result.out)
    assert (result.code, found["passed"], found["stored"]) == (0, True, "float32")
    assert found["fingerprint"] == make_model(300).fingerprint()
    wanted = [(check.what, check.bound) for check in verify(Subject.open("modèle 狐.pth"))]
    assert [(row["check"], row["bound"]) for row in found["checks"]] == wanted


def test_recording_and_comparing():
    result = call("verify", "modèle 狐.pth", "--record")
    assert (result.code, result.err) == (0, "")
    assert "recorded modèle 狐.pth.logits" in result.out
    assert "logits as recorded" in call("verify", "modèle 狐.pth").out
    again = call("verify", "modèle 狐.pth", "--record")
    assert again.code == 2 and "modèle 狐.pth.logits exists" in again.err
    save(make_model(300, seed=2), "other", small_bpe())
    result = call("verify", "other", "--logits", "modèle 狐.pth.logits")
    assert result.code == 1
    assert result.out.splitlines()[-1].startswith("logits as recorded")
    assert "of other weights" in result.out


def test_the_logits_of_a_run_lie_beside_its_folder():
    save(make_model(300), "runs/x/step-5", small_bpe())
    result = call("verify", "runs/x", "--record")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[-1] == "recorded runs/x.logits"
    assert sorted(path.name for path in Path("runs").iterdir()) == ["x", "x.logits"]
    assert "logits as recorded" in call("verify", "runs/x").out
    save(make_model(300, seed=2), "runs/x/step-6", small_bpe())
    result = call("verify", "runs/x")
    assert result.code == 1
    assert result.out.splitlines()[-1].split()[-3:] == ["of", "other", "weights"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("missing",), "no such file or directory: missing"),
        (("empty.pth",), "empty.pth: the file is empty"),
        (("bare",), "there is no model in this directory"),
        (("no/such",), "hub model 'no/such' is not in the local cache"),
        (("ünïcode/狐",), "no such file or directory: ünïcode/狐"),
        (("eight.pth",), "this is an RWKV-8 file"),
        (("state",), "state: this is a state, no model"),
        (("modèle 狐.pth", "--logits", "missing"), "missing is not a readable file of logits"),
        (("modèle 狐.pth", "--device", "warp"), "device 'warp' cannot be used here"),
    ],
)
def test_a_bad_input_is_one_line(argv, words):
    Path("empty.pth").touch()
    Path("bare").mkdir()
    torch.save({"blocks.0.ffn.enn.weight": torch.zeros(2, 4)}, "eight.pth")
    make_model().empty_state().save("state", "x")
    result = call("verify", *argv)
    assert (result.code, result.out) == (2, "")
    assert words in result.err and result.err.count("\n") == 1


def test_what_comes_from_a_file_gives_a_terminal_no_commands():
    shown = Console(file=io.StringIO(), width=160)
    shown.print(table([Check("na\x1b[2Jme", 0.0, 0.0, "no\nte\x9b")]))
    assert shown.file.getvalue().count("\n") == 2
    assert "na\\x1b[2Jme" in shown.file.getvalue() and "no\\x0ate\\x9b" in shown.file.getvalue()

"""receptance convert, from the command line."""

from pathlib import Path

import pytest
import torch
from command import call
from tiny import make_model, same_bits, small_bpe
from transformers import RwkvConfig, RwkvForCausalLM

from receptance import load
from receptance.formats import read_pth
from receptance.formats.hf import read_hf

BPE = small_bpe()


@pytest.fixture(autouse=True)
def model(tmp_path, monkeypatch):
    """model.pth and its tokenizer, in the current directory."""
    monkeypatch.chdir(tmp_path)
    model = make_model(BPE.vocab_size)
    torch.save(dict(model.state_dict()), "model.pth")
    BPE.save(tmp_path)
    return model


def test_there_and_back(model):
    for source, target, *options in (
        ("model.pth", "hf", "--to", "hf", "--shard-gb", 1e-5),
        ("hf", "x.st"),
        ("x.st", "mine", "--to", "receptance"),
        ("mine", "back.pth"),
    ):
        result = call("convert", source, target, *options)
        assert (result.code, result.err) == (0, "")
        assert f"{target}: 0.1 MB, float32; largest difference of a logit 0.0e+00" in result.out
        assert ("Ai00 and web-rwkv read float16 only" in result.out) == (target == "x.st")
        assert "exponentials" not in result.out
    assert same_bits(read_pth("back.pth"), read_pth("model.pth"))
    assert len(list(Path("hf").glob("model-*.safetensors"))) > 3
    assert load("mine")[1].fingerprint == BPE.fingerprint
    assert not list(Path().rglob("*.partial"))


def test_narrower_says_how_far_off():
    result = call("convert", "model.pth", "x.st", "--dtype", "float16")
    assert result.code == 0
    assert "float16; largest difference of a logit 0.0e+00" not in result.out
    assert "float16; largest difference of a logit" in result.out
    assert "Ai00" not in result.out


def test_without_a_tokenizer():
    Path("tokenizer.json").unlink()
    result = call("convert", "model.pth", "x.bin")
    assert (result.code, result.err) == (0, "")
    assert "no tokenizer was found beside model.pth, so none was written" in result.out
    assert "rwkv.cpp keeps exponentials of decays" in result.out
    result = call("convert", "model.pth", "mine", "--to", "receptance", "--tokenizer", "absent")
    assert result.code == 2 and "absent" in result.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("model.pth", "model.pth"), "model.pth exists; give another name"),
        (("model.pth", "new"), "choose with --to"),
        (("model.pth", "new.bin", "--dtype", "bfloat16"), "know no bfloat16"),
        (("nowhere", "new.st"), "no such file or directory: nowhere"),
        (("model.pth", "new.st", "--unscale"), "only a transformers directory"),
        (("model.pth", "new.bin", "--dtype", "Q8_0"), "Q8_0 wants widths that are multiples of 32"),
        (("model.pth", "new.st", "--revision", "main"), "only hub models have them"),
        (("model.pth", "new", "--to", "hf", "--shard-gb", 0), "shard_bytes is 0"),
        (("model.pth", "model.pth", "--to", "pth", "--shard-gb", "inf"), "model.pth exists"),
        (("model.pth", "new.st", "--shard-gb", 1), "--shard-gb is for the format hf; leave it out"),
        (("model.pth", "new.st", "--dtype", "Q8_0"), "rwkv.cpp (--to ggmf) hold Q8_0"),
        (("~no one/x.pth", "new.st"), "no such file or directory: ~no one/x.pth"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(argv, words):
    before = sorted(Path().rglob("*"))
    result = call("convert", *argv)
    assert result.code == 2
    assert words in result.err
    assert result.err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


def test_weights_that_transformers_altered():
    sizes = {"vocab_size": BPE.vocab_size, "hidden_size": 16, "num_hidden_layers": 8}
    generator = torch.Generator().manual_seed(0)
    theirs = RwkvForCausalLM(RwkvConfig(**sizes, rescale_every=3))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    theirs.save_pretrained("fresh")
    with torch.no_grad():
        theirs.eval()(torch.arange(5)[None])
    theirs.save_pretrained("altered")

    result = call("convert", "fresh", "0/x.pth")
    assert (result.code, result.err) == (0, "")
    assert "0/x.pth: " in result.out and "--unscale" not in result.out
    result = call("convert", "altered", "1/x.pth")
    assert result.code == 0
    assert "the output matrices halve every 3 blocks" in result.out and "--unscale" in result.out
    assert not same_bits(read_pth("0/x.pth"), read_pth("1/x.pth"))
    assert call("convert", "altered", "2/x.pth", "--unscale").code == 0
    assert same_bits(read_pth("0/x.pth"), read_pth("2/x.pth"))
    assert same_bits(read_hf("fresh").tensors, read_pth("2/x.pth"))

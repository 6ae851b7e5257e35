"""receptance quantize: what it writes, what it says, what it refuses."""

from pathlib import Path

import pytest
import torch
from command import call
from tiny import TEXT, make_model, small_bpe

from receptance import load, save
from receptance.apps.quantize import sample_text
from receptance.formats.names import tensor_shapes
from receptance.quantize import Quantized, relative_error
from receptance.quantize.calibration import Calibration
from receptance.quantize.weights import quantize_tensors
from receptance.storage.quantized import About, dequantized_tensors, read_quantized
from receptance.tokenizer import ByteTokenizer, Tokenizer


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """A folder with a model at `model` and a text beside it."""
    monkeypatch.chdir(tmp_path)
    save(make_model(300, width=32), "model", small_bpe())
    Path("text.txt").write_text(TEXT)
    return tmp_path


def quantized(**options: object) -> dict[str, Quantized | torch.Tensor]:
    return dict(quantize_tensors(load("model")[0].state_dict(), **options))


@pytest.mark.parametrize(
    ("argv", "about"),
    [
        (("--to", "int8"), {"kind": "int8", "group": 128}),
        (("--to", "int4"), {"kind": "int4", "group": 64}),
        (("--to", "int4", "--group", 32), {"kind": "int4", "group": 32}),
    ],
)
def test_it_writes_what_the_library_makes(argv, about):
    result = call("quantize", "model", *argv, "--out", "small")
    assert (result.code, result.err) == (0, "")
    found = read_quantized("small")
    model, tokenizer = load("model")
    assert found.about == About(**about, source=model.fingerprint())
    assert found.tokenizer.fingerprint == tokenizer.fingerprint
    for name, weight in quantized(**about).items():
        floats = weight.dequantize() if isinstance(weight, Quantized) else weight
        assert torch.equal(dequantized_tensors(found)[name], floats)


def test_it_reports_sizes_and_the_worst_errors():
    result = call("quantize", "model", "--to", "int4", "--out", "small")
    lines = [line.strip("│ ").split("│") for line in result.out.splitlines() if "│" in line]
    rows = {kind.strip(): (int(number), error.strip()) for kind, number, error in lines}
    matrices, exact = quantized(kind="int4"), load("model")[0].state_dict()
    errors = {
        name: relative_error(exact[name], x)
        for name, x in matrices.items()
        if isinstance(x, Quantized)
    }
    assert len(rows) == 9
    assert rows["head"] == (1, f"{errors['head.weight']:.2%}")
    worst = max(errors[f"blocks.{layer}.ffn.value.weight"] for layer in (0, 1))
    assert rows["ffn.value"] == (2, f"{worst:.2%}")
    before = sum(x.nbytes for x in exact.values())
    after = Path("small/weights.safetensors").stat().st_size
    last = result.out.splitlines()[-1]
    assert f"{after / 1e6:,.1f} MB" in last
    assert last.endswith(f"before {before / 1e6:,.1f} MB, 32.00")


def test_bfloat16_models(tmp_path):
    save(make_model().bfloat16(), "narrow", ByteTokenizer())
    result = call("quantize", "narrow", "--to", "int8", "--out", "small")
    assert result.code == 0
    assert "MB, 16." in result.out.splitlines()[-1]


def test_official_files():
    model = make_model()
    torch.save(model.state_dict(), "official.pth")
    argv = ("official.pth", "--to", "int8", "--out", "small", "--tokenizer", "bytes")
    assert call("quantize", *argv).code == 0
    found = read_quantized("small")
    assert found.tokenizer.kind == "bytes"
    assert dequantized_tensors(found).keys() == tensor_shapes(model.config).keys()


def test_calibration():
    argv = ("model", "--to", "int4", "--group", 32, "--calibrate", "text.txt")
    result = call("quantize", *argv, "--calibration-tokens", 512, "--out", "fitted")
    assert (result.code, result.err) == (0, "")
    found = read_quantized("fitted")
    model, tokenizer = load("model")
    rows = sample_text(Path("text.txt"), tokenizer, 512)
    assert found.about.calibration_tokens == rows.numel() <= 512
    wanted = quantized(kind="int4", group=32, calibration=Calibration(model, rows))
    for name, floats in dequantized_tensors(found).items():
        weight = wanted[name]
        assert torch.equal(floats, weight.dequantize() if isinstance(weight, Quantized) else weight)


class TestSample:
    @pytest.mark.parametrize("tokenizer", [ByteTokenizer(), small_bpe()], ids=lambda t: t.kind)
    @pytest.mark.parametrize("count", [64, 100, 4096])
    def test_pieces_come_from_all_over_the_file(self, tokenizer: Tokenizer, count):
        rows = sample_text(Path("text.txt"), tokenizer, count)
        text = TEXT.encode()
        assert rows.shape[0] == 8
        assert rows.shape[1] <= count // 8
        for number, row in enumerate(rows.tolist()):
            # Where a piece begins inside a character, the rest of that is left out.
            begins = len(text) * number // 8
            piece = tokenizer.decode_bytes(row)
            assert piece in text[begins : begins + len(piece) + 3]

    def test_a_short_text_gives_fewer(self):
        Path("short.txt").write_text("12 little foxes")
        assert 0 < sample_text(Path("short.txt"), ByteTokenizer(), 4096).numel() < 16

    def test_no_more_than_needed_is_read(self):
        with Path("huge.txt").open("wb") as file:
            file.truncate(1 << 40)
        assert sample_text(Path("huge.txt"), ByteTokenizer(), 64).shape == (8, 8)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("model --to int4 --out model", "model exists; give another name with --out"),
        ("model --to int4 --out x --group 48", "int4 has no groups of 48 weights"),
        ("model --to int8 --out x --group 64", "int8 has no groups of 64 weights"),
        ("model --to int8 --out x --calibrate text.txt", "leave out --calibrate"),
        ("model --to int4 --out x --calibrate nowhere", "nowhere: No such file"),
        ("model --to int4 --out x --calibrate empty.txt", "0 tokens are too few"),
        ("model --to int4 --out x --calibrate text.txt --calibration-tokens 9", "at least 64"),
        (
            "model --to int4 --out x --calibrate text.txt --calibration-tokens -9",
            "calibration_tokens is -9",
        ),
        ("model --to int4 --out x --calibration-tokens 99", "name one with --calibrate"),
        ("small --to int4 --out x", "small is quantized already; start from the model that"),
        ("nowhere --to int4 --out x", "no such file or directory: nowhere"),
        ("bad --to int8 --out x", "blocks.1.att.key.weight cannot be quantized: 1 of its"),
        ("model --to int8 --out text.txt/x", "text.txt"),
    ],
)
def test_refusals(argv, words, place):
    Path("empty.txt").touch()
    assert call("quantize", "model", "--to", "int8", "--out", "small").code == 0
    bad = make_model()
    with torch.no_grad():
        bad.get_parameter("blocks.1.att.key.weight")[3, 4] = torch.nan
    save(bad, "bad", ByteTokenizer())
    before = sorted(place.rglob("*"))
    result = call("quantize", *argv.split())
    assert result.code == 2
    assert words in result.err
    assert result.err.count("\n") == 1
    assert sorted(place.rglob("*")) == before

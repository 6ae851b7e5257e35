"""Directories of quantized models: whole or absent, bit by bit, mapped, damage refused."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import make_model, same_bits, small_bpe
from torch import Tensor

from receptance.engine import load_engine
from receptance.model import Model
from receptance.quantize import Quantized
from receptance.quantize.packing import unpack
from receptance.quantize.weights import quantize_tensors
from receptance.storage import opening
from receptance.storage.checkpoint import save
from receptance.storage.directories import write_directory
from receptance.storage.quantized import (
    WEIGHTS,
    About,
    dequantized_tensors,
    is_quantized,
    read_quantized,
    write_quantized,
)
from receptance.tokenizer import ByteTokenizer

NAMES = ["config.json", WEIGHTS, "tokenizer.json"]
FORMATS = [("int8", 128), ("int4", 32), ("int4", 128)]

every_format = pytest.mark.parametrize(("kind", "group"), FORMATS)


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(300, width=24)


def write(model: Model, directory: Path, kind: str = "int4", group: int | None = 64) -> None:
    about = About(kind=kind, group=group, source=model.fingerprint())
    weights = quantize_tensors(model.state_dict(), kind, group)
    write_quantized(directory, model.config, small_bpe(), about, weights)


@pytest.fixture(scope="module")
def pristine(model, tmp_path_factory) -> Path:
    """A directory that no test may change."""
    directory = tmp_path_factory.mktemp("pristine") / "model"
    write(model, directory)
    return directory


@pytest.fixture
def written(pristine, tmp_path) -> Path:
    return shutil.copytree(pristine, tmp_path / "written")


def refusal(directory: Path) -> str:
    """The message, of one line, with which reading fails."""
    with pytest.raises(ValueError) as caught:
        read_quantized(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(directory: Path, **changes: object) -> None:
    """Change config.json as another release might have written it, manifest included."""

    def fill(folder: Path) -> None:
        for name in NAMES:
            shutil.copy(directory / name, folder / name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    write_directory(directory, fill)


class TestReading:
    @every_format
    def test_everything_comes_back(self, kind, group, model, tmp_path):
        write(model, tmp_path / "x", kind, group)
        found = read_quantized(tmp_path / "x")
        assert found.config == model.config
        assert found.tokenizer.fingerprint == small_bpe().fingerprint
        assert found.about == About(kind=kind, group=group, source=model.fingerprint())
        for name, weight in quantize_tensors(model.state_dict(), kind, group):
            if isinstance(weight, Quantized):
                codes = unpack(found.matrices[name])
                assert torch.equal(codes.codes, weight.codes)
                assert torch.equal(codes.params(), weight.params())
            else:
                assert torch.equal(found.vectors[name], weight)
        assert len(found.matrices) + len(found.vectors) == len(model.state_dict())

    def test_names_are_the_official_ones(self, pristine):
        found = read_quantized(pristine)
        assert {"emb.weight", "head.weight", "blocks.1.ffn.value.weight"} <= found.matrices.keys()
        assert {"ln_out.bias", "blocks.0.att.time_decay"} <= found.vectors.keys()
        assert found.vectors["blocks.0.att.time_mix_k"].shape == (1, 1, 24)

    @pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux shows its maps")
    def test_weights_stay_mapped(self, written):
        found = read_quantized(written)
        assert str(written / WEIGHTS) in Path("/proc/self/maps").read_text()
        del found

    def test_matrices_begin_at_lines_of_the_cache(self, pristine):
        for packed in read_quantized(pristine).matrices.values():
            assert packed.data.data_ptr() % 64 == 0

    @every_format
    def test_dequantized_it_is_a_model(self, kind, group, model, tmp_path):
        write(model, tmp_path / "x", kind, group)
        tensors = dequantized_tensors(read_quantized(tmp_path / "x"))
        loaded = Model.from_tensors(model.config, tensors)
        tokens = torch.arange(40).view(2, 20)
        wanted, found = model(tokens)[0].detach(), loaded(tokens)[0].detach()
        # Rounding errors of 24 inputs each, through 2 layers, against logits of size 1 to 10.
        assert (found - wanted).norm() < (0.04 if kind == "int8" else 0.5) * wanted.norm()
        assert not torch.equal(found, wanted)

    def test_dequantized_in_another_type(self, pristine):
        exact, half = (
            dequantized_tensors(read_quantized(pristine), dtype)
            for dtype in (torch.float32, torch.bfloat16)
        )
        wanted = exact["head.weight"].bfloat16()
        assert same_bits({"x": half["head.weight"]}, {"x": wanted})

    def test_what_is_quantized(self, pristine, model, tmp_path):
        save(model, tmp_path / "plain", small_bpe())
        assert is_quantized(pristine)
        assert is_quantized(str(pristine))
        assert not is_quantized(tmp_path / "plain")
        assert not is_quantized(tmp_path / "missing")
        (tmp_path / "config.json").write_text("{")
        assert not is_quantized(tmp_path)


class TestDamage:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
    def test_a_flipped_bit_is_refused(self, name, share, written):
        content = bytearray((written / name).read_bytes())
        content[int(share * len(content))] ^= 1
        (written / name).write_bytes(content)
        assert name in refusal(written)

    @pytest.mark.parametrize("name", [*NAMES, "manifest.json"])
    def test_a_truncated_file_is_refused(self, name, written):
        os.truncate(written / name, 70)
        assert name in refusal(written)

    @pytest.mark.parametrize("name", [*NAMES, "manifest.json"])
    def test_a_missing_file_is_refused(self, name, written):
        (written / name).unlink()
        assert name in refusal(written)

    def test_other_versions_are_refused(self, written):
        rewrite(written, format_version=2)
        assert "has format version 2; this release reads 1, so update receptance" in refusal(
            written
        )

    def test_other_formats_are_refused(self, written, model, tmp_path):
        rewrite(written, format="receptance")
        assert "holds no model that `receptance quantize` wrote" in refusal(written)
        save(model, tmp_path / "plain", small_bpe())
        assert "holds no model that `receptance quantize` wrote" in refusal(tmp_path / "plain")

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"quantisation": {"kind": "int4", "group": 32, "source": ""}}, "of the wrong shape"),
            ({"quantisation": {"kind": "int8", "group": 128, "source": ""}}, "of the wrong shape"),
            ({"quantisation": {"kind": "int2", "group": 64, "source": ""}}, "'int2'"),
            ({"quantisation": {"kind": "int4"}}, "config.json: a field is wrong"),
            ({"quantisation": None}, "config.json: a field is wrong"),
            ({"model": {"width": 24}}, "are missing"),
            ({"model": {"width": 24, "num_layers": 3, "vocab_size": 300}}, "blocks.2"),
            ({"model": {"width": 24, "num_layers": 1, "vocab_size": 300}}, "blocks.1"),
            ({"tokenizer": {"kind": "bpe"}}, "does not say which tokenizer it holds"),
        ],
    )
    def test_a_description_that_does_not_fit_is_refused(self, changes, words, written):
        rewrite(written, **changes)
        assert words in refusal(written)

    @pytest.mark.parametrize("value", [None, 3, [], {"kind": "int4"}])
    def test_an_engine_refuses_such_a_description_too(self, value, written):
        rewrite(written, quantisation=value)
        with pytest.raises(ValueError, match=r"config\.json: a field is wrong"):
            load_engine(written)

    def test_a_missing_directory(self, tmp_path):
        assert "missing" in refusal(tmp_path / "missing")


class TestWriting:
    def test_a_failure_on_the_way_leaves_nothing(self, model, tmp_path):
        def failing() -> Iterator[tuple[str, Quantized | Tensor]]:
            yield next(quantize_tensors(model.state_dict(), "int8"))
            raise ValueError("no more")

        about = About(kind="int8", group=128, source="")
        with pytest.raises(ValueError, match="no more"):
            write_quantized(tmp_path / "x", model.config, small_bpe(), about, failing())
        assert list(tmp_path.iterdir()) == []

    def test_what_is_no_checkpoint_is_not_replaced(self, model, tmp_path):
        (tmp_path / "x").mkdir()
        (tmp_path / "x/mine").touch()
        with pytest.raises(ValueError, match="not a checkpoint; choose another name"):
            write(model, tmp_path / "x")
        assert (tmp_path / "x/mine").exists()

    def test_a_wrong_tokenizer_is_refused_before_anything_is_quantized(self, tmp_path):
        about, config = About(kind="int8", group=128, source=""), make_model(1000).config
        with pytest.raises(ValueError, match="wrong tokenizer"):
            write_quantized(tmp_path / "x", config, ByteTokenizer(), about, iter(()))

    def test_an_unknown_format_is_refused(self):
        with pytest.raises(ValueError, match="int4 has no groups of 7 weights"):
            About(kind="int4", group=7, source="")

    def test_what_was_written_can_be_described(self, pristine):
        fields = json.loads((pristine / "config.json").read_text())
        assert fields["format"] == opening.QUANTIZED_FORMAT
        assert fields["quantisation"] == dataclasses.asdict(read_quantized(pristine).about)

"""RWKV-7 from format to format: the names, transposes and joined tensors of each undone by it."""

import json
from pathlib import Path

import pytest
import torch
from command import call
from tiny import make_model, small_bpe
from torch import Tensor

from receptance import Model, generate, load, save
from receptance.conversion.converting import Report, convert
from receptance.conversion.source import open_source
from receptance.conversion.target import Target
from receptance.formats import read_pth
from receptance.tokenizer import ByteTokenizer, Tokenizer, WorldTokenizer

BPE = small_bpe()
FORMATS = {"pth": "x.pth", "hf": "x", "st": "x.st", "safetensors": "x.safetensors",
           "gguf": "x.gguf", "ggmf": "x.bin", "receptance": "x"}  # fmt: skip
RANKS = {"head_size": 64, "decay_rank": 8, "rate_rank": 12, "value_rank": 20, "gate_rank": 28}


def weights(dtype: torch.dtype = torch.float32, layers: int = 2) -> Model:
    """Tamer than make_model's, whose logits the rounding to Q4_0 would change altogether."""
    model = make_model(BPE.vocab_size, width=128, layers=layers, version=7, **RANKS)
    with torch.no_grad():
        for matrix in (x for x in model.parameters() if x.dim() == 2):
            matrix.mul_(0.4)
    return model.to(dtype)


def official(model: Model, path: Path, tokenizer: Tokenizer = BPE) -> Path:
    """A .pth as others publish them."""
    path.parent.mkdir(exist_ok=True)
    torch.save(dict(model.state_dict()), path)
    tokenizer.save(path.parent)
    return path


def used(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All but those that no model uses, which some formats have no place for."""
    return {name: x for name, x in tensors.items() if not name.startswith("blocks.0.att.v")
            or name == "blocks.0.att.value.weight"}  # fmt: skip


def turn(source: Path, target: Path, **options: object) -> Report:
    return convert(open_source(source), Target(path=target, **options))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_the_way_round(tmp_path, dtype, layers):
    path = first = official(weights(dtype, layers), tmp_path / "0/model.pth")
    for place in ("1/x.gguf", "2/hf", "3/x.gguf", "4/x.bin", "5/x.st", "6/mine"):
        to = {"hf": "hf", "mine": "receptance"}.get(place[2:])
        (tmp_path / place[0]).mkdir()
        turn(path, tmp_path / place, format=to)
        path = tmp_path / place
    assert open_source(path).tokenizer.fingerprint == BPE.fingerprint
    name = str(dtype).removeprefix("torch.")
    turn(path, tmp_path / "x.pth", dtype=None if name == "float32" else name)
    found, wanted = used(read_pth(tmp_path / "x.pth")), used(read_pth(first))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].float(), tensor.float()), name
        decay = name.endswith(".w0")
        assert found[name].dtype == (torch.float32 if decay else dtype), name


@pytest.mark.parametrize("format_", FORMATS)
def test_every_format_gives_the_same_answers(tmp_path, format_):
    path = official(weights(), tmp_path / "0/model.pth")
    (tmp_path / "1").mkdir()
    report = turn(path, tmp_path / "1" / FORMATS[format_], format=format_)
    assert report.difference.largest == 0
    model, tokenizer = load(tmp_path / "1" / FORMATS[format_])
    wanted = generate(weights(), BPE, "12 little", max_tokens=12, temperature=0)
    assert generate(model, tokenizer, "12 little", max_tokens=12, temperature=0) == wanted


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("format_", ["gguf", "ggmf"])
def test_quantized_files_are_compared_with_what_they_were_made_from(tmp_path, format_, kind):
    path = official(weights(), tmp_path / "0/model.pth")
    (tmp_path / "1").mkdir()
    target = tmp_path / "1" / FORMATS[format_]
    report = turn(path, target, dtype=kind)
    assert report.dtypes == (kind,) and 0 < report.difference.relative < 0.5
    size = sum(x.numel() for x in weights().parameters()) * 4
    assert target.stat().st_size < 0.6 * size
    turn(target, tmp_path / "back.pth")


def test_types_are_kept_where_the_file_has_them(tmp_path):
    model = weights()
    model.head.weight.data = model.head.weight.data.half()
    model.emb.weight.data = model.emb.weight.data.double()
    model.blocks[0].att.w1.data = model.blocks[0].att.w1.data.bfloat16()
    path = official(model, tmp_path / "0/model.pth")
    report = turn(path, tmp_path / "x.gguf")
    assert report.dtypes == ("float16", "float32")
    found = open_source(tmp_path / "x.gguf").dtypes
    assert found["head.weight"] == torch.float16
    assert found["emb.weight"] == found["blocks.0.att.w1"] == torch.float32


def test_the_tokenizer_is_in_the_file_and_not_beside_it(tmp_path):
    path = official(weights(), tmp_path / "0/model.pth")
    (tmp_path / "1").mkdir()
    ByteTokenizer().save(tmp_path / "1")
    small_bpe(290).save(tmp_path / "1")  # that of another model, which nobody reads for this one
    turn(path, tmp_path / "1/x.gguf")
    assert {x.name for x in (tmp_path / "1").iterdir()} == {"x.gguf", "tokenizer.json"}
    assert load(tmp_path / "1/x.gguf")[1].fingerprint == BPE.fingerprint


def test_world_models_of_the_hub_and_back(tmp_path):
    """Their repositories hold the vocabulary, and code that nobody has to run here."""
    vocabulary = "".join(f"{n + 1} {bytes([n])!r} 1\n" for n in range(256)) + "257 '\\n\\n' 2\n"
    tokenizer = WorldTokenizer(vocabulary.encode())
    model = make_model(258, width=64, version=7)
    path = official(model, tmp_path / "0/model.pth", tokenizer)
    turn(path, tmp_path / "hub", format="hf")
    assert (tmp_path / "hub/rwkv_vocab_v20230424.txt").read_text() == vocabulary
    (tmp_path / "hub/hf_rwkv_tokenizer.py").write_text("raise SystemExit")
    (tmp_path / "hub/added_tokens.json").write_text('{"<|rwkv_tokenizer_end_of_text|>": 0}')
    about = {"tokenizer_class": "RwkvTokenizer", "eos_token": "<|rwkv_tokenizer_end_of_text|>",
             "auto_map": {"AutoTokenizer": ["hf_rwkv_tokenizer.RwkvTokenizer", None]}}  # fmt: skip
    (tmp_path / "hub/tokenizer_config.json").write_text(json.dumps(about))
    assert load(tmp_path / "hub")[1].fingerprint == tokenizer.fingerprint
    (tmp_path / "1").mkdir()
    turn(tmp_path / "hub", tmp_path / "1/x.gguf")
    turn(tmp_path / "1/x.gguf", tmp_path / "1/back.pth")
    for name in ("x.gguf", "back.pth"):
        assert load(tmp_path / "1" / name)[1].same_as(tokenizer)


def test_what_cannot_be_written_is_told_before_anything_is(tmp_path):
    four = make_model(BPE.vocab_size)
    torch.save(dict(four.state_dict()), tmp_path / "four.pth")
    with pytest.raises(ValueError, match=r"llama\.cpp, .* runs no RWKV-4"):
        turn(tmp_path / "four.pth", tmp_path / "x.gguf")
    odd = make_model(256, version=7, width=64, **RANKS | {"group_norm_epsilon": 1e-5})
    save(odd, tmp_path / "odd", None)
    for name in ("x.gguf", "x.bin"):
        with pytest.raises(ValueError, match="group_norm_epsilon is 1e-05, and"):
            turn(tmp_path / "odd", tmp_path / name)
    assert not list(tmp_path.glob("x.*"))


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A file that `convert` wrote. Not to be changed."""
    folder = tmp_path_factory.mktemp("commands")
    official(weights(), folder / "model.pth")
    (folder / "only").mkdir()
    options = folder / "model.pth", folder / "only/x.gguf", "--dtype", "Q8_0"
    assert call("convert", *options).code == 0
    return folder / "only/x.gguf"


def test_generate_takes_it_straight(file):
    wanted = generate(*load(file), "12 little", max_tokens=8, temperature=0)
    found = call("generate", file, "12 little", "--max-tokens", 8, "--temperature", 0)
    assert found.code == 0 and wanted in found.out


def test_it_is_inspected_and_verified(file):
    found = call("inspect", file).out
    assert "GGUF file of rwkv7" in found and "bpe, in the file" in found
    assert call("verify", file).code == 0

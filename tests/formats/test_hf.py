"""Directories that transformers wrote, whole, in shards, pickled, tied, damaged or of others."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import RwkvConfig, RwkvForCausalLM

import receptance
from receptance.config import WORLD_VOCAB_SIZE, ModelConfig
from receptance.formats.hf import read_hf
from receptance.formats.names_hf import from_hf, to_hf
from receptance.formats.safetensors import read_safetensors
from receptance.tokenizer.files import find_tokenizer

CONFIG = RwkvConfig(
    vocab_size=19,
    hidden_size=8,
    num_hidden_layers=3,
    intermediate_size=24,
    layer_norm_epsilon=2e-5,
)
WANTED = ModelConfig(vocab_size=19, width=8, num_layers=3, ffn_width=24, layer_norm_epsilon=2e-5)


@pytest.fixture(scope="module")
def model() -> RwkvForCausalLM:
    generator = torch.Generator().manual_seed(0)
    model = RwkvForCausalLM(CONFIG)
    for parameter in model.parameters():  # no two tensors alike
        torch.nn.init.normal_(parameter, generator=generator)
    return model


@pytest.fixture(scope="module")
def tensors(model) -> dict[str, Tensor]:
    return {from_hf(name): value.detach() for name, value in model.state_dict().items()}


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def saved(tmp_path, model) -> Path:
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def sharded(tmp_path, model) -> Path:
    model.save_pretrained(tmp_path / "sharded", max_shard_size="3KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    return tmp_path / "sharded"


@pytest.fixture
def pickled(saved, model) -> Path:
    """As older versions of transformers wrote it."""
    (saved / "model.safetensors").unlink()
    torch.save(model.state_dict(), saved / "pytorch_model.bin")
    return saved


@pytest.fixture
def pickled_shards(saved, model) -> Path:
    (saved / "model.safetensors").unlink()
    weight_map = {}
    for number, (name, value) in enumerate(model.state_dict().items()):
        file = f"pytorch_model-{number % 2 + 1:05}-of-00002.bin"
        weight_map[name] = file
        part = torch.load(saved / file) if (saved / file).exists() else {}
        torch.save(part | {name: value}, saved / file)
    (saved / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return saved


@pytest.mark.parametrize("kind", ["saved", "sharded", "pickled", "pickled_shards"])
def test_every_layout_is_read_bit_for_bit(request, assert_same, tensors, kind):
    found = read_hf(request.getfixturevalue(kind))
    assert found.config == WANTED
    assert found.tokenizer is None
    assert_same(found.tensors, tensors)


def test_time_decay_may_be_float32_in_a_half_precision_model(tmp_path, model, assert_same):
    half = {name: value.detach().half() for name, value in model.state_dict().items()}
    name = "rwkv.blocks.1.attention.time_decay"
    half[name] = half[name].float()
    save_file(half, tmp_path / "model.safetensors")
    CONFIG.save_pretrained(tmp_path)
    assert_same(read_hf(tmp_path).tensors, {from_hf(name): value for name, value in half.items()})


def test_a_tied_head_is_the_embedding(tmp_path):
    config = RwkvConfig(**(CONFIG.to_dict() | {"tie_word_embeddings": True}))
    RwkvForCausalLM(config).save_pretrained(tmp_path)
    assert to_hf("head.weight") not in read_safetensors(tmp_path / "model.safetensors")
    tensors = read_hf(tmp_path).tensors
    assert torch.equal(tensors["head.weight"], tensors["emb.weight"])
    edit(tmp_path / "config.json", tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"missing are 'head.weight'"):
        read_hf(tmp_path)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_tied_head_is_written_and_trained_by_itself(tmp_path, pickled):
    """The two names of one tensor in a file become two tensors, in whatever format."""
    config = RwkvConfig(**(CONFIG.to_dict() | {"tie_word_embeddings": True, "vocab_size": 256}))
    theirs = RwkvForCausalLM(config)
    theirs.save_pretrained(tmp_path / "tied")
    if pickled:
        (tmp_path / "tied/model.safetensors").unlink()
        torch.save(theirs.state_dict(), tmp_path / "tied/pytorch_model.bin")
    model, tokenizer = receptance.load(tmp_path / "tied")
    receptance.save(model, tmp_path / "mine", tokenizer)
    again, _ = receptance.load(tmp_path / "mine")
    tokens = torch.arange(12)[None]
    assert torch.equal(again(tokens)[0], model(tokens)[0])
    with torch.no_grad():
        again.head.weight.zero_()
    assert again.emb.weight.any() and torch.equal(again.emb.weight, model.emb.weight)
    with torch.no_grad():
        model.head.weight.zero_()
    assert torch.equal(again.emb.weight, model.emb.weight)


def test_a_head_of_its_own_goes_before_a_tied_one(saved, tensors, assert_same):
    edit(saved / "config.json", tie_word_embeddings=True)
    theirs = RwkvForCausalLM.from_pretrained(saved, local_files_only=True)
    assert torch.equal(theirs.head.weight, tensors["head.weight"])
    assert_same(read_hf(saved).tensors, tensors)


def test_the_tokenizer_beside_the_weights_is_found(saved):
    (saved / "tokenizer.json").write_text("{}")
    assert read_hf(saved).tokenizer == saved / "tokenizer.json"


def test_of_two_tokenizers_the_vocabulary_decides(tmp_path):
    for name in ("20B_tokenizer.json", "rwkv_vocab_v20230424.txt"):
        (tmp_path / name).touch()
    assert find_tokenizer(tmp_path, 50277) == tmp_path / "20B_tokenizer.json"
    for rows in (WORLD_VOCAB_SIZE, 65530, 65600):
        assert find_tokenizer(tmp_path, rows) == tmp_path / "rwkv_vocab_v20230424.txt"


# Configurations that are not those of the weights, or not RWKV-4's.


@pytest.mark.parametrize("model_type", ["rwkv8", "llama", None])
def test_other_architectures_are_refused_by_name(saved, model_type):
    edit(saved / "config.json", model_type=model_type)
    with pytest.raises(ValueError, match=rf"config.json: the model_type is {model_type!r}"):
        read_hf(saved)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 16),
        ("attention_hidden_size", 16),
        ("num_hidden_layers", 4),
        ("vocab_size", 20),
        ("intermediate_size", 32),
        ("layer_norm_epsilon", "small"),
        ("layer_norm_epsilon", 7.5),
        ("hidden_size", "8"),
    ],
)
def test_a_configuration_that_does_not_fit_the_tensors_is_refused(saved, refusal, field, value):
    edit(saved / "config.json", **{field: value})
    assert field in refusal(lambda _: read_hf(saved), saved / "config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\x00", '{"a":' * 100_000])
def test_a_config_that_is_no_json_object_is_refused(saved, refusal, text):
    (saved / "config.json").write_text(text)
    refusal(lambda _: read_hf(saved), saved / "config.json")
    (saved / "config.json").write_bytes(b"\xff\xfe{")
    refusal(lambda _: read_hf(saved), saved / "config.json")


def test_missing_files_are_named(saved, refusal):
    (saved / "model.safetensors").unlink()
    assert "pytorch_model.bin.index.json" in refusal(read_hf, saved)
    (saved / "config.json").unlink()
    assert "No such file" in refusal(lambda _: read_hf(saved), saved / "config.json")


# Indices and shards.


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", 3, None]
)
def test_an_index_that_reaches_out_of_its_directory_is_refused(sharded, refusal, name):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=weight_map | {"head.weight": name})
    (sharded.parent / "outside.safetensors").write_bytes(b"secret")
    assert "same directory" in refusal(lambda _: read_hf(sharded), index)


def test_shards_that_do_not_fit_their_index_are_refused(sharded, refusal):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=weight_map | {"head.weight": weight_map["rwkv.ln_out.bias"]})
    if weight_map["head.weight"] != weight_map["rwkv.ln_out.bias"]:
        assert "'head.weight'" in refusal(lambda _: read_hf(sharded), index)
    edit(index, weight_map={})
    assert "no weight_map" in refusal(lambda _: read_hf(sharded), index)
    edit(index, weight_map=weight_map)
    shard = sharded / weight_map["head.weight"]
    shard.unlink()
    assert "No such file" in refusal(lambda _: read_hf(sharded), shard)


def test_an_evil_shard_is_refused_by_name(pickled, refusal):
    path = pickled / "pytorch_model.bin"
    path.write_bytes(b"\x80\x02cposix\nsystem\nX\x0c\0\0\0touch marker\x85R.")
    assert "'posix.system'" in refusal(lambda _: read_hf(pickled), path)


# Damaged safetensors.


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("damage") / "model.safetensors"
    save_file({"emb.weight": torch.arange(36.0).view(9, 4), "b": torch.ones(4).bfloat16()}, path)
    return path, path.read_bytes()


def test_safetensors_cut_short_anywhere_are_refused(intact, refusal):
    path, content = intact
    for size in range(len(content)):
        path.write_bytes(content[:size])
        refusal(read_safetensors, path)


@settings(max_examples=120)
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1))
def test_changed_bytes_give_tensors_or_a_refusal(intact, refusal, changes):
    path, content = intact
    damaged = bytearray(content)
    for position, value in changes:
        # Mostly in the header, where it matters.
        damaged[position % (len(content) if position % 5 == 0 else 160)] = value
    path.write_bytes(damaged)
    try:
        tensors = read_safetensors(path)
    except ValueError:
        refusal(read_safetensors, path)
    else:
        assert all(isinstance(tensor, Tensor) for tensor in tensors.values())


@settings(max_examples=100)
@given(header=st.binary(max_size=100), claimed=st.integers(0, 2**64 - 1) | st.none())
@example(header=b"{}", claimed=None)
@example(header=b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}', claimed=None)
def test_random_headers_give_no_numbers_or_a_refusal(intact, refusal, header, claimed):
    path, _ = intact
    size = len(header) if claimed is None else claimed
    path.write_bytes(size.to_bytes(8, "little") + header)
    try:
        tensors = read_safetensors(path)
    except ValueError:
        refusal(read_safetensors, path)
    else:
        assert sum(tensor.numel() for tensor in tensors.values()) == 0


def test_types_that_torch_has_no_view_of_are_refused_or_read(tmp_path, refusal: Callable):
    # Offsets that are no multiple of the element size.
    header = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        }
    ).encode()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(9))
    try:
        assert read_safetensors(path)["b"].tolist() == [0, 0]
    except ValueError:
        refusal(read_safetensors, path)

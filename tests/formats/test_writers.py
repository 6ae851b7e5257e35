"""What is written is what torch, safetensors, transformers and `rwkv` read, bit for bit."""

import json
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_model, small_bpe
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from receptance import Model, ModelConfig
from receptance.formats import read
from receptance.formats.hf import read_hf, tokenizer_fields, write_hf
from receptance.formats.names import to_hf
from receptance.formats.pth import read_pth, write_pth
from receptance.formats.safetensors import ALIGNMENT, write_safetensors
from receptance.formats.writing import Schema

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)
shapes = st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple)
layouts = st.dictionaries(names, st.tuples(st.sampled_from(FLOATS), shapes), max_size=5)


def filled(layout: Schema) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator).to(d) for n, (d, s) in layout.items()}


def layout_of(tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> Schema:
    return {name: (dtype or x.dtype, tuple(x.shape)) for name, x in tensors.items()}


class TestPth:
    @given(layouts)
    def test_the_index_is_that_of_torch_to_the_byte(self, tmp_path_factory, layout):
        folder, tensors = tmp_path_factory.getbasetemp(), filled(layout)
        write_pth(folder / "ours.pth", layout, tensors)
        torch.save(tensors, folder / "archive.pth")
        with zipfile.ZipFile(folder / "ours.pth") as ours:
            assert ours.testzip() is None
            with zipfile.ZipFile(folder / "archive.pth") as theirs:
                indices = [archive.read("archive/data.pkl") for archive in (ours, theirs)]
                assert indices[0] == indices[1]
                assert set(ours.namelist()) <= set(theirs.namelist())
                for name in ours.namelist():
                    assert ours.read(name) == theirs.read(name)

    @pytest.mark.parametrize("mapped", [False, True])
    @pytest.mark.parametrize("guarded", [False, True])
    def test_torch_loads_it_in_every_way(self, tmp_path, official, assert_same, mapped, guarded):
        write_pth(tmp_path / "x.pth", layout_of(official), official)
        found = torch.load(tmp_path / "x.pth", weights_only=guarded, mmap=mapped)
        assert list(found) == list(official)
        assert_same(found, official)
        assert not mapped or all(x.data_ptr() % 64 == 0 for x in found.values())

    def test_types_are_changed_on_the_way(self, tmp_path, official, assert_same):
        write_pth(tmp_path / "x.pth", layout_of(official, torch.bfloat16), official)
        wanted = {name: x.bfloat16() for name, x in official.items()}
        assert_same(read_pth(tmp_path / "x.pth"), wanted)

    def test_views_and_parameters(self, tmp_path):
        matrix = torch.arange(12.0).view(3, 4)
        tensors = {"t": matrix.T, "p": torch.nn.Parameter(matrix), "row": matrix[1]}
        write_pth(tmp_path / "x.pth", layout_of(tensors), tensors)
        found = read_pth(tmp_path / "x.pth")
        assert all(torch.equal(found[name], x) for name, x in tensors.items())

    def test_what_a_type_cannot_hold_is_named(self, tmp_path, official):
        tensors = official | {"head.weight": official["head.weight"] * 1e6}
        with pytest.raises(ValueError, match=r"head.weight has values too large for float16"):
            write_pth(tmp_path / "x.pth", layout_of(tensors, torch.float16), tensors)


def test_safetensors_are_read_by_their_library(tmp_path, official, assert_same):
    for dtype in FLOATS:
        layout = layout_of(official, dtype)
        write_safetensors(tmp_path / "x.st", layout, reversed(official.items()))
        found = safetensors.torch.load_file(tmp_path / "x.st")
        assert_same(found, {name: x.to(dtype) for name, x in official.items()})
    content = (tmp_path / "x.st").read_bytes()
    length = int.from_bytes(content[:8], "little")
    for entry in list(json.loads(content[8 : 8 + length]).values())[1:]:
        begin, end = entry["data_offsets"]
        assert (end - begin) % ALIGNMENT or (8 + length + begin) % ALIGNMENT == 0


def test_ai00_files_are_read_by_their_suffix(tmp_path, official, config, assert_same):
    # assets/scripts/convert_safetensors.py of Ai00: official names and shapes, all float16.
    half = {name: x.half() for name, x in official.items()}
    safetensors.torch.save_file(half, tmp_path / "model.st", metadata={"format": "pt"})
    for path in (tmp_path / "model.st", tmp_path):
        weights = read(path)
        assert weights.config == config
        assert_same(dict(weights.tensors), half)


TOKENIZER = small_bpe()
TEXT = "12 little foxes, naïvely — 狐.<|endoftext|>\n x"


@pytest.fixture(scope="module")
def model() -> Model:
    """Deeper than the six blocks after which transformers would divide."""
    return make_model(TOKENIZER.vocab_size, layers=8)


def theirs(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    """Ours or theirs: [1,T,V]."""
    found = model(torch.tensor([TOKENIZER.encode(TEXT)]))
    return found[0] if isinstance(found, tuple) else found.logits


class TestTransformers:
    def write(self, model: Model, folder: Path, shard_bytes: int = 1 << 30) -> Path:
        folder.mkdir()
        tensors = model.state_dict()
        write_hf(folder, model.config, layout_of(tensors), tensors, shard_bytes)
        return folder

    @pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000])
    def test_it_loads_ours_and_gives_our_logits(self, tmp_path, model, assert_same, shard_bytes):
        folder = self.write(model, tmp_path / "hf", shard_bytes)
        assert (len(list(folder.glob("model-*-of-*.safetensors"))) > 3) == (shard_bytes < 1 << 30)
        found = theirs(folder)
        wanted = logits(model)
        for _ in range(2):  # the first evaluation is the one that may change weights
            torch.testing.assert_close(logits(found), wanted, rtol=1e-5, atol=1e-5)
        assert_same({n: x.detach() for n, x in found.state_dict().items()},
                    {to_hf(n): x for n, x in model.state_dict().items()})  # fmt: skip
        assert_same(read_hf(folder).tensors, dict(model.state_dict()))

    def test_shards_hold_no_more_than_they_may_and_all_there_is(self, tmp_path, model):
        folder = self.write(model, tmp_path / "hf", 20_000)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        files = {
            path.name: safetensors.torch.load_file(path) for path in folder.glob("*.safetensors")
        }
        assert index["weight_map"] == {name: f for f, held in files.items() for name in held}
        sizes = [sum(x.nbytes for x in files[name].values()) for name in sorted(files)]
        assert all(sum(two) > 20_000 for two in pairwise(sizes)), "more files than needed"
        assert sum(sizes) == index["metadata"]["total_size"]
        assert all(
            size <= 20_000 or len(held) == 1
            for size, (_, held) in zip(sizes, sorted(files.items()), strict=True)
        )

    def test_epsilon_and_a_narrow_feed_forward(self, tmp_path):
        config = ModelConfig(
            vocab_size=TOKENIZER.vocab_size,
            width=16,
            num_layers=2,
            ffn_width=24,
            layer_norm_epsilon=1e-3,
        )
        model = Model(config, seed=3).eval()
        folder = self.write(model, tmp_path / "hf")
        assert read(folder).config == config
        torch.testing.assert_close(logits(theirs(folder)), logits(model), rtol=1e-5, atol=1e-5)

    def test_half_precision_says_so(self, tmp_path, model):
        for dtype in (torch.float16, torch.bfloat16):
            narrow = make_model(TOKENIZER.vocab_size).to(dtype)
            found = theirs(self.write(narrow, tmp_path / str(dtype)))
            assert found.dtype == dtype
            # Models overflow in float16 without.
            assert found.config.rescale_every == (6 if dtype == torch.float16 else 0)
            assert found.config.tie_word_embeddings is False
            assert (found.config.bos_token_id, found.config.eos_token_id) == (0, 0)

    def test_their_tokenizer_cuts_like_ours(self, tmp_path, model):
        folder = self.write(model, tmp_path / "hf")
        TOKENIZER.save(folder)
        fields = tokenizer_fields("<|endoftext|>")
        (folder / "tokenizer_config.json").write_text(json.dumps(fields))
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        assert found(TEXT)["input_ids"] == TOKENIZER.encode(TEXT)
        assert found.decode(found(TEXT)["input_ids"]) == TEXT
        assert found.eos_token_id == TOKENIZER.end_of_text


# In a process of its own: importing it sets environment variables and compiles.
RWKV = """
import json, sys, torch
from rwkv.model import RWKV
tokens = json.loads(sys.argv[2])
model = RWKV(model=sys.argv[1], strategy="cpu fp32", verbose=False)
print("\\n" + json.dumps(model.forward(tokens, None, full_output=True)[0].tolist()))
"""


@pytest.mark.slow
def test_the_rwkv_package_loads_ours_and_gives_our_logits(tmp_path, model):
    pytest.importorskip("rwkv")
    tensors = model.state_dict()
    write_pth(tmp_path / "ours.pth", layout_of(tensors), tensors)
    tokens = json.dumps(TOKENIZER.encode(TEXT))
    done = subprocess.run(
        [sys.executable, "-c", RWKV, str(tmp_path / "ours.pth"), tokens],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found = torch.tensor(json.loads(done.stdout.strip().splitlines()[-1]))
    torch.testing.assert_close(found, logits(model)[0], rtol=1e-5, atol=1e-5)

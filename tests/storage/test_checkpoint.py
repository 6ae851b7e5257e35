"""Directories that are whole or absent, and everything that `load` opens."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from tiny import make_model, same_bits, small_bpe

import receptance
from receptance.engine import EngineOptions, load_engine
from receptance.model import Model
from receptance.quantize.weights import quantize_tensors
from receptance.storage import checkpoint
from receptance.storage.checkpoint import load, save
from receptance.storage.directories import newest_checkpoint, write_directory
from receptance.storage.manifest import verify
from receptance.storage.quantized import About, read_quantized, write_quantized
from receptance.tokenizer import BPETokenizer, ByteTokenizer

NAMES = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(300)


@pytest.fixture(scope="module")
def pristine(model, tmp_path_factory) -> Path:
    """A checkpoint that no test may change."""
    directory = tmp_path_factory.mktemp("pristine") / "model"
    save(model, directory, small_bpe())
    return directory


@pytest.fixture
def saved(pristine, tmp_path) -> Path:
    return shutil.copytree(pristine, tmp_path / "saved")


def refusal(call: Callable[[], object]) -> str:
    """The message, of one line, with which the call fails."""
    with pytest.raises(ValueError) as caught:
        call()
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(directory: Path, **changes: object) -> None:
    """Change config.json as a later release might have written it, manifest included."""

    def write(partial: Path) -> None:
        for name in NAMES:
            shutil.copy(directory / name, partial / name)
        config = json.loads((partial / "config.json").read_text())
        (partial / "config.json").write_text(json.dumps(config | changes))

    write_directory(directory, write)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_saved_model_comes_back_bit_by_bit(dtype, tmp_path):
    model = make_model().to(dtype)
    save(model, tmp_path / "model", ByteTokenizer())
    loaded, tokenizer = load(tmp_path / "model", dtype=dtype)
    assert same_bits(loaded.state_dict(), model.state_dict())
    assert loaded.config == model.config
    assert not loaded.training
    assert tokenizer.kind == "bytes"


def test_the_tokenizer_comes_back_with_the_model(pristine):
    _, tokenizer = load(pristine)
    assert tokenizer.fingerprint == small_bpe().fingerprint


@pytest.mark.parametrize("name", ["mödél", "two words", "новая/папка", "[brackets]", "a.b"])
def test_any_path_will_do(name, model, tmp_path):
    save(model, tmp_path / name, small_bpe())
    loaded, _ = load(str(tmp_path / name))
    assert same_bits(loaded.state_dict(), model.state_dict())


def test_a_home_directory_is_expanded(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(model, "~/model", small_bpe())
    assert (tmp_path / "model").is_dir()
    assert same_bits(load("~/model")[0].state_dict(), model.state_dict())


def test_everyone_may_read_what_everyone_could_read(pristine):
    assert len({file.stat().st_mode for file in pristine.iterdir()}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_dtype_of_the_file_is_kept(dtype, tmp_path):
    save(make_model().to(dtype), tmp_path / "model", ByteTokenizer())
    assert load(tmp_path / "model")[0].emb.weight.dtype == dtype


def test_float16_is_widened(tmp_path):
    model = make_model().to(torch.float16)
    save(model, tmp_path / "model", ByteTokenizer())
    loaded, _ = load(tmp_path / "model")
    assert same_bits(loaded.state_dict(), model.float().state_dict())


def test_dtype_is_an_argument(saved, model):
    half, _ = load(saved, dtype=torch.bfloat16)
    assert half.emb.weight.dtype == torch.bfloat16
    assert torch.equal(half.emb.weight, model.emb.weight.bfloat16())


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_named(name, saved):
    content = bytearray((saved / name).read_bytes())
    content[len(content) // 2] ^= 4
    (saved / name).write_bytes(content)
    assert name in refusal(lambda: load(saved))


@pytest.mark.parametrize("name", NAMES)
def test_a_truncated_file_is_named(name, saved):
    os.truncate(saved / name, 100)
    assert name in refusal(lambda: load(saved))


@pytest.mark.parametrize("name", [*NAMES, "manifest.json"])
def test_a_missing_file_is_named(name, saved):
    (saved / name).unlink()
    assert name in refusal(lambda: load(saved))


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"files": []}', '{"files": {"model.safetensors": {}}}', "\xff"],
)
def test_a_damaged_manifest_is_named(content, saved):
    (saved / "manifest.json").write_bytes(content.encode("latin-1"))
    assert "manifest.json is damaged" in refusal(lambda: load(saved))


@given(st.data())
@settings(max_examples=60)
def test_no_changed_byte_goes_unnoticed(pristine, tmp_path_factory, data):
    saved = shutil.copytree(pristine, tmp_path_factory.mktemp("flip") / "saved")
    file = saved / data.draw(st.sampled_from([*NAMES, "manifest.json"]))
    content = bytearray(file.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    assert str(file) in refusal(lambda: load(saved))


def test_files_of_two_checkpoints_do_not_mix(saved, tmp_path):
    save(make_model(300, seed=2), tmp_path / "other", small_bpe())
    shutil.copy(tmp_path / "other/model.safetensors", saved / "model.safetensors")
    assert "model.safetensors does not match" in refusal(lambda: load(saved))


def test_a_newer_format_asks_for_an_update(saved):
    rewrite(saved, format_version=2)
    assert "update receptance" in refusal(lambda: load(saved))


def test_sizes_that_are_not_those_of_the_tensors(saved):
    sizes = json.loads((saved / "config.json").read_text())["model"]
    rewrite(saved, model=sizes | {"num_layers": 3})
    assert "do not belong together" in refusal(lambda: load(saved))


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter.safetensors").touch()
    assert "name the model that it was trained on" in refusal(lambda: load(tmp_path / "lora"))


class TestFailingWrites:
    """What was there stays as it was, and nothing is left beside it."""

    @pytest.fixture
    def failing(self, request, monkeypatch) -> None:
        """One phase of writing fails, the disk being full."""

        def fail(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def fail_late(source: Path, target: Path) -> None:
            if ".partial" in source.name:
                fail()
            rename(source, target)

        rename = os.rename
        target, replacement = {
            "tensors": ("safetensors.torch.save_file", fail),
            "manifest": ("receptance.storage.directories.write_manifest", fail),
            "sync": ("os.fsync", fail),
            "any rename": ("os.rename", fail),
            "last rename": ("os.rename", fail_late),
        }[request.param]
        monkeypatch.setattr(target, replacement)

    phases = pytest.mark.parametrize(
        "failing", ["tensors", "manifest", "sync", "any rename", "last rename"], indirect=True
    )

    @phases
    @pytest.mark.usefixtures("failing")
    def test_the_old_checkpoint_stays(self, saved, model):
        message = refusal(lambda: save(make_model(300, seed=2), saved, small_bpe()))
        assert str(saved) in message
        assert "No space left" in message
        assert [p.name for p in saved.parent.iterdir()] == ["saved"]
        assert same_bits(load(saved)[0].state_dict(), model.state_dict())

    @phases
    @pytest.mark.usefixtures("failing")
    def test_a_new_one_leaves_nothing(self, model, tmp_path):
        refusal(lambda: save(model, tmp_path / "new", small_bpe()))
        assert list(tmp_path.iterdir()) == []

    def test_an_error_of_safetensors_is_one_of_writing(self, saved, model, monkeypatch):
        def fail(*_: object, **__: object) -> None:
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        monkeypatch.setattr("safetensors.torch.save_file", fail)
        assert "No space" in refusal(lambda: save(make_model(300, seed=2), saved, small_bpe()))
        assert same_bits(load(saved)[0].state_dict(), model.state_dict())

    def test_an_interrupt_leaves_nothing_half_done(self, saved, model, monkeypatch):
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("receptance.storage.directories.write_manifest", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save(make_model(300, seed=2), saved, small_bpe())
        assert [p.name for p in saved.parent.iterdir()] == ["saved"]
        assert same_bits(load(saved)[0].state_dict(), model.state_dict())

    def test_a_tokenizer_that_does_not_fit_is_not_written(self, tmp_path):
        model = make_model(1000)
        assert "wrong tokenizer" in refusal(lambda: save(model, tmp_path / "m", small_bpe()))
        assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_may_be_replaced(saved):
    new = make_model(300, seed=2)
    save(new, saved, small_bpe())
    assert same_bits(load(saved)[0].state_dict(), new.state_dict())
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]


@pytest.mark.parametrize("name", ["a file", "a folder"])
def test_what_is_not_a_checkpoint_is_never_replaced(name, model, tmp_path):
    (tmp_path / "a file").write_text("precious")
    (tmp_path / "a folder").mkdir()
    (tmp_path / "a folder/thesis.txt").write_text("precious")
    assert "not a checkpoint" in refusal(lambda: save(model, tmp_path / name, small_bpe()))
    assert (tmp_path / "a file").read_text() == "precious"
    assert (tmp_path / "a folder/thesis.txt").read_text() == "precious"


class TestRuns:
    @pytest.fixture
    def run(self, pristine, tmp_path) -> Path:
        for step in (5, 20, 100):  # not in alphabetical order
            save(make_model(300, seed=step), tmp_path / f"run/step-{step}", small_bpe())
        (tmp_path / "run/step-1000.partial").mkdir()
        (tmp_path / "run/data").mkdir()
        return tmp_path / "run"

    def test_the_newest_is_loaded(self, run):
        loaded, _ = load(run)
        assert same_bits(loaded.state_dict(), make_model(300, seed=100).state_dict())

    def test_a_damaged_one_is_passed_over(self, run):
        os.truncate(run / "step-100/model.safetensors", 100)
        directory, skipped = newest_checkpoint(run)
        assert directory.name == "step-20"
        assert len(skipped) == 1
        assert "step-100/model.safetensors" in skipped[0]
        with pytest.warns(UserWarning, match=r"passed over a damaged.*step-100/model\.safetensors"):
            loaded, _ = load(run)
        assert same_bits(loaded.state_dict(), make_model(300, seed=20).state_dict())

    def test_all_damaged_ones_are_listed(self, run):
        for step in (5, 20, 100):
            (run / f"step-{step}/manifest.json").unlink()
        message = refusal(lambda: load(run))
        assert all(f"step-{step}/manifest.json is missing" in message for step in (5, 20, 100))

    def test_a_damaged_one_can_be_written_again(self, run, model):
        (run / "step-100/manifest.json").unlink()
        save(model, run / "step-100", small_bpe())
        assert same_bits(load(run)[0].state_dict(), model.state_dict())
        verify(run / "step-100")

    def test_a_run_without_checkpoints_says_so(self, tmp_path):
        assert "it has none" in refusal(lambda: newest_checkpoint(tmp_path))


class TestForeignWeights:
    @pytest.fixture
    def pth(self, model, tmp_path) -> Path:
        torch.save(model.state_dict(), tmp_path / "model.pth")
        return tmp_path / "model.pth"

    @pytest.fixture
    def elsewhere(self, tmp_path) -> Path:
        (tmp_path / "elsewhere").mkdir()
        small_bpe().save(tmp_path / "elsewhere")
        return tmp_path / "elsewhere" / "tokenizer.json"

    def test_a_pth_with_a_tokenizer_given_as_a_path(self, pth, elsewhere, model):
        loaded, tokenizer = load(pth, tokenizer=elsewhere)
        assert same_bits(loaded.state_dict(), model.state_dict())
        assert tokenizer.fingerprint == small_bpe().fingerprint

    def test_a_pth_with_a_tokenizer_given_as_an_object(self, pth):
        tokenizer = small_bpe()
        assert load(pth, tokenizer=tokenizer)[1] is tokenizer

    def test_a_pth_with_a_tokenizer_beside_it(self, pth):
        small_bpe().save(pth.parent)
        assert load(str(pth))[1].fingerprint == small_bpe().fingerprint

    @pytest.mark.parametrize("opener", [load, load_engine])
    def test_a_pth_of_an_unusual_vocabulary_has_no_tokenizer(self, pth, opener, model):
        loaded, tokenizer = opener(pth)
        assert tokenizer is None
        assert loaded.fingerprint() == model.fingerprint()

    def test_engine_options_want_a_tokenizer(self, pth):
        message = refusal(lambda: EngineOptions().load(pth))
        assert "vocabulary of 300" in message
        assert "pass tokenizer=FILE" in message

    def test_256_ids_are_bytes(self, tmp_path):
        torch.save(make_model(256).state_dict(), tmp_path / "model.pth")
        assert load(tmp_path / "model.pth")[1].kind == "bytes"

    def test_256_ids_are_bytes_beside_the_tokenizers_of_other_models_too(self, elsewhere):
        torch.save(make_model(256).state_dict(), elsewhere.parent / "model.pth")
        assert load(elsewhere.parent / "model.pth")[1].kind == "bytes"

    def test_256_ids_may_be_those_of_a_tokenizer_that_fits(self, elsewhere):
        torch.save(make_model(256).state_dict(), elsewhere.parent / "model.pth")
        spec = json.loads(elsewhere.read_text())
        bytes_only = [x for x in spec["model"]["vocab"] if len(x) == 1]
        spec["model"] |= {"vocab": {x: n for n, x in enumerate(bytes_only)}, "merges": []}
        elsewhere.write_text(json.dumps(spec | {"added_tokens": []}))
        elsewhere.with_name("tokenizer_config.json").write_text('{"eos_token": "!"}')
        assert load(elsewhere.parent / "model.pth")[1].kind == "bpe"

    @pytest.mark.parametrize("size", [300, 301, 427])
    def test_unused_rows_are_padding(self, size, tmp_path):
        torch.save(make_model(size).state_dict(), tmp_path / "model.pth")
        loaded, tokenizer = load(tmp_path / "model.pth", tokenizer=small_bpe())
        assert (loaded.config.vocab_size, tokenizer.vocab_size) == (size, 300)

    @pytest.mark.parametrize("size", [299, 428, 1000])
    def test_a_tokenizer_of_another_size_is_refused(self, size, tmp_path):
        torch.save(make_model(size).state_dict(), tmp_path / "model.pth")
        message = refusal(lambda: load(tmp_path / "model.pth", tokenizer=small_bpe()))
        assert f"wrong tokenizer: bpe has 300 ids and these weights {size}" in message

    def test_a_directory_of_transformers_gives_its_logits(self, tmp_path):
        from transformers import RwkvConfig, RwkvForCausalLM

        generator = torch.Generator().manual_seed(0)
        sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2}
        theirs = RwkvForCausalLM(RwkvConfig(**sizes, rescale_every=0)).eval()
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.5, generator=generator)
        theirs.save_pretrained(tmp_path / "hf")
        small_bpe().save(tmp_path / "hf")
        ours, tokenizer = load(tmp_path / "hf")
        tokens = torch.tensor([tokenizer.encode("12 little foxes jump")])
        with torch.no_grad():
            wanted = theirs(tokens).logits
            found, _ = ours(tokens)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)

    def test_a_hub_id_without_a_network_is_one_line(self, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        message = refusal(lambda: load("RWKV/no-such-model-at-all"))
        assert "RWKV/no-such-model-at-all" in message
        assert "network" in message


def test_a_checkpoint_accepts_its_own_tokenizer_only(saved):
    given = small_bpe()
    assert load(saved, tokenizer=given)[1].fingerprint == given.fingerprint
    other = BPETokenizer.train(["entirely different words"], 300)
    assert "wrong tokenizer" in refusal(lambda: load(saved, tokenizer=other))
    assert "wrong tokenizer" in refusal(lambda: load(saved, tokenizer="bytes"))


class TestWithoutATokenizer:
    """What is not text has none."""

    @pytest.fixture
    def untold(self, model, tmp_path) -> Path:
        receptance.save(model, tmp_path / "untold", None)
        return tmp_path / "untold"

    @pytest.fixture
    def codes(self, model, tmp_path) -> Path:
        """The same, quantized."""
        about = About(kind="int8", group=128, source=model.fingerprint())
        weights = quantize_tensors(model.state_dict(), "int8")
        write_quantized(tmp_path / "codes", model.config, None, about, weights)
        return tmp_path / "codes"

    def test_it_is_saved_and_loaded(self, untold, model):
        found, tokenizer = receptance.load(untold)
        assert tokenizer is None
        assert same_bits(found.state_dict(), model.state_dict())
        assert sorted(x.name for x in untold.iterdir()) == [
            "config.json",
            "manifest.json",
            "model.safetensors",
        ]

    def test_bytes_are_not_guessed(self, tmp_path):
        """As they are for a bare file of 256 ids: here it is known that there is none."""
        receptance.save(make_model(256), tmp_path / "model", None)
        assert receptance.load(tmp_path / "model")[1] is None

    def test_an_engine_has_none(self, untold, model):
        engine, tokenizer = load_engine(untold)
        assert tokenizer is None
        assert engine.fingerprint() == model.fingerprint()

    @pytest.mark.parametrize("opener", [load, load_engine])
    def test_a_quantized_model_has_none(self, codes, model, opener):
        found, tokenizer = opener(codes)
        assert tokenizer is None
        assert found.config == model.config
        assert read_quantized(codes).tokenizer is None

    @pytest.mark.parametrize("place", ["untold", "codes"])
    @pytest.mark.parametrize("opener", [load, load_engine])
    def test_one_that_fits_may_be_given(self, place, opener, request):
        tokenizer = small_bpe()
        directory = request.getfixturevalue(place)
        assert opener(directory, tokenizer=tokenizer)[1] is tokenizer

    @pytest.mark.parametrize("place", ["untold", "codes"])
    @pytest.mark.parametrize("opener", [load, load_engine])
    def test_one_that_does_not_fit_is_refused(self, place, opener, request):
        directory = request.getfixturevalue(place)
        message = refusal(lambda: opener(directory, tokenizer=small_bpe(301)))
        assert "wrong tokenizer: bpe has 301 ids and these weights 300" in message


def test_what_is_here_has_no_revision(saved):
    assert "only hub models have them" in refusal(lambda: load(saved, revision="main"))


@pytest.mark.parametrize("device", ["warp", "cuda:99", "cuda"])
def test_a_device_that_is_not_there_is_one_line(device, saved):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("it is there")
    assert repr(device) in refusal(lambda: load(saved, device=device))


def test_a_type_by_its_name_is_refused(saved):
    line = refusal(lambda: load(saved, dtype="float32"))
    assert line == "dtype is 'float32'; it must be one like torch.float32"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "no such file or directory: missing"),
        (
            "empty",
            "empty: wanted a config.json or a single .pth, .safetensors, .st or .gguf file in it",
        ),
        (
            "text.txt",
            "text.txt: weights are read from .pth, .pt, .bin, .safetensors, .st, .gguf files",
        ),
        ("", "a path is empty"),
    ],
)
def test_what_holds_no_model_is_refused(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("words")
    assert refusal(lambda: load(name)).startswith(words)


class TestTensorFiles:
    """One file, or shards with an index in the form that transformers has."""

    @pytest.fixture
    def tensors(self, model) -> dict[str, torch.Tensor]:
        return model.state_dict()

    def write_shards(self, directory: Path, tensors: dict, stem: str, count: int) -> list[str]:
        names = sorted(tensors)
        shards = [
            checkpoint.write_tensors(
                {n: tensors[n] for n in names[i::count]}, directory, stem, shard=i, shards=count
            )
            for i in range(count)
        ]
        return [*shards, checkpoint.write_index(directory, stem, shards)]

    @pytest.mark.parametrize("count", [1, 2, 7])
    def test_a_model_in_shards_is_loaded(self, count, model, tensors, tmp_path):
        def write(partial: Path) -> None:
            checkpoint.write_description(model.config, partial, small_bpe())
            self.write_shards(partial, tensors, "model", count)

        write_directory(tmp_path / "model", write)
        assert same_bits(load(tmp_path / "model")[0].state_dict(), tensors)

    def test_they_have_the_names_of_transformers(self, tensors, tmp_path):
        assert self.write_shards(tmp_path, tensors, "model", 2) == [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
        ]

    def test_transformers_reads_the_shards(self, tmp_path):
        """What save_pretrained would have written, written by us."""
        from transformers import RwkvConfig, RwkvForCausalLM

        sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2}
        theirs = RwkvForCausalLM(RwkvConfig(**sizes)).eval()
        theirs.config.save_pretrained(tmp_path)
        self.write_shards(tmp_path, theirs.state_dict(), "model", 3)
        found = RwkvForCausalLM.from_pretrained(tmp_path).state_dict()
        assert same_bits(found, theirs.state_dict())

    @given(st.data())
    @settings(max_examples=20)
    def test_any_tensors_in_any_shards_come_back(self, tmp_path_factory, data):
        folder = tmp_path_factory.mktemp("shards")
        names = data.draw(st.sets(st.text("ab./é", min_size=1, max_size=5), min_size=1, max_size=8))
        tensors = {
            name: torch.arange(data.draw(st.integers(0, 5)), dtype=torch.float64) + i
            for i, name in enumerate(sorted(names))
        }
        self.write_shards(folder, tensors, "optimizer", data.draw(st.integers(1, 4)))
        assert same_bits(checkpoint.read_tensors(folder, "optimizer"), tensors)

    def test_a_shard_of_another_model_is_refused(self, tensors, tmp_path):
        shards = self.write_shards(tmp_path, tensors, "model", 2)
        shutil.copy(tmp_path / shards[0], tmp_path / shards[1])
        message = refusal(lambda: checkpoint.read_tensors(tmp_path, "model"))
        assert "model.safetensors.index.json: tensors are not in the files it names" in message

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}'])
    def test_a_damaged_index_is_named(self, content, tmp_path):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        message = refusal(lambda: checkpoint.read_tensors(tmp_path, "model"))
        assert "model.safetensors.index.json: " in message

    def test_an_index_reaches_for_no_files_elsewhere(self, tensors, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        self.write_shards(tmp_path / "elsewhere", tensors, "model", 1)
        (tmp_path / "here").mkdir()
        index = {"weight_map": dict.fromkeys(tensors, "../elsewhere/model.safetensors")}
        (tmp_path / "here/model.safetensors.index.json").write_text(json.dumps(index))
        message = refusal(lambda: checkpoint.read_tensors(tmp_path / "here", "model"))
        assert "shards must lie in the same directory" in message


@pytest.mark.parametrize("kind", ["checkpoint of a run", "int8"])
def test_nothing_but_a_model_is_replaced(kind, model, saved, tmp_path):
    target = tmp_path / "target"
    if kind == "int8":
        codes = quantize_tensors(model.state_dict(), "int8", None)
        about = About(kind="int8", group=128, source=model.fingerprint())
        write_quantized(target, model.config, small_bpe(), about, codes)
    else:

        def write(partial: Path) -> None:
            checkpoint.write_model(model, partial, small_bpe())
            (partial / "training.json").write_text("{}")
            checkpoint.write_tensors(model.state_dict(), partial, "optimizer")

        write_directory(target, write)
    assert "would be lost" in refusal(lambda: save(model, target, small_bpe()))
    verify(target)
    save(model, saved, small_bpe())  # a model is replaced


def test_no_directory_is_written_into_another(model, saved):
    assert "choose another folder" in refusal(lambda: save(model, saved / "new", small_bpe()))
    verify(saved)

"""receptance train: what it can begin with, and what it refuses to go on with."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command import SMALL, call
from tiny import TEXT, make_model, same_bits, small_bpe

from receptance.adapters import LoRAOptions, load_adapter, make_adapter
from receptance.config import ModelConfig
from receptance.data import Batches, TokenFiles
from receptance.data.binidx import binidx_writer
from receptance.model import Model
from receptance.storage.checkpoint import load, read_tensors, save
from receptance.storage.directories import newest_checkpoint, step_directories
from receptance.storage.lock import RunLock
from receptance.storage.manifest import verify
from receptance.tokenizer import ByteTokenizer
from receptance.training import start
from receptance.training.notes import read_about
from receptance.training.run import Run
from receptance.training.trainer import Trainer

RECORDS = [
    {"prompt": f"Add {n} and {n}.", "response": f"That is {2 * n}, my dear."} for n in range(60)
]
TUNE = "--batch 4 --context 64 --steps 6 --reports 2 --learning-rate 0.05"


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch) -> None:
    monkeypatch.setattr("receptance.training.run._SAMPLE_TOKENS", 2)


def begun(*argv: object) -> Path:
    """The newest checkpoint of a run that went well."""
    result = call(*argv)
    assert result.code == 0, result.err
    return newest_checkpoint(argv[argv.index("--out") + 1])[0]


def refused(*argv: object) -> str:
    """The one line with which the command ends."""
    result = call(*argv)
    assert result.code == 2
    assert result.err.startswith("receptance: error: ")
    assert result.err.count("\n") == 1
    return result.err


class TestCorpora:
    """Tokens that somebody prepared: the run is the same as that on the text."""

    @pytest.mark.parametrize("packing", ["stream", "reset"])
    def test_a_pair_whose_documents_have_no_end(self, packing, folder):
        """Only where documents matter; `data merge` puts the ends there."""
        with binidx_writer(Path("pair"), np.dtype(np.uint16), 256) as append:
            append(np.tile(np.array([*b"no end of text", 256], np.uint16), 60))
        tokens = np.fromfile("pair.bin", np.uint16)
        tokens[tokens == 256] = ord(".")
        tokens.tofile("pair.bin")
        more = ["--out", "new", "--steps", 1, "--packing", packing, *SMALL.split()]
        if packing == "stream":
            begun("train", "pair", *more)
        else:
            assert "do not end with the end-of-text token 0" in refused("train", "pair", *more)
            merged = call("data", "merge", "pair", "--out", "merged", "--tokenizer", "bytes")
            assert merged.code == 0, merged.err
            begun("train", "merged", *more)

    @pytest.fixture
    def corpus(self, folder) -> Path:
        made = call("data", "prepare", "text.txt", "--out", "corpus", "--tokenizer", "bytes",
                    "--validation", 0.02)  # fmt: skip
        assert made.code == 0, made.err
        return folder / "corpus"

    def test_a_folder(self, corpus, train):
        assert train("--steps", 2, "--out", "text").code == 0
        directory = begun("train", corpus, "--out", "new", "--steps", 2, *SMALL.split()[2:])
        weights = [load(run)[0].state_dict() for run in ("text", "new")]
        assert same_bits(*weights)
        assert read_about(directory).corpus.resolve() == corpus.resolve()
        assert not Path("new/data").exists()

    def test_a_folder_knows_its_tokenizer(self, corpus):
        """That of a recipe need not be there."""
        Path("mine.toml").write_text('tokenizer = "20B_tokenizer.json"\nsteps = 9')
        recipe = "--recipe", "mine.toml", *SMALL.split()[2:]
        directory = begun("train", corpus, "--out", "new", "--steps", 1, *recipe)
        assert load(directory)[1].kind == "bytes"
        begun("train", "--resume", "--out", "new", "--steps", 2, *recipe[:2])
        seen = call("train", corpus, "--dry-run", *recipe)
        assert seen.code == 0 and f"{load(directory)[0].config.num_parameters:,}" in seen.out

    @pytest.mark.parametrize(
        ("named", "said"),
        [
            ("bpe:300", "has its own tokenizer"),
            ("tokenizer.json", "trained with|another tokenizer"),
            ("nowhere.json", "no such file"),
        ],
    )
    @pytest.mark.parametrize("how", [["corpus"], ["text.txt", "--init", "run"]])
    def test_another_tokenizer_is_refused(self, named, said, how, corpus):
        small_bpe().save(Path())
        line = refused("train", *how, "--tokenizer", named, "--out", "new", "--steps", 1)
        assert re.search(said, line)

    @pytest.mark.parametrize(("place", "id"), [(64, 300), (64, -1), (200, 256), (1990, 300)])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_ids_of_another_tokenizer(self, place, id, seed, folder):
        """Also the last target of a window, which no layer reads, and what is for validation."""
        tokens = np.full(2000, 65, np.int32)
        tokens[place] = id
        np.save("tokens.npy", tokens)
        line = refused("train", "tokens.npy", "--out", "new", "--steps", 99, *SMALL.split(),
                       "--batch", 1, "--seed", seed)  # fmt: skip
        assert f"the corpus has the token id {id} and the model knows 0 to 255" in line

    @pytest.mark.parametrize("name", ["tokens.npy", "tokens.bin", "tokens.idx", "tokens"])
    def test_bare_tokens_need_a_tokenizer(self, name, corpus):
        if name.endswith("npy"):
            np.save(name, np.load(corpus / "train.npy"))
        else:
            made = call("data", "prepare", "text.txt", "--out", "pair", "--tokenizer", "bytes",
                        "--format", "binidx")  # fmt: skip
            assert made.code == 0, made.err
            for ending in ("bin", "idx"):
                shutil.copy(f"pair/train.{ending}", f"tokens.{ending}")
        run = ["train", name, "--out", "new", "--steps", 2, *SMALL.split()]
        directory = begun(*run)
        assert load(directory)[1].kind == "bytes"
        begun("train", "--resume", "--out", "new", "--steps", 3)
        without = [word for word in run if word not in ("--tokenizer", "bytes")]
        without[without.index("new")] = "other"
        assert "name that tokenizer" in refused(*without)

    def test_another_tokenizer_than_the_model_s(self, corpus, folder):
        assert call("train", "text.txt", "--out", "bpe", "--steps", 1, *SMALL.split(),
                    "--tokenizer", "bpe:300").code == 0  # fmt: skip
        line = refused("train", corpus, "--init", "bpe", "--out", "new", "--steps", 1)
        assert "made with another tokenizer" in line

    def test_one_that_changed_is_refused(self, corpus, folder):
        begun("train", corpus, "--out", "new", "--steps", 2, *SMALL.split()[2:])
        Path("text.txt").write_text(TEXT.upper())
        shutil.rmtree(corpus)
        made = call("data", "prepare", "text.txt", "--out", "corpus", "--tokenizer", "bytes")
        assert made.code == 0, made.err
        line = refused("train", "--resume", "--out", "new", "--steps", 4)
        assert "is not the corpus that the run began with" in line

    def test_one_that_moved_is_named_again(self, corpus, folder):
        begun("train", corpus, "--out", "new", "--steps", 2, *SMALL.split()[2:])
        os.rename("corpus", "elsewhere")
        assert "corpus" in refused("train", "--resume", "--out", "new", "--steps", 4)
        begun("train", "elsewhere", "--resume", "--out", "new", "--steps", 4)
        begun("train", "--resume", "--out", "new", "--steps", 5)


class TestMoving:
    def test_a_run_goes_on_wherever_it_is(self, folder, train, monkeypatch):
        assert train("--steps", 12).code == 0
        (folder / "deep/er").mkdir(parents=True)
        os.rename("new", "deep/er/moved")
        os.remove("text.txt")
        begun("train", "--resume", "--out", "deep/er/moved", "--steps", 14)
        monkeypatch.chdir("deep/er/moved")
        begun("train", "--resume", "--out", ".", "--steps", 15)
        assert load(".")[0].config.width == 16


class TestInit:
    def test_a_run_begins_with_the_weights_of_another(self, folder):
        before = load("run")[0].state_dict()
        rates = ["--learning-rate", 1e-30, "--final-learning-rate", 1e-30]
        directory = begun("train", "text.txt", "--init", "run", "--out", "new", "--steps", 1,
                          "--batch", 2, "--context", 32, *rates)  # fmt: skip
        model, tokenizer = load(directory)
        assert tokenizer.kind == "bytes"
        assert same_bits(model.state_dict(), before)
        begun("train", "--resume", "--out", "new", "--steps", 2)

    def test_the_tokenizer_is_named_if_it_is_not_beside_the_weights(self, folder):
        """As of an official file."""
        torch.save(make_model(300).state_dict(), "bare.pth")
        small_bpe(300).save(Path("run"))  # somewhere else
        start = ["train", "text.txt", "--init", "bare.pth", "--batch", 2, "--context", 32]
        assert "pass --tokenizer FILE" in refused(*start, "--out", "new", "--steps", 1)
        start += ["--tokenizer", "run/tokenizer.json"]
        for tune in ("all", "lora"):
            begun(*start, "--tune", tune, "--out", tune, "--steps", 1)
            begun("train", "--resume", "--out", tune, "--steps", 2)
        assert call(*start, "--dry-run").code == 0

    @pytest.mark.parametrize("tune", ["all", "lora"])
    def test_weights_without_a_tokenizer_take_that_of_a_corpus(self, folder, tune):
        save(make_model(), "untold", None)
        made = call("data", "prepare", "text.txt", "--out", "corpus", "--tokenizer", "bytes")
        assert made.code == 0, made.err
        start = ["train", "corpus", "--init", "untold", "--batch", 2, "--context", 32]
        begun(*start, "--tune", tune, "--out", "new", "--steps", 1)
        directory = begun("train", "--resume", "--out", "new", "--steps", 2)
        assert directory.name == "step-00000002"
        assert tune == "lora" or load(directory)[1].kind == "bytes"

    def test_it_is_read_tensor_by_tensor(self, folder, monkeypatch):
        """A process of several that share a model never has all of it."""
        monkeypatch.setattr(Model, "from_tensors", None)
        monkeypatch.setattr(Run, "_sample", lambda self, step: None)
        directory = begun("train", "text.txt", "--init", "run", "--out", "new", "--steps", 1,
                          "--learning-rate", 1e-30, "--final-learning-rate", 1e-30)  # fmt: skip
        old = read_tensors(newest_checkpoint("run")[0], "model")
        assert same_bits(read_tensors(directory, "model"), old)

    def test_a_recipe_s_tokenizer_is_for_a_new_model(self, folder):
        Path("mine.toml").write_text('tokenizer = "bpe:300"')
        words = ["--recipe", "mine.toml", "--steps", "1", "--batch", "2", "--context", "32"]
        directory = begun("train", "text.txt", "--init", "run", "--out", "new", *words)
        assert load(directory)[1].kind == "bytes"

    @pytest.mark.parametrize("asked", [["--width", 256], ["--layers", 9], ["--size", "169m"]])
    @pytest.mark.parametrize("dry", [[], ["--dry-run"]])
    def test_other_sizes_than_the_model_has_are_refused(self, folder, asked, dry):
        line = refused("train", "text.txt", "--init", "run", "--out", "new", *asked, *dry)
        assert "the model of init has" in line and "leave" in line

    def test_sizes_said_twice_are_refused(self, folder):
        asked = "--size", "169m", "--width", 64
        assert "leave those out" in refused("train", "text.txt", "--out", "new", *asked)

    @pytest.mark.parametrize(
        ("more", "what", "rates"),
        [
            ([], "all parameters of a given model", (2e-5, 1e-5)),
            (["--tune", "lora"], "LoRA", (2e-4, 1e-5)),
            (["--tune", "state"], "a state", (0.1, 1e-3)),
            (["--learning-rate", 3e-6], None, (3e-6, 3e-6)),
        ],
    )
    def test_the_learning_rate_is_one_for_fine_tuning(self, more, what, rates, folder):
        """Pretraining's would destroy what the model has learned."""
        start = ["train", "text.txt", "--init", "run", "--out", "new", "--batch", 2]
        result = call(*start, "--context", 32, "--steps", 2, *more)
        assert result.code == 0, result.err
        why = f" (the default for {what})" if what else ""
        said = f"learning rate: {rates[0]:g} at the start, {rates[1]:g} at the end{why}\n"
        assert said in result.out
        stored = read_about(newest_checkpoint("new")[0]).options.train
        assert (stored.learning_rate, stored.final_learning_rate) == rates
        lines = [json.loads(line) for line in Path("new/metrics.jsonl").read_text().splitlines()]
        used = [line["learning_rate"] for line in lines if "loss" in line]
        assert used == pytest.approx([(rates[0] * rates[1]) ** 0.5, rates[1]])

    def test_a_new_model_has_the_papers_rate(self, folder):
        more = [*SMALL.split()[:-2], "--steps", 1, "--out", "new"]
        result = call("train", "text.txt", *more)
        assert "learning rate: 0.0006 at the start, 1e-05 at the end (the default" in result.out
        assert read_about(newest_checkpoint("new")[0]).options.train.rates == (6e-4, 1e-5)

    def test_a_recipe_s_rate_counts(self, folder):
        Path("mine.toml").write_text("learning_rate = 3e-5\nfinal_learning_rate = 1e-6")
        words = ["--recipe", "mine.toml", "--steps", 1, "--batch", 2, "--context", 32]
        result = call("train", "text.txt", "--init", "run", "--out", "new", *words)
        assert "learning rate: 3e-05 at the start, 1e-06 at the end\n" in result.out

    def test_nothing_there(self, folder):
        assert "nowhere" in refused("train", "text.txt", "--init", "nowhere", "--out", "new")


class TestTuning:
    @pytest.fixture
    def records(self, folder) -> Path:
        lines = [json.dumps(record) for record in RECORDS]
        (folder / "chat.jsonl").write_text("\n".join(lines))
        return folder / "chat.jsonl"

    @pytest.mark.parametrize("kind", ["lora", "state"])
    def test_from_records_to_an_answer(self, kind, records):
        more = ["--lora.rank", 2] if kind == "lora" else []
        start = ["train", records, "--init", "run", "--tune", kind, "--out", "new", *TUNE.split()]
        directory = begun(*start, "--template", "world", *more)
        files = {file.name for file in directory.iterdir()}
        assert "adapter.safetensors" in files and "model.safetensors" not in files
        model, _ = load("run")
        adapter = load_adapter(directory, model)
        assert all(x.isfinite().all() for x in adapter.tensors().values())
        prompt = ["generate", "run", "User: Add 3 and 3.\n\nAssistant:", "--max-tokens", 8]
        answers = [call(*prompt, "--temperature", 0, *a) for a in ([], ["--adapter", directory])]
        assert [a.code for a in answers] == [0, 0]
        reports = [json.loads(line) for line in Path("new/metrics.jsonl").read_text().splitlines()]
        assert sum("validation_nats_per_token" in report for report in reports) >= 2

    @pytest.mark.parametrize("kind", ["lora", "state"])
    def test_it_goes_on_exactly(self, kind, records):
        start = ["train", records, "--init", "run", "--tune", kind, *TUNE.split()]
        start += ["--template", "world"]
        whole = begun(*start, "--out", "whole", "--reports", 6, "--keep", 9)
        shutil.copytree("whole", "part")
        for directory in step_directories(Path("part"))[2:]:
            shutil.rmtree(directory)
        again = begun("train", "--resume", "--out", "part")
        for stem in ("adapter", "optimizer"):
            assert same_bits(read_tensors(whole, stem), read_tensors(again, stem))

    def test_a_start_that_fails_marks_nothing(self, folder):
        line = refused("train", "text.txt", "--init", "run", "--tune", "lora", "--out", "new",
                       "--lora.targets", "nope*")  # fmt: skip
        assert "nope*" in line
        assert not list(folder.glob("run/*.pinned"))

    def test_it_goes_on_from_anywhere_and_if_the_model_was_moved(self, folder, monkeypatch):
        directory = begun("train", "text.txt", "--init", "run", "--tune", "lora", "--out", "new",
                          *TUNE.split())  # fmt: skip
        assert read_about(directory).options.init == str(folder / "run/step-00000012")
        (folder / "elsewhere").mkdir()
        monkeypatch.chdir(folder / "elsewhere")
        assert begun("train", "--resume", "--out", "../new", "--steps", 7).name == "step-00000007"
        (folder / "run").rename(folder / "moved")
        assert "no such file or directory" in refused("train", "--resume", "--out", "../new")
        again = ["train", "--resume", "--out", "../new", "--steps", 8, "--init"]
        assert begun(*again, "../moved").name == "step-00000008"
        save(Model(ModelConfig(vocab_size=256, width=16, num_layers=2)), "other", ByteTokenizer())
        assert "was trained on model" in refused(*again, "other")

    def test_the_checkpoint_that_it_was_trained_on_stays(self, folder):
        """The run of the base goes on and removes older ones, but not this one."""
        start = ["train", "text.txt", "--init", "run", "--tune", "lora", "--out", "new"]
        result = call(*start, *TUNE.split())
        assert result.code == 0, result.err
        base = folder / "run/step-00000012"
        assert f"the adapter is trained on {base}, which its run keeps from now on" in result.out
        begun("train", "--resume", "--out", "run", "--steps", 24, "--reports", 8)
        names = [path.name for path in step_directories(Path("run"))]
        assert names == [f"step-{n:08d}" for n in (12, 21, 24)]
        model, _ = load(base)
        load_adapter("new", model)
        begun("train", "--resume", "--out", "new", "--steps", 7)
        begun("train", "--resume", "--out", "new", "--steps", 8, "--init", "run")
        assert f"needed by the adapter in {folder}/new" in Path(f"{base}.pinned").read_text()
        line = refused("generate", "run", "x", "--adapter", "new")
        assert f"was trained on model {model.fingerprint()[:12]} ({base}), and this one is" in line

    def test_without_the_mark_it_is_named_when_it_is_gone(self, folder):
        base = folder / "run/step-00000012"
        begun("train", "text.txt", "--init", base, "--tune", "lora", "--out", "new", *TUNE.split())
        Path(f"{base}.pinned").unlink()
        begun("train", "--resume", "--out", "run", "--steps", 24, "--reports", 8)
        line = refused("generate", "run", "x", "--adapter", "new")
        assert f"({base}, which is no longer there)" in line

    def test_a_base_that_cannot_be_marked_is_said(self, folder, monkeypatch):
        def read_only(directory: Path, reason: str) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(start, "pin", read_only)
        result = call("train", "text.txt", "--init", "run", "--tune", "lora", "--out", "new",
                      *TUNE.split())  # fmt: skip
        assert result.code == 0, result.err
        assert "run/step-00000012 may be removed when its run goes on" in result.out

    def test_every_row_of_state_tuning_is_one_document(self, records, monkeypatch):
        """A second one in the row would begin from an empty state."""
        made: list[Batches] = []
        monkeypatch.setattr(
            start, "Batches", lambda *all, **more: made.append(Batches(*all, **more)) or made[-1]
        )
        begun("train", records, "--init", "run", "--tune", "state", "--out", "new",
              *TUNE.split(), "--template", "world")  # fmt: skip
        assert [batches.packing for batches in made] == ["single"]

    def test_all_parameters_learn_from_records_as_well(self, records):
        options = [*SMALL.split(), "--context", 64, "--steps", 2, "--template", "world"]
        directory = begun("train", records, "--out", "new", *options)
        assert set(TokenFiles.open("new/data").train_mask.tolist()) == {0, 1}
        state = read_tensors(directory, "optimizer")
        names = load(directory)[0].state_dict()
        assert {n.rpartition("/")[0] for n, x in state.items() if x.count_nonzero()} >= {*names}

    @pytest.mark.parametrize("count", [1, 3])
    @pytest.mark.parametrize("packing", ["auto", "single", "reset"])
    def test_few_records_are_enough(self, count, packing, folder):
        """Next to nothing is left for validation then."""
        Path("few.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * count)
        result = call("train", "few.jsonl", "--template", "world", "--packing", packing,
                      "--out", "new", *SMALL.split(), "--context", 16, "--steps", 2)  # fmt: skip
        assert result.code == 0, result.err
        assert "nothing to validate on" in result.out

    def test_nothing_is_dropped_in_samples(self, folder, monkeypatch):
        """Also without a validation before them."""
        sample, training = Run._sample, []

        def watch(self: Run, step: int) -> None:
            sample(self, step)
            training.extend([self.trainer.model.training, self.trainer.adapter.training])

        monkeypatch.setattr(Run, "_sample", watch)
        Path("one.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
        begun("train", "one.jsonl", "--template", "world", "--init", "run", "--tune", "lora",
              "--out", "new", "--steps", 1, "--reports", 1, "--context", 64)  # fmt: skip
        assert training == [False, False]

    @pytest.mark.parametrize("packing", ["auto", "single", "reset", "stream"])
    def test_what_is_for_validation_may_be_shorter_than_a_row(self, packing, records):
        begun("train", records, "--template", "world", "--packing", packing, "--out", "new",
              *SMALL.split(), "--context", 128, "--steps", 2, "--reports", 1)  # fmt: skip
        lines = [json.loads(line) for line in Path("new/metrics.jsonl").read_text().splitlines()]
        assert [0 < line.get("validation_nats_per_token", 1) < 9 for line in lines] == [True] * 4

    @pytest.mark.parametrize(
        ("more", "why"),
        [
            ([], "say which model with init"),
            (["--init", "run", "--packing", "whole"], "leave packing out"),
            (["--init", "run", "--parallel", "fsdp"], "works with ddp"),
            (["--init", "run", "--lora.rank", 4], "options of lora have no effect"),
        ],
    )
    def test_what_does_not_go_together(self, more, why, records):
        result = call("train", records, "--tune", "state", "--out", "new", *more)
        assert result.code == 2
        assert why in " ".join(result.err.split())


class TestRecipes:
    def test_what_is_given_comes_first(self, folder):
        Path("mine.toml").write_text(
            'tokenizer = "bytes"\nwidth = 32\nlayers = 1\nbatch = 2\ncontext = 16\nsteps = 2\n'
        )
        directory = begun("train", "text.txt", "--recipe", "mine.toml", "--layers", 2, "--out", "n")
        sizes = load(directory)[0].config
        assert (sizes.width, sizes.num_layers) == (32, 2)
        options = read_about(directory).options.train
        assert (options.batch, options.context) == (2, 16)

    @pytest.mark.parametrize(
        ("given", "width", "layers"),
        [
            (["--width", 32, "--layers", 1], 32, 1),
            (["--layers", 1], 48, 1),
            (["--init", "run"], None, None),
        ],
    )
    def test_a_published_size_gives_way(self, given, width, layers, folder, monkeypatch):
        sizes = ModelConfig(vocab_size=50277, width=48, num_layers=3)
        monkeypatch.setattr("receptance.training.options.published", lambda name: sizes)
        Path("mine.toml").write_text('tokenizer = "bytes"\nsize = "169m"\n')
        more = ["--recipe", "mine.toml", "--batch", 2, "--context", 32, "--steps", 1, "--out", "n"]
        found = load(begun("train", "text.txt", *given, *more))[0].config
        own = load("run")[0].config
        assert (found.width, found.num_layers) == (width or own.width, layers or own.num_layers)

    def test_a_dry_run_trains_nothing(self, folder):
        result = call("train", "--recipe", "169m", "--dry-run", "--on", "a100-80g", "--out", "n")
        assert result.code == 0, result.err
        assert "169" in result.out
        assert not Path("n").exists()

    def test_a_dry_run_knows_what_is_trained(self, folder):
        more = ["train", "--init", "run", "--tune", "lora", "--lora.rank", 2, "--dry-run"]
        (trained,) = re.findall(r"trained +([\d,]+)", call(*more, "--on", "h100").out)
        model, _ = load("run")
        adapter = make_adapter(model, LoRAOptions(rank=2))
        assert int(trained.replace(",", "")) == sum(x.numel() for x in adapter.tensors().values())

    def test_a_dry_run_knows_what_is_offloaded(self, folder):
        more = ["train", "--recipe", "14b", "--dry-run", "--on", "rtx-4090", "--devices", "8"]
        results = [call(*more, *extra) for extra in ([], ["--offload"])]
        assert [result.code for result in results] == [0, 0], results[1].err
        assert ["does not fit" in result.out for result in results] == [True, False]

    @pytest.mark.parametrize(
        ("recipe", "given"),
        [
            ('parallel = "fsdp"', ["--offload"]),
            ('init = "run"', ["--tune", "lora"]),
            ("context = 8192", ["--context-ranks", 512, "--devices", 512]),
            ('tune = "state"', ["--init", "run"]),
        ],
    )
    def test_options_are_checked_together_with_those_given(self, recipe, given, folder):
        """Neither the recipe nor the command line would do alone."""
        Path("mine.toml").write_text(recipe)
        result = call("train", "--recipe", "mine.toml", *given, "--dry-run", "--on", "h100")
        assert (result.code, result.err) == (0, "")
        assert "FLOP" in result.out
        if "--init" not in given:
            refused("train", *given, "--dry-run", "--on", "h100")

    def test_a_recipe_does_not_excuse_what_does_not_go_together(self, folder):
        Path("mine.toml").write_text('parallel = "ddp"')
        line = refused("train", "text.txt", "--recipe", "mine.toml", "--offload", "--out", "new")
        assert "set parallel to fsdp" in line
        assert not Path("new").exists()

    def test_stored_options_count_when_a_run_is_resumed(self, folder):
        """A single process has no shares to keep elsewhere, which is found later."""
        begun("train", "text.txt", "--parallel", "fsdp", "--out", "new", "--steps", 1,
              *SMALL.split())  # fmt: skip
        line = refused("train", "--resume", "--offload", "--out", "new", "--steps", 2)
        assert "there are no shares here" in line
        line = refused("train", "--auto-resume", "--offload", "--out", "new", "--batch", 3)
        assert "batch 2, not 3" in line


class TestAutoResume:
    def test_one_command_begins_and_goes_on(self, train):
        assert train("--steps", 3, "--auto-resume").code == 0
        result = train("--steps", 5, "--auto-resume")
        assert result.code == 0
        assert "resumed new/step-00000003 at step 3" in result.out

    def test_what_died_before_its_first_checkpoint_begins_again(self, train):
        Path("new").mkdir()
        Path("new/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
        assert train("--steps", 2, "--auto-resume").code == 0
        lines = Path("new/metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines if "loss" in line] == [1, 2]


@pytest.mark.parametrize("out", ["model", "model/runs", "run/step-00000012"])
def test_nothing_is_written_into_a_model(out, folder):
    model, tokenizer = load("run")
    save(model, "model", tokenizer)
    assert "choose another folder" in refused("train", "text.txt", "--out", out, *SMALL.split())
    made = refused("data", "prepare", "text.txt", "--out", out, "--tokenizer", "bytes")
    assert "choose another folder" in made
    load("model")
    verify("run/step-00000012")


@pytest.mark.parametrize(
    "more", [["--template", "world"], ["--skip-bad"], ["--text-field", "z"], ["--exclude", "q"]]
)
def test_options_of_text_are_not_for_tokens(more, folder):
    prepared = call("data", "prepare", "text.txt", "--out", "corpus", "--tokenizer", "bytes")
    assert prepared.code == 0, prepared.err
    assert "holds tokens already" in refused("train", "corpus", "--out", "new", *more)


def test_a_corrected_command_begins_again(folder):
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    more = ["train", "chat.jsonl", "--out", "new", *SMALL.split()]
    assert "say with --template" in refused(*more)
    begun(*more, "--template", "world", "--steps", 1)


def test_a_dry_run_wants_the_tokenizer_that_the_run_will_want(folder):
    save(make_model(300), "untold", None)
    more = ["train", "text.txt", "--init", "untold", "--out", "new"]
    assert refused(*more) == refused(*more, "--dry-run")


def test_a_folder_in_use_is_left_alone(folder):
    def visible() -> list[Path]:
        return [path for path in sorted(Path("run").rglob("*")) if path.name[0] != "."]

    before = visible()
    with RunLock("run"):
        line = refused("train", "--resume", "--out", "run", "--steps", 14)
    assert "run is in use by process" in line
    assert visible() == before


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["text.txt", "--out", "new", "--on", "h200"], "--on is for an estimate; add --dry-run"),
        (["text.txt", "--out", "new", "--devices", 8], "--devices is for an estimate"),
        (["text.txt", "--out", "new", "--mfu", 0.4], "--mfu is for an estimate; add --dry-run"),
        (["text.txt", "--dry-run", "--mfu", 1.5], "--mfu is 1.5; it must be above 0 and at most 1"),
        (["text.txt", "--out", "new", "--carry", "state"], "without a chunk nothing is carried"),
        (["text.txt", "--out", ""], "--out is ''; it must be a path"),
        ([""], "a path is empty"),
        (["text.txt", "--init", ""], "a path is empty"),
        (["text.txt", "--tokenizer", "bpe:lots"], "for example bpe:2048"),
        (["--out", "new"], "no data"),
        (["text.txt", "--out", "new", "--context", "99999"], "shorter context"),
        (["missing.txt", "--out", "new"], "missing.txt"),
        (["text.txt", "--out", "new", "--device", "quantum"], "quantum"),
        (["--resume", "--out", "nowhere"], "no run in nowhere"),
        (["text.txt", "--out", "new", "--recipe", "168m"], "did you mean"),
        (["text.txt", "--out", "new", "--context-ranks", "2"], "torchrun"),
        (["text.txt", "--out", "new", "--offload"], "set parallel to fsdp, or leave offload out"),
        (["text.txt", "--out", "new", "--context-ranks", "0"], "it must be at least 1"),
        (["text.txt", "--out", "new", "--context", "1", "--context-ranks", "2"], "has a piece"),
        (["text.txt", "--out", "new", "--device", "meta"], "'meta' cannot be used here"),
        (["text.txt", "--out", "new", "--minutes", "inf"], "minutes is inf"),
        (["text.txt", "--out", "new", "--warmup-steps", "9" * 400], "it must be at least 0 and"),
        (["text.txt", "--out", "new", "--tokenizer", "bpe:" + "9" * 30], "less than 2**31"),
        (["--resume", "--dry-run", "--out", "run"], "leave out --resume"),
        (["--dry-run", "--tokenizer", "typo.json"], "typo.json: no such file"),
        (["nope.txt", "--dry-run"], "nope.txt"),
        (["empty.txt", "--dry-run"], "the text is empty"),
        (["text.txt", "--out", "text.txt"], "text.txt is a file; name a folder"),
    ],
)
def test_errors_are_one_line(argv, why, folder):
    Path("empty.txt").touch()
    assert why in refused("train", *SMALL.split()[:2], *argv)


def test_what_a_run_that_goes_on_does_not_read_is_said(folder):
    Path("other.txt").write_text("something else")
    again = ["train", "other.txt", "--resume", "--recipe", "cpu-10min", "--out", "run"]
    result = call(*again, "--steps", 13)
    assert result.code == 0, result.err
    for what in ("text", "recipe"):
        assert f"the {what} given is not read: the run keeps its own" in result.out


class TestBadSteps:
    @pytest.fixture
    def broken(self, monkeypatch) -> set[int]:
        """Steps, counted from 1, whose gradient is not a number."""
        steps: set[int] = set()
        clip = Trainer._clip

        def clip_or_break(self: Trainer) -> float:
            return float("nan") if self.step + 1 in steps else clip(self)

        monkeypatch.setattr(Trainer, "_clip", clip_or_break)
        return steps

    def test_the_batch_is_put_away(self, broken, train):
        broken.add(3)
        result = train("--steps", 6, "--reports", 6)
        assert result.code == 2
        assert "gradient norm is nan at step 3; stopped before the update" in result.err
        assert "new/bad-step-00000003.npz" in result.err
        with np.load("new/bad-step-00000003.npz", allow_pickle=False) as batch:
            assert set(batch) == {"inputs", "targets"}
            assert batch["inputs"].shape == (2, 32)
            assert np.array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
        assert newest_checkpoint("new")[0].name == "step-00000002"

    def test_or_left_out(self, broken, train):
        broken.update({3, 5})
        result = train("--steps", 6, "--skip-bad-steps")
        assert result.code == 0, result.err
        assert "left out" in result.out
        lines = [json.loads(line) for line in Path("new/metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4, 6]
        left_out = {line["step"]: line["left_out"] for line in lines if "left_out" in line}
        assert left_out == {n: f"gradient norm is nan at step {n}" for n in (3, 5)}
        assert newest_checkpoint("new")[0].name == "step-00000006"

    def test_even_on_a_full_disk(self, broken, train, monkeypatch):
        def full(stream: object, **arrays: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        broken.add(3)
        monkeypatch.setattr(np, "savez", full)
        result = train("--steps", 4, "--skip-bad-steps")
        assert result.code == 0, result.err
        assert "cannot be written: No space left" in " ".join(result.out.split())
        assert not list(Path("new").glob("*bad-step-*"))

    def test_many_are_left_out_if_others_are_good(self, broken, train):
        """Nine in a row, twice."""
        broken.update({*range(2, 11), *range(12, 21)})
        assert train("--steps", 22, "--skip-bad-steps").code == 0
        lines = [json.loads(line) for line in Path("new/metrics.jsonl").read_text().splitlines()]
        assert {line["step"] for line in lines if "left_out" in line} == broken
        assert [line["step"] for line in lines if "loss" in line] == [1, 11, 21, 22]

    def test_but_not_for_ever(self, broken, train):
        broken.update(range(4, 40))
        result = train("--steps", 40, "--skip-bad-steps")
        assert result.code == 2
        assert "at step 13; stopped" in result.err
        assert len(list(Path("new").glob("bad-step-*"))) == 10

    @pytest.mark.parametrize("reports", [1, 6])
    def test_the_advice_can_be_followed(self, reports, broken, train):
        broken.add(3)
        line = train("--steps", 6, "--reports", reports).err
        assert "begin in another folder with a lower learning_rate" in line
        assert ("resume with --skip-bad-steps" in line) == bool(step_directories(Path("new")))

"""receptance train: a run's files, stopping and resuming, and everything that can fail."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import tyro
from command import SMALL, call
from tiny import TEXT, same_bits

from receptance import plots
from receptance.apps import train as app
from receptance.data import TokenFiles
from receptance.inference import generation
from receptance.inference.generation import generate
from receptance.plots import draw_losses
from receptance.storage.checkpoint import load
from receptance.storage.directories import newest_checkpoint, step_directories
from receptance.storage.manifest import verify
from receptance.training import Trainer, saving
from receptance.training.logs import MetricsLog
from receptance.training.notes import read_about
from receptance.training.run import Run


def records(run: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def steps(run: str | Path) -> list[int]:
    return [record["step"] for record in records(run) if "loss" in record]


def checkpoints(run: str | Path) -> list[str]:
    return [path.name for path in step_directories(Path(run))]


def same_ending(one: str | Path, other: str | Path) -> bool:
    """Whether two runs arrived at the same weights, losses and samples, to the bit."""

    def told(run: str | Path) -> list[dict]:
        timed = {"tokens_per_second", "mfu"}
        return [{k: v for k, v in r.items() if k not in timed} for r in records(run)]

    weights = [load(run)[0].state_dict() for run in (one, other)]
    return same_bits(*weights) and told(one) == told(other)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """Send this process a signal while that step is recorded."""
    record = Run._record

    def record_and_signal(self: Run, values: dict) -> None:
        record(self, values)
        if values["step"] == step and "loss" in values:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Run, "_record", record_and_signal)


QUICK = "validation_bits_per_byte"


class TestARun:
    def test_its_metrics(self, finished):
        run = finished / "run"
        assert steps(run) == list(range(1, 13))
        for record in records(run):
            assert record["tokens"] == record["step"] * 2 * 32
        losses = [record for record in records(run) if "loss" in record]
        wanted = {"tokens", "step", "loss", "learning_rate", "gradient_norm"}
        wanted |= {"tokens_per_second", "mfu"}
        assert all(set(record) == wanted for record in losses)
        assert losses[-1]["loss"] < losses[0]["loss"]

    def test_its_reports(self, finished):
        for name in ("validation_bits_per_byte", "sample"):
            reports = [record for record in records(finished / "run") if name in record]
            assert [report["step"] for report in reports] == [4, 8, 12]
            assert all(report[name] for report in reports)
        assert all(0 < r.get("validation_bits_per_byte", 1) < 9 for r in records(finished / "run"))

    def test_its_picture(self, finished):
        assert (finished / "run/loss.png").read_bytes().startswith(b"\x89PNG")

    def test_its_checkpoints(self, finished):
        assert checkpoints(finished / "run") == ["step-00000008", "step-00000012"]
        model, tokenizer = load(finished / "run")
        assert tokenizer.kind == "bytes"
        assert generate(model, tokenizer, "1", max_tokens=5)
        assert not list((finished / "run").rglob("*partial*"))

    def test_it_can_be_repeated(self, finished, train):
        assert train("--steps", 12, "--reports", 3).code == 0
        assert same_ending("new", finished / "run")

    def test_with_a_bpe_of_its_own(self, train):
        content = TEXT.encode()
        Path("text.txt").write_bytes(content)
        result = train("--steps", 3, "--tokenizer", "bpe:300", "--sample-prompt", "12 ")
        assert result.code == 0, result.err
        model, tokenizer = load("new")
        assert tokenizer.kind == "bpe"
        assert tokenizer.decode_bytes(tokenizer.encode(content)) == content
        assert model.config.vocab_size == tokenizer.vocab_size <= 300
        assert records("new")[-1]["sample"].startswith("12 ")

    def test_bytes_that_are_not_utf8(self, train):
        content = b"caf\xe9 \xff\xfe\x80 \xc3" * 90
        Path("text.txt").write_bytes(content)
        assert train("--steps", 2).code == 0
        corpus = TokenFiles.open("new/data")
        sides = [bytes(x[:-1].tolist()) for x in (corpus.train, corpus.validation)]
        assert b"".join(sides) == content
        assert steps("new") == [1, 2]

    def test_with_a_tokenizer_file(self, train):
        assert train("--steps", 1, "--tokenizer", "bpe:300", "--out", "first").code == 0
        tokenizer = "first/step-00000001/tokenizer.json"
        assert train("--steps", 1, "--tokenizer", tokenizer).code == 0
        assert load("first")[1].fingerprint == load("new")[1].fingerprint

    def test_several_sources_and_unusual_names(self, folder):
        (folder / "größe [1]").mkdir()
        (folder / "größe [1]/a b.txt").write_text(TEXT)
        out = "runs/ünï [x]/y"
        result = call("train", "größe [1]", "*.txt", "--out", out, "--steps", 1, *SMALL.split())
        assert result.code == 0, result.err
        assert f"done: {out}/step-00000001" in result.out
        load(out)

    def test_one_more_kept(self, train):
        assert train("--steps", 6, "--reports", 6, "--keep", 4).code == 0
        assert checkpoints("new") == [f"step-0000000{n}" for n in (3, 4, 5, 6)]

    def test_minutes_end_it(self, train):
        assert train("--minutes", 1e-6).code == 0
        assert steps("new") == [1]

    @pytest.mark.parametrize("text", ["\x1b[2J\x9b1mX\x07\r", "\u202eback"])
    def test_a_sample_cannot_control_the_terminal(self, text, train, monkeypatch):
        monkeypatch.setattr("receptance.training.run.generate", lambda *_, **__: text)
        result = train("--steps", 1, "--sample-prompt", "\x1b]0;title\x07")
        assert result.code == 0, result.err
        assert not set(result.out) & set("\x1b\x9b\x07\u202e")
        assert records("new")[-1]["sample"] == "\x1b]0;title\x07" + text

    def test_the_device_is_chosen_and_said_first(self, train, monkeypatch):
        result = train("--steps", 1)
        assert result.out.startswith("training on cpu (1 thread)\n")
        assert read_about(newest_checkpoint("new")[0]).options.device == "auto"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        again = call("train", "--resume", "--out", "new", "--steps", 2)
        assert "device 'cuda' cannot be used here" in again.err
        again = call("train", "--resume", "--out", "new", "--steps", 2, "--device", "cpu")
        assert again.code == 0, again.err
        assert read_about(newest_checkpoint("new")[0]).options.device == "cpu"

    def test_bfloat16_and_dropout(self, train):
        assert train("--steps", 3, "--dtype", "bfloat16", "--dropout", 0.1).code == 0
        assert str(load("new")[0].emb.weight.dtype) == "torch.float32"


class TestResuming:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_finishes_the_step_and_saves(self, number, train, monkeypatch, finished):
        before = signal.getsignal(number)
        with monkeypatch.context() as patch:
            stop_after(patch, 5, number)
            result = train("--steps", 12, "--reports", 3)
        assert result.code == 0
        assert "stopping after step 5" in result.out
        assert "continue with: receptance train --resume --out new" in result.out
        assert signal.getsignal(number) == before
        assert checkpoints("new") == ["step-00000004", "step-00000005"]
        assert steps("new") == [1, 2, 3, 4, 5]
        result = call("train", "--resume", "--out", "new", "--reports", 3)
        assert result.code == 0
        assert "resumed new/step-00000005 at step 5" in result.out
        assert same_ending("new", finished / "run")

    def test_a_signal_before_the_first_step(self, train, monkeypatch, finished):
        @contextlib.contextmanager
        def stopped_already() -> Iterator[threading.Event]:
            stop = threading.Event()
            stop.set()
            yield stop

        with monkeypatch.context() as patch:
            patch.setattr("receptance.training.run.stop_requested", stopped_already)
            assert train("--steps", 12, "--reports", 3).code == 0
        assert checkpoints("new") == ["step-00000000"]
        # As in RWKV-v4neo, the embedding begins as large as one step at the learning rate.
        largest = load("new")[0].emb.weight.detach().abs().max()
        assert float(largest) == pytest.approx(1e-2, rel=0.01)
        assert call("train", "--resume", "--out", "new", "--reports", 3).code == 0
        assert same_ending("new", finished / "run")

    def test_a_second_signal_leaves_at_once(self, train, monkeypatch):
        stop_after(monkeypatch, 5)
        stop_again = Run._save

        def save(self: Run) -> None:
            if self.trainer.step == 5:
                os.kill(os.getpid(), signal.SIGINT)
            stop_again(self)

        monkeypatch.setattr(Run, "_save", save)
        result = train("--steps", 12, "--reports", 3)
        assert result.code == 130
        assert result.err.strip() == "interrupted"
        verify("new/step-00000004")
        assert checkpoints("new") == ["step-00000004"]

    def test_a_killed_run_does_its_last_steps_again(self, folder, finished):
        """As after kill -9 between two checkpoints, in the middle of a line."""
        shutil.rmtree("run/step-00000012")
        lines = Path("run/metrics.jsonl").read_text().splitlines(keepends=True)
        Path("run/metrics.jsonl").write_text("".join(lines[:14]) + '{"tokens": 9, "sample": "}')
        assert call("train", "--resume", "--out", "run", "--reports", 3).code == 0
        assert same_ending("run", finished / "run")

    def test_a_damaged_checkpoint_is_passed_over_loudly(self, folder, finished):
        os.truncate("run/step-00000012/optimizer.safetensors", 1000)
        result = call("train", "--resume", "--out", "run", "--reports", 3)
        assert result.code == 0
        assert "skipped a damaged checkpoint" in result.out
        assert "step-00000012/optimizer.safetensors has 1000 bytes" in result.out
        assert "resumed run/step-00000008 at step 8" in result.out
        assert same_ending("run", finished / "run")
        verify("run/step-00000012")

    def test_an_optimizer_s_damage_is_that_of_a_run_and_not_of_its_model(self, folder):
        """Whoever only reads the model does not read twice as much besides."""
        newest = newest_checkpoint("run")[0]
        weights = load("run")[0].state_dict()
        file = newest / "optimizer.safetensors"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        assert same_bits(load("run")[0].state_dict(), weights)  # a warning would be an error
        assert call("generate", "run", "--max-tokens", 1).err == ""
        told = f"{file.relative_to(newest.parent.parent)} does not match its sha256 digest"
        result = call("inspect", "run")
        assert f"warning: passed over a damaged checkpoint: {told}" in result.err
        result = call("train", "--resume", "--out", "run", "--reports", 3)
        assert result.code == 0
        assert "skipped a damaged checkpoint" in result.out and told in result.out
        assert "resumed run/step-00000008 at step 8" in result.out

    def test_all_checkpoints_damaged(self, folder):
        for directory in checkpoints("run"):
            Path("run", directory, "manifest.json").unlink()
        result = call("train", "--resume", "--out", "run")
        assert result.code == 2
        assert "no whole checkpoint in run" in result.err

    def test_more_steps(self, folder):
        assert call("train", "--resume", "--out", "run", "--steps", 15).code == 0
        assert steps("run") == list(range(1, 16))
        assert read_about(newest_checkpoint("run")[0]).options.train.steps == 15

    def test_a_jump_of_the_learning_rate_is_said(self, folder):
        """From where the old schedule ended back up to where the new one is at this step."""
        result = call("train", "--resume", "--out", "run", "--steps", 15)
        now = 1e-2 * 1e-3 ** (13 / 15)
        said = f"the learning rate was 1e-05 and continues at {now:.3g}\n"
        assert said in result.out
        (used,) = [r["learning_rate"] for r in records("run") if r["step"] == 13 and "loss" in r]
        assert used == pytest.approx(now)
        again = call("train", "--resume", "--out", "run")
        assert (again.code, again.err) == (0, "")
        assert "the schedule changes" in result.out and "schedule" not in again.out

    def test_an_end_that_is_behind_the_run_is_refused(self, folder, train):
        for resume in ("--resume", "--auto-resume"):
            result = call("train", resume, "--out", "run", "--steps", 5)
            assert (result.code, result.err.count("\n")) == (2, 1)
            assert "the run is at step 12 already and steps=5 is behind it" in result.err
        assert train("--minutes", 1e-6).code == 0
        result = call("train", "--resume", "--out", "new", "--minutes", 1e-7)
        assert result.code == 2
        assert "already and minutes=1e-07 is less" in result.err
        assert call("train", "--resume", "--out", "new").code == 0

    def test_a_finished_run_has_nothing_to_do(self, folder):
        def contents() -> dict[Path, bytes]:
            return {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}

        before = contents()
        result = call("train", "--resume", "--out", "run")
        assert (result.code, result.err) == (0, "")
        assert "done: run/step-00000012" in result.out
        assert contents() == before

    def test_the_command_that_began_it_resumes_it(self, folder, train):
        """As one does with the arrow-up key."""
        assert train("--steps", 4, "--seed", 3).code == 0
        assert train("--steps", 6, "--seed", 3, "--resume").code == 0
        assert steps("new") == list(range(1, 7))

    @pytest.mark.parametrize(
        ("option", "value", "old"),
        [
            ("--batch", 3, 2),
            ("--learning-rate", 6e-4, 0.01),  # that is the default, and not what it began with
            ("--seed", 5, 0),
            ("--dropout", 0.1, 0.0),
            ("--width", 256, 16),
            ("--layers", 3, 2),
            ("--size", "169m", None),
        ],
    )
    def test_other_options_are_refused(self, option, value, old, folder):
        result = call("train", "--resume", "--out", "run", option, value)
        assert result.code == 2
        assert f" {old}, not " in result.err

    @pytest.mark.parametrize("damage", ["missing", "truncated"])
    def test_lost_tokens_are_one_line(self, damage, folder):
        if damage == "missing":
            shutil.rmtree("run/data")
        else:
            os.truncate("run/data/train.npy", 500)
        result = call("train", "--resume", "--out", "run", "--steps", 20)
        assert result.code == 2
        assert result.err.startswith("receptance: error: no readable token files in run/data")
        assert result.err.count("\n") == 1

    def test_an_existing_run_is_not_overwritten(self, folder, train):
        result = train("--out", "run")
        assert result.code == 2
        assert "already holds a run; resume it, or" in result.err

    def test_what_a_crash_left_before_any_checkpoint(self, folder, train):
        Path("new").mkdir()
        Path("new/metrics.jsonl").write_text("{}\n")
        result = train()
        assert result.code == 2
        assert "without a checkpoint" in result.err


class TestFailures:
    @pytest.fixture
    def full(self, monkeypatch) -> set[int]:
        """The steps whose checkpoints find the disk full."""
        steps: set[int] = set()
        write = saving.write_tensors

        def write_or_fail(tensors, folder, *rest, **more):
            if int(folder.name.split(".")[1].removeprefix("step-")) in steps:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(tensors, folder, *rest, **more)

        monkeypatch.setattr(saving, "write_tensors", write_or_fail)
        return steps

    def test_one_save_that_fails_costs_nothing(self, full, train, finished):
        full.add(4)
        result = train("--steps", 12, "--reports", 3)
        assert result.code == 0
        assert "checkpoint not saved: cannot write new/step-00000004" in result.out
        assert same_ending("new", finished / "run")

    def test_the_last_save_fails(self, full, train):
        full.add(12)
        result = train("--steps", 12, "--reports", 3)
        assert result.code == 2
        assert result.err == "receptance: error: the last step (12) is not saved; see above\n"
        assert [p for p in checkpoints("new") if not verify(Path("new", p))] == [
            "step-00000004",
            "step-00000008",
        ]

    def test_three_saves_in_a_row_fail(self, full, train):
        full.update({6, 8, 10, 12})
        result = train("--steps", 12, "--reports", 6)
        assert result.code == 2
        assert result.err == "receptance: error: 3 saves failed in a row; see above\n"
        assert "cannot write new/step-00000010" in result.out
        assert checkpoints("new") == ["step-00000002", "step-00000004"]

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is full")
    def test_metrics_wait_for_space(self, train, monkeypatch, finished):
        record = MetricsLog.record

        def record_on_a_full_disk(self: MetricsLog, values: dict) -> None:
            place = self.path
            self.path = Path("/dev/full") if values["step"] in (5, 6) else place
            record(self, values)
            self.path = place

        monkeypatch.setattr(MetricsLog, "record", record_on_a_full_disk)
        assert train("--steps", 12, "--reports", 3).code == 0
        assert same_ending("new", finished / "run")

    def test_no_picture_without_matplotlib(self, train, monkeypatch):
        monkeypatch.setattr(plots, "draw_losses", draw_losses)
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        result = train("--steps", 2)
        assert result.code == 0
        assert "no plot without matplotlib: pip install matplotlib" in result.out
        assert not Path("new/loss.png").exists()

    @pytest.mark.parametrize("error", [RuntimeError("a broken\nfont cache"), KeyError("x")])
    def test_a_plot_ends_no_run_and_fails_aloud_once(self, error, train, monkeypatch):
        def fail(metrics: Path, picture: Path) -> None:
            raise error

        monkeypatch.setattr(plots, "draw_losses", fail)
        result = train("--steps", 6, "--reports", 3)
        assert result.code == 0, result.err
        assert result.out.count("no plot: ") == 1
        assert "no plot: a broken font cache\n" in result.out or "no plot: 'x'\n" in result.out
        assert steps("new") == list(range(1, 7))

    def test_not_a_number_keeps_the_last_checkpoint(self, train, monkeypatch):
        run_step = Trainer.run_step

        def explode(self: Trainer):
            if self.step == 9:
                self.model.head.weight.data.fill_(float("inf"))
            return run_step(self)

        monkeypatch.setattr(Trainer, "run_step", explode)
        result = train("--steps", 12, "--reports", 3)
        assert result.code == 2
        assert result.err.startswith("receptance: error: loss is nan at step 10; stopped before")
        assert result.err.count("\n") == 1
        verify("new/step-00000008")
        assert load("new")[0].head.weight.isfinite().all()
        assert steps("new") == list(range(1, 10))


STOPPED = """
import os
import signal
import sys
from receptance.__main__ import main
from receptance.training.run import Run

record = Run._record

def record_and_stop(self, values):
    record(self, values)
    if values["step"] == 15 and "loss" in values:
        os.kill(os.getpid(), signal.SIGINT)

Run._record = record_and_stop
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ctrl_c_when_the_reader_of_the_output_has_gone(folder):
    """In a process of its own: `receptance train ... | head -1` goes on, and Ctrl-C still saves."""
    reading, writing = os.pipe()
    os.close(reading)
    command = "train --resume --out run --steps 20"
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, *command.split()],
        stdout=writing,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")
    assert steps("run") == list(range(1, 16))
    assert checkpoints("run")[-1] == "step-00000015"
    assert call("train", "--resume", "--out", "run").code == 0
    assert steps("run") == list(range(1, 21))


def test_samples_depend_on_the_step_alone(finished):
    """A report that is repeated after resuming says the same again."""
    model, tokenizer = load(finished / "run")
    sample = generation.generate(model, tokenizer, "", max_tokens=80, top_p=0.9, seed=12)
    assert records(finished / "run")[-1]["sample"] == sample


def test_minutes_alone_lift_the_default_number_of_steps():
    options = tyro.cli(app.Options, args=["text", "--minutes", "4"])
    assert options.start.train.total_steps > 10**6
    assert tyro.cli(app.Options, args=["text"]).start.train.total_steps == 1000


def test_the_end_of_a_run_looks_at_all_of_the_validation_text(train, monkeypatch):
    monkeypatch.setattr("receptance.training.run._QUICK_VALIDATION", 40)
    assert train("--steps", 2, "--reports", 2).code == 0
    found = [[r["step"] for r in records("new") if name in r] for name in (QUICK, f"whole_{QUICK}")]
    assert found == [[1, 2], [2]]

"""A run that meets a spike of its loss, a full disk, or the end of the time it may take."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command import SMALL, Result, call
from tiny import TEXT

from receptance.data.batches import Batch, Batches
from receptance.inference.scoring import bits_per_byte, negative_log_likelihood
from receptance.storage.checkpoint import load
from receptance.storage.directories import newest_checkpoint, step_directories
from receptance.training import TrainOptions, saving, trainer
from receptance.training import run as module
from receptance.training.run import Run, RunOptions

STEPS = 24


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory: a text in it; no pictures and short samples."""
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("receptance.plots.draw_losses", lambda metrics, picture: None)
    monkeypatch.setattr(module, "_SAMPLE_TOKENS", 2)
    return tmp_path


def train(out: str, *more: object) -> Result:
    return call("train", "text.txt", "--out", out, *SMALL.split(), "--steps", STEPS, *more)


def records(out: str) -> list[dict]:
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def newest(out: str) -> bytes:
    """Everything in the last checkpoint, by its digests."""
    return (newest_checkpoint(out)[0] / "manifest.json").read_bytes()


class TestRollback:
    @pytest.fixture
    def spikes(self, monkeypatch) -> set[int]:
        """Places in the order of batches, from 0, with tokens that nothing predicts."""
        places: set[int] = set()
        at = Batches.at

        def at_or_worse(self: Batches, step: int) -> Batch:
            batch = at(self, step)
            if step not in places:
                return batch
            generator = torch.Generator().manual_seed(step)
            worse = torch.randint(128, 256, batch.targets.shape, generator=generator)
            return Batch(batch.inputs, worse.to(batch.targets))

        monkeypatch.setattr(Batches, "at", at_or_worse)
        for one in (module, trainer):
            monkeypatch.setattr(one, "SPIKE_MEMORY", 3)
        return places

    def test_it_goes_back_and_passes_over(self, spikes):
        spikes.add(13)
        result = train("run", "--rollback", 1.0, "--reports", 6)
        assert result.code == 0, result.err
        assert "at step 14 is a spike: back to step 12" in result.out
        steps = [record["step"] for record in records("run") if "loss" in record]
        assert steps == [*range(1, 15), *range(13, STEPS + 1)]
        about = json.loads((newest_checkpoint("run")[0] / "training.json").read_text())
        assert (about["step"], about["passed_over"]) == (STEPS, 2)

    @pytest.mark.parametrize("place", [13, 21])
    def test_a_run_that_died_after_it_goes_on_exactly(self, place, spikes, monkeypatch):
        """A second spike follows soon, so what is remembered of losses matters."""
        spikes.update({13, 20})
        assert train("whole", "--rollback", 1.0, "--reports", 6).code == 0
        record, seen = Run._record, []

        def record_and_die(self: Run, values: dict) -> None:
            record(self, values)
            seen.append(values)
            if sum("loss" in values for values in seen) == place + 1:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Run, "_record", record_and_die)
            assert train("run", "--rollback", 1.0, "--reports", 6).code == 130
        result = call("train", "--resume", "--out", "run", "--reports", 6)
        assert result.code == 0, result.err
        assert newest("run") == newest("whole")

    def test_a_stop_right_after_it_remembers(self, spikes, monkeypatch):
        spikes.add(13)
        go_back = Run._roll_back

        def go_back_and_stop(self: Run, report) -> None:
            go_back(self, report)
            os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "_roll_back", go_back_and_stop)
            assert train("run", "--rollback", 1.0, "--reports", 6).code == 0
        assert call("train", "--resume", "--out", "run", "--reports", 6).code == 0
        assert sum("rolled_back_from" in record for record in records("run")) == 1

    def test_a_spike_before_the_first_report(self, spikes):
        spikes.add(4)
        result = train("run", "--rollback", 1.0, "--reports", 1)
        assert result.code == 0, result.err
        assert "at step 5 is a spike: back to step 0" in result.out

    @pytest.mark.parametrize(
        ("losses", "loss", "is_one"),
        [
            ([1.0, 3.0, 2.0], 2.4, False),
            ([1.0, 3.0, 2.0], 2.6, True),  # less than the largest, but over the mean
            ([1.0, 3.0], 9.0, False),  # too few to say
        ],
    )
    def test_it_is_measured_against_the_mean(self, losses, loss, is_one, monkeypatch):
        monkeypatch.setattr(module, "SPIKE_MEMORY", 3)
        about = SimpleNamespace(options=TrainOptions(rollback=0.5), losses=losses)
        assert Run._is_spike(SimpleNamespace(trainer=about), loss) == is_one

    def test_without_the_option_it_goes_on(self, spikes):
        spikes.add(13)
        assert train("run").code == 0
        steps = [record["step"] for record in records("run") if "loss" in record]
        assert steps == list(range(1, STEPS + 1))

    def test_it_gives_up_in_the_end(self, spikes):
        spikes.update(range(6, 999))
        result = train("run", "--rollback", 0.5, "--reports", 12)
        assert result.code == 2
        assert "the loss has left its mean 11 times" in result.err


class TestSaves:
    def test_after_so_many_minutes(self):
        assert train("run", "--reports", 1, "--save-minutes", 0, "--keep", 99).code == 0
        names = [path.name for path in step_directories(Path("run"))]
        assert names == [f"step-{n:08d}" for n in range(1, STEPS + 1)]

    def test_time_is_counted_from_the_last_one(self, monkeypatch):
        """A step takes a minute here: the fourth is more than three after the one before."""
        clock, run_step = [0.0], trainer.Trainer.run_step

        def take_a_minute(self: trainer.Trainer):
            clock[0] += 60
            return run_step(self)

        monkeypatch.setattr(trainer.Trainer, "run_step", take_a_minute)
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
        assert train("run", "--reports", 1, "--save-minutes", 3, "--keep", 99).code == 0
        names = [path.name for path in step_directories(Path("run"))]
        assert names == [f"step-{n:08d}" for n in range(4, STEPS + 1, 4)]

    def test_a_disk_that_is_full_for_a_while(self, monkeypatch):
        write, tried = saving.write_tensors, []

        def full(*arguments, **more):
            tried.append(None)
            if 2 <= len(tried) <= 3:
                raise OSError(28, "No space left on device")
            return write(*arguments, **more)

        monkeypatch.setattr(saving, "write_tensors", full)
        result = train("run", "--reports", 6)
        assert result.code == 0, result.err
        assert result.out.count("checkpoint not saved") == 2
        assert train("other", "--reports", 6).code == 0
        assert newest("run") == newest("other")

    def test_a_disk_that_stays_full(self, monkeypatch):
        def full(*arguments, **more):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(saving, "write_tensors", full)
        result = train("run", "--reports", 12)
        assert result.code == 2
        assert result.err == "receptance: error: 3 saves failed in a row; see above\n"
        assert result.out.count("No space left") == 3
        assert not step_directories(Path("run"))
        assert max(r["step"] for r in records("run")) < 8  # not until another save is due


class TestReports:
    @pytest.fixture
    def killed(self, monkeypatch):
        """`train`, killed in the validation of a step."""

        def run(step: int) -> list[dict]:
            def die(self: Run, limit: int, what: str) -> None:
                if self.trainer.step == step:
                    raise KeyboardInterrupt
                validate(self, limit, what)

            validate = Run._validate
            with monkeypatch.context() as patch:
                patch.setattr(Run, "_validate", die)
                assert train("run", "--reports", 3).code == 130
            return records("run")

        return run

    @pytest.mark.parametrize("step", [8, STEPS])
    def test_one_that_was_cut_off_is_made_up_for(self, step, killed):
        assert killed(step)[-1]["step"] == step
        for _ in range(2):  # and only once
            result = call("train", "--resume", "--out", "run", "--reports", 3)
            assert result.code == 0, result.err
        assert train("whole", "--reports", 3).code == 0
        kept = [
            [{k: v for k, v in r.items() if k not in ("tokens_per_second", "mfu")} for r in found]
            for found in (records("run"), records("whole"))
        ]
        assert kept[0] == kept[1]

    def test_the_end_has_one_although_it_is_saved(self):
        assert train("run", "--reports", 1, "--save-minutes", 0).code == 0
        assert [r["step"] for r in records("run") if "sample" in r] == [STEPS]

    def test_a_sample_that_cannot_be_is_no_end(self, monkeypatch):
        def fail(*arguments, **more):
            raise ValueError("logits are not numbers")

        monkeypatch.setattr(module, "generate", fail)
        result = train("run", "--reports", 2)
        assert result.code == 0, result.err
        assert result.out.count("no sample: logits are not numbers") == 2


class TestValidation:
    def test_the_figure_is_of_the_validation_text(self):
        assert train("run", "--reports", 1).code == 0
        (found,) = [
            r["validation_bits_per_byte"] for r in records("run") if "validation_bits_per_byte" in r
        ]
        tokens = np.load("run/data/validation.npy")
        wanted = negative_log_likelihood(load("run")[0], tokens)
        assert found == pytest.approx(bits_per_byte(wanted, int((tokens > 0).sum())), rel=1e-5)


@pytest.mark.parametrize("name", ["reports", "keep", "save_minutes"])
def test_options_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} is -1; it must be at least"):
        RunOptions(**{name: -1})

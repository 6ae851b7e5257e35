"""Stopping and continuing is, to the bit, as if there had been no stop; saves that fail."""

import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import same_bits
from training_cases import (
    TOKENS,
    everything,
    make_saver,
    make_trainer,
    run,
    same_files,
    save,
    small,
)

from receptance.adapters import LoRAOptions, StateTuningOptions, make_adapter
from receptance.storage.checkpoint import load, read_tensors
from receptance.storage.directories import newest_checkpoint, step_directories
from receptance.storage.manifest import verify
from receptance.training import Trainer, TrainOptions, saving
from receptance.training.saving import FAILED_SAVES, read_training, restore


def lora(model):
    return make_adapter(model, LoRAOptions(rank=2, dropout=0.1))


def state_tuning(model):
    return make_adapter(model, StateTuningOptions())


def continued(like: Trainer, directory: Path, **more: Any) -> Trainer:
    """A new trainer, of other random numbers, that has all else from the directory."""
    trainer = make_trainer(like.options, like.batches.tokens, **more)
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.fill_(0.5)
    restore(trainer, directory)
    return trainer


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.2},
    "in the warm-up": {"warmup_steps": 7, "constant_steps": 3},
    "after the schedule's end": {"steps": 2},
    "decay, no clipping": {"weight_decay": 0.1, "clip": 0.0},
    "bfloat16": {"dtype": "bfloat16"},
    "another seed": {"seed": 123_456_789},
    "one loader": {"loader_workers": 1},
    "two loaders": {"loader_workers": 2},
    "micro-batches": {"batch": 3, "micro_batch": 1, "dropout": 0.1},
    "chunks": {"chunk": 9, "dropout": 0.1, "recompute": True},
    "truncated": {"chunk": 9, "carry": "state"},
    "whole documents": {"packing": "whole", "context": 90},
    "lora": {"adapter": lora, "dropout": 0.1},
    "lora in micro-batches": {"adapter": lora, "batch": 3, "micro_batch": 2},
    "state": {"adapter": state_tuning, "packing": "single", "learning_rate": 0.1},
    "rollback": {"rollback": 1.0},
}


class TestResume:
    @pytest.mark.parametrize("case", CASES)
    def test_files_and_losses_are_the_same(self, case, tmp_path):
        """N steps, a stop, M steps; and as many again after that."""
        options = dict(CASES[case])
        more = {"end_of_text": 10} if "packing" in options else {}
        if "adapter" in options:
            more["adapter"] = options.pop("adapter")
        options = small(**{"steps": 40} | options)
        straight, stopped = make_trainer(options, **more), make_trainer(options, **more)
        whole = run(straight, 5)
        left = run(stopped, 3)
        again = continued(stopped, save(stopped, tmp_path / "stopped"), **more)
        assert again.step == 3
        assert left + run(again, 2) == whole
        assert same_files(save(again, tmp_path / "again"), save(straight, tmp_path / "straight"))
        further = 4 if options.chunk else 20  # those are slow
        assert run(again, further) == run(straight, further)

    @pytest.mark.parametrize("stops", [[1], [3], [5], [5, 6, 7], [0, 8]])
    def test_across_epochs_and_more_than_once(self, stops, tmp_path):
        """5 windows and batches of 2: an epoch begins within a step, or ends with one."""
        options, tokens = small(steps=10, dropout=0.1), TOKENS[: 5 * 16 + 1]
        straight, trainer = make_trainer(options, tokens), make_trainer(options, tokens)
        assert trainer.batches.windows == 5
        reports = []
        for stop in stops:
            reports += run(trainer, stop - trainer.step)
            trainer = continued(trainer, save(trainer, tmp_path / f"{stop}"))
        reports += run(trainer, 10 - trainer.step)
        assert reports == run(straight, 10)
        assert same_files(save(trainer, tmp_path / "a"), save(straight, tmp_path / "b"))

    @pytest.mark.parametrize("place", [0, 1])
    def test_a_crash_between_micro_batches(self, place, tmp_path):
        """What had been added up is gone, with whatever else was half done."""
        options = small(batch=4, micro_batch=1, chunk=9, dropout=0.1)
        straight, trainer = make_trainer(options), make_trainer(options)
        whole = run(straight, 7)
        run(trainer, 3)
        directory = save(trainer, tmp_path / "run")
        run(trainer, 1)
        inner, calls = trainer.objective.forward, []

        def fail(*arguments):
            calls.append(None)
            if len(calls) > place * 3 + 1:  # chunks, read twice but for the last
                raise RuntimeError("pulled the plug")
            return inner(*arguments)

        trainer.objective.forward = fail
        with pytest.raises(RuntimeError, match="pulled"):
            trainer.run_step()
        assert trainer.step == 4
        again = continued(trainer, directory)
        assert run(again, 4) == whole[3:]
        assert same_files(save(again, tmp_path / "a"), save(straight, tmp_path / "b"))

    def test_time_goes_on(self, tmp_path):
        trainer = make_trainer(small(steps=5, minutes=10))
        run(trainer, 2)
        assert continued(trainer, save(trainer, tmp_path)).seconds == trainer.seconds > 0

    @pytest.mark.parametrize("change", ["micro_batch", "recompute", "loader_workers", "steps"])
    def test_what_may_change_in_between_changes_little(self, change, tmp_path):
        """Sums in another order; nothing else."""
        trainer = make_trainer(small(steps=40))
        run(trainer, 2)
        directory = save(trainer, tmp_path)
        other = make_trainer(small(**{"steps": 40, change: {"steps": 39}.get(change, 1)}))
        restore(other, directory)
        for one, two in zip(run(trainer, 3), run(other, 3), strict=True):
            assert one.loss == pytest.approx(two.loss, rel=1e-3)


class TestACheckpoint:
    def test_it_is_a_model_with_everything_needed_to_go_on(self, tmp_path):
        trainer = make_trainer(small(steps=5))
        run(trainer, 3)
        directory = save(trainer, tmp_path)
        assert same_bits(load(tmp_path)[0].state_dict(), trainer.model.state_dict())
        assert load(tmp_path)[1].kind == "bytes"
        optimizer = read_tensors(directory, "optimizer")
        assert same_bits(
            optimizer, {n: x for n, x in everything(trainer).items() if n in optimizer}
        )
        assert len(optimizer) == 3 * len(trainer.parameters)

    def test_people_can_read_what_it_says(self, tmp_path):
        trainer = make_trainer(small(steps=5))
        run(trainer, 3)
        about = json.loads((save(trainer, tmp_path) / "training.json").read_text())
        assert (about["step"], about["tokens"]) == (3, 3 * 2 * 16)
        assert (about["epoch"], about["position"]) == (0, 6)
        assert about["versions"]["torch"] == torch.__version__
        assert about["seconds"] is None

    def test_an_adapter_is_all_that_is_written(self, tmp_path):
        trainer = make_trainer(small(), adapter=lora)
        run(trainer, 2)
        names = {file.name for file in save(trainer, tmp_path).iterdir()}
        wanted = {"adapter.safetensors", "optimizer.safetensors", "training.json"}
        assert names == wanted | {"manifest.json"}

    @pytest.mark.parametrize("content", [None, "", "{", "[]", "1"])
    def test_another_directory_is_refused(self, content, tmp_path):
        if content is not None:
            (tmp_path / "training.json").write_text(content)
        with pytest.raises(ValueError, match="is not a checkpoint to resume from"):
            read_training(tmp_path)


class TestTheSaver:
    def test_it_writes_what_was_there_when_it_was_asked(self, tmp_path, monkeypatch):
        """Training goes on while it writes; none of that may arrive."""
        trainer = make_trainer(small(steps=10))
        run(trainer, 2)
        wanted = save(trainer, tmp_path / "wanted")
        changed, write = threading.Event(), saving.write_tensors

        def write_later(*arguments, **keywords):
            assert changed.wait(600)  # only a hang takes so long
            return write(*arguments, **keywords)

        monkeypatch.setattr(saving, "write_tensors", write_later)
        saver = make_saver(trainer, tmp_path / "run")
        saver.save(trainer)
        run(trainer, 3)
        with torch.no_grad():
            for x in everything_itself(trainer):
                x.fill_(-7.0)
        changed.set()
        saver.wait()
        assert saver.saved_step == 2
        assert same_files(tmp_path / "run/step-00000002", wanted)

    def test_old_ones_go_when_a_new_one_is_there(self, tmp_path):
        trainer = make_trainer(small(steps=10))
        saver = make_saver(trainer, tmp_path)
        for _ in range(4):
            run(trainer, 1)
            saver.save(trainer)
        saver.wait()
        kept = step_directories(tmp_path)
        assert [path.name for path in kept] == ["step-00000003", "step-00000004"]
        for path in kept:
            verify(path)
        assert {path.name for path in tmp_path.iterdir()} == {path.name for path in kept}

    @pytest.mark.parametrize("file", ["model", "optimizer"])
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
    def test_a_disk_that_fails(self, file, number, tmp_path, monkeypatch):
        """It says so once for each, goes on, and gives up when none has worked for long."""
        trainer, said = make_trainer(small(steps=10)), []
        saver = make_saver(trainer, tmp_path, said)
        saver.save(trainer)
        saver.wait()
        write = saving.write_tensors

        def fail(tensors, directory, stem, **rest):
            if stem == file:
                raise OSError(number, "the disk says no")
            return write(tensors, directory, stem, **rest)

        monkeypatch.setattr(saving, "write_tensors", fail)
        for attempt in range(1, FAILED_SAVES + 1):
            run(trainer, 1)
            saver.save(trainer)
            saver.wait()
            path = tmp_path / f"step-{attempt:08d}"
            assert said[-1] == f"checkpoint not saved: cannot write {path}: the disk says no"
        assert saver.saved_step == 0
        assert newest_checkpoint(tmp_path) == (tmp_path / "step-00000000", [])
        assert not list(tmp_path.glob(".step*"))
        with pytest.raises(ValueError, match="3 saves failed in a row"):
            saver.save(trainer)

    def test_one_that_works_is_a_new_beginning(self, tmp_path, monkeypatch):
        trainer = make_trainer(small(steps=20))
        saver, write = make_saver(trainer, tmp_path), saving.write_tensors

        def fail_mostly(*arguments, **rest):
            if trainer.step % FAILED_SAVES:
                raise OSError(errno.ENOSPC, "full")
            return write(*arguments, **rest)

        monkeypatch.setattr(saving, "write_tensors", fail_mostly)
        for _ in range(3 * FAILED_SAVES):
            run(trainer, 1)
            saver.save(trainer)
            saver.wait()
        assert saver.saved_step == trainer.step == 3 * FAILED_SAVES


def everything_itself(trainer: Trainer) -> list[torch.Tensor]:
    """Parameters and optimizer, no copies."""
    states = [x for state in trainer.optimizer.state.values() for x in state.values()]
    return [*trainer.parameters.values(), *states]


def test_options_survive_json():
    """As a checkpoint keeps them."""
    from dataclasses import asdict

    from receptance.training.notes import restored_options
    from receptance.training.options import StartOptions

    options = StartOptions(
        init="x", tune="lora", train=TrainOptions(betas=(0.8, 0.95)), exclude=("a", "b")
    )
    assert restored_options(StartOptions(), json.loads(json.dumps(asdict(options)))) == options

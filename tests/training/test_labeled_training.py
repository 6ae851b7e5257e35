"""Training on labeled sequences: scores, steps, and runs that go on as if nothing had happened."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch
from rich.console import Console

from receptance.config import ModelConfig
from receptance.data.labeled import LabeledBatch, Part, Problem, StoredExamples
from receptance.model.heads import SequenceConfig
from receptance.model.sequences import SequenceModel
from receptance.storage.sequences import load_sequence_model, write_sequence_description
from receptance.training import TrainOptions
from receptance.training.labeled import LabeledTrainer, errors, score
from receptance.training.labeled_run import LabeledRun, LabeledStart, labeled_notes
from receptance.training.options import StartOptions
from receptance.training.run import RunOptions
from receptance.training.trainer import NotFinite

CLASSES = Problem(kind="classify", outputs=2, vocab_size=8)
NUMBERS = Problem(kind="regress", outputs=2, channels=1)


def make_examples(problem: Problem = CLASSES) -> StoredExamples:
    """Is there a 7 in the row? Or: how large are the first and the last number?"""
    rng = np.random.default_rng(0)
    rows, targets = [], []
    for n in range(60):
        length = int(rng.integers(3, 9))
        if problem.kind == "classify":
            row = rng.integers(7, size=length)
            if n % 2:
                row[rng.integers(length)] = 7
            targets.append(n % 2)
        else:
            row = rng.normal(size=(length, 1)).astype(np.float32)
            targets.append(row[[0, -1], 0])
        rows.append(row)
    kind = np.int64 if problem.kind == "classify" else np.float32
    part = Part(rows, np.array(targets, kind))
    return StoredExamples(problem, {"train": part, "validation": part, "test": part}, {})


def make_trainer(problem: Problem = CLASSES, **options) -> LabeledTrainer:
    stack = ModelConfig(vocab_size=problem.vocab_size, width=16, num_layers=2)
    sizes = SequenceConfig(stack=stack, outputs=problem.outputs, channels=problem.channels)
    train = TrainOptions(**{"steps": 60, "batch": 10, "learning_rate": 1e-2, **options})
    return LabeledTrainer(SequenceModel(sizes, seed=1), make_examples(problem), train)


class TestScores:
    def test_accuracy_is_the_share_of_right_answers(self):
        batch = LabeledBatch(torch.zeros(2, 3), torch.tensor([[1, 0, 1], [0, 0, 1]]))
        places = torch.tensor([[True, False, True], [True, True, True]])
        batch = LabeledBatch(torch.ones(2, 3, dtype=torch.int64), batch.targets, places=places)
        stack = ModelConfig(vocab_size=8, width=16, num_layers=1)
        model = SequenceModel(SequenceConfig(stack=stack, outputs=2, pooling="every"))
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.bias.copy_(torch.tensor([0.0, 1.0]))  # it always answers 1
        found = score(model, [batch], Problem(kind="classify", outputs=2, every=True))
        assert found.examples.tolist() == [1.0, pytest.approx(1 / 3)]
        right, wrong = np.log1p(np.exp(-1.0)), np.log1p(np.exp(1.0))
        assert found.loss == pytest.approx((3 * right + 2 * wrong) / 5)

    def test_errors_of_numbers(self):
        found = errors(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]]), NUMBERS)
        assert found.tolist() == [2.5]

    def test_scores_do_not_depend_on_the_size_of_batches(self):
        trainer, examples = make_trainer(), make_examples()
        one, other = (score(trainer.model, examples.held_out("test", n), CLASSES) for n in (1, 60))
        assert one.loss == pytest.approx(other.loss, abs=1e-5)
        assert one.mean == other.mean

    def test_dropout_is_off(self):
        trainer = make_trainer(dropout=0.5)
        trainer.switch(training=True)
        assert trainer.score("test").loss == trainer.score("test").loss
        assert trainer.model.training


class TestSteps:
    @pytest.mark.parametrize("problem", [CLASSES, NUMBERS], ids=lambda problem: problem.kind)
    def test_it_learns(self, problem):
        trainer = make_trainer(problem)
        before = trainer.score("test").loss
        while not trainer.finished:
            trainer.run_step()
        assert trainer.score("test").loss < 0.7 * before

    def test_micro_batches_change_nothing(self):
        whole, parts = make_trainer(), make_trainer(micro_batch=3)
        reports = [(whole.run_step(), parts.run_step()) for _ in range(3)]
        for one, other in reports:
            assert one.loss == pytest.approx(other.loss, rel=1e-4)
            assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-3)

    def test_recomputing_changes_nothing(self):
        plain, again = make_trainer(), make_trainer(recompute=True)
        for _ in range(2):
            assert plain.run_step().loss == pytest.approx(again.run_step().loss, rel=1e-5)

    def test_dropout_depends_on_the_step_alone(self):
        one, other = make_trainer(dropout=0.3), make_trainer(dropout=0.3)
        before = torch.get_rng_state()
        assert one.run_step().loss == other.run_step().loss
        assert torch.equal(torch.get_rng_state(), before)

    def test_what_is_not_finite_changes_nothing(self):
        trainer = make_trainer()
        with torch.no_grad():
            trainer.model.head.bias[0] = float("nan")
        before = trainer.model.blocks[0].ln1.weight.clone()
        with pytest.raises(NotFinite, match="loss is nan at step 1") as refused:
            trainer.run_step()
        assert torch.equal(trainer.model.blocks[0].ln1.weight, before) and trainer.step == 0
        assert "inputs" in refused.value.batch.arrays()

    def test_options_about_text_are_refused(self):
        with pytest.raises(ValueError, match="z_loss is about text"):
            make_trainer(z_loss=1e-4)


def make_run(folder, **options) -> LabeledRun:
    folder.mkdir(exist_ok=True)
    trainer = make_trainer(steps=6, dropout=0.2, **options)

    def describe(place) -> None:
        write_sequence_description(trainer.model.config, place, {"task": "classify"})

    start = LabeledStart(trainer, StartOptions(train=trainer.options), describe, {"source": "x"})
    console = Console(quiet=True)
    return LabeledRun(folder, RunOptions(reports=2), start, console).restored()


@pytest.fixture
def no_plots(monkeypatch):
    """Pictures take longer than these runs, and have tests of their own."""
    monkeypatch.setattr("receptance.plots.draw_losses", lambda *_: None)


@pytest.mark.usefixtures("no_plots")
class TestRuns:
    def test_a_run_that_stopped_goes_on_as_if_it_had_not(self, tmp_path):
        assert make_run(tmp_path / "whole").go()
        stopped = make_run(tmp_path / "cut")
        trainer = stopped.labeled.trainer
        step, stop = trainer.run_step, threading.Event()

        def interrupted():
            if trainer.step == 2:
                stop.set()
            return step()

        trainer.run_step = interrupted
        stopped.logs = []
        stopped._train(stop)
        stopped.saver.wait()
        assert trainer.step == 3
        assert make_run(tmp_path / "cut").go()
        for name in ("model.safetensors", "optimizer.safetensors"):
            one, other = (tmp_path / run / "step-00000006" / name for run in ("whole", "cut"))
            assert one.read_bytes() == other.read_bytes()

    def test_its_folder(self, tmp_path):
        run = make_run(tmp_path)
        run.go()
        records = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        positions = [record["tokens"] for record in records]
        assert positions == sorted(positions) and positions[-1] == run.labeled.trainer.positions
        assert {"validation_accuracy", "validation_loss"} <= records[-1].keys()
        assert labeled_notes(tmp_path / "step-00000006")["source"] == "x"
        model, about = load_sequence_model(tmp_path)
        assert about == {"task": "classify"} and not model.training
        tokens = torch.tensor([[1, 2, 3]])
        assert torch.equal(model(tokens), run.labeled.trainer.model.eval()(tokens))

    def test_a_damaged_checkpoint_is_passed_over(self, tmp_path):
        make_run(tmp_path).go()
        file = tmp_path / "step-00000006" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\0")
        assert make_run(tmp_path).trainer.step == 3

    def test_a_language_model_is_not_loaded_as_one(self, tmp_path):
        (tmp_path / "config.json").write_text('{"format": "receptance"}')
        with pytest.raises(ValueError, match=r"manifest|no classifier"):
            load_sequence_model(tmp_path)

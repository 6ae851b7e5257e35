"""The schedule, the objective, the groups, and steps that can be stopped and continued exactly."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny import TEXT, make_model, same_bits
from torch import Tensor

from receptance import training
from receptance.checkpoint import load, write_directory, write_model
from receptance.config import ModelConfig
from receptance.data import Batches
from receptance.model import Model
from receptance.tokenizer import ByteTokenizer
from receptance.training import (
    StepReport,
    Trainer,
    TrainOptions,
    head_loss,
    learning_rate,
    make_optimizer,
    stored_options,
)

TOKENS = np.frombuffer(TEXT.encode(), np.uint8).astype(np.uint16)
SMALL = {"batch": 2, "context": 16, "learning_rate": 1e-2, "final_learning_rate": 1e-3}


def make_trainer(options: TrainOptions, tokens: np.ndarray = TOKENS) -> Trainer:
    sizes = ModelConfig(vocab_size=256, width=16, num_layers=2)
    model = Model(sizes, seed=options.seed, dropout=options.dropout)
    batches = Batches(tokens, context=options.context, batch=options.batch, seed=options.seed)
    return Trainer(model, batches, options)


def run(trainer: Trainer, steps: int) -> list[StepReport]:
    """The reports of so many steps, without the times."""
    reports = [trainer.run_step() for _ in range(steps)]
    return [dataclasses.replace(report, tokens_per_second=0.0) for report in reports]


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """Parameters and optimizer."""
    parameters = dict(trainer.model.named_parameters())
    state = {
        f"{name}/{key}": x
        for name, parameter in parameters.items()
        for key, x in trainer.optimizer.state[parameter].items()
    }
    return {name: x.detach().clone() for name, x in (parameters | state).items()}


def stop_and_continue(trainer: Trainer, directory: Path) -> Trainer:
    """A new trainer that knows nothing but what is in the directory."""

    def write(partial: Path) -> None:
        write_model(trainer.model, partial, ByteTokenizer())
        trainer.write(partial)

    write_directory(directory, write)
    model, _ = load(directory)
    options, batches = stored_options(directory), trainer.batches
    model.dropout = options.dropout
    again = Batches(batches.tokens, context=options.context, batch=options.batch, seed=options.seed)
    continued = Trainer(model, again, options)
    continued.restore(directory)
    return continued


class TestLearningRate:
    @given(
        step=st.integers(0, 300),
        steps=st.integers(1, 250),
        constant=st.integers(0, 100),
        warmup=st.integers(0, 60),
    )
    def test_the_formula_of_rwkv_v4neo(self, step, steps, constant, warmup):
        options = TrainOptions(
            steps=steps, constant_steps=constant, warmup_steps=warmup, learning_rate=6e-4
        )
        if steps - constant - warmup < 1:
            return  # no steps are left to decay in; the formula would divide by zero
        progress = (step - constant - warmup + 1) / (steps - constant - warmup)
        progress = max(0, min(1, progress))
        wanted = math.exp(math.log(6e-4) * (1 - progress) + math.log(1e-5) * progress)
        if step < warmup:
            wanted *= 0.2 + 0.8 * step / warmup
        assert learning_rate(step, options) == pytest.approx(wanted, rel=1e-9)

    def test_by_hand(self):
        options = TrainOptions(
            steps=110,
            warmup_steps=10,
            constant_steps=20,
            learning_rate=1e-2,
            final_learning_rate=1e-4,
        )
        rates = {0: 2e-3, 5: 6e-3, 10: 1e-2, 29: 1e-2, 69: 1e-3, 109: 1e-4, 500: 1e-4}
        for step, rate in rates.items():
            assert learning_rate(step, options) == pytest.approx(rate), step

    def test_steps_use_it_times_the_scale(self):
        trainer = make_trainer(TrainOptions(steps=6, warmup_steps=2, **SMALL))
        for step in range(6):
            report = trainer.run_step()
            assert report.learning_rate == learning_rate(step, trainer.options)
            for group in trainer.optimizer.param_groups:
                assert group["lr"] == report.learning_rate * group["scale"]

    def test_a_time_limit_moves_it_along(self):
        trainer = make_trainer(TrainOptions(minutes=1.0, **SMALL))
        trainer.seconds = 30.0
        assert trainer.progress == 0.5
        assert run(trainer, 1)[0].learning_rate == pytest.approx((1e-2 * 1e-3) ** 0.5)
        trainer.seconds = 60.0
        assert trainer.finished

    def test_steps_and_minutes_limit_a_run_together(self):
        trainer = make_trainer(TrainOptions(steps=3, minutes=60.0, **SMALL))
        run(trainer, 3)
        assert trainer.finished

    def test_without_a_limit_there_are_1000_steps(self):
        assert TrainOptions().total_steps == 1000
        assert TrainOptions(minutes=1).total_steps > 10**6


class TestHeadLoss:
    """Against cross entropy of all logits at once, whatever the number of parts."""

    @pytest.fixture(params=[1, 300, 3000, 1 << 24])
    def _parts(self, request, monkeypatch) -> None:
        monkeypatch.setattr(training, "_LOGITS_AT_ONCE", request.param)

    def draw(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(3)
        features = torch.randn(3, 7, 16, generator=generator).to(dtype)
        weight = torch.randn(100, 16, generator=generator)
        targets = torch.randint(100, (3, 7), generator=generator)
        return features.requires_grad_(), weight.requires_grad_(), targets

    @pytest.mark.usefixtures("_parts")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("scale", [1.0, 1024.0])
    def test_value_and_gradients(self, dtype, scale):
        features, weight, targets = self.draw(dtype)
        loss = head_loss(features, weight, targets)
        found = torch.autograd.grad(loss * scale, (features, weight))
        logits = features.float() @ weight.T
        wanted_loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        wanted = torch.autograd.grad(wanted_loss * scale, (features, weight))
        assert loss.dtype == torch.float32
        assert found[0].dtype == dtype
        torch.testing.assert_close(loss, wanted_loss, atol=1e-6, rtol=1e-6)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6 * scale, rtol=1e-5)

    def test_equal_tokens_among_the_targets_add_up(self):
        features, weight, _ = self.draw(torch.float32)
        targets = torch.full((3, 7), 5)
        head_loss(features, weight, targets).backward()
        logits = features @ weight.T
        wanted = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        (wanted_grad,) = torch.autograd.grad(wanted, weight)
        torch.testing.assert_close(weight.grad, wanted_grad, atol=1e-6, rtol=1e-5)

    def test_without_gradients(self):
        features, weight, targets = self.draw(torch.float32)
        with torch.no_grad():
            value = head_loss(features, weight, targets)
        assert not value.requires_grad
        assert torch.equal(value, head_loss(features, weight, targets))

    def test_extreme_logits_stay_finite(self):
        features, weight, targets = self.draw(torch.float32)
        loss = head_loss(features * 1e4, weight, targets)
        assert torch.isfinite(loss)
        assert all(torch.isfinite(x).all() for x in torch.autograd.grad(loss, (features, weight)))


class TestOptimizer:
    def groups(self, **options: float) -> dict[str, dict[str, float]]:
        """By parameter name."""
        model = make_model()
        optimizer = make_optimizer(model, TrainOptions(**options))
        found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        return {name: found[id(p)] for name, p in model.named_parameters()}

    def test_every_parameter_is_in_one_group(self):
        model = make_model()
        listed = [
            id(p)
            for group in make_optimizer(model, TrainOptions()).param_groups
            for p in group["params"]
        ]
        assert sorted(listed) == sorted(id(p) for p in model.parameters())

    def test_decay_and_bonus_learn_faster(self):
        for name, group in self.groups().items():
            ending = name.rpartition(".")[2]
            assert group["scale"] == {"time_decay": 2, "time_first": 3}.get(ending, 1), name

    def test_weight_decay_is_for_matrices(self):
        matrices = ("emb", "head", "key", "value", "receptance", "output")
        for name, group in self.groups(weight_decay=0.1).items():
            is_matrix = name.removesuffix(".weight").rpartition(".")[2] in matrices
            assert group["weight_decay"] == (0.1 if is_matrix else 0), name

    def test_there_is_none_by_default(self):
        assert {group["weight_decay"] for group in self.groups().values()} == {0}

    def test_the_options_arrive(self):
        group = self.groups(betas=(0.8, 0.95), epsilon=1e-6)["emb.weight"]
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)


class TestSteps:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_a_small_text_is_learnt_by_heart(self, dtype):
        tokens = np.frombuffer(b"the quick brown fox jumps over it. " * 12, np.uint8)
        options = TrainOptions(steps=60, dtype=dtype, **SMALL | {"context": 35})
        trainer = make_trainer(options, tokens)
        reports = run(trainer, 60)
        assert reports[0].loss > 5
        assert reports[-1].loss < 0.5
        assert trainer.finished
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        states = trainer.optimizer.state.values()
        assert {x.dtype for state in states for x in state.values()} == {torch.float32}

    def test_reports_count_steps(self):
        reports = run(make_trainer(TrainOptions(steps=3, **SMALL)), 3)
        assert [report.step for report in reports] == [1, 2, 3]

    def test_gradients_are_clipped(self, monkeypatch):
        """Adam divides the size of gradients out; its first average shows what it was given."""
        limited = make_trainer(TrainOptions(clip=1e-3, **SMALL))
        free = make_trainer(TrainOptions(clip=0, **SMALL))
        norms = run(limited, 1)[0].gradient_norm, run(free, 1)[0].gradient_norm
        assert norms[0] == norms[1] > 1e-3
        sizes = []
        for trainer in (limited, free):
            averages = [state["exp_avg"].flatten() for state in trainer.optimizer.state.values()]
            sizes.append(float(torch.cat(averages).norm()))
        assert sizes == pytest.approx([0.1 * 1e-3, 0.1 * norms[1]], rel=1e-3)

    @pytest.mark.parametrize("dropout", [0.0, 0.2])
    def test_a_step_ignores_and_leaves_the_global_generator(self, dropout):
        losses = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            trainer = make_trainer(TrainOptions(dropout=dropout, **SMALL))
            before = torch.get_rng_state()
            losses.append(run(trainer, 3))
            assert torch.equal(torch.get_rng_state(), before)
        assert losses[0] == losses[1]

    def test_dropout_differs_between_steps(self):
        """A learning rate of next to nothing and one batch: the rest is dropout."""
        options = TrainOptions(
            dropout=0.2, batch=1, context=16, learning_rate=1e-30, final_learning_rate=1e-30
        )
        trainer = make_trainer(options, TOKENS[:17])
        trainer.model.load_state_dict(make_model().state_dict())
        assert len({report.loss for report in run(trainer, 4)}) == 4

    def test_the_seed_decides(self):
        one, other = (make_trainer(TrainOptions(seed=seed, **SMALL)) for seed in (0, 1))
        assert run(one, 2) != run(other, 2)


def nan_loss(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return head_loss(features, weight, targets) * math.nan


def nan_gradient(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return head_loss(features, weight, targets) + (features * 0).square().sum().sqrt()


class TestNotANumber:
    @pytest.mark.parametrize(
        ("objective", "what"), [(nan_loss, "loss is nan"), (nan_gradient, "gradient norm is nan")]
    )
    @pytest.mark.parametrize("steps", [0, 3])
    def test_it_stops_before_the_update(self, objective: Callable, what, steps, monkeypatch):
        options = TrainOptions(steps=10, dropout=0.1, **SMALL)
        trainer, undisturbed = make_trainer(options), make_trainer(options)
        run(trainer, steps)
        run(undisturbed, steps)
        before = everything(trainer)
        with monkeypatch.context() as patch:
            patch.setattr(training, "head_loss", objective)
            with pytest.raises(ValueError, match=rf"^{what} at step {steps + 1}; stopped before"):
                trainer.run_step()
        assert trainer.step == steps
        assert same_bits(everything(trainer), before)
        assert run(trainer, 3) == run(undisturbed, 3)
        assert same_bits(everything(trainer), everything(undisturbed))

    def test_infinite_weights_are_found(self):
        trainer = make_trainer(TrainOptions(**SMALL))
        torch.nn.init.constant_(trainer.model.ln_out.weight, 1e38)
        with pytest.raises(ValueError, match="at step 1; stopped"):
            trainer.run_step()


class TestResume:
    """Stopping and continuing is, to the bit, as if there had been no stop."""

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"dropout": 0.2},
            {"warmup_steps": 4, "constant_steps": 3},
            {"weight_decay": 0.1, "clip": 0.0},
            {"dtype": "bfloat16"},
            {"seed": 123_456_789},
        ],
        ids=lambda options: ", ".join(options) or "plain",
    )
    def test_in_the_middle_of_an_epoch(self, options, tmp_path):
        options = TrainOptions(steps=12, **SMALL | options)
        straight, stopped = make_trainer(options), make_trainer(options)
        whole = run(straight, 9)
        left = run(stopped, 4)
        continued = stop_and_continue(stopped, tmp_path / "step-4")
        assert continued.step == 4
        assert left + run(continued, 5) == whole
        assert same_bits(everything(continued), everything(straight))

    @pytest.mark.parametrize("stops", [[1], [3], [4], [5, 6, 7], [0, 8]])
    def test_across_epochs(self, stops, tmp_path):
        """5 windows and batches of 2: an epoch begins within a step."""
        options = TrainOptions(steps=10, dropout=0.1, **SMALL)
        tokens = TOKENS[: 5 * 16 + 1]
        straight, trainer = make_trainer(options, tokens), make_trainer(options, tokens)
        assert trainer.batches.windows == 5
        reports = []
        for stop in stops:
            reports += run(trainer, stop - trainer.step)
            trainer = stop_and_continue(trainer, tmp_path / f"step-{stop}")
        reports += run(trainer, 10 - trainer.step)
        assert reports == run(straight, 10)
        assert same_bits(everything(trainer), everything(straight))

    def test_time_goes_on(self, tmp_path):
        trainer = make_trainer(TrainOptions(steps=5, minutes=10, **SMALL))
        run(trainer, 2)
        assert stop_and_continue(trainer, tmp_path / "m").seconds == trainer.seconds > 0

    def test_what_is_stored_can_be_read_by_people(self, tmp_path):
        trainer = make_trainer(TrainOptions(steps=5, **SMALL))
        run(trainer, 2)
        trainer.write(tmp_path)
        about = json.loads((tmp_path / "training.json").read_text())
        assert (about["step"], about["tokens"]) == (2, 2 * 2 * 16)
        assert about["options"]["learning_rate"] == 1e-2
        assert stored_options(tmp_path) == trainer.options

    @pytest.mark.parametrize(
        "content", [None, "", "{}", '{"options": {"bogus": 1, "betas": [0, 0]}}', '{"options": []}']
    )
    def test_another_directory_is_refused(self, content, tmp_path):
        if content is not None:
            (tmp_path / "training.json").write_text(content)
        with pytest.raises(ValueError, match="is not a checkpoint to resume from"):
            stored_options(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", -1),
        ("batch", 0),
        ("context", -1),
        ("minutes", -1.0),
        ("minutes", math.nan),
        ("warmup_steps", -1),
        ("constant_steps", -1),
        ("weight_decay", -0.1),
        ("clip", -1.0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("final_learning_rate", math.inf),
        ("epsilon", 0.0),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("betas", (0.9, 1.0)),
        ("seed", -1),
        ("seed", 1 << 32),
    ],
)
def test_options_are_checked(name, value):
    with pytest.raises(ValueError) as caught:
        TrainOptions(**{name: value})
    assert str(caught.value).startswith(name)
    assert str(value) in str(caught.value)

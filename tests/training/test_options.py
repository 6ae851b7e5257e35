"""The options' limits, and the learning rate of every step."""

import math
import re
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from training_cases import make_trainer, run, small

import receptance
from receptance.training import TrainOptions, learning_rate


class TestLearningRate:
    @given(
        step=st.integers(0, 300),
        steps=st.integers(1, 250),
        constant=st.integers(0, 100),
        warmup=st.integers(0, 60),
    )
    def test_the_formula_of_rwkv_v4neo(self, step, steps, constant, warmup):
        assume(steps > constant + warmup)  # otherwise the formula divides by zero
        options = TrainOptions(
            steps=steps, constant_steps=constant, warmup_steps=warmup, learning_rate=6e-4
        )
        progress = (step - constant - warmup + 1) / (steps - constant - warmup)
        progress = max(0, min(1, progress))
        wanted = math.exp(math.log(6e-4) * (1 - progress) + math.log(1e-5) * progress)
        if step < warmup:
            wanted *= 0.2 + 0.8 * step / warmup
        assert learning_rate(step, options) == pytest.approx(wanted, rel=1e-9)

    @given(st.integers(0, 99), st.floats(0, 2))
    def test_the_clock_counts_when_it_is_ahead(self, step, clock):
        options = TrainOptions(steps=100, learning_rate=1e-2, final_learning_rate=1e-4)
        ahead = max(min(1, clock), (step + 1) / 100)
        assert learning_rate(step, options, clock) == pytest.approx(1e-2 * 0.01**ahead)

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

    def test_it_is_finite_when_no_steps_are_left_to_decay_in(self):
        options = TrainOptions(steps=5, warmup_steps=4, constant_steps=4)
        assert all(0 < learning_rate(step, options) <= 6e-4 for step in range(9))

    @pytest.mark.parametrize(
        ("trained", "rates"),
        [
            ("new", (6e-4, 1e-5)),
            ("all", (2e-5, 1e-5)),
            ("lora", (2e-4, 1e-5)),
            ("state", (0.1, 1e-3)),
        ],
    )
    def test_its_default_depends_on_what_is_trained(self, trained, rates):
        assert TrainOptions().with_rates(trained).rates == rates
        given = TrainOptions(learning_rate=0.5, final_learning_rate=0.25)
        assert given.with_rates(trained).rates == (0.5, 0.25)
        assert TrainOptions(learning_rate=1e-7).with_rates(trained).rates == (1e-7, 1e-7)

    def test_steps_use_it_times_the_scale(self):
        trainer = make_trainer(small(steps=6, warmup_steps=2))
        for step in range(6):
            report = trainer.run_step()
            assert report.learning_rate == learning_rate(step, trainer.options)
            for group in trainer.optimizer.param_groups:
                assert group["lr"] == report.learning_rate * group["scale"]

    def test_a_time_limit_moves_it_along(self):
        trainer = make_trainer(small(minutes=1.0))
        trainer.seconds = 30.0
        assert trainer.progress == 0.5
        assert run(trainer, 1)[0].learning_rate == pytest.approx((1e-2 * 1e-3) ** 0.5)
        trainer.seconds = 60.0
        assert trainer.finished

    def test_steps_and_minutes_limit_a_run_together(self):
        trainer = make_trainer(small(steps=3, minutes=60.0))
        run(trainer, 3)
        assert trainer.finished

    def test_without_a_limit_there_are_1000_steps(self):
        assert TrainOptions().total_steps == 1000
        assert TrainOptions(minutes=1).total_steps > 10**6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", -1),
        ("batch", 0),
        ("context", -1),
        ("minutes", -1.0),
        ("minutes", math.nan),
        ("micro_batch", -1),
        ("chunk", -1),
        ("carry", "nothing"),
        ("packing", "tight"),
        ("dtype", "float16"),
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
        ("max_logit_penalty", -1e-4),
        ("z_loss", math.nan),
        ("loader_workers", -1),
        ("rollback", -1.0),
        ("seed", -1),
        ("seed", 1 << 32),
    ],
)
def test_options_are_checked(name, value):
    with pytest.raises(ValueError) as caught:
        TrainOptions(**{name: value})
    assert str(caught.value).startswith(name)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize("room", ["training", "adapters", "storage/lock.py", "plots.py"])
def test_the_library_names_arguments_and_no_flags(room):
    """Its users call it from Python; help texts of the command are made of these docstrings."""
    root = Path(receptance.__file__).parent / room
    for file in [root] if root.is_file() else root.rglob("*.py"):
        assert not re.findall(r"(?<![\w-])--[a-z][\w-]*", file.read_text()), file

"""`run_task`: a whole comparison in tiny, its result, and what is not run again."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from rich.console import Console

from receptance.config import ModelConfig
from receptance.evaluation.results import Curve, Figure, Result
from receptance.evaluation.tasks.comparing import TaskOptions, over_seeds, run_task
from receptance.evaluation.tasks.findings import curves_of
from receptance.evaluation.tasks.pictures import draw_curves
from receptance.evaluation.tasks.runs import OUTCOME, Measured, Outcome, wilson
from receptance.evaluation.tasks.transformer import Transformer, matched_ffn_width, rotated
from receptance.model.heads import SequenceConfig
from receptance.model.sequences import SequenceModel
from receptance.training import TrainOptions

TRAIN = TrainOptions(steps=2, batch=4)
QUIET = Console(quiet=True)


def options(**changes) -> TaskOptions:
    plain = {
        "task": "mqar",
        "settings": tuple(f"pairs={n},length=16,vocabulary=64" for n in (2, 4)),
        "widths": (16,),
        "learning_rates": (1e-3, 1e-2),
        "beyond": (1, 2),
        "held_out": 8,
        "train": TRAIN,
    }
    return TaskOptions(**{**plain, **changes})


@pytest.fixture
def no_plots(monkeypatch):
    """Pictures of runs take longer than these runs, and have tests of their own."""
    monkeypatch.setattr("receptance.plots.draw_losses", lambda *_: None)


@pytest.mark.usefixtures("no_plots")
class TestComparison:
    @pytest.mark.slow
    def test_its_result(self, tmp_path):
        pytest.importorskip("matplotlib")
        found = run_task(options(seeds=2), tmp_path, QUIET)
        assert Result.load(tmp_path / "result.json").figures == found.figures
        # 2 difficulties x 2 models, tested at the trained length and at twice that.
        assert len(found.figures) == 8
        assert {f.interval for f in found.figures} == {"95 % over 2 seeds"}
        assert {f.about["length"] for f in found.figures} == {16, 32}
        assert {m.name for m in found.models} == {"rwkv4 width 16", "transformer width 16"}
        names = {curve.name for curve in found.curves}
        assert names == {"accuracy by pairs", "accuracy beyond the trained length"}
        sweeps = found.details["learning rates"]
        assert len(sweeps) == 4 and all(len(s["validation"]) == 2 for s in sweeps)
        for sweep in sweeps:
            best = max(sweep["validation"].values())
            assert sweep["validation"][f"{sweep['chosen']:g}"] == best
        # 4 places, 2 learning rates, and a second seed at the better one.
        assert len(list((tmp_path / "runs").glob(f"*/{OUTCOME}"))) == 12
        assert (tmp_path / "mqar.png").is_file() and (tmp_path / "mqar.svg").is_file()

    def test_what_has_ended_is_not_run_again(self, tmp_path, monkeypatch):
        small = options(settings=("pairs=2,length=16,vocabulary=64",), learning_rates=(1e-3,))
        first = run_task(small, tmp_path, QUIET)
        monkeypatch.setattr(
            "receptance.evaluation.tasks.runs.LabeledTrainer", lambda *_: pytest.fail("run again")
        )
        again = run_task(small, tmp_path, QUIET)
        assert again.figures == first.figures

    def test_other_options_are_another_run(self, tmp_path):
        small = options(
            settings=("pairs=2,length=16,vocabulary=64",), learning_rates=(1e-3,), models=("rwkv4",)
        )
        run_task(small, tmp_path, QUIET)
        longer = dataclasses.replace(small, train=dataclasses.replace(TRAIN, steps=3))
        run_task(longer, tmp_path, QUIET)
        assert len(list((tmp_path / "runs").iterdir())) == 2

    def test_a_stop_is_passed_on_and_the_next_call_goes_on(self, tmp_path, monkeypatch):
        small = options(
            settings=("pairs=2,length=16,vocabulary=64",), learning_rates=(1e-3,), models=("rwkv4",)
        )
        name = "receptance.evaluation.tasks.runs.LabeledRun.go"
        with monkeypatch.context() as patch:
            patch.setattr(name, lambda self: False)
            with pytest.raises(KeyboardInterrupt):
                run_task(small, tmp_path, QUIET)
        assert not list(tmp_path.glob(f"runs/*/{OUTCOME}"))
        assert len(run_task(small, tmp_path, QUIET).figures) == 2

    def test_a_benchmark_has_the_published_figures_beside_it(self, tmp_path):
        setting = "train=20,validation=4,test=4,min_length=3,max_length=20"
        found = run_task(
            options(task="listops", settings=(setting,), learning_rates=(1e-3,)), tmp_path, QUIET
        )
        published = {f.model: f.value for f in found.figures if "(published)" in str(f.model)}
        assert published["RWKV (published)"] == pytest.approx(0.5588)
        assert "Guessing gives an accuracy of 0.1." in found.notes
        assert len(found.figures) == 2 + len(published)

    def test_a_forecast_has_the_error_of_no_change_beside_it(self, tmp_path):
        rows = "".join(f"{n % 7},{n % 5}\n" for n in range(200))
        (tmp_path / "a.csv").write_text("x,y\n" + rows)
        found = run_task(
            options(
                task="forecast",
                settings=("history=8,horizon=2",),
                source=str(tmp_path / "a.csv"),
                learning_rates=(1e-3,),
                models=("rwkv4",),
            ),
            tmp_path,
            QUIET,
        )
        assert [f.model for f in found.figures] == ["rwkv4 width 16", "zeros"]
        assert {f.name for f in found.figures} == {"mean squared error"}

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"task": "mqra"}, "no task 'mqra'; did you mean mqar"),
            ({"models": ("rwkv99",)}, "no model 'rwkv99'; there are rwkv4"),
            ({"widths": ()}, "widths is"),
            ({"learning_rates": (1e-3, 1e-3)}, "each once"),
            ({"seeds": 0}, "seeds is 0"),
            ({"beyond": (0,)}, "beyond is"),
            ({"learning_rates": (-1.0,)}, "learning_rate is -1.0"),
        ],
    )
    def test_mistakes(self, changes, message):
        with pytest.raises(ValueError, match=message):
            options(**changes)

    def test_a_damaged_outcome_is_named(self, tmp_path):
        (tmp_path / OUTCOME).write_text(json.dumps({"tested": [{}]}))
        with pytest.raises(ValueError, match="remove it to run again"):
            Outcome.load(tmp_path / OUTCOME)


class TestIntervals:
    def test_wilson(self):
        """The example of Brown, Cai and DasGupta (2001) has 0.95 intervals for 0 and n of n."""
        assert wilson(0.0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
        assert wilson(0.5, 100) == (
            pytest.approx(0.4038, abs=1e-4),
            pytest.approx(0.5962, abs=1e-4),
        )

    def test_over_seeds(self):
        def tested(value):
            return Measured(about={}, value=value, low=0, high=1, examples=5, interval="one")

        assert over_seeds([tested(0.5)]) == (0.5, 0, 1, "one")
        mean, low, high, interval = over_seeds([tested(x) for x in (0.4, 0.5, 0.6)])
        assert (mean, interval) == (pytest.approx(0.5), "95 % over 3 seeds")
        assert (high - mean, mean - low) == pytest.approx((4.302653 * 0.1 / 3**0.5,) * 2)


class TestCurves:
    @staticmethod
    def figure(model, **about) -> Figure:
        about = {"trained length": 16, "state": 1, "length": 16, **about}
        return Figure(name="accuracy", value=0.5, model=model, about=about)

    def test_numbers_that_grow_together_make_one_curve(self):
        figures = [
            self.figure("a", pairs=2, length=16),
            self.figure("a", pairs=4, length=32, **{"trained length": 32}),
        ]
        assert [(c.name, c.x) for c in curves_of(figures)] == [
            ("accuracy by length", [16.0, 32.0]),
            ("accuracy by pairs", [2.0, 4.0]),
        ]

    def test_a_grid_makes_a_curve_for_each_value_of_the_other_number(self):
        figures = [
            self.figure("a", pairs=p, length=n, **{"trained length": n})
            for p in (2, 4)
            for n in (16, 32)
        ]
        by_pairs = [c for c in curves_of(figures) if c.name == "accuracy by pairs"]
        assert [c.model for c in by_pairs] == ["a, length 16", "a, length 32"]

    def test_widths_make_a_curve_of_states(self):
        figures = [self.figure(f"a width {w}", state=10 * w) for w in (8, 4)]
        (found,) = curves_of(figures)
        assert (found.name, found.model) == ("accuracy by numbers in the state", "a")
        assert found.x == [40.0, 80.0]

    def test_another_file_is_not_drawn_over(self, tmp_path):
        pytest.importorskip("matplotlib")
        (tmp_path / "a.png").write_text("mine")
        curve = Curve(name="c", x_name="x", x=[1.0, 2.0], y_name="y", y=[0.0, 1.0], model="m")
        with pytest.raises(ValueError, match="not a PNG"):
            draw_curves([curve], tmp_path / "a")
        paths = draw_curves([curve], tmp_path / "b", chance=0.1)
        assert [path.suffix for path in paths] == [".png", ".svg"]


def transformer(**form) -> Transformer:
    vocabulary = 1 if form.get("channels") else 11
    stack = ModelConfig(vocab_size=vocabulary, width=32, num_layers=2)
    sizes = SequenceConfig(stack=stack, outputs=4, **form)
    model = Transformer(sizes, heads=2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


class TestTransformer:
    @pytest.mark.parametrize("form", [{}, {"bidirectional": True}, {"channels": 2}], ids=str)
    def test_it_has_the_budget_of_the_rwkv_stack(self, form):
        vocabulary = 1 if form.get("channels") else 11
        stack = ModelConfig(vocab_size=vocabulary, width=64, num_layers=2)
        sizes = SequenceConfig(stack=stack, outputs=4, **form)
        ours, theirs = SequenceModel(sizes).num_parameters, Transformer(sizes).num_parameters
        assert abs(ours - theirs) < 0.01 * ours
        assert matched_ffn_width(sizes) > 64

    @pytest.mark.parametrize("form", [{}, {"bidirectional": True}, {"pooling": "last"}], ids=str)
    def test_padding_changes_nothing(self, form):
        model = transformer(**form)
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(11, (n,), generator=generator) for n in (3, 8, 1)]
        alone = torch.cat([model(row[None]) for row in rows])
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=5)
        together = model(padded, lengths=torch.tensor([3, 8, 1]))
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)

    def test_it_is_causal_unless_it_reads_both_ways(self):
        tokens = torch.tensor([[1, 2, 3, 4]])
        other = torch.tensor([[1, 2, 3, 9]])
        for both, same in ((False, True), (True, False)):
            model = transformer(bidirectional=both)
            first = [model._read(model._embedded(x, None), None)[0, 0] for x in (tokens, other)]
            assert torch.equal(*first) == same

    def test_blocks_are_those_of_gpt_neox(self):
        """transformers' GPT-NeoX with the same weights gives the same features."""
        transformers = pytest.importorskip("transformers")
        ours = transformer(pooling="every")
        config = transformers.GPTNeoXConfig(
            vocab_size=11,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=ours.blocks[0].up.weight.shape[0],
            rotary_pct=1.0,
            use_parallel_residual=False,
            hidden_act="gelu",
            layer_norm_eps=1e-5,
        )
        theirs = transformers.GPTNeoXModel(config).eval()
        mine = ours.state_dict()
        found = {"embed_in.weight": mine["emb.weight"]}
        names = {
            "input_layernorm": "ln1",
            "post_attention_layernorm": "ln2",
            "attention.dense": "output",
            "mlp.dense_h_to_4h": "up",
            "mlp.dense_4h_to_h": "down",
        }
        for part in ("weight", "bias"):
            found[f"final_layer_norm.{part}"] = mine[f"ln_out.{part}"]
            for layer in range(2):
                for name, own in names.items():
                    found[f"layers.{layer}.{name}.{part}"] = mine[f"blocks.{layer}.{own}.{part}"]
                # GPT-NeoX has query, key and value of each head side by side.
                joint = mine[f"blocks.{layer}.projections.{part}"].unflatten(0, (3, 2, 16))
                found[f"layers.{layer}.attention.query_key_value.{part}"] = joint.transpose(
                    0, 1
                ).flatten(0, 2)
        missing, unexpected = theirs.load_state_dict(found, strict=False)
        assert not unexpected and all("rotary" in name or "bias" in name for name in missing)
        tokens = torch.tensor([[1, 5, 2, 9, 0, 3]])
        with torch.no_grad():
            wanted = theirs(tokens).last_hidden_state
            got = ours._read(ours._embedded(tokens, None), None)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)

    def test_rotations_keep_lengths_and_depend_on_distance(self):
        x = torch.randn(1, 1, 6, 8, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(rotated(x).norm(dim=-1), x.norm(dim=-1))
        same = x[:, :, :1].expand(-1, -1, 6, -1)
        products = rotated(same)[0, 0] @ rotated(same)[0, 0].T
        torch.testing.assert_close(products[0, 2], products[3, 5])

    def test_a_width_that_heads_do_not_divide(self):
        stack = ModelConfig(vocab_size=5, width=18, num_layers=1)
        with pytest.raises(ValueError, match="multiple of 8"):
            Transformer(SequenceConfig(stack=stack, outputs=2), heads=4)

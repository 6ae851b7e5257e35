"""Groups of the optimizer, steps, validation, and what is refused."""

import math

import numpy as np
import pytest
import torch
from tiny import TEXT, make_model, same_bits
from training_cases import SIZES, SMALL, TOKENS, everything, make_batches, make_trainer, run, small

from receptance.adapters import LoRAOptions, StateTuningOptions, make_adapter
from receptance.data import Batches
from receptance.inference.scoring import negative_log_likelihood
from receptance.model import Model
from receptance.training import Trainer, TrainOptions, make_optimizer
from receptance.training.ranks import Ranks
from receptance.training.trainer import NotFinite


def groups(**options: float) -> dict[str, dict[str, float]]:
    """The optimizer's group of each parameter, by its name."""
    model = make_model()
    scales = model.learning_rate_scales()
    optimizer = make_optimizer(model.named_parameters(), scales, TrainOptions(**options))
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)
    return {name: found[id(p)] for name, p in model.named_parameters()}


class TestOptimizer:
    def test_decay_and_bonus_learn_faster(self):
        for name, group in groups().items():
            ending = name.rpartition(".")[2]
            assert group["scale"] == {"time_decay": 2, "time_first": 3}.get(ending, 1), name

    def test_unless_that_is_switched_off(self):
        trainer = make_trainer(small(layerwise_rates=False))
        assert {group["scale"] for group in trainer.optimizer.param_groups} == {1.0}

    def test_weight_decay_is_for_matrices(self):
        matrices = ("emb", "head", "key", "value", "receptance", "output")
        for name, group in groups(weight_decay=0.1).items():
            is_matrix = name.removesuffix(".weight").rpartition(".")[2] in matrices
            assert group["weight_decay"] == (0.1 if is_matrix else 0), name

    def test_there_is_none_by_default(self):
        assert {group["weight_decay"] for group in groups().values()} == {0}

    def test_the_options_arrive(self):
        group = groups(betas=(0.8, 0.95), epsilon=1e-6)["emb.weight"]
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)


class TestSteps:
    @pytest.mark.parametrize(
        ("dtype", "more"), [("float32", {}), ("bfloat16", {"chunk": 20, "recompute": True})]
    )
    def test_a_small_text_is_learnt_by_heart(self, dtype, more):
        tokens = np.frombuffer(b"the quick brown fox jumps over it. " * 12, np.uint8)
        trainer = make_trainer(small(steps=60, dtype=dtype, context=35, **more), tokens)
        reports = run(trainer, 60)
        assert reports[0].loss > 5
        assert reports[-1].loss < 0.5
        assert trainer.finished
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        states = trainer.optimizer.state.values()
        assert {x.dtype for state in states for x in state.values()} == {torch.float32}

    def test_reports_count_steps(self):
        reports = run(make_trainer(small(steps=3)), 3)
        assert [report.step for report in reports] == [1, 2, 3]

    def test_the_loss_is_that_of_what_counts(self):
        """Without the penalties, and over the mask alone."""
        mask = (np.arange(len(TOKENS)) % 3 == 0).astype(np.uint8)
        trainer = make_trainer(small(z_loss=1.0, max_logit_penalty=1.0), mask=mask)
        batch = trainer.batches.at(0)
        assert batch.mask is not None and 0 < batch.learned < batch.targets.numel()
        logits, _ = trainer.model(batch.inputs, resets=batch.resets)
        chosen = logits[batch.mask], batch.targets[batch.mask]
        wanted = float(torch.nn.functional.cross_entropy(*chosen).detach())
        assert run(trainer, 1)[0].loss == pytest.approx(wanted, rel=1e-5)

    def test_micro_batches_and_chunks_change_nothing(self):
        plain, parts = (
            make_trainer(small(batch=5, **more)) for more in ({}, {"micro_batch": 2, "chunk": 7})
        )
        for one, other in zip(run(plain, 4), run(parts, 4), strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-5)
            assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-4)

    def test_gradients_are_clipped(self):
        """Adam divides the size of gradients out; its first average shows what it was given."""
        limited, free = make_trainer(small(clip=1e-3)), make_trainer(small(clip=0))
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
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                trainer = make_trainer(small(dropout=dropout))
                before = torch.get_rng_state()
                losses.append(run(trainer, 3))
                assert torch.equal(torch.get_rng_state(), before)
        assert losses[0] == losses[1]

    def test_dropout_differs_between_steps(self):
        """A learning rate of next to nothing and one batch: the rest is dropout."""
        rates = {"learning_rate": 1e-30, "final_learning_rate": 1e-30}
        trainer = make_trainer(small(dropout=0.2, batch=1, **rates), TOKENS[:17])
        trainer.model.load_state_dict(make_model().state_dict())
        assert len({report.loss for report in run(trainer, 4)}) == 4

    def test_the_seed_decides(self):
        one, other = (make_trainer(small(seed=seed)) for seed in (0, 1))
        assert run(one, 2) != run(other, 2)

    @pytest.mark.parametrize("workers", [0, 1, 2])
    def test_loader_workers_change_nothing(self, workers):
        trainer = make_trainer(small(loader_workers=workers))
        assert run(trainer, 6) == run(make_trainer(small()), 6)

    @pytest.mark.parametrize(
        "kind", [LoRAOptions(rank=2, dropout=0.1), StateTuningOptions(start_key=-1.0)]
    )
    def test_an_adapter_trains_and_nothing_else(self, kind):
        trainer = make_trainer(
            small(packing="single", context=70), adapter=lambda m: make_adapter(m, kind), **ENDS
        )
        model = {name: x.clone() for name, x in trainer.model.state_dict().items()}
        before = everything(trainer)
        text = TOKENS[:1000], np.ones(1000, np.uint8)
        loss = trainer.validate_examples(*text)
        assert loss is not None
        run(trainer, 20)
        assert same_bits(trainer.model.state_dict(), model)
        after = everything(trainer)
        assert all(not torch.equal(before[name], after[name]) for name in before)
        assert {name.rpartition("/")[0] for name in after} - {""} == trainer.parameters.keys()
        assert trainer.validate_examples(*text) < loss


# Lines are documents, closed by the line feed.
ENDS = {"end_of_text": 10}


def break_loss(trainer: Trainer) -> None:
    torch.nn.init.constant_(trainer.model.head.weight, math.nan)


def break_gradient(trainer: Trainer) -> None:
    """A loss that is finite, with a gradient that is not."""
    trainer.model.ln_out.weight.register_hook(lambda gradient: gradient * math.nan)


class TestNotANumber:
    @pytest.mark.parametrize(
        ("damage", "what"), [(break_loss, "loss is nan"), (break_gradient, "gradient norm is nan")]
    )
    @pytest.mark.parametrize("steps", [0, 3])
    def test_it_stops_before_the_update(self, damage, what, steps):
        trainer = make_trainer(small(steps=10, dropout=0.1))
        run(trainer, steps)
        damage(trainer)
        before = everything(trainer)
        with pytest.raises(NotFinite, match=rf"^{what} at step {steps + 1}$") as e:
            trainer.run_step()
        assert trainer.step == steps
        after = everything(trainer)
        assert before.keys() == after.keys()
        assert all(torch.equal(x.nan_to_num(), after[n].nan_to_num()) for n, x in before.items())
        assert torch.equal(e.value.batch.inputs, trainer.batches.at(steps).inputs)

    def test_it_leaves_no_trace(self):
        """As if the failed attempt had not been."""
        trainer, undisturbed = (make_trainer(small(dropout=0.1)) for _ in range(2))
        run(trainer, 2)
        run(undisturbed, 2)
        handle = trainer.model.ln_out.weight.register_hook(lambda gradient: gradient * math.nan)
        with pytest.raises(NotFinite):
            trainer.run_step()
        handle.remove()
        assert run(trainer, 3) == run(undisturbed, 3)
        assert same_bits(everything(trainer), everything(undisturbed))

    def test_infinite_weights_are_found(self):
        trainer = make_trainer(small())
        torch.nn.init.constant_(trainer.model.ln_out.weight, 1e38)
        with pytest.raises(NotFinite, match=r"at step 1$"):
            trainer.run_step()


class TestValidation:
    @pytest.mark.parametrize("length", [0, 1, 300, 3000])
    def test_it_is_the_likelihood_of_the_text(self, length):
        trainer = make_trainer(small(dropout=0.3, max_logit_penalty=1.0))
        trainer.model.load_state_dict(make_model().state_dict())
        wanted = negative_log_likelihood(trainer.model, TOKENS[:length])
        assert trainer.validate(TOKENS[:length]) == pytest.approx(wanted, rel=1e-5)

    @pytest.mark.parametrize(
        ("packing", "kind"),  # a learned first state and resets exclude each other
        [("whole", None), ("single", None), ("single", StateTuningOptions(start_key=-1.0))],
    )
    def test_examples_are_read_as_training_reads_them(self, packing, kind):
        """Each from where training begins; what is not to be learned does not count."""
        adapter = None if kind is None else lambda model: make_adapter(model, kind)
        options = small(dropout=0.3, packing=packing, context=150)
        trainer = make_trainer(options, adapter=adapter, **ENDS)
        trainer.model.load_state_dict(make_model().state_dict())
        lines = TEXT.encode().splitlines(keepends=True)[:9]
        tokens = np.frombuffer(b"".join(lines), np.uint8)
        mask = np.concatenate([np.arange(len(line)) % 2 for line in lines]).astype(np.uint8)
        first = None if trainer.adapter is None else trainer.adapter.initial_state(1)
        nats = count = 0.0
        for line in lines:
            ids = torch.tensor([list(line)])
            logits, _ = trainer.model.eval()(ids[:, :-1], first)
            chosen = torch.arange(1, len(line)) % 2 == 1
            losses = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="none")
            nats, count = nats + float(losses[chosen].sum().detach()), count + int(chosen.sum())
        assert trainer.validate_examples(tokens, mask) == pytest.approx(nats / count, rel=1e-5)

    @pytest.mark.parametrize("packing", ["stream", "reset", "whole"])
    def test_examples_shorter_than_a_row(self, packing):
        """Of three tokens two are predicted; where none is, there is no figure."""
        trainer = make_trainer(small(packing=packing), **ENDS)
        tokens, mask = TOKENS[:3], np.array([1, 1, 0], np.uint8)
        ids = torch.from_numpy(tokens[None].astype(np.int64))
        logits, _ = trainer.model.eval()(ids[:, :1])
        wanted = float(torch.nn.functional.cross_entropy(logits[:, 0].detach(), ids[:, 1]))
        assert trainer.validate_examples(tokens, mask) == pytest.approx(wanted, rel=1e-5)
        assert trainer.validate_examples(tokens, 0 * mask) is None
        assert all(trainer.validate_examples(tokens[:n], mask[:n]) is None for n in (0, 1))

    def test_it_leaves_training_as_it_was(self):
        trainer, undisturbed = (make_trainer(small(dropout=0.2)) for _ in range(2))
        trainer.validate(TOKENS[:100])
        assert run(trainer, 2) == run(undisturbed, 2)


def test_fewer_rows_than_processes_are_refused():
    options = TrainOptions(**SMALL)
    batches = Batches(TOKENS, context=16, batch=2, seed=0)
    with pytest.raises(ValueError, match="batch is 2, fewer rows than the 3 processes"):
        Trainer(Model(SIZES), batches, options, ranks=Ranks(0, 3))


@pytest.mark.parametrize("sizes", [{"batch": 4}, {"context": 8}])
def test_batches_of_other_sizes_are_refused(sizes):
    """They would be cut to the batch that the options name, and the loss with them."""
    options = TrainOptions(**SMALL)
    batches = Batches(TOKENS, **({"context": 16, "batch": options.batch, "seed": 0} | sizes))
    with pytest.raises(ValueError, match=r"the batches have .* make both from the same numbers"):
        Trainer(Model(SIZES), batches, options)


class TestAdapters:
    def test_one_that_is_not_attached_is_refused(self):
        model, options = make_model(), small()
        adapter = make_adapter(model, LoRAOptions())
        with pytest.raises(ValueError, match=r"adapter is not attached; call adapter\.attach"):
            Trainer(model, make_batches(options), options, adapter=adapter)

    def test_one_that_is_attached_and_not_named_is_refused(self):
        model, options = make_model(), small()
        with (
            make_adapter(model, LoRAOptions()).attach(model),
            pytest.raises(ValueError, match="if an adapter is attached, pass adapter="),
        ):
            Trainer(model, make_batches(options), options)

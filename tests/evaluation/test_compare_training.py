"""The loop that trains every architecture: the Trainer's steps, the same tokens, resumed runs."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from compare_cases import SMALL, TOKENIZER, corpus, job, small
from tiny import TEXT

from receptance import Model
from receptance.data import Batches
from receptance.evaluation.compare import training
from receptance.evaluation.compare.families import RWKV
from receptance.evaluation.compare.runs import Record
from receptance.evaluation.compare.table import FAMILIES, family
from receptance.evaluation.compare.training import (
    HeldOut,
    Stopped,
    Training,
    run_job,
    steps_done,
)
from receptance.inference.scoring import negative_log_likelihood
from receptance.training import Trainer, learning_rate

MODELS = ("rwkv4", "neox", "llama")
CPU = torch.device("cpu")


def begun(model: str, **changes: object) -> Training:
    return Training(job(model, small(**changes)), corpus(), TOKENIZER, CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rwkv_learns_as_the_trainer_would(dtype):
    """The oracle is the package's own trainer, with its own batches, schedule and clipping."""
    ours = begun("rwkv4", dtype=dtype)
    about = ours.job.train
    tokens = corpus().train
    batches = Batches(tokens, context=about.context, batch=about.batch, seed=0, packing="stream")
    config = RWKV(4).config(job("rwkv4").shape)
    model = Model(config, seed=about.seed, embedding_bound=about.rates[0])
    trainer = Trainer(model, batches, about)
    for _ in range(about.total_steps):
        assert ours.run_step() == trainer.run_step().loss
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, ours.parameters[name]), name


@pytest.mark.parametrize("name", ["neox", "llama"])
def test_a_transformer_gets_the_gradients_of_its_own_library(name):
    about = job(name, small(max_logit_penalty=0.0, clip=0.0))
    ours, other = (Training(about, corpus(), TOKENIZER, CPU) for _ in range(2))
    batch = other.batches.at(0)
    # The library shifts labels by one position itself.
    tokens = torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1)
    loss = other.model(tokens, labels=tokens).loss
    loss.backward()
    assert ours.run_step() == pytest.approx(float(loss.detach()), rel=1e-5)
    for key, parameter in other.parameters.items():
        torch.testing.assert_close(ours.parameters[key].grad, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_for_activations_in_training_alone(name):
    exact, narrow = begun(name), begun(name, dtype="bfloat16")
    seen = set()
    for module in narrow.model.modules():
        if hasattr(module, "weight") and not isinstance(module, torch.nn.Embedding):
            module.register_forward_hook(lambda *found: seen.add(found[-1].dtype))
    assert narrow.run_step() == pytest.approx(exact.run_step(), rel=1e-2)
    assert seen == {torch.bfloat16}
    for parameter in narrow.parameters.values():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()
    gradients = [
        torch.cat([p.grad.flatten() for p in run.parameters.values()]) for run in (exact, narrow)
    ]
    assert not torch.equal(*gradients)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999
    with torch.no_grad():
        for key, parameter in exact.parameters.items():
            parameter.copy_(narrow.parameters[key])
    one, other = (run.held_out.nats(run.objective, CPU, 2) for run in (exact, narrow))
    assert one == other
    assert narrow.objective.dtype == torch.bfloat16


@pytest.mark.parametrize("name", MODELS)
def test_the_learning_rate_is_that_of_the_schedule(name):
    run = begun(name, warmup_share=0.3)
    for step in range(run.job.train.total_steps):
        run.run_step()
        rate = learning_rate(step, run.job.train)
        assert {group["lr"] / group["scale"] for group in run.optimizer.param_groups} == {rate}
    assert rate == pytest.approx(1e-3)


def test_all_architectures_read_the_same_tokens_in_the_same_order():
    digests = {}
    for name in MODELS:
        run = begun(name, tokens=(192,))
        while run.step < run.job.train.total_steps:
            run.run_step()
        digests[name] = run.digest
    assert len(set(digests.values())) == 1
    # And these are the tokens of the corpus, in the order that the seed makes of them.
    wanted = ""
    for step in range(3):
        chain = hashlib.sha256(wanted.encode())
        batch = run.batches.at(step)
        for tensor in (batch.inputs, batch.targets):
            chain.update(tensor.numpy().astype(np.int64).tobytes())
        wanted = chain.hexdigest()
    assert digests["neox"] == wanted


def test_another_seed_is_another_order_and_other_weights():
    one, other = (Training(job("llama", seed=n), corpus(), TOKENIZER, CPU) for n in (0, 1))
    one.run_step(), other.run_step()
    assert one.digest != other.digest
    names = [name for name, x in one.parameters.items() if x.dim() == 2]
    assert not any(torch.equal(one.parameters[n], other.parameters[n]) for n in names)


@pytest.mark.parametrize("name", ["neox", "llama"])
def test_making_a_transformer_draws_from_its_own_generator(name):
    before = torch.get_rng_state()
    family(name).objective(job(name).shape, job(name).train)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", MODELS)
def test_a_resumed_run_is_the_undisturbed_one(name, tmp_path):
    whole = run_job(job(name), corpus(), TOKENIZER, tmp_path / "whole")
    looks = iter([False] * 5 + [True])
    with pytest.raises(Stopped):
        run_job(job(name), corpus(), TOKENIZER, tmp_path / "cut", stop=lambda: next(looks))
    assert list((tmp_path / "cut/runs").glob("*.safetensors"))
    again = run_job(job(name), corpus(), TOKENIZER, tmp_path / "cut")
    assert same(again) == same(whole)
    assert not list((tmp_path / "cut/runs").glob("*.safetensors"))
    saved = [sorted((tmp_path / n / "models").rglob("*.safetensors")) for n in ("whole", "cut")]
    assert [x.read_bytes() for x in saved[0]] == [x.read_bytes() for x in saved[1]] != []


def same(record: Record) -> dict:
    """A record without its times."""
    points = [dataclasses.replace(point, seconds=0.0) for point in record.points]
    return dataclasses.asdict(dataclasses.replace(record, seconds=0.0, points=points))


def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch):
    first = run_job(job("llama"), corpus(), TOKENIZER, tmp_path)
    monkeypatch.setattr(training, "Training", None)
    assert run_job(job("llama"), corpus(), TOKENIZER, tmp_path) == first


def test_a_run_of_other_options_is_not_taken_for_this_one(tmp_path):
    run_job(job("llama"), corpus(), TOKENIZER, tmp_path)
    other = job("llama", small(tokens=(1280,)))
    with pytest.raises(ValueError, match="was made with steps 10, not 20"):
        run_job(other, corpus(), TOKENIZER, tmp_path)


def test_a_saved_run_of_other_options_is_not_continued(tmp_path):
    looks = iter([False] * 3 + [True])
    with pytest.raises(Stopped):
        run_job(job("llama"), corpus(), TOKENIZER, tmp_path, stop=lambda: next(looks))
    with pytest.raises(ValueError, match="belongs to another run"):
        run_job(job("llama", small(clip=0.5)), corpus(), TOKENIZER, tmp_path)


def test_a_damaged_file_of_a_run_is_named(tmp_path):
    (tmp_path / "runs").mkdir()
    file = tmp_path / "runs" / f"{job('llama').name}.safetensors"
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"safetensors is damaged .*; delete it to begin again"):
        run_job(job("llama"), corpus(), TOKENIZER, tmp_path)


def test_a_full_disk_does_not_end_a_run(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "_SAVE_SECONDS", -1.0)
    monkeypatch.setattr(Training, "save", lambda self, path: full(path))
    with pytest.warns(UserWarning, match="No space left on device; the run goes on"):
        record = run_job(job("llama"), corpus(), TOKENIZER, tmp_path)
    assert len(record.points) == 2


def test_the_text_that_is_held_out_is_read_once_and_each_window_from_nothing():
    held = HeldOut(corpus(), TOKENIZER, 16, 200)
    assert held.text.tolist() == corpus().validation[:193].tolist()
    # Each target is counted once: all bytes but the first of the text.
    assert sum(held.byte_counts) == 192
    run = begun("rwkv4")
    wanted = [
        negative_log_likelihood(run.model, held.text[at + 1 : at + 17], start=int(held.text[at]))
        for at in range(0, 192, 16)
    ]
    found = held.nats(run.objective, CPU, len(held.pieces))
    assert len(found) == len(held.pieces) == 12
    assert found == pytest.approx(wanted, rel=1e-5)


def test_text_that_is_too_short_to_be_held_out_is_refused():
    with pytest.raises(ValueError, match="not one context of 5000"):
        HeldOut(corpus(), TOKENIZER, 5000, 1 << 20)


def test_ends_of_documents_are_predicted_and_have_no_bytes():
    text = TEXT.replace("\n", "\0")
    held = HeldOut(corpus(text), TOKENIZER, 16, 160)
    assert sum(held.byte_counts) == np.count_nonzero(held.text[1:])


def test_a_run_that_diverges_is_recorded_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(torch.nan))
    record = run_job(job("neox"), corpus(), TOKENIZER, tmp_path)
    assert record.diverged == 1 and record.bits_per_byte == float("inf")
    assert Record.load(tmp_path / "runs" / f"{record.name}.json") == record


def test_steps_are_told_while_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_SHOW_SECONDS", -1.0)
    looks = iter([False] * 4 + [True])
    assert steps_done(tmp_path, job("llama")) == 0
    with pytest.raises(Stopped):
        run_job(job("llama"), corpus(), TOKENIZER, tmp_path, stop=lambda: next(looks))
    assert steps_done(tmp_path, job("llama")) == 3


# Every run of 64 letters has only 4 of the 16 that there are: to know which, a model has to look
# further back than the shift of RWKV's channel mixing, which is a single token.
_RNG = np.random.default_rng(3)
RUNS = "".join(
    letter
    for _ in range(100)
    for letter in _RNG.choice(_RNG.choice(list("abcdefghijklmnop"), 4, replace=False), 64)
)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_without_its_mixing_a_model_loses(name):
    options = small(sizes=("32x1",), tokens=(150 * 8 * 16,), batch=8, points=1, held_out=400)
    losses = []
    for mixing in (True, False):
        run = Training(job(name, options, rate=3e-2), corpus(RUNS), TOKENIZER, CPU)
        if not mixing:
            for part in run.model.modules():
                if type(part).__name__ in ("TimeMix", "GPTNeoXAttention", "LlamaAttention"):
                    part.register_forward_hook(silenced)
        while run.step < run.job.train.total_steps:
            run.run_step()
        losses.append(run.record().bits_per_byte)
    assert losses[0] < losses[1] - 0.1


def silenced(module, inputs, outputs):
    """The outputs of a module that mixes tokens, with nothing in what it adds to the stream."""
    return torch.zeros_like(outputs[0]), *outputs[1:]


def test_all_versions_of_rwkv_can_be_trained():
    for name in FAMILIES:
        if name.startswith("rwkv"):
            assert begun(name, models=(name,)).run_step() > 0


def test_the_first_losses_are_those_of_guessing():
    """Whatever its starting values are, a new model knows nothing."""
    for name in MODELS:
        assert begun(name, tokens=SMALL.tokens).run_step() == pytest.approx(np.log(256), rel=0.15)

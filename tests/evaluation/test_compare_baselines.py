"""Transformers: starting values, and models that are saved and run as their library runs them."""

from __future__ import annotations

import math

import pytest
import torch
from compare_cases import TOKENIZER, job, small

from receptance import Model
from receptance.evaluation.compare import costs
from receptance.evaluation.compare.costs import Cost, Costs, Measurement, measure
from receptance.evaluation.compare.families import Shape
from receptance.evaluation.compare.table import family
from receptance.training import TrainOptions

BASELINES = ("neox", "llama")
SHAPE = Shape(vocab_size=256, width=64, layers=2, ffn_width=96)
PROMPT = torch.arange(1, 20) * 7 % 256


@pytest.mark.parametrize("name", BASELINES)
def test_starting_values_have_the_deviations_that_the_docstrings_name(name):
    which = family(name)
    model = which.model(which.objective(SHAPE, TrainOptions()))
    small, output = 0.02, 0.02
    if name == "neox":
        small, output = math.sqrt(2 / (5 * 64)), 2 / (2 * math.sqrt(64))
    outputs = 0
    for key, parameter in model.named_parameters():
        if parameter.dim() == 2:
            ends = key.endswith(("dense.weight", "dense_4h_to_h.weight", "o_proj.weight"))
            ends = ends or key.endswith("down_proj.weight")
            outputs += ends
            assert float(parameter.detach().std()) == pytest.approx(
                output if ends else small, rel=0.05
            )
        else:
            wanted = 0.0 if key.endswith("bias") else 1.0
            assert bool((parameter == wanted).all()), key
    assert outputs == 2 * SHAPE.layers


@pytest.fixture(params=["rwkv4", *BASELINES])
def saved(request, tmp_path):
    """An architecture, a model of it, and the folder in which it was saved."""
    which = family(request.param)
    model = which.model(which.objective(job(which.name).shape, TrainOptions())).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    which.save(model, tmp_path / "model", TOKENIZER)
    return which, model, tmp_path / "model"


@torch.no_grad()
def next_tokens(model, count: int) -> list[int]:
    """The most likely tokens after the prompt, by reading everything anew for each of them."""
    ids = PROMPT
    for _ in range(count):
        found = model(ids[None])
        logits = found[0] if isinstance(model, Model) else found.logits
        ids = torch.cat([ids, logits[0, -1].argmax()[None]])
    return ids[len(PROMPT) :].tolist()


def test_a_decoder_generates_what_the_model_says_about_the_whole_text(saved):
    which, model, folder = saved
    decoder = which.decoder(folder)
    decoder.read(PROMPT[:5])
    decoder.read(PROMPT[5:])
    found = []
    for _ in range(6):
        found.append(int(decoder.next))
        decoder.step()
    assert found == next_tokens(model, 6)


def test_a_state_stays_as_it_is_and_a_cache_grows(saved):
    which, _, folder = saved
    decoder = which.decoder(folder)
    decoder.read(PROMPT)
    first = sum(x.nbytes for x in decoder.remembered)
    decoder.step()
    shape = job(which.name).shape
    each = 0 if which.name == "rwkv4" else 2 * shape.layers * shape.width * 4
    assert sum(x.nbytes for x in decoder.remembered) - first == each
    assert first == (5 * shape.layers * shape.width * 4 if each == 0 else each * len(PROMPT))


@pytest.mark.parametrize("name", BASELINES)
def test_transformers_opens_what_is_saved(name, tmp_path):
    from transformers import AutoModelForCausalLM

    which = family(name)
    model = which.model(which.objective(job(name).shape, TrainOptions())).eval()
    which.save(model, tmp_path, TOKENIZER)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(model(PROMPT[None]).logits, again(PROMPT[None]).logits)


def test_costs_are_measured_at_all_contexts_in_ascending_order(saved):
    which, _, folder = saved
    work = Measurement(folder, which.name, job(which.name).shape, small(contexts=(40, 4)))
    found = measure(work)
    assert found.step > 0
    first, second = found.generation
    assert (first.context, second.context) == (4, 40)
    assert first.seconds > 0 and second.seconds > 0
    assert second.remembered == (1 if which.name == "rwkv4" else 10) * first.remembered


def test_costs_are_kept(tmp_path):
    known = Costs(step=2.0, generation=[Cost(context=4, seconds=0.5, remembered=7, resident=None)])
    assert costs.stored(tmp_path, "a", (4,)) is None
    costs.store(tmp_path, "a", known)
    assert costs.stored(tmp_path, "a", (4,)) == known
    assert costs.stored(tmp_path, "a", (4, 8)) is None
    (tmp_path / "costs/a.json").write_text("{")
    with pytest.raises(ValueError, match="delete it to measure again"):
        costs.stored(tmp_path, "a", (4,))

"""lm-evaluation-harness asks the server, and gets the model's own log-likelihoods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TEXT

pytestmark = pytest.mark.slow

PAIRS = [
    ("3 little foxes jump over", " 9 lazy dogs"),
    ("3 little foxes jump over", " 8 lazy dogs"),
    ("", "a text without a beginning"),
    ("naïvely", " — 狐."),
]


CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITTEN = """
task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{written}}}}"
generation_kwargs: {{until: ["\\n", "e"], max_gen_toks: 12, do_sample: false, temperature: 0.0}}
metric_list: [{{metric: exact_match}}]
"""
DOCUMENTS = 12


@pytest.fixture
def harness(running, monkeypatch) -> Any:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    pytest.importorskip("tenacity", reason="the extra api of lm_eval is not installed")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        model="tiny",
        base_url=f"{running.url}/v1/completions",
        tokenizer_backend="remote",
        batch_size=2,
        max_retries=1,
    )


def test_log_likelihoods_are_those_of_the_model(harness, running):
    from lm_eval.api.instance import Instance

    served = running.app.models.sources["tiny"].served
    tokenizer = served.tokenizer
    requests = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(PAIRS)]
    found = harness.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        before = tokenizer.encode(context) or [tokenizer.end_of_text]
        if context:
            ids = tokenizer.encode(context + continuation)
        else:
            ids = [*before, *tokenizer.encode(continuation)]
        start = len(before)
        with torch.no_grad():
            logits, _ = served.engine(torch.tensor([ids]))
        scores = logits[0, start - 1 : -1].log_softmax(-1)
        own = torch.tensor(ids[start:])
        wanted = float(scores.gather(1, own[:, None]).sum())
        assert value == pytest.approx(wanted, abs=1e-3)
        assert greedy == bool((scores.argmax(-1) == own).all())


def test_whole_tasks_have_the_scores_of_evaluate(harness, running, tmp_path):
    """A task of choices and one of written answers, half of which are the model's own."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from receptance.evaluation.benchmarks.harness import run_tasks
    from receptance.evaluation.benchmarks.tasks import TaskOptions

    served = running.app.models.sources["tiny"].served
    options = TaskOptions(tasks=("choices", "written"), include_path=(tmp_path,))
    _write_tasks(tmp_path, [""] * DOCUMENTS)
    samples = run_tasks(served.engine, served.tokenizer, options).results["samples"]
    said = [sample["filtered_resps"][0] for sample in samples["written"]]
    assert len(set(said)) > 3
    _write_tasks(tmp_path, [text if n % 2 else f"{text}?" for n, text in enumerate(said)])

    wanted = run_tasks(served.engine, served.tokenizer, options).results
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(harness, tasks=["choices", "written"], task_manager=manager)
    for task, metrics in (("choices", ("acc", "acc_norm")), ("written", ("exact_match",))):
        for metric in metrics:
            value = found["results"][task][f"{metric},none"]
            assert value == wanted["results"][task][f"{metric},none"]
            assert 0 < value < 1  # else equality would say little
    for one, other in zip(found["samples"]["choices"], wanted["samples"]["choices"], strict=True):
        for (value, greedy), (own, own_greedy) in zip(
            one["filtered_resps"], other["filtered_resps"], strict=True
        ):
            assert value == pytest.approx(own, abs=1e-3) and greedy == own_greedy
    assert [s["filtered_resps"] for s in found["samples"]["written"]] == [[text] for text in said]


def _write_tasks(folder: Path, written: list[str]) -> None:
    rows = []
    for number, text in enumerate(written):
        question = f"{TEXT[9 * number : 9 * number + 20]} {number}"
        choices = [" jump", " over 9 dogs", "狐", "\nand then"][: 2 + number % 3]
        row = {"question": question, "choices": choices, "answer": number % 2, "written": text}
        rows.append(json.dumps(row))
    data = folder / f"{len(list(folder.iterdir()))}.jsonl"  # data sets are kept by their names
    data.write_text("\n".join(rows))
    for name, task in (("choices", CHOICES), ("written", WRITTEN)):
        (folder / f"{name}.yaml").write_text(task.format(rows=data))

"""lm-evaluation-harness asks the server, and gets the model's own log-likelihoods."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

PAIRS = [
    ("3 little foxes jump over", " 9 lazy dogs"),
    ("3 little foxes jump over", " 8 lazy dogs"),
    ("", "a text without a beginning"),
    ("naïvely", " — 狐."),
]


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

"""The harness's own HFLM as an oracle: the same requests to the same weights, one by one.

Its pitfalls, avoided here: it pads on the right, which leaves causal results alone; transformers'
RWKV rewrites its weights in an evaluation unless rescale_every is 0; a continuation without tokens
ends it with an assertion.
"""

from __future__ import annotations

import numpy as np
import pytest
from tiny import TEXT, small_bpe

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

from lm_eval.api.instance import Instance
from parity_cases import VOCABULARY, hf_lm, neox_pair, rwkv_pair

from receptance.evaluation.benchmarks.answers import Answers
from receptance.evaluation.benchmarks.harness import EngineLM

pytestmark = pytest.mark.slow

BOUND = 1e-4
WINDOW = 24
END = "<|endoftext|>"

PAIRS = [
    ("", " 12 little foxes"),
    ("", END + " jump over"),
    ("", "\n lazy dogs"),
    ("12 little foxes jump over", " 144 lazy dogs"),
    ("12 little foxes jump over ", "144 lazy dogs"),
    ("12 little foxes jump over   ", " 144"),
    ("12 little foxes jump over\n\n", "naïvely"),
    ("foxes naïvely — ", "狐狐"),
    ("foxes naïvely —", " 狐.\n"),
    ("12 little foxes" + END, END),
    (END, "12 little foxes"),
    *((TEXT[:300], choice) for choice in (" lazy", " dogs", " dog", " lazy dogs", "\n", " 狐")),
    *((TEXT[:290], choice) for choice in (" lazy", " dogs and more of them")),
    (TEXT[:3], TEXT[3:60]),
    (TEXT[:300], " lazy"),
]
TEXTS = ["", "fox", TEXT[:40], TEXT[:700], "狐狐狐 — naïvely", " ", END]


@pytest.fixture(scope="module", params=["rwkv", "neox"])
def pair(request, tmp_path_factory):
    """An engine, the harness's class over the same weights, and one with short windows."""
    folder = tmp_path_factory.mktemp("pair")
    ours, theirs = rwkv_pair(folder) if request.param == "rwkv" else neox_pair()
    return ours, hf_lm(theirs, folder, max_length=480), hf_lm(theirs, folder, max_length=WINDOW)


def ours(engine, **options) -> EngineLM:
    return EngineLM(Answers(engine, small_bpe(VOCABULARY), **options))


def instances(kind: str, arguments) -> list[Instance]:
    return [
        Instance(kind, {}, each if isinstance(each, tuple) else (each,), number, ("t", number, 1))
        for number, each in enumerate(arguments)
    ]


def test_log_likelihoods(pair):
    engine, theirs, _ = pair
    requests = instances("loglikelihood", PAIRS)
    found, wanted = ours(engine).loglikelihood(requests), theirs.loglikelihood(requests)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in wanted], atol=BOUND, rtol=1e-6)


def test_log_likelihoods_in_windows(pair):
    engine, _, theirs = pair
    fitting = [each for each in PAIRS if len(small_bpe(VOCABULARY).encode(each[1])) < WINDOW]
    requests = instances("loglikelihood", fitting)
    assert any(len(small_bpe(VOCABULARY).encode("".join(each))) > WINDOW + 1 for each in fitting)
    found = ours(engine, max_length=WINDOW).loglikelihood(requests)
    wanted = theirs.loglikelihood(requests)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in wanted], atol=BOUND, rtol=1e-6)


def test_whole_texts(pair):
    engine, theirs, short = pair
    requests = instances("loglikelihood_rolling", [text for text in TEXTS if text])
    for model, length in ((theirs, None), (short, WINDOW)):
        found = ours(engine, max_length=length).loglikelihood_rolling(requests)
        wanted = model.loglikelihood_rolling(requests)
        if length is None:
            # Their windows begin anew after 480 tokens, so longer texts are not compared.
            lengths = [len(small_bpe(VOCABULARY).encode(r.args[0])) for r in requests]
            kept = [i for i, count in enumerate(lengths) if count <= 480]
            found, wanted = [found[i] for i in kept], [wanted[i] for i in kept]
        np.testing.assert_allclose(found, wanted, atol=BOUND, rtol=1e-6)


def test_greedy_continuations(pair):
    engine, theirs, _ = pair
    arguments = {"until": ["\n", "dog"], "max_gen_toks": 12, "do_sample": False}
    texts = [TEXT[:50], "12 little", TEXT[:90], "foxes —"]
    requests = instances("generate_until", [(text, arguments) for text in texts])
    # One row at a time: a batch of transformers' RWKV would read its padding.
    theirs.batch_size_per_gpu = 1
    assert ours(engine).generate_until(requests) == theirs.generate_until(requests)

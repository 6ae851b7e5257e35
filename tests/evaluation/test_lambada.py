"""LAMBADA: cut where the harness cuts it, by three protocols, resumed without loss."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import TEXT, make_model, small_bpe

from receptance.evaluation.benchmarks.lambada import figures, read_lambada, score_lambada
from receptance.evaluation.benchmarks.prefixes import PREFIXES, encode_pair, prefix_ids
from receptance.evaluation.journal import Journal

TOKENIZER = small_bpe(300)
MODEL = make_model(300)


@pytest.fixture
def file(tmp_path):
    lines = [TEXT[start : start + 60].strip() for start in range(0, 600, 60)]
    path = tmp_path / "lambada.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_score_of_each_word_is_that_of_the_model(file, prefix):
    examples = read_lambada(file)
    found = score_lambada(MODEL, TOKENIZER, examples, prefix)
    for (context, word), score in zip(examples, found, strict=True):
        before, after = encode_pair(TOKENIZER, context, word)
        ids = torch.tensor([*prefix_ids(prefix, TOKENIZER), *before, *after])
        with torch.no_grad():
            logits = MODEL(ids[None, :-1])[0][0, -len(after) :]
        targets = torch.tensor(after)
        wanted = logits.log_softmax(-1)[torch.arange(len(after)), targets].sum()
        assert score.log_probability == pytest.approx(float(wanted), abs=1e-4)
        assert score.greedy == bool((logits.argmax(-1) == targets).all())


def test_protocols_differ(file):
    examples = read_lambada(file)
    found = [score_lambada(MODEL, TOKENIZER, examples, prefix) for prefix in PREFIXES]
    assert len({tuple(score.log_probability for score in each) for each in found}) == 3


def test_figures_say_the_protocol_and_follow_the_harness(file):
    pytest.importorskip("lm_eval")
    from lm_eval.api.metrics import perplexity

    scores = score_lambada(MODEL, TOKENIZER, read_lambada(file), "newline")
    found = {each.name: each for each in figures(scores, "newline", "m")}
    wanted = perplexity([score.log_probability for score in scores])
    assert found["perplexity"].value == pytest.approx(wanted)
    assert found["accuracy"].value == 100 * sum(score.greedy for score in scores) / len(scores)
    assert all(each.about["prefix"] == "newline" for each in found.values())


def test_texts_are_cut_at_the_last_space(file):
    assert read_lambada(file)[0] == tuple(part for part in _cut(TEXT[:60].strip()))
    assert len(read_lambada(file, limit=3)) == 3


def _cut(text: str) -> tuple[str, str]:
    words = text.split(" ")
    return " ".join(words[:-1]), " " + words[-1]


def test_kept_scores_are_not_computed_again(file, tmp_path):
    examples, wanted = read_lambada(file), None
    for limit in (4, None):
        with Journal(tmp_path / "journal", {"of": "lambada"}) as journal:
            told = []
            found = score_lambada(
                MODEL,
                TOKENIZER,
                examples[:limit],
                "none",
                journal=journal,
                progress=lambda done, total, told=told: told.append(total),
            )
        assert wanted is None or found[:4] == wanted
        wanted = found[:4]
    fresh = []
    score_lambada(MODEL, TOKENIZER, examples, "none", progress=lambda d, total: fresh.append(total))
    assert told[0] < fresh[0]


@pytest.mark.parametrize("line", ["{", '{"txt": "a b"}', '{"text": 3}', '{"text": "word"}', "[]"])
def test_a_bad_line_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "a b"}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2"):
        read_lambada(tmp_path / "a.jsonl")


def test_no_file_and_no_examples(tmp_path):
    with pytest.raises(ValueError, match="no file"):
        read_lambada(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no examples"):
        read_lambada(tmp_path / "a.jsonl")


def test_an_unknown_prefix_is_refused():
    with pytest.raises(ValueError, match="one of none, newline, token-0"):
        prefix_ids("bos", TOKENIZER)

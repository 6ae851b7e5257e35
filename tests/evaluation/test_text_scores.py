"""Scores of texts: against the model and the harness's formulas, interrupted and resumed."""

from __future__ import annotations

import contextlib
import gzip
import json
import math

import numpy as np
import pytest
import torch
from tiny import TEXT, make_model, small_bpe

from receptance.evaluation.journal import Journal
from receptance.evaluation.texts import enwik8, scoring, text
from receptance.evaluation.texts.documents import describe, encoded, find_files, read_documents
from receptance.evaluation.texts.positions import Positions
from receptance.evaluation.texts.text import TextOptions
from receptance.tokenizer import ByteTokenizer

TOKENIZER = small_bpe(300)
MODEL = make_model(300)
TEXTS = [TEXT[:900], "fox", TEXT[100:2500], "狐 — naïve", TEXT[:20]]


def nats(content: str) -> float:
    ids = torch.tensor([TOKENIZER.end_of_text, *TOKENIZER.encode(content)])
    with torch.no_grad():
        logits = MODEL(ids[None, :-1])[0][0]
    return -float(logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]].double().sum())


@pytest.fixture
def files(tmp_path):
    """The texts as lines of JSON, with an empty one that does not count."""
    lines = [json.dumps({"text": each}) for each in [TEXTS[0], "", *TEXTS[1:]]]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    return find_files([str(tmp_path / "texts.jsonl")])


def scores(files, options=TextOptions(), **more) -> scoring.Scores:  # noqa: B008
    return scoring.score(
        MODEL,
        read_documents(files, TOKENIZER),
        lambda document: options.passages(document, TOKENIZER.end_of_text),
        **more,
    )


class TestFigures:
    def test_each_document_has_the_loss_of_the_model(self, files):
        found = scores(files)
        np.testing.assert_allclose(found.nats, [nats(each) for each in TEXTS], rtol=1e-5)
        assert found.bytes == [len(each.encode()) for each in TEXTS]
        assert found.characters == [len(each) for each in TEXTS]

    def test_figures_are_those_of_the_harness(self, files):
        metrics = pytest.importorskip("lm_eval.api.metrics")
        found = scores(files)
        values = {each.name: each.value for each in text.figures(found, "m")}
        pairs = list(zip(-found.nats, found.bytes, strict=True))
        words = list(zip(-found.nats, [len(each.split()) for each in TEXTS], strict=True))
        assert values["bits per byte"] == pytest.approx(metrics.bits_per_byte(pairs))
        # The harness counts an empty word behind a last white space.
        assert values["perplexity per word"] == pytest.approx(
            metrics.weighted_perplexity(words), rel=0.1
        )
        tokens = sum(len(TOKENIZER.encode(each)) for each in TEXTS)
        assert values["perplexity per token"] == pytest.approx(math.exp(found.nats.sum() / tokens))

    def test_windows_cost_context(self, files):
        whole, short = scores(files), scores(files, TextOptions(max_length=8))
        assert short.tokens == whole.tokens
        assert short.nats[1] == pytest.approx(whole.nats[1], rel=1e-5)  # It fits one window.
        assert short.nats[0] != pytest.approx(whole.nats[0], rel=1e-5)

    def test_all_as_one_text(self, files):
        total = text.joined(read_documents(files, TOKENIZER), TOKENIZER.end_of_text)
        ids = [t for each in TEXTS for t in (*TOKENIZER.encode(each), TOKENIZER.end_of_text)]
        assert total.tokens.tolist() == ids[:-1]
        assert total.bytes == sum(len(each.encode()) for each in TEXTS)

    def test_words_are_counted_as_the_harness_counts_them(self):
        api = pytest.importorskip("lm_eval.api.task")
        for each in (*TEXTS, " a  b\n", "a"):
            found = encoded(0, [each.encode()], TOKENIZER)
            assert found.words == api.Task.count_words(each)


IDENTITY = {"of": "these texts"}


class TestResuming:
    @pytest.mark.parametrize("options", [TextOptions(), TextOptions(max_length=50)])
    def test_an_interrupted_run_goes_on(self, files, tmp_path, monkeypatch, options):
        wanted = scores(files, options)
        monkeypatch.setattr(scoring, "_PATIENCE", 0.0)
        told, found = [], None

        def interrupt(done):
            told.append(done)
            if len(told) % 2:
                raise KeyboardInterrupt

        while found is None:
            with (
                contextlib.suppress(KeyboardInterrupt),
                Journal(tmp_path / "journal", IDENTITY) as journal,
            ):
                found = scores(files, options, journal=journal, progress=interrupt)
        assert len(told) > 2
        np.testing.assert_allclose(found.nats, wanted.nats, rtol=1e-5)
        assert list(tmp_path.glob("journal.state*")) == []

    def test_the_middle_of_a_long_text_is_kept(self, files, tmp_path, monkeypatch):
        monkeypatch.setattr(scoring, "_PATIENCE", 0.0)
        told = []

        def stop(done):
            told.append(done)
            if len(told) == 2:
                raise KeyboardInterrupt

        with (
            Journal(tmp_path / "journal", IDENTITY) as journal,
            pytest.raises(KeyboardInterrupt),
        ):
            scores(files, journal=journal, progress=stop)
        reads = []
        with Journal(tmp_path / "journal", IDENTITY) as journal:
            found = scores(files, journal=journal, progress=reads.append)
        assert reads[0] > told[-1]
        np.testing.assert_allclose(found.nats, [nats(each) for each in TEXTS], rtol=1e-5)

    def test_a_lost_state_costs_time_alone(self, files, tmp_path, monkeypatch):
        self.test_the_middle_of_a_long_text_is_kept(files, tmp_path, monkeypatch)
        with Journal(tmp_path / "journal", IDENTITY) as journal:
            kept = {"unfinished": {"keys": [[0, 0]], "at": [5], "sums": [[1.0]]}, "state": "gone"}
            journal.add(kept)
        with Journal(tmp_path / "journal", IDENTITY) as journal:
            found = scores(files, journal=journal)
        np.testing.assert_allclose(found.nats, [nats(each) for each in TEXTS], rtol=1e-5)


class TestDocuments:
    def test_text_files_are_one_document_each(self, tmp_path):
        (tmp_path / "a.txt").write_text(TEXT)
        with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
            file.write("fox")
        found = list(read_documents(find_files([str(tmp_path)]), TOKENIZER))
        assert [TOKENIZER.decode(each.tokens.tolist()) for each in found] == [TEXT, "fox"]
        assert [each.number for each in found] == [0, 1]

    def test_the_limit_is_kept(self, files):
        assert len(list(read_documents(files, TOKENIZER, limit=2))) == 2

    def test_files_have_digests(self, files):
        (found,) = describe(files)
        assert found.name == "texts.jsonl" and len(found.digest) == 64

    @pytest.mark.parametrize("line", ['{"body": "x"}', '{"text": 3}', "{", "[]"])
    def test_a_bad_record_is_named(self, tmp_path, line):
        (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + line + "\n")
        with pytest.raises(ValueError, match="line 2") as refused:
            list(read_documents(find_files([str(tmp_path / "a.jsonl")]), TOKENIZER))
        assert "\n" not in str(refused.value)

    def test_what_is_no_utf8_is_refused_unless_bytes_are_tokens(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"caf\xe9")
        with pytest.raises(ValueError, match="not UTF-8"):
            list(read_documents(find_files([str(tmp_path / "a.txt")]), TOKENIZER))
        (found,) = read_documents(find_files([str(tmp_path / "a.txt")]), ByteTokenizer())
        assert found.bytes == 4


class TestPositions:
    def test_a_curve_is_the_mean_loss_in_each_bucket(self):
        positions = Positions(100)
        documents = [encoded(n, [TEXT[200 * n : 200 * n + 1200].encode()], TOKENIZER)
                     for n in range(4)]  # fmt: skip
        documents.insert(1, encoded(9, [b"short"], TOKENIZER))
        found = scoring.score(
            MODEL,
            positions.long_enough(documents),
            lambda document: positions.passages(document, TOKENIZER.end_of_text),
        )
        curve = positions.curve(found, "m")
        assert len(found.sums) == 4
        edges = np.array(curve.about["bucket edges"])
        assert edges[0] == 0 and edges[-1] == 100 and len(curve.x) == len(edges) - 1
        total = sum(y * width for y, width in zip(curve.y, np.diff(edges), strict=True))
        kept = [each for each in documents if each.number != 9]
        wanted = np.mean([self.loss(each.tokens[:100]) for each in kept])
        assert total == pytest.approx(wanted, rel=1e-5)
        assert all(a <= y <= b for a, y, b in zip(curve.low, curve.y, curve.high, strict=True))
        assert np.all(np.diff(curve.x) > 0)

    @staticmethod
    def loss(tokens) -> float:
        ids = torch.tensor([TOKENIZER.end_of_text, *tokens])
        with torch.no_grad():
            logits = MODEL(ids[None, :-1])[0][0]
        return -float(logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]].sum())

    @pytest.mark.parametrize("length", [2, 3, 7, 64, 100, 4096])
    def test_buckets_cover_every_position_once(self, length):
        edges = Positions(length).edges
        assert edges[0] == 0 and edges[-1] == length and np.all(np.diff(edges) > 0)

    def test_without_a_long_document_the_longest_is_named(self):
        with pytest.raises(ValueError, match="no document has 1,000 tokens, and the longest has"):
            list(Positions(1000).long_enough([encoded(0, [b"fox"], TOKENIZER)]))


SIZES = {"train": 90, "validation": 5, "test": 5}


class TestEnwik8:
    def test_splits_are_parts_of_the_file(self, tmp_path):
        content = bytes(range(100))
        (tmp_path / "enwik8").write_bytes(content)
        for split, wanted in (("train", content[:90]), ("validation", content[90:95]),
                              ("test", content[95:])):  # fmt: skip
            found = enwik8.read_split(tmp_path / "enwik8", split, ByteTokenizer(), SIZES)
            assert bytes(found.tokens.tolist()) == wanted and found.bytes == len(wanted)

    def test_a_character_may_be_cut(self, tmp_path):
        (tmp_path / "enwik8").write_bytes(("狐" * 34).encode()[:100])
        assert enwik8.read_split(tmp_path / "enwik8", "test", TOKENIZER, SIZES).bytes == 5

    def test_another_file_is_refused(self, tmp_path):
        (tmp_path / "enwik8").write_bytes(b"x" * 99)
        with pytest.raises(ValueError, match="has 99 bytes and enwik8 has 100"):
            enwik8.read_split(tmp_path / "enwik8", "test", TOKENIZER, SIZES)
        with pytest.raises(ValueError, match="no file"):
            enwik8.check(tmp_path / "none")

    def test_the_paper_prints_its_numbers(self):
        assert enwik8.published("test")["RWKV, 12 layers"] == 1.178
        assert enwik8.published("train")["RWKV, 6 layers"] == 0.720
        assert "RWKV, 6 layers" not in enwik8.published("test")
        assert enwik8.published("validation") == {}

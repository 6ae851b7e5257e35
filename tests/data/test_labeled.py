"""Sequences with answers: the order of training, padding, parts that share nothing, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from receptance.data.labeled import LabeledBatch, Part, Problem, StoredExamples, padded, split_off
from receptance.data.labeled_records import read_labeled_records

CLASSES = Problem(kind="classify", outputs=3, vocab_size=256)


def make_part(count: int = 10, each: int = 1) -> Part:
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 256, size=n % 4 + 1).astype(np.uint8) for n in range(count * each)]
    return Part(rows, np.arange(count) % 3)


def make_examples(problem: Problem = CLASSES, count: int = 10) -> StoredExamples:
    part = make_part(count, problem.rows)
    return StoredExamples(problem, {"train": part, "validation": part, "test": part}, {})


class TestOrder:
    def test_an_epoch_has_every_example_once(self):
        examples = make_examples()
        for epoch in range(2):
            batches = [examples.train(step, 5, seed=3) for step in (2 * epoch, 2 * epoch + 1)]
            targets = torch.cat([batch.targets for batch in batches])
            assert sorted(targets.tolist()) == sorted((np.arange(10) % 3).tolist())

    def test_it_depends_on_seed_and_step_alone(self):
        one, other = make_examples(), make_examples()
        other.train(0, 4, seed=3)
        batches = one.train(7, 4, seed=3), other.train(7, 4, seed=3)
        assert torch.equal(batches[0].inputs, batches[1].inputs)
        assert not torch.equal(one.train(7, 8, seed=4).targets, one.train(7, 8, seed=3).targets)

    def test_a_batch_may_be_larger_than_an_epoch(self):
        assert make_examples().train(1, 25, seed=0).size == 25

    def test_held_out_examples_come_once(self):
        batches = list(make_examples().held_out("test", 4))
        assert [batch.size for batch in batches] == [4, 4, 2]
        assert sorted(torch.cat([b.targets for b in batches]).tolist()) == sorted(
            (np.arange(10) % 3).tolist()
        )


class TestBatches:
    def test_rows_are_padded_behind(self):
        inputs, lengths = padded([np.array([1, 2], np.uint8), np.array([3], np.uint8)], CLASSES)
        assert inputs.tolist() == [[1, 2], [3, 0]] and lengths.tolist() == [2, 1]

    def test_equal_rows_have_no_lengths(self):
        assert padded([np.ones(3, np.uint8)] * 2, CLASSES)[1] is None

    def test_bytes_of_pixels_run_from_minus_one_to_one(self):
        pixels = Problem(kind="classify", outputs=2, channels=1)
        inputs, _ = padded([np.array([[0], [255]], np.uint8)], pixels)
        assert inputs.dtype == torch.float32 and inputs.flatten().tolist() == [-1.0, 1.0]

    def test_a_part_of_pairs_keeps_them_together(self):
        pairs = Problem(kind="classify", outputs=3, vocab_size=256, pairs=True)
        batch = make_examples(pairs).train(0, 4, seed=0)
        assert len(batch.inputs) == 8
        part = batch.part(slice(1, 3))
        assert torch.equal(part.inputs, batch.inputs[2:6])
        assert torch.equal(part.targets, batch.targets[1:3])

    def test_answers_are_those_at_the_places(self):
        places = torch.tensor([[True, False], [False, True]])
        targets = torch.tensor([[1, 2], [3, 4]])
        batch = LabeledBatch(torch.zeros(2, 2), targets, places=places)
        assert batch.answers.tolist() == [1, 4] and batch.learned == 2
        assert set(batch.arrays()) == {"inputs", "targets", "places"}


class TestSplittingOff:
    def test_every_example_goes_to_one_part(self):
        whole = make_part(20)
        rest, kept = split_off(whole, 0.25, 1, CLASSES)
        assert len(rest.targets) == 15 and len(kept.targets) == 5
        counts = np.bincount(np.concatenate([rest.targets, kept.targets]))
        assert (counts == np.bincount(whole.targets)).all()

    def test_groups_are_not_separated(self):
        whole = make_part(20)
        numbered = Part(whole.inputs, np.arange(20))
        rest, kept = split_off(numbered, 0.3, 1, CLASSES, groups=np.arange(20) // 4)
        assert not set(rest.targets // 4) & set(kept.targets // 4)

    def test_too_few(self):
        with pytest.raises(ValueError, match="1 examples are too few"):
            split_off(make_part(1), 0.1, 0, CLASSES)


@pytest.mark.parametrize(
    ("problem", "part", "message"),
    [
        (CLASSES, Part([], np.zeros(0, np.int64)), "has no examples"),
        (CLASSES, Part([np.ones(2, np.uint8)] * 2, np.zeros(1, np.int64)), "2 sequences and 1"),
        (CLASSES, Part([np.ones(0, np.uint8)], np.zeros(1, np.int64)), "sequence 1 .* is empty"),
        (CLASSES, Part([np.ones(2, np.uint8)], np.array([3])), "classes from 3 to 3"),
        (
            Problem(kind="classify", outputs=2, channels=2),
            Part([np.ones((3, 1), np.float32)], np.array([0])),
            r"is \[3, 1\]; wanted \[3, 2\]",
        ),
        (
            Problem(kind="regress", outputs=1, channels=1),
            Part([np.array([[np.nan]], np.float32)], np.ones((1, 1), np.float32)),
            "missing or infinite numbers",
        ),
        (
            Problem(kind="regress", outputs=1, channels=1),
            Part([np.ones((1, 1), np.float32)], np.array([[np.inf]], np.float32)),
            "an answer that is missing",
        ),
    ],
)
def test_parts_that_do_not_fit(problem, part, message):
    with pytest.raises(ValueError, match=message):
        StoredExamples(problem, {"train": part}, {})


class TestRecords:
    @staticmethod
    def write(path, records) -> None:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))

    def test_texts(self, tmp_path):
        file = tmp_path / "a.jsonl"
        self.write(file, [{"text": f"née {n}", "label": "xy"[n % 2]} for n in range(40)])
        examples, classes = read_labeled_records(file, "classify")
        assert classes == ["x", "y"] and examples.problem.vocab_size == 256
        assert [examples.count(s) for s in ("train", "validation", "test")] == [32, 4, 4]
        row = examples.part("train").inputs[0]
        assert bytes(row).decode().startswith("née ")

    def test_equal_texts_are_not_divided(self, tmp_path):
        file = tmp_path / "a.jsonl"
        self.write(file, [{"text": f"t{n // 5}", "label": n % 2} for n in range(100)])
        examples, _ = read_labeled_records(file, "classify")
        found = [
            {row.tobytes() for row in examples.part(split).inputs}
            for split in ("train", "validation", "test")
        ]
        assert not found[0] & found[1] and not found[0] & found[2] and not found[1] & found[2]

    def test_values_and_a_test_file(self, tmp_path):
        for name, count in (("a.jsonl", 20), ("a.test.jsonl", 3)):
            records = [{"values": [[n, 1.0], [2, 3]], "label": n / 2} for n in range(count)]
            self.write(tmp_path / name, records)
        examples, classes = read_labeled_records(tmp_path / "a.jsonl", "regress", max_length=1)
        assert not classes and examples.problem.channels == 2 and examples.count("test") == 3
        assert examples.part("test").inputs[2].tolist() == [[2.0, 1.0]]

    @pytest.mark.parametrize(
        ("line", "kind", "message"),
        [
            ("{", "classify", "line 1"),
            ("[1]", "classify", "wanted an object"),
            ('{"text": "", "label": 1}', "classify", 'wanted "text" that is not empty'),
            ('{"values": [[[1]]], "label": 1}', "classify", "wanted"),
            ('{"values": [[1], [1, 2]], "label": 1}', "classify", "line 1"),
            ('{"text": "a", "label": "x"}', "regress", "a regression wants numbers"),
            ('{"text": "a", "label": NaN}', "regress", "within float32"),
            (f'{{"text": "a", "label": 1{"0" * 400}}}', "regress", "within float32"),
            ('{"text": "a", "label": null}', "classify", "a class is a string or a whole number"),
            ('{"text": "a", "label": 1.0}', "classify", "a class is a string or a whole number"),
            ('{"text": "a", "values": [1], "label": 1}', "classify", "wanted one of them"),
            ('{"values": {"a": 1}, "label": 1}', "classify", "of numbers"),
            ('{"values": ["1"], "label": 1}', "classify", "of numbers"),
            ('{"values": [1, null], "label": 1}', "classify", "of numbers"),
            ('{"values": [1, 1e39], "label": 1}', "classify", "not finite in float32"),
            ("", "classify", "has no examples"),
        ],
    )
    def test_mistakes(self, tmp_path, line, kind, message):
        (tmp_path / "a.jsonl").write_text(line + "\n")
        with pytest.raises(ValueError, match=message):
            read_labeled_records(tmp_path / "a.jsonl", kind)

    @pytest.mark.parametrize("kinds", [("1", 1), (2, True)])
    def test_labels_of_two_kinds(self, tmp_path, kinds):
        self.write(tmp_path / "a.jsonl", [{"text": "a", "label": kinds[n % 2]} for n in range(40)])
        with pytest.raises(ValueError, match="labels of the kinds"):
            read_labeled_records(tmp_path / "a.jsonl", "classify")

    def test_two_kinds_in_a_file(self, tmp_path):
        records = [{"text": "a", "label": 1}, {"values": [1], "label": 1}]
        self.write(tmp_path / "a.jsonl", records * 10)
        with pytest.raises(ValueError, match="different kinds"):
            read_labeled_records(tmp_path / "a.jsonl", "classify")

"""Tasks that are drawn: each is what its definition says, and no test question was trained on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from receptance.evaluation.tasks.base import DrawnExamples, Task, draw, hashed
from receptance.evaluation.tasks.passkey import Passkey
from receptance.evaluation.tasks.recall import MQAR, Induction, SelectiveCopying
from receptance.evaluation.tasks.registry import DRAWN, make_task
from receptance.evaluation.tasks.tracking import S5, Parity, products

TEXT = b"".join(b"line %d of a text that hides pass keys.\n" % n for n in range(200))
TASKS = [
    MQAR(pairs=3, length=20, vocabulary=32),
    MQAR(pairs=2, length=12, vocabulary=16, random_filler=False, power=1.0),
    Induction(length=12),
    SelectiveCopying(length=12, memorize=4),
    Parity(length=10),
    S5(length=6),
    Passkey(text=TEXT, length=160),
]
every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: repr(task)[:40])


def questions(task: Task, split, count=64, seed=0) -> set[bytes]:
    return {row.tobytes() for row in draw(task, split, count, (seed, 0)).question}


@every_task
class TestEveryTask:
    def test_splits_share_no_question(self, task):
        found = {split: questions(task, split) for split in ("train", "validation", "test")}
        for one, other in itertools.combinations(found.values(), 2):
            assert not one & other

    def test_draws_depend_on_the_key_alone(self, task):
        one, same, other = (draw(task, "train", 4, key) for key in ((3, 5), (3, 5), (3, 6)))
        assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
        assert not np.array_equal(one.tokens, other.tokens)

    def test_shapes_and_ranges(self, task):
        found = draw(task, "test", 5, (0,))
        assert found.tokens.shape == found.targets.shape == found.mask.shape
        assert found.tokens.dtype == np.int64 and found.mask.dtype == bool
        assert found.tokens.min() >= 0 and found.tokens.max() < task.vocab_size
        assert found.mask.any(axis=1).all()
        assert not found.targets[~found.mask].any()

    def test_it_can_be_longer(self, task):
        longer = task.at_length(2 * task.length)
        extra = draw(longer, "test", 1, (0,)).tokens.shape[1]
        assert extra - draw(task, "test", 1, (0,)).tokens.shape[1] == task.length

    def test_batches(self, task):
        examples = DrawnExamples(task, held_out=7)
        batch = examples.train(3, 4, seed=1)
        assert batch.size == 4 and batch.learned == int(batch.places.sum())
        sizes = [part.size for part in examples.held_out("test", 4)]
        assert sizes == [4, 3]


class TestMQAR:
    def test_every_query_asks_for_the_value_beside_its_key(self):
        task = MQAR(pairs=4, length=32, vocabulary=64)
        found = draw(task, "train", 50, (0,))
        for tokens, targets, mask in zip(found.tokens, found.targets, found.mask, strict=True):
            pairs = dict(zip(tokens[0:8:2], tokens[1:8:2], strict=True))
            assert len(pairs) == 4 and len(set(pairs.values())) == 4
            assert all(1 <= key < 32 <= value < 64 for key, value in pairs.items())
            places = np.flatnonzero(mask)
            assert sorted(tokens[places]) == sorted(pairs)  # each key is asked for once
            assert (places >= 8).all() and (places % 2 == 0).all()
            assert [pairs[key] for key in tokens[places]] == list(targets[places])

    def test_the_gaps_have_the_power_law(self):
        task = MQAR(pairs=1, length=18, vocabulary=64, power=0.1)
        places = task._gaps(np.random.default_rng(0), 40_000)[:, 0]
        weights = np.arange(1, 9) ** (0.1 - 1.0)
        wanted = weights / weights.sum()
        # Four standard errors of a share.
        bound = 4 * np.sqrt(wanted * (1 - wanted) / len(places))
        assert (abs(np.bincount(places, minlength=8) / len(places) - wanted) < bound).all()

    def test_filler_is_random_or_zero(self):
        zeros, random = (
            draw(MQAR(pairs=2, length=40, random_filler=filler), "train", 20, (0,)).tokens[:, 4:]
            for filler in (False, True)
        )
        assert (zeros == 0).sum() == 20 * 34
        assert (random == 0).mean() < 0.01

    @pytest.mark.parametrize(
        ("numbers", "message"),
        [
            ({"length": 30}, "at least 32"),
            ({"length": 33}, "must be even"),
            ({"vocabulary": 16, "length": 64}, "has 7 keys"),
            ({"power": 0.0}, "power of mqar is 0.0"),
            ({"pairs": 0}, "pairs of mqar is 0"),
        ],
    )
    def test_impossible_numbers(self, numbers, message):
        with pytest.raises(ValueError, match=message):
            MQAR(**{"pairs": 8, **numbers})


def test_induction_repeats_what_followed_the_marker():
    found = draw(Induction(length=16), "train", 50, (0,))
    for tokens, targets in zip(found.tokens, found.targets, strict=True):
        first, last = np.flatnonzero(tokens == 0)
        assert last == 15 and targets[-1] == tokens[first + 1] and tokens[first + 1] != 0


def test_selective_copying_repeats_the_data_in_order():
    found = draw(SelectiveCopying(length=20, memorize=5), "train", 50, (0,))
    for tokens, targets in zip(found.tokens, found.targets, strict=True):
        data = tokens[:20][tokens[:20] != 0]
        assert list(data) == list(targets[20:])
        assert set(tokens[20:]) == {15}


def test_parity_counts_ones():
    found = draw(Parity(length=12), "train", 20, (0,))
    for tokens, targets in zip(found.tokens, found.targets, strict=True):
        assert [sum(tokens[: n + 1]) % 2 for n in range(12)] == list(targets)


class TestS5:
    def test_the_table_is_that_of_a_group_which_does_not_commute(self):
        table = products()
        assert (table[0] == np.arange(120)).all() and (table[:, 0] == np.arange(120)).all()
        assert all(len(set(row)) == 120 for row in (*table, *table.T))
        some = np.random.default_rng(0).integers(120, size=(200, 3))
        for a, b, c in some:
            assert table[table[a, b], c] == table[a, table[b, c]]
        assert (table != table.T).any()

    def test_targets_are_products_of_permutations(self):
        elements = list(itertools.permutations(range(5)))
        found = draw(S5(length=6), "train", 10, (0,))
        for tokens, targets in zip(found.tokens, found.targets, strict=True):
            things = tuple(range(5))
            for token, target in zip(tokens, targets, strict=True):
                new = elements[token]
                things = tuple(new[thing] for thing in things)  # the new one is applied last
                assert elements[target] == things


class TestPasskey:
    def test_the_answer_stands_in_the_text(self):
        task = Passkey(text=TEXT, length=200, digits=4)
        found = draw(task, "test", 10, (0,))
        for tokens, targets in zip(found.tokens, found.targets, strict=True):
            text, key = bytes(tokens.astype(np.uint8)), bytes(targets[-4:].astype(np.uint8))
            assert b" The pass key is %s. Remember it." % key in text
            assert text.endswith(b"What is the pass key? The pass key is " + key[:-1])

    def test_texts_of_the_test_are_not_those_of_training(self):
        # The last tenth of this text has other letters than the rest.
        text = b"a" * 9000 + b"z" * 1000
        task = Passkey(text=text, length=160)
        assert ord("z") not in draw(task, "train", 50, (0,)).tokens
        for split in ("validation", "test"):
            depth = draw(task, split, 50, (0,)).tokens
            assert (depth == ord("z")).any(axis=1).all()

    def test_too_little_text(self):
        with pytest.raises(ValueError, match="want 2,560 of them"):
            Passkey(text=b"short", length=256)


class TestDrawing:
    def test_a_task_with_too_few_questions_is_refused(self):
        splits = ("train", "validation", "test")
        with pytest.raises(ValueError, match="too few questions to divide"):
            [draw(Parity(length=1), split, 2, (0,)) for split in splits]

    def test_hashes_depend_on_every_number_and_its_place(self):
        rows = np.array([[1, 2, 3], [1, 2, 4], [2, 1, 3], [1, 2, 3]])
        found = hashed(rows)
        assert len(set(found)) == 3 and found[0] == found[3]

    def test_an_eighth_of_the_questions_is_for_the_test(self):
        strings = np.array(list(itertools.product(range(2), repeat=12)))
        assert abs((hashed(strings) % np.uint64(8) == 0).mean() - 1 / 8) < 0.02


class TestNames:
    def test_settings(self):
        task = make_task("mqar", "pairs=4,length=32,random_filler=false")
        assert task == MQAR(pairs=4, length=32, random_filler=False)
        assert task.difficulty["pairs"] == 4

    @pytest.mark.parametrize(
        ("name", "setting", "message"),
        [
            ("mqra", "", "no task 'mqra'; did you mean mqar"),
            ("mqar", "pair=4", "no setting 'pair=4'; did you mean pairs"),
            ("mqar", "pairs", "no setting 'pairs'"),
            ("mqar", "pairs=many", "must be a whole number"),
            ("passkey", "", "name a text file"),
        ],
    )
    def test_mistakes(self, name, setting, message):
        with pytest.raises(ValueError, match=message):
            make_task(name, setting)

    def test_files_for_tasks_that_read_none(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(TEXT)
        assert make_task("passkey", "length=160", str(tmp_path / "a.txt")).vocab_size == 256
        with pytest.raises(ValueError, match="reads no files"):
            make_task("mqar", "", "a.txt")
        with pytest.raises(ValueError, match="cannot be read"):
            make_task("passkey", "", str(tmp_path / "b.txt"))

    def test_all_are_known_by_their_names(self):
        assert {task.name for task in TASKS} == DRAWN.keys()

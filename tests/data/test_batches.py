"""The order of reading, rows of documents, and what the model makes of them."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import make_model

from receptance.data.batches import Batch, Batches, Prefetcher, document_lengths, shuffled
from receptance.training.ranks import Ranks

END = 0
documents = st.lists(st.lists(st.integers(1, 255), max_size=9), min_size=1, max_size=12)


def flat(texts: list[list[int]], *, ended: bool = True) -> np.ndarray:
    """Documents with an end of text after each, or after all but the last."""
    ids = [id for text in texts for id in (*text, END)]
    return np.array(ids if ended else ids[:-1], np.uint16)


def plain(batch: Batch) -> list[dict[str, list]]:
    """Each row's tensors, as lists."""
    return [
        {name: x[row].tolist() for name, x in batch.arrays().items()}
        for row in range(len(batch.inputs))
    ]


def an_epoch(batches: Batches) -> list[dict[str, list]]:
    """Its rows, for batches of one."""
    return [row for step in range(batches.windows) for row in plain(batches.at(step))]


class TestShuffled:
    keys = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 1000))

    @given(st.integers(1, 3000), keys)
    def test_every_place_gets_one(self, count, key):
        found = shuffled(np.arange(count), count, key)
        assert sorted(found.tolist()) == list(range(count))

    @given(st.integers(1, 2**62), keys, st.data())
    def test_it_does_not_depend_on_how_it_is_asked(self, count, key, data):
        places = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=20))
        together = shuffled(np.array(places), count, key)
        apart = [int(shuffled(np.array([place]), count, key)[0]) for place in places]
        assert together.tolist() == apart
        assert all(0 <= found < count for found in apart)
        assert len(set(apart)) == len(set(places))

    def test_keys_give_other_orders(self):
        orders = {tuple(shuffled(np.arange(50), 50, (s, e))) for s in range(5) for e in range(5)}
        assert len(orders) == 25

    def test_it_looks_random(self):
        """Neighbors end far apart, and each place's value is anywhere."""
        found = np.stack([shuffled(np.arange(1000), 1000, (7, epoch)) for epoch in range(200)])
        assert abs(np.corrcoef(found[:, :-1].ravel(), found[:, 1:].ravel())[0, 1]) < 0.01
        np.testing.assert_allclose(found.mean(0), 499.5, atol=6 * 289 / 200**0.5)


class TestStreams:
    @given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 7), st.integers(0, 3))
    def test_every_window_once_an_epoch(self, more, context, batch, seed):
        tokens = np.arange(context + more)
        batches = Batches(tokens, context=context, batch=batch, seed=seed)
        windows = (len(tokens) - 1) // context
        assert batches.windows == windows
        rows = torch.cat([batches.at(step).inputs for step in range(windows)])
        targets = torch.cat([batches.at(step).targets for step in range(windows)])
        assert torch.equal(targets, rows + 1)
        starts = rows[:, 0].reshape(batch, windows)  # as many epochs as rows in a batch
        wanted = torch.arange(windows) * context
        assert all(torch.equal(epoch.sort().values, wanted) for epoch in starts)
        assert batches.at(0).mask is None and batches.at(0).resets is None

    def test_epochs_differ_and_are_counted(self):
        batches = Batches(np.arange(101), context=10, batch=4, seed=1)
        orders = [batches.at(step).inputs[:, 0].tolist() for step in range(5)]
        read = [start for order in orders for start in order]
        first, second = read[:10], read[10:]
        assert first != second and sorted(first) == sorted(second)
        places = [(batches.epoch(step), batches.position(step)) for step in range(6)]
        assert places == [(0, 0), (0, 4), (0, 8), (1, 2), (1, 6), (2, 0)]

    def test_too_short_a_text_is_refused(self):
        Batches(np.arange(11), context=10, batch=1, seed=0)
        with pytest.raises(ValueError, match="the text has 10 tokens and the context is 10"):
            Batches(np.arange(10), context=10, batch=1, seed=0)

    def test_far_away_is_as_near(self):
        """No order is kept: a corpus of a trillion tokens is asked like any other."""
        mapped = np.broadcast_to(np.uint16(3), (10**12,))
        batches = Batches(mapped, context=1024, batch=2, seed=0)
        assert batches.at(10**9).inputs.shape == (2, 1024)

    @given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
    def test_ranks_together_read_the_batch(self, batch, groups, neighbors, step):
        assume(batch >= groups)
        whole = Batches(np.arange(200), context=12, batch=batch, seed=3).at(step)
        rebuilt = torch.full_like(whole.inputs, -1)
        for rank in range(groups * neighbors):
            place = Ranks(rank, groups * neighbors, neighbors)
            rows, time = place.rows(batch), place.time(12)
            rebuilt[rows, time] = whole.part(rows, time).inputs
        assert torch.equal(rebuilt, whole.inputs)


class TestDocuments:
    @given(documents, st.booleans())
    def test_their_lengths(self, texts, ended):
        tokens = flat(texts, ended=ended)
        lengths = [len(text) + 1 for text in texts]
        lengths[-1] -= not ended
        assert document_lengths(tokens, END).tolist() == [n for n in lengths if n]

    def test_lengths_across_the_searched_blocks(self, monkeypatch):
        monkeypatch.setattr("receptance.data.batches._SEARCHED_AT_ONCE", 4)
        assert document_lengths(flat([[5] * 3, [], [5] * 7, [5] * 3]), END).tolist() == [4, 1, 8, 4]

    @given(documents, st.integers(1, 14), st.booleans(), st.sampled_from(["whole", "single"]))
    def test_every_transition_is_learned_once(self, texts, context, ended, packing):
        """Within documents; borders between them are extra, and padding is nothing."""
        tokens = flat(texts, ended=ended)
        assume(any(length > 1 for length in document_lengths(tokens, END)))
        rows = an_epoch(
            Batches(tokens, context=context, batch=1, seed=0, packing=packing, end_of_text=END)
        )
        found = [
            pair
            for row in rows
            for *pair, learned in zip(row["inputs"], row["targets"], row["mask"], strict=True)
            if learned and pair[0] != END
        ]
        ids = tokens.tolist()
        wanted = [list(pair) for pair in itertools.pairwise(ids) if pair[0] != END]
        assert sorted(found) == sorted(wanted)

    def test_by_hand(self):
        tokens = flat([[1, 2], [3], [4, 5, 6, 7, 8, 9]])
        rows = {"context": 5, "batch": 1, "seed": 0, "end_of_text": END}
        whole = sorted(
            an_epoch(Batches(tokens, packing="whole", **rows)), key=lambda r: r["inputs"]
        )
        assert [row["inputs"] for row in whole] == [
            [1, 2, 0, 3, 0],
            [4, 5, 6, 7, 8],
            [9, 0, 0, 0, 0],
        ]
        assert [row["targets"] for row in whole][:2] == [[2, 0, 3, 0, 0], [5, 6, 7, 8, 9]]
        assert [sum(row["mask"]) for row in whole] == [4, 5, 1]
        assert whole[0]["resets"] == [False, False, False, True, False]
        single = an_epoch(Batches(tokens, packing="single", **rows))
        assert sorted(row["inputs"] for row in single) == [
            [1, 2, 0, 0, 0],
            [3, 0, 0, 0, 0],
            [4, 5, 6, 7, 8],
            [9, 0, 0, 0, 0],
        ]
        assert all("resets" not in row for row in single)

    def test_a_mask_goes_with_its_tokens(self):
        tokens = flat([[1, 2], [3], [4, 5, 6]])
        mask = (tokens % 2).astype(np.uint8)
        batches = Batches(tokens, context=4, batch=1, seed=0, mask=mask, end_of_text=END)
        assert batches.packing == "whole"
        for row in an_epoch(batches):
            both = zip(row["targets"], row["mask"], strict=True)
            assert all(target % 2 == 1 for target, learned in both if learned)
        learned = sum(sum(row["mask"]) for row in an_epoch(batches))
        assert learned == 1 + 1  # 3 and 5; nothing predicts the 1

    @pytest.mark.parametrize("packing", ["whole", "single"])
    def test_rows_with_nothing_to_learn_are_left_out(self, packing):
        """Of a prompt longer than the context only the end, with the response, is a row."""
        tokens = flat([[*range(1, 20)], [1, 2, 3]])
        mask = np.zeros(len(tokens), np.uint8)
        mask[[17, 18, -2]] = 1
        batches = Batches(
            tokens, context=5, batch=1, seed=0, mask=mask, packing=packing, end_of_text=END
        )
        rows = an_epoch(batches)
        assert all(any(row["mask"]) for row in rows)
        learned = [t for row in rows for t, m in zip(row["targets"], row["mask"], strict=True) if m]
        assert sorted(learned) == [3, 18, 19]

    def test_nothing_to_learn_at_all(self):
        tokens = flat([[1, 2, 3]])
        with pytest.raises(ValueError, match="or none with a token to learn"):
            Batches(tokens, context=4, batch=1, seed=0, mask=np.zeros(4, np.uint8))

    def test_no_document_of_two_tokens(self):
        with pytest.raises(ValueError, match="no document of at least two tokens"):
            Batches(flat([[], []]), context=4, batch=1, seed=0, packing="single")


class TestTheLaw:
    """Packed among others, a document is read as if it were alone."""

    @given(documents, st.integers(3, 14), st.booleans(), st.sampled_from(["whole", "single"]))
    def test_its_losses_are_those_from_an_empty_state(self, texts, context, ended, packing):
        texts = [text[: context - 1] for text in texts]  # those that fit a row
        tokens = flat(texts, ended=ended)
        assume(any(length > 1 for length in document_lengths(tokens, END)))
        self.check(Batches(
            tokens, context=context, batch=1, seed=0, packing=packing, end_of_text=END
        ), texts, ended)  # fmt: skip

    def test_in_windows_with_resets_too(self):
        """Those documents that no window cuts."""
        texts = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11]]
        batches = Batches(
            np.append(flat(texts), 77), context=15, batch=1, seed=0, packing="reset",
            end_of_text=END,
        )  # fmt: skip
        self.check(batches, texts, True)

    def check(self, batches: Batches, texts: list[list[int]], ended: bool) -> None:
        model, wanted = make_model(), []
        whole = [(*text, END) for text in texts[:-1]] + [(*texts[-1], *[END][: int(ended)])]
        for ids in whole:
            if len(ids) > 1:
                wanted += nats(model, torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))
        found = []
        for step in range(batches.windows):
            batch = batches.at(step)
            inside = batch.inputs != END  # a border is predicted by the document before it
            inside &= torch.ones_like(inside) if batch.mask is None else batch.mask
            losses = nats(model, batch.inputs, batch.targets, batch.resets)
            found += [x for x, counts in zip(losses, inside.flatten(), strict=True) if counts]
        # A document that begins with an end of text is empty: nothing in it is to be learned.
        np.testing.assert_allclose(sorted(found), sorted(wanted), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def nats(model, inputs, targets, resets=None) -> list[float]:
    """The loss at each position."""
    logits, _ = model(inputs, resets=resets)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").tolist()


class TestPrefetcher:
    @pytest.mark.parametrize("workers", [0, 1, 2])
    @given(steps=st.lists(st.integers(0, 30), min_size=1, max_size=8))
    def test_it_reads_what_is_asked_wherever_it_begins(self, workers, steps):
        batches = Batches(np.arange(200), context=7, batch=3, seed=2)
        read = Prefetcher(batches, workers)
        for step in steps:
            for following in (step, step + 1):
                assert torch.equal(read.at(following).inputs, batches.at(following).inputs)

    def test_it_reads_ahead_and_no_further(self):
        batches, seen = Batches(np.arange(200), context=7, batch=3, seed=2), []
        at = batches.at
        batches.at = lambda step: (seen.append(step), at(step))[1]  # type: ignore[method-assign]
        read = Prefetcher(batches, 2)
        for step in range(5):
            read.at(step)
        read._pool.shutdown()  # type: ignore[union-attr]
        assert sorted(seen) == list(range(7))


def test_a_batch_as_arrays():
    batch = Batch(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64))
    assert batch.learned == 6
    assert {name: x.shape for name, x in batch.arrays().items()} == dict.fromkeys(
        ("inputs", "targets"), (2, 3)
    )
    masked = Batch(batch.inputs, batch.targets, torch.eye(2, 3) > 0)
    assert masked.learned == 2
    assert masked.part(time=slice(1, 3)).learned == 1

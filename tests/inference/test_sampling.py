"""The sampler against one in plain Python, over whole distributions."""

import dataclasses
import math
import re
from collections import defaultdict
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from receptance.inference import sampling
from receptance.inference.sampling import (
    Sampling,
    Seen,
    choose,
    is_counted,
    log_probabilities,
    penalize,
)

GRID = 2000


def wanted(logits: list[float], options: Sampling) -> list[float]:
    """ChatRWKV's sampler: softmax, top_p, top_k, then 1/temperature on what is left."""
    exponentials = [math.exp(x - max(logits)) for x in logits]
    probabilities = [x / sum(exponentials) for x in exponentials]
    falling = sorted(probabilities, reverse=True)
    cumulated = 0.0
    for cutoff in falling:
        cumulated += cutoff
        if cumulated >= options.top_p:
            break
    kept = [p if p >= cutoff else 0.0 for p in probabilities]
    if options.top_k:
        least = sorted(kept, reverse=True)[: options.top_k][-1]
        kept = [p if p >= least else 0.0 for p in kept]
    powers = [(p / falling[0]) ** (1 / options.temperature) for p in kept]
    return [p / sum(powers) for p in powers]


def found(logits: list[float], options: Sampling) -> list[float]:
    """The share of a grid over [0, 1) that each token gets."""
    uniform = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    ids = choose(torch.tensor([logits]).expand(GRID, -1), uniform, options)
    return [times / GRID for times in torch.bincount(ids, minlength=len(logits)).tolist()]


def assert_same(logits: list[float], options: Sampling) -> None:
    for share, probability in zip(found(logits, options), wanted(logits, options), strict=True):
        assert abs(share - probability) <= 1 / GRID + 1e-6


def is_clear(logits: list[float], options: Sampling) -> bool:
    """Whether rounding to float32 cannot move the cutoff, and top_k does not cut between equals."""
    ranked = sorted(logits, reverse=True)
    exponentials = [math.exp(x - ranked[0]) for x in ranked]
    reached = [x / sum(exponentials) for x in accumulate(exponentials)]
    is_far = options.top_p == 1 or all(abs(x - options.top_p) > 1e-5 for x in reached)
    beyond = ranked[options.top_k :]
    return is_far and not (options.top_k and beyond and beyond[0] == ranked[options.top_k - 1])


# Two decimals: equal or clearly different, also after rounding.
logit = st.integers(-1200, 1200).map(lambda x: x / 100)
some_logits = st.lists(logit, min_size=1, max_size=12)
some_options = st.builds(
    Sampling,
    temperature=st.sampled_from([0.1, 0.5, 0.9, 1.0, 1.3, 5.0]),
    top_p=st.sampled_from([0.01, 0.1, 0.3, 0.5, 0.85, 0.95, 1.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 100]),
)


MIXED_DRAWS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(top_p=0.5),
    Sampling(top_p=0.999, temperature=1.4),
    Sampling(top_k=5),
    Sampling(top_k=200, top_p=0.9),
]
MIXED = [Sampling(temperature=0), *MIXED_DRAWS]


class TestChoose:
    @given(some_logits, some_options)
    def test_the_distribution_is_that_of_chatrwkv(self, logits, options):
        assume(is_clear(logits, options))
        assert_same(logits, options)

    @given(some_logits, some_options)
    def test_shortlists_and_blocks_change_nothing(self, logits, options):
        assume(is_clear(logits, options))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "_SHORTLIST", 3)
            patch.setattr(sampling, "_BLOCK", 2)
            assert_same(logits, options)

    @pytest.mark.parametrize("top_p", [0.2, 0.7, 1.0])
    def test_a_vocabulary_larger_than_the_shortlist(self, top_p):
        assert sampling._SHORTLIST < 600
        assert_same([0.003 * n for n in range(600)], Sampling(top_p=top_p))

    @pytest.mark.parametrize("top_p", [0.8, 1.0])
    def test_a_top_k_larger_than_the_shortlist(self, top_p):
        assert sampling._SHORTLIST < 300
        assert_same([0.003 * n for n in range(600)], Sampling(top_k=300, top_p=top_p))

    def test_equally_likely_tokens_stay_or_go_together(self):
        shares = found([2.0, 1.0, 1.0, 1.0, 0.0], Sampling(top_p=0.6))
        assert shares[4] == 0
        assert min(shares[1:4]) > 0
        assert found([0.0] * 1000, Sampling(top_p=0.01)) == [1 / 1000] * 1000

    @given(some_logits)
    def test_no_temperature_takes_the_likeliest(self, logits):
        likeliest = logits.index(max(logits))
        for temperature in (0.0, 1e-9, 1e-300):
            for top_p in (0.5, 1.0):
                options = Sampling(temperature=temperature, top_p=top_p)
                assert found(logits, options)[likeliest] == 1

    @given(some_logits)
    def test_a_low_temperature_is_nearly_greedy(self, logits):
        assume(len(set(logits)) == len(logits))
        for top_p in (0.9, 1.0):
            shares = found(logits, Sampling(temperature=2e-6, top_p=top_p))
            assert shares[logits.index(max(logits))] == 1

    def test_a_tiny_top_p_keeps_the_likeliest(self):
        for top_p in (0.0, 1e-12, 1e-4):
            assert found([0.0, 3.0, 1.0], Sampling(top_p=top_p)) == [0, 1, 0]

    @pytest.mark.parametrize("option", ["top_p", "top_k", "temperature"])
    def test_of_equals_a_greedy_choice_takes_the_first(self, option):
        options = Sampling(**{option: 1 if option == "top_k" else 0})
        assert found([0.0, 3.0, 3.0], options) == [0, 1, 0]

    @pytest.mark.parametrize("options", [Sampling(), Sampling(top_p=0.9), Sampling(top_k=3)])
    def test_extreme_logits(self, options):
        huge = torch.finfo(torch.float32).max
        assert found([-huge, huge, 0.0], options) == [0, 1, 0]
        assert found([-math.inf, 1.0, -math.inf, 1.0], options) == [0, 0.5, 0, 0.5]
        assert found([-math.inf, -huge, -math.inf], options) == [0, 1, 0]

    @pytest.mark.parametrize("last", [1 - 2**-24, 1 - 2**-53, 1.0])
    @pytest.mark.parametrize("options", [Sampling(), Sampling(top_p=0.9), Sampling(top_k=3)])
    def test_the_largest_random_number_finds_no_impossible_token(self, last, options):
        logits = torch.tensor([[0.1, 0.2, 0.3, -math.inf, -200.0]])
        token = choose(logits, torch.tensor([last], dtype=torch.float64), options)
        assert int(token) <= 2

    @pytest.mark.parametrize("options", [Sampling(), Sampling(top_p=0.9), Sampling(top_k=3)])
    def test_the_smallest_random_number_finds_no_impossible_token(self, options):
        logits = torch.tensor([[-math.inf, -200.0, 0.2]])
        assert int(choose(logits, torch.zeros(1), options)) == 2

    @given(some_options)
    def test_rows_do_not_see_each_other(self, options):
        generator = torch.Generator().manual_seed(0)
        logits = 3 * torch.randn(20, 600, generator=generator)
        logits[0] = 0  # flat: the shortlist is not enough for this one
        uniform = torch.rand(20, generator=generator)
        together = choose(logits, uniform, options)
        alone = [choose(logits[[i]], uniform[[i]], options) for i in range(20)]
        assert together.tolist() == torch.cat(alone).tolist()

    def test_rows_have_their_own_options(self):
        generator = torch.Generator().manual_seed(0)
        logits = 3 * torch.randn(40, 600, generator=generator)
        uniform = torch.rand(40, generator=generator)
        options = [MIXED[i % len(MIXED)] for i in range(40)]
        together = choose(logits, uniform, options)
        alone = [choose(logits[[i]], uniform[[i]], options[i]) for i in range(40)]
        assert together.tolist() == torch.cat(alone).tolist()

    def test_a_top_p_of_one_cuts_nothing_off_in_any_company(self):
        """Where the likeliest token's probability rounds to 1, the sums reach it at once."""
        options = [Sampling(top_k=3, temperature=100.0), Sampling(top_p=0.5)]
        logits, uniform = torch.tensor([[30.0, 0.0, 0.0, 0.0]] * 2), torch.full((2,), 0.99)
        alone = [int(choose(logits[:1], uniform[:1], own)) for own in options]
        assert alone[0] != 0
        assert choose(logits, uniform, options).tolist() == alone

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_row_that_is_no_distribution_harms_no_other(self, bad):
        generator = torch.Generator().manual_seed(0)
        logits = 3 * torch.randn(len(MIXED), 600, generator=generator)
        uniform = torch.rand(len(MIXED), generator=generator)
        wanted = choose(logits, uniform, MIXED).tolist()
        for row in range(len(MIXED)):
            broken = logits.clone()
            broken[row, 5] = bad
            found = choose(broken, uniform, MIXED).tolist()
            assert found == [*wanted[:row], -1, *wanted[row + 1 :]]

    @pytest.mark.parametrize("options", [Sampling(temperature=0), *MIXED_DRAWS])
    def test_nothing_possible_is_no_distribution(self, options):
        logits = torch.full((1, 600), -math.inf)
        assert choose(logits, torch.tensor([0.5]), options).tolist() == [-1]

    @given(st.integers(1, 700), st.integers(1, 64), st.integers(0, 99), st.booleans())
    def test_the_largest_are_those_of_topk(self, size, count, seed, with_ties):
        count = min(count, size)
        x = torch.randn(3, size, generator=torch.Generator().manual_seed(seed))
        x = x.round() if with_ties else x
        values, ids = sampling._largest(x, count)
        assert torch.equal(values, x.topk(count).values)
        assert torch.equal(x.gather(1, ids), values)
        assert all(len(set(row)) == count for row in ids.tolist())

    @pytest.mark.parametrize("size", [1, 255, 512, 513, 514, 768, 769, 5000])
    def test_blocks_of_weights_are_drawn_from_as_if_they_were_one(self, size):
        """Among weights that are whole numbers nothing is rounded."""
        generator = torch.Generator().manual_seed(size)
        weights = torch.randint(0, 3, (1, size), generator=generator).float()
        weights[0, -1] = 1
        total = int(weights.sum())
        uniform = (torch.arange(total, dtype=torch.float64) + 0.5) / total
        found = sampling._draw(weights.expand(total, -1), uniform)
        assert torch.equal(found, torch.arange(size).repeat_interleave(weights[0].long()))

    @pytest.mark.parametrize("size", [600, 767, 1000])
    def test_the_largest_random_number_does_not_leave_the_last_block(self, size):
        """That block's sum was rounded to float32, and may be more than its weights are."""
        weights = torch.rand(200, size, generator=torch.Generator().manual_seed(size))
        weights[:, : size // 256 * 256] *= 1e-6
        assert sampling._draw(weights, torch.full((200,), 1 - 2**-24)).max() == size - 1

    def test_half_precision_logits_will_do(self):
        logits = torch.tensor([[1.0, 2.0, 5.0]]).bfloat16()
        for options in (Sampling(), Sampling(top_p=0.5), Sampling(top_k=2)):
            assert choose(logits, torch.tensor([0.9]), options).item() == 2

    @pytest.mark.parametrize("options", MIXED)
    def test_logits_may_have_gradients(self, options):
        logits = torch.zeros(1, 600, requires_grad=True)
        assert 0 <= int(choose(logits, torch.tensor([0.5]), options)) < 600

    def test_arguments_stay_as_they_are(self):
        logits = torch.randn(2, 700, generator=torch.Generator().manual_seed(0))
        before = logits.clone()
        for options in (Sampling(), Sampling(top_p=0.5), Sampling(top_k=3, temperature=0.5)):
            choose(logits, torch.tensor([0.3, 0.8]), options)
        assert torch.equal(logits, before)


def penalized(logits: list[float], tokens: list[int], options: Sampling) -> list[float]:
    """The rule as ChatRWKV writes it, with a dict of occurrences."""
    occurrence: dict[int, float] = defaultdict(float)
    for token in tokens:
        for seen in occurrence:
            occurrence[seen] *= options.penalty_decay
        occurrence[token] += 1
    result = list(logits)
    for token, times in occurrence.items():
        if result[token] > 0:
            result[token] /= options.repetition_penalty
        else:
            result[token] *= options.repetition_penalty
        result[token] -= options.presence_penalty + times * options.frequency_penalty
    return result


class TestPenalties:
    @given(
        tokens=st.lists(st.integers(0, 5), max_size=20),
        logits=st.lists(logit, min_size=6, max_size=6),
        options=st.builds(
            Sampling,
            repetition_penalty=st.sampled_from([0.5, 1.0, 1.2]),
            presence_penalty=st.sampled_from([-0.5, 0.0, 0.4]),
            frequency_penalty=st.sampled_from([-0.5, 0.0, 0.4]),
            penalty_decay=st.sampled_from([0.5, 0.996, 1.0]),
        ),
    )
    def test_the_rule_of_chatrwkv(self, tokens, logits, options):
        seen = Seen()
        for token in tokens:
            seen.add(token, options)
        result = torch.tensor([logits])
        penalize(result, [seen], [options])
        wanted = torch.tensor([penalized(logits, tokens, options)])
        torch.testing.assert_close(result, wanted, atol=1e-5, rtol=1e-5)

    @given(st.lists(st.integers(0, 299), max_size=300), st.sampled_from([0.9, 1.0]))
    @example([*range(200), 7], 1.0)
    def test_each_token_is_seen_once_with_its_count(self, tokens, decay):
        seen, options = Seen(), Sampling(presence_penalty=1, penalty_decay=decay)
        for token in tokens:
            seen.add(token, options)
        wanted: dict[int, float] = {}
        for age, token in enumerate(reversed(tokens)):
            wanted[token] = wanted.get(token, 0) + decay**age
        assert len(seen) == len(wanted)
        assert dict(zip(seen.ids.tolist(), seen.counts.tolist(), strict=True)) == pytest.approx(
            wanted, rel=1e-4
        )

    def test_rows_have_their_own_options_and_tokens(self):
        options = [
            Sampling(),
            Sampling(repetition_penalty=2),
            Sampling(presence_penalty=0.5),
            Sampling(frequency_penalty=0.25, penalty_decay=0.5),
            Sampling(presence_penalty=0.5),
        ]
        seen = [Seen() for _ in options]
        for row, tokens in enumerate([[0, 1], [0, 1], [1, 1, 2], [2, 2], []]):
            for token in tokens:
                seen[row].add(token, options[row])
        logits = torch.tensor([[4.0, -4.0, 1.0]]).repeat(5, 1)
        penalize(logits, seen, options)
        assert logits.tolist() == [
            [4, -4, 1],
            [2, -8, 1],
            [4, -4.5, 0.5],
            [4, -4, 1 - 0.25 * 1.5],
            [4, -4, 1],
        ]

    def test_presence_does_not_fade(self):
        """However long ago; the count has underflowed by then."""
        options, seen = Sampling(presence_penalty=1, penalty_decay=0.1), Seen()
        for token in [0] + [1] * 100:
            seen.add(token, options)
        logits = torch.ones(1, 3)
        penalize(logits, [seen], [options])
        assert logits.tolist() == [[0, 0, 1]]

    def test_a_token_that_is_not_counted_has_occurred_nevertheless(self):
        """As in the rwkv package: the presence penalty is its, the frequency penalty is not."""
        options = Sampling(presence_penalty=0.5, frequency_penalty=1, penalty_decay=0.5)
        seen = Seen()
        for token in (0, 0, 1):
            seen.add(token, options, counted=token != 0)
        logits = torch.ones(1, 3)
        penalize(logits, [seen], [options])
        assert logits.tolist() == [[0.5, -0.5, 1]]
        seen.add(0, options)
        assert seen.counts.tolist() == [1, 0.5]

    def test_digits_and_blanks_are_those_of_the_rwkv_package(self):
        """Every text that it does not count, here neither; and all others of the same letters."""
        rule = " \t0123456789"  # PIPELINE.generate: `if ttt in ' \t0123456789': www = 0`
        parts = {rule[a:b] for a in range(len(rule)) for b in range(a, len(rule) + 1)}
        assert not any(is_counted(text.encode()) for text in parts)
        assert not any(is_counted(text) for text in (b"10", b" 13", b"2026", b"    ", b"\t\t"))
        for text in (b"a", b"1a", b"\n", b" \n", b",", b"1.", b"\x00", "１".encode(), b"\xc3"):
            assert is_counted(text)

    def test_impossible_tokens_stay_impossible(self):
        options = Sampling(repetition_penalty=2, presence_penalty=1, frequency_penalty=1)
        seen = Seen()
        for token in (0, 1):
            seen.add(token, options)
        logits = torch.tensor([[-math.inf, 1.0]])
        penalize(logits, [seen], [options])
        assert logits.tolist() == [[-math.inf, -1.5]]

    @given(
        options=st.builds(
            Sampling,
            temperature=st.sampled_from([1e-9, 1.0, 1e9]),
            top_p=st.sampled_from([0.9, 1.0]),
            repetition_penalty=st.sampled_from([1e-9, 1.0, 1e9]),
            presence_penalty=st.sampled_from([-1e9, 0.0, 1e9]),
            frequency_penalty=st.sampled_from([-1e9, 0.0, 1e9]),
            penalty_decay=st.sampled_from([0.0, 1.0]),
        ),
        logits=st.lists(st.sampled_from([-math.inf, -1e20, 0.0, 1e20]), min_size=3, max_size=9),
    )
    def test_no_option_makes_numbers_of_a_model_none(self, options, logits):
        """Whatever is accepted: a row's -1 is to say that the model is damaged."""
        assume(max(logits) > -math.inf)
        seen = Seen()
        for token in (0, 1, 1):
            seen.add(token, options)
        table = torch.tensor([logits])
        penalize(table, [seen], [options])
        chosen = int(choose(table, torch.tensor([0.5]), options))
        assert chosen >= 0 and logits[chosen] > -math.inf

    def test_whether_there_are_any(self):
        assert not Sampling(temperature=0.5, penalty_decay=0.5).penalizes
        for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
            assert Sampling(**{name: 0.5}).penalizes


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("top_p", math.nan),
        ("top_k", -1),
        ("top_k", 200.0),
        ("temperature", 1e39),
        ("repetition_penalty", 1e-39),
        ("presence_penalty", -1e39),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("presence_penalty", math.nan),
        ("frequency_penalty", math.inf),
        ("penalty_decay", 1.01),
        ("temperature", 1j),
        ("presence_penalty", []),
    ],
)
def test_options_are_checked(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is {re.escape(str(value))}; it must be "):
        Sampling(**{name: value})


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "penalty_decay"])
def test_a_text_is_no_number(name):
    with pytest.raises(ValueError, match=rf"^{name} is '1'; it must be "):
        Sampling(**{name: "1"})


def test_none_is_the_default():
    names = [field.name for field in dataclasses.fields(Sampling)]
    assert Sampling(**dict.fromkeys(names)) == Sampling()
    assert Sampling(temperature=None, top_k=3) == Sampling(top_k=3)


def test_a_lower_top_p_keeps_fewer():
    logits = [0.1 * n for n in range(20)]
    kept = [sum(x > 0 for x in found(logits, Sampling(top_p=p / 10))) for p in range(11)]
    assert all(less <= more for less, more in pairwise(kept))
    assert kept[0] == 1 and kept[-1] == 20


@pytest.mark.parametrize(("threads", "sizes"), [(1, range(1, 18)), (2, (1, 2, 9, 17))])
def test_a_row_is_the_same_to_the_bit_in_any_company(threads, sizes):
    """At the size of a real vocabulary, where kernels begin to share their work out."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(17, 50277, generator=generator)
    logits[3] /= 10  # a flat one: too many tokens for the shortlist
    uniform = torch.rand(17, generator=generator)
    options = [MIXED[i % len(MIXED)] for i in range(17)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ids, scores = choose(logits, uniform, options), log_probabilities(logits)
        for size in sizes:
            part = slice(17 - size, None) if size % 2 else slice(size)
            own = logits[part].clone()
            assert torch.equal(choose(own, uniform[part], options[part]), ids[part])
            assert torch.equal(log_probabilities(own), scores[part])
    finally:
        torch.set_num_threads(before)


def test_log_probabilities_are_those_of_double_precision():
    logits = 5 * torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    exact = logits.double().numpy()
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    np.testing.assert_allclose(log_probabilities(logits).numpy(), exact, atol=1e-5)

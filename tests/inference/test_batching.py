"""Slots: a row is what it is alone, whoever comes and goes; and nobody waits for long."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model, same_bits, small_bpe
from torch import Tensor

from receptance.adapters.state_tuning import StateTuning, StateTuningOptions
from receptance.engine.adapted import AdaptedModel
from receptance.engine.base import Engine
from receptance.engine.load import native_engine
from receptance.inference.batching import Slots, _Group
from receptance.inference.generation import Generation, prefill
from receptance.inference.rows import Left, Request, Row, Token
from receptance.inference.sampling import Sampling
from receptance.model import Model
from receptance.ops import native
from receptance.state import State
from receptance.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
GREEDY = Sampling(temperature=0)
KINDS = [
    GREEDY,
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(top_p=0.8),
    Sampling(top_k=3, temperature=1.5),
    Sampling(presence_penalty=0.5, frequency_penalty=0.3, penalty_decay=0.9),
    Sampling(temperature=0, repetition_penalty=1.5),
]


@cache
def make_engine(kind: str) -> Engine:
    model = make_model()
    if kind == "torch":
        return model
    if not native.is_available():
        pytest.skip("the native kernels were not built")
    return native_engine(model.config, dict(model.state_dict()))


@pytest.fixture(params=["torch", "native"])
def engine(request) -> Engine:
    return make_engine(request.param)


@pytest.fixture(scope="module")
def model() -> Model:
    return make_engine("torch")  # type: ignore[return-value]


class Recorder:
    """An engine that remembers the shapes of what it was given, and may be told to fail."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.batch_invariant = engine, engine.batch_invariant
        self.config, self.device = engine.config, engine.device
        self.calls: list[tuple[int, int]] = []
        self.heads: list[int] = []
        self.fails_at = -1

    def features(self, tokens: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, State]:
        if len(self.calls) + len(self.heads) == self.fails_at:
            self.fails_at = -1
            raise MemoryError("out of memory")
        self.calls.append(tuple(tokens.shape))
        return self._engine.features(tokens, *args, **kwargs)  # type: ignore[arg-type]

    def evaluating(self) -> AbstractContextManager[None]:
        return self._engine.evaluating()

    def head(self, features: Tensor) -> Tensor:
        if len(self.calls) + len(self.heads) == self.fails_at:
            self.fails_at = -1
            raise MemoryError("out of memory")
        self.heads.append(len(features))
        return self._engine.head(features)


def ids(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (length,), generator=generator).tolist()


def drain(slots: Slots, steps: int = 10_000) -> dict[int, list[Token]]:
    """The tokens of every row until all are through."""
    found: dict[int, list[Token]] = {}
    while slots.active or slots.waiting:
        for token in slots.step():
            found.setdefault(token.row, []).append(token)
        assert (steps := steps - 1), "it does not end"
    return found


def anonymous(tokens: Sequence[Token]) -> list[Token]:
    return [dataclasses.replace(token, row=0) for token in tokens]


def solo(
    engine: Engine, prompt: object, request: Request, state: State | None = None, **options: object
) -> list[Token]:
    slots = Slots(engine, BYTES, 1, **options)  # type: ignore[arg-type]
    slots.admit(prompt, request, state=state)  # type: ignore[arg-type]
    return drain(slots).get(0, [])


def some_request(chance: random.Random) -> Request:
    return Request(
        sampling=chance.choice(KINDS),
        max_tokens=chance.choice([0, 1, 2, 7, 20, 40]),
        stop=chance.choice([(), ("e",), ("\x13", "ab"), ("zzzzzz",)]),
        seed=chance.randrange(5),
        ignore_end_of_text=chance.random() < 0.5,
        log_probabilities=chance.random() < 0.7,
    )


def some_prompt(chance: random.Random) -> list[int]:
    return ids(chance.choice([0, 1, 2, 5, 30, 64, 65, 150]), seed=chance.randrange(4))


class Schedule:
    """Rows that are admitted and evicted at random; what came of them."""

    def __init__(self, engine: Engine, seed: int, **options: object) -> None:
        self.chance, self.engine, self.options = random.Random(seed), engine, options
        self.slots = Slots(engine, BYTES, self.chance.randint(1, 17), **options)  # type: ignore[arg-type]
        self.asked: dict[int, tuple[list[int], Request]] = {}
        self.tokens: dict[int, list[Token]] = {}
        self.left: dict[int, Left] = {}
        self.evicted: set[int] = set()

    def run(self, events: int) -> None:
        for _ in range(events):
            self.chance.choices([self.admit, self.evict, self.step], [5, 1, 8])[0]()
        while self.slots.active or self.slots.waiting:
            self.step()

    def admit(self) -> None:
        prompt, request = some_prompt(self.chance), some_request(self.chance)
        number = self.slots.admit(prompt, request)
        self.asked[number], self.tokens[number] = (prompt, request), []

    def evict(self) -> None:
        if there := self.slots.active + self.slots.waiting:
            number = self.chance.choice(there)
            self.left[number] = self.slots.evict(number)
            self.evicted.add(number)

    def step(self) -> None:
        for token in self.slots.step():
            self.tokens[token.row].append(token)
        self.left |= self.slots.left


class TestDeterministic:
    """To the bit: tokens, texts, log-probabilities, states."""

    @pytest.mark.parametrize("seed", range(6))
    def test_rows_equal_solo_runs(self, engine, seed):
        schedule = Schedule(engine, seed, deterministic=True)
        schedule.run(60)
        for row, (prompt, request) in schedule.asked.items():
            found, wanted = schedule.tokens[row], solo(engine, prompt, request, deterministic=True)
            if row not in schedule.evicted:
                assert schedule.left[row].finish_reason == (
                    found[-1].finish_reason if request.max_tokens else "length"
                )
                assert len(found) == len(wanted)
            assert anonymous(found) == wanted[: len(found)]

    @pytest.mark.parametrize("size", range(1, 18))
    def test_any_number_of_neighbors(self, engine, size):
        requests = [
            Request(sampling=KINDS[i % len(KINDS)], max_tokens=4, seed=i) for i in range(size)
        ]
        slots = Slots(engine, BYTES, size, deterministic=True)
        for i, request in enumerate(requests):
            slots.admit(ids(3 + 5 * i, seed=i), request)
        together = drain(slots)
        for i, request in enumerate(requests):
            alone = solo(engine, ids(3 + 5 * i, seed=i), request, deterministic=True)
            assert anonymous(together[i]) == alone

    def test_states_are_those_of_solo_runs(self, engine):
        slots = Slots(engine, BYTES, 3, deterministic=True)
        for i in range(3):
            slots.admit(ids(70 + 40 * i, seed=i), Request(sampling=GREEDY, max_tokens=99))
        for _ in range(15):
            slots.step()
        for i in range(3):
            read = slots.evict(i)
            assert read.state is not None
            alone = Slots(engine, BYTES, 1, deterministic=True)
            alone.admit(ids(70 + 40 * i, seed=i), Request(sampling=GREEDY, max_tokens=99))
            while True:
                alone.step()
                (group,) = [g for g in (alone._reading, alone._running) if g.rows]
                if group.state is not None and torch.equal(group.state.tokens, read.state.tokens):
                    break
            wanted = alone.evict(0)
            assert wanted.state is not None and wanted.unread == read.unread
            assert same_bits(wanted.state.tensors, read.state.tensors)

    def test_of_a_generation(self, engine):
        def run(prompts: Sequence[list[int]]) -> list[Token]:
            return list(Generation(engine, BYTES, prompts, max_tokens=9, deterministic=True))

        prompts = [ids(n, seed=n) for n in (80, 3, 130, 64)]
        together = run(prompts)
        for row, prompt in enumerate(prompts):
            assert anonymous([t for t in together if t.row == row]) == run([prompt])


class TestFast:
    @pytest.mark.parametrize("seed", range(4))
    def test_greedy_rows_take_the_likeliest_token(self, model, seed):
        """Wherever rounding cannot decide, by the logits of the whole text in one piece."""
        chance = random.Random(seed)
        slots = Slots(model, BYTES, chance.randint(2, 17))
        prompts, tokens = {}, {}
        for _ in range(30):
            if chance.random() < 0.6:
                prompt = some_prompt(chance) or [65]
                request = Request(
                    sampling=GREEDY, max_tokens=chance.randint(1, 25), ignore_end_of_text=True
                )
                number = slots.admit(prompt, request)
                prompts[number], tokens[number] = prompt, []
            elif chance.random() < 0.2 and slots.active:
                slots.evict(chance.choice(slots.active))
            for token in slots.step():
                tokens[token.row].append(token)
        for row, own in drain(slots).items():
            tokens[row] += own
        compared = sum(self.check(model, prompts[row], tokens[row]) for row in prompts)
        assert compared > 50

    @torch.no_grad()
    def check(self, model: Model, prompt: list[int], tokens: list[Token]) -> int:
        written = [token.id for token in tokens]
        logits = model(torch.tensor([prompt + written]))[0][0, len(prompt) - 1 : -1]
        largest = logits.topk(2).values
        clear = largest[:, 0] - largest[:, 1] > 1e-4
        assert torch.equal(torch.tensor(written).long()[clear], logits.argmax(-1)[clear])
        return int(clear.sum())

    @pytest.mark.slow
    @given(st.integers(0, 10_000))
    @settings(max_examples=12)
    def test_rows_equal_solo_runs_but_for_rounding(self, seed):
        schedule = Schedule(make_engine("torch"), seed)
        schedule.run(15)
        for row, (prompt, request) in schedule.asked.items():
            found, wanted = schedule.tokens[row], solo(schedule.engine, prompt, request)
            for one, other in zip(found, wanted, strict=False):
                assert (one.id, one.text, one.finish_reason) == (
                    other.id,
                    other.text,
                    other.finish_reason,
                )
                assert (one.log_probability is None) == (not request.log_probabilities)
                assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)

    def test_a_random_row_draws_its_own_numbers(self, engine):
        """A neighbor's seed, options or arrival move nothing."""
        request = Request(max_tokens=20, seed=42, sampling=Sampling(temperature=0.8))
        wanted = solo(engine, "The", request)
        for other in (Request(seed=42), Request(seed=1), Request(sampling=GREEDY)):
            slots = Slots(engine, BYTES, 2)
            slots.admit("neighbor", other)
            slots.step()
            number = slots.admit("The", request)
            assert [t.id for t in drain(slots)[number]] == [t.id for t in wanted]


class TestLeaving:
    @pytest.mark.parametrize("steps", range(12))
    @pytest.mark.parametrize("length", [1, 40])
    def test_what_is_left_goes_on_exactly(self, engine, steps, length):
        """Out of the queue, out of the middle of a prompt, out of a generation."""
        options = {"chunk": 8, "chunk_beside": 4, "deterministic": True}
        request = Request(sampling=GREEDY, max_tokens=30, ignore_end_of_text=True)
        wanted = [t.id for t in solo(engine, ids(length), request)]
        slots = Slots(engine, BYTES, 2, **options)
        slots.admit(ids(3, seed=5), Request(max_tokens=50, ignore_end_of_text=True))
        number = slots.admit(ids(length), request)
        found = [t.id for _ in range(steps) for t in slots.step() if t.row == number]
        left = slots.evict(number)
        assert left.unread
        read = 0 if left.state is None else int(left.state.tokens)
        assert read + len(left.unread) == length + len(found)
        rest = solo(
            engine,
            left.unread,
            dataclasses.replace(request, max_tokens=30 - len(found)),
            left.state,
            **options,
        )
        assert found + [t.id for t in rest] == wanted

    def test_a_finished_row_leaves_its_state_for_one_step(self, model):
        slots = Slots(model, BYTES, 2)
        slots.admit("one", Request(sampling=GREEDY, max_tokens=1))
        slots.admit("two", Request(sampling=GREEDY, max_tokens=2))
        (first, _), left = slots.step(), slots.left
        assert list(left) == [0]
        assert left[0].unread == [first.id] and int(left[0].state.tokens) == 3
        slots.step()
        assert list(slots.left) == [1]
        slots.step()
        assert not slots.left

    def test_what_was_held_back_is_not_lost(self, model, monkeypatch):
        written = iter(b"ab")
        monkeypatch.setattr(
            "receptance.inference.sampling.choose", lambda *_: torch.tensor([next(written)])
        )
        slots = Slots(model, BYTES, 1)
        slots.admit("x", Request(stop="abc"))
        assert [t.text for _ in range(2) for t in slots.step()] == ["", ""]
        assert slots.evict(0).text == "ab"

    def test_a_row_that_is_not_there(self, model):
        slots = Slots(model, BYTES, 1)
        slots.admit("x", Request(max_tokens=1))
        slots.step()
        for number in (0, 1):
            with pytest.raises(ValueError, match=f"no row {number}"):
                slots.evict(number)

    def test_a_slot_keeps_nothing_of_its_last_row(self, engine):
        request = Request(sampling=KINDS[5], max_tokens=20, seed=3)
        slots = Slots(engine, BYTES, 1)
        wanted = solo(engine, "hello", request)
        for _ in range(3):
            slots.admit("hello", request)
            slots.admit("something else", Request(sampling=KINDS[6], max_tokens=7, stop="e"))
        found = drain(slots)
        for number in (0, 2, 4):
            assert anonymous(found[number]) == wanted


class TestWaiting:
    def test_first_come_first_served(self, model):
        slots = Slots(model, BYTES, 2)
        for n in range(5):
            slots.admit(f"{n}", Request(max_tokens=3, ignore_end_of_text=True))
        assert (slots.active, slots.waiting, slots.free) == ([], [0, 1, 2, 3, 4], 2)
        assert [t.row for t in slots.step()] == [0, 1]
        assert (slots.active, slots.waiting, slots.free) == ([0, 1], [2, 3, 4], 0)
        slots.evict(3)
        slots.evict(0)
        assert [t.row for t in slots.step()] == [1, 2]
        assert slots.waiting == [4]
        drain(slots)
        assert slots.free == 2

    def test_a_free_slot_is_filled_in_the_next_step(self, model):
        slots = Slots(model, BYTES, 3)
        for n in range(30):
            slots.admit(f"{n}", Request(max_tokens=1 + n % 3, ignore_end_of_text=True))
        while slots.waiting:
            waiting, free = len(slots.waiting), slots.free
            slots.step()
            assert len(slots.waiting) == max(0, waiting - free)
        drain(slots)

    def test_nobody_generates_less_often_for_a_long_prompt(self, model):
        recorder = Recorder(model)
        slots = Slots(recorder, BYTES, 4, chunk=64, chunk_beside=16)
        forever = Request(max_tokens=10_000, ignore_end_of_text=True)
        for _ in range(2):
            slots.admit("x", forever)
        slots.step()
        slots.admit(ids(500), forever)
        recorder.calls.clear()
        for _ in range(31):
            assert [t.row for t in slots.step()] == [0, 1]
        assert set(recorder.calls) == {(1, 16), (2, 1)}
        assert [t.row for t in slots.step()] == [0, 1, 2]

    @pytest.mark.parametrize("deterministic", [False, True])
    def test_a_short_prompt_is_not_stuck_behind_long_ones(self, model, deterministic):
        slots = Slots(model, BYTES, 8, chunk=64, chunk_beside=16, deterministic=deterministic)
        for _ in range(6):  # more than the four that a step reads on when each reads alone
            slots.admit(ids(5000), Request())
        slots.step()
        short = slots.admit(ids(20), Request())
        steps = next(n for n in range(1, 99) if any(t.row == short for t in slots.step()))
        assert steps <= 8

    @pytest.mark.parametrize("deterministic", [False, True])
    @pytest.mark.parametrize("rows", [1, 3, 17, 40])
    def test_calls_are_bounded(self, model, rows, deterministic):
        recorder = Recorder(model)
        slots = Slots(recorder, BYTES, rows, chunk=32, chunk_beside=8, deterministic=deterministic)
        for n in range(rows):
            slots.admit(ids(2 + 7 * n), Request(max_tokens=2))
        assert len(drain(slots)) == rows
        assert all(batch * time <= 32 for batch, time in recorder.calls if time > 1)
        assert sum(recorder.heads) <= 2 * rows  # a prompt wants it for its last position alone

    def test_in_lockstep_all_prompts_are_read_first(self, model):
        recorder = Recorder(model)
        slots = Slots(recorder, BYTES, 3, lockstep=True, chunk=12)
        for n in (1, 30, 100):
            slots.admit(ids(n), Request(max_tokens=3, ignore_end_of_text=True))
        for _ in range(3):
            assert [t.row for t in slots.step()] == [0, 1, 2]
        assert slots.step() == []
        assert recorder.heads == [3, 3, 3]

    def test_nothing_to_do(self, model):
        assert Slots(model, BYTES).step() == []


def broken(state: State, change: Callable[[Tensor], Tensor]) -> State:
    tensors = {name: change(x) for name, x in state.tensors.items()}
    return State(tensors, state.tokens)


class TestTrouble:
    """What is wrong with one row is the trouble of that row."""

    BAD: tuple[Callable[[Slots, State], object], ...] = (
        lambda slots, state: slots.admit([5, 256]),
        lambda slots, state: slots.admit([-1]),
        lambda slots, state: slots.admit([0.5]),
        lambda slots, state: slots.admit(["a"]),
        lambda slots, state: slots.admit([[1], [2]]),
        lambda slots, state: slots.admit([1 << 70]),
        lambda slots, state: slots.admit(7),
        lambda slots, state: slots.admit(None),
        lambda slots, state: slots.admit("x", Request(max_tokens=-1)),
        lambda slots, state: slots.admit("x", Request(max_tokens=2.5)),
        lambda slots, state: slots.admit("x", Request(seed=-1)),
        lambda slots, state: slots.admit("x", Request(seed="7")),
        lambda slots, state: slots.admit("x", Request(stop=["a", ""])),
        lambda slots, state: slots.admit("x", Request(stop=[3])),
        lambda slots, state: slots.admit("x", Request(stop=3)),
        lambda slots, state: slots.admit("x", Request(stop=b"x")),
        lambda slots, state: slots.admit("x", Request(sampling="greedy")),
        lambda slots, state: slots.admit("x", Request(sampling=Sampling(temperature=-1))),
        lambda slots, state: slots.admit("x", state=State.cat([state, state])),
        lambda slots, state: slots.admit("x", state=broken(state, lambda x: x[:1])),
        lambda slots, state: slots.admit("x", state=broken(state, lambda x: x[..., :8])),
        lambda slots, state: slots.admit("x", state=State({}, state.tokens)),
    )

    @pytest.mark.parametrize("bad", BAD)
    def test_a_bad_request_is_refused_and_nobody_notices(self, model, bad):
        requests = [Request(sampling=kind, max_tokens=12, seed=9) for kind in KINDS[:3]]
        slots = Slots(model, BYTES, 4, deterministic=True)
        for request in requests:
            slots.admit("fox", request)
        found = {n: [token] for n, token in enumerate(slots.step())}
        state = Slots(model, BYTES)._nothing()
        with pytest.raises(ValueError) as caught:
            bad(slots, state)
        assert "\n" not in str(caught.value)
        for row, tokens in drain(slots).items():
            found[row] += tokens
        for row, request in enumerate(requests):
            assert anonymous(found[row]) == solo(model, "fox", request, deterministic=True)

    @pytest.mark.parametrize("empty", ["", [], b""])
    def test_an_end_of_text_that_the_model_does_not_know(self, model, empty):
        tokenizer = ByteTokenizer()
        tokenizer.end_of_text = 300
        with pytest.raises(ValueError, match="token id 300 is out of range"):
            Slots(model, tokenizer).admit(empty)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_damaged_state_ends_its_own_row(self, engine, kind):
        request = Request(sampling=kind, max_tokens=12, seed=9)
        damaged = broken(Slots(engine, BYTES)._nothing(), lambda x: x * torch.nan)
        slots = Slots(engine, BYTES, 3, deterministic=True)
        slots.admit("fox", request)
        slots.admit("fox", request, state=damaged)
        slots.admit("fox", request)
        found = drain(slots)
        assert [(t.id, t.text, t.finish_reason) for t in found[1]] == [(-1, "", "error")]
        for row in (0, 2):
            assert anonymous(found[row]) == solo(engine, "fox", request, deterministic=True)

    def test_a_damaged_row_leaves_nothing_to_go_on_with(self, model):
        slots = Slots(model, BYTES, 1)
        slots.admit("fox", state=broken(slots._nothing(), lambda x: x * torch.nan))
        slots.step()
        assert slots.left[0].unread == []

    def test_a_damaged_state_is_not_passed_over_by_a_generation(self, model):
        damaged = broken(Slots(model, BYTES)._nothing(), lambda x: x * torch.nan)
        with pytest.raises(ValueError, match="row 0: the model's logits are not numbers"):
            list(Generation(model, BYTES, ["fox"], state=damaged))

    @pytest.mark.parametrize("deterministic", [False, True])
    def test_an_engine_that_fails_loses_nothing(self, model, deterministic):
        def run(fails_at: int) -> tuple[dict[int, list[Token]], int]:
            recorder = Recorder(model)
            recorder.fails_at = fails_at
            slots = Slots(recorder, BYTES, 2, chunk=8, chunk_beside=8, deterministic=deterministic)
            for n, kind in enumerate(KINDS[1:5]):
                slots.admit(ids(3 + 9 * n), Request(sampling=kind, max_tokens=6, seed=n))
            found: dict[int, list[Token]] = {}
            while slots.active or slots.waiting:
                try:
                    for token in slots.step():
                        found.setdefault(token.row, []).append(token)
                except MemoryError:
                    assert sorted(slots.active + slots.waiting)
            return found, len(recorder.calls) + len(recorder.heads)

        wanted, calls = run(-1)
        for fails_at in range(0, calls, 3):
            assert run(fails_at)[0] == wanted

    def test_after_a_failure_rows_can_be_evicted(self, model):
        recorder = Recorder(model)
        slots = Slots(recorder, BYTES, 2)
        slots.admit("one", Request())
        slots.step()
        slots.admit("two", Request())
        recorder.fails_at = len(recorder.calls) + len(recorder.heads) + 1
        with pytest.raises(MemoryError):
            slots.step()
        assert slots.evict(1).unread == BYTES.encode("two")
        assert len(slots.evict(0).unread) == 1
        assert slots.free == 2

    @pytest.mark.parametrize("name", ["capacity", "chunk", "chunk_beside"])
    def test_options_are_checked(self, model, name):
        with pytest.raises(ValueError, match=f"^{name} is 0; it must be at least 1"):
            Slots(model, BYTES, **{name: 0})


class TestText:
    def test_stop_strings_match_across_tokens_and_are_a_rows_own(self, model, monkeypatch):
        steps = iter(zip(b"one stop", b"two stop", b"a\xc3\xa9 stopx", strict=False))
        monkeypatch.setattr(
            "receptance.inference.sampling.choose",
            lambda logits, *_: torch.tensor(list(next(steps)))[: len(logits)],
        )
        slots = Slots(model, BYTES, 3)
        for stop in ((), ("stop",), (" st",)):
            slots.admit("x", Request(stop=stop, max_tokens=7))
        found = drain(slots)
        texts = ["".join(t.text for t in found[row]) for row in range(3)]
        assert texts == ["one sto", "two sto", "aé"]
        assert [found[row][-1].finish_reason for row in range(3)] == ["length", "length", "stop"]

    def test_one_stop_string_need_not_be_in_a_list(self):
        assert Request(stop="abc").stop == ("abc",)

    def test_whole_numbers_of_other_libraries_will_do(self):
        request = Request(seed=np.int64(7), max_tokens=torch.tensor(3))
        assert request == Request(seed=7, max_tokens=3)
        assert type(request.seed) is int


class TestNothingToGenerate:
    """A `max_tokens` of 0: the prompt is read, and that is all."""

    @pytest.mark.parametrize("deterministic", [False, True])
    @pytest.mark.parametrize("prompt", ["x", "a longer one", ""])
    def test_the_prompt_is_read_to_its_end(self, engine, prompt, deterministic):
        slots = Slots(engine, BYTES, 2, chunk=4, deterministic=deterministic)
        slots.admit(prompt, Request(max_tokens=0))
        while slots.active or slots.waiting:
            assert slots.step() == []
        (left,) = slots.left.values()
        assert (left.unread, left.text, left.finish_reason) == ([], "", "length")
        _, wanted = prefill(engine, [BYTES.encode(prompt) or [0]])
        assert int(left.state.tokens) == int(wanted.tokens)
        for name, x in wanted.tensors.items():
            torch.testing.assert_close(left.state.tensors[name], x, atol=1e-5, rtol=1e-5)
        assert slots.step() == [] and slots.left == {}

    def test_neighbors_generate_and_the_head_is_theirs(self, model):
        recorder = Recorder(model)
        slots = Slots(recorder, BYTES, 3)
        request = Request(max_tokens=3, ignore_end_of_text=True)
        for own in (Request(max_tokens=0), request, Request(max_tokens=0)):
            slots.admit("fox", own)
        found = drain(slots)
        assert list(found) == [1] and recorder.heads == [1, 1, 1]
        assert [t.id for t in found[1]] == [t.id for t in solo(model, "fox", request)]


class TestGroups:
    def test_a_permutation_is_obeyed(self, model):
        """An index of full length need not be in order."""
        rows = tuple(Row(n, Request(), torch.tensor([n]), BYTES) for n in range(3))
        _, state = prefill(model, [[1], [2, 3], [4, 5, 6]])
        group = _Group(rows, (1, 2, 3), state)
        found = group.pick([2, 0, 1])
        assert [row.number for row in found.rows] == [2, 0, 1]
        assert found.read == (3, 1, 2)
        assert found.state is not None and found.state.tokens.tolist() == [3, 1, 2]
        assert same_bits(found.state.tensors, state.rows([2, 0, 1]).tensors)
        assert group.pick([0, 1, 2]) is group


def test_bytes_are_a_text(model):
    """Which the tokenizer encodes; they are not token ids."""
    slots = Slots(make_model(300), small_bpe(), 2)
    text = "little foxes, naïvely — 狐"
    for prompt in (text, text.encode(), bytearray(text.encode())):
        number = slots.admit(prompt)
        assert slots.evict(number).unread == small_bpe().encode(text) != list(text.encode())


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_model_in_training_mode_drops_nothing_out(deterministic):
    model = make_model()
    model.dropout = 0.5
    requests = [Request(sampling=kind, max_tokens=9, seed=3) for kind in KINDS[:3]]

    def run() -> dict[int, list[Token]]:
        slots = Slots(model, BYTES, 3, deterministic=deterministic)
        state = prefill(model, [[5, 6]])[1]
        for request in requests:
            slots.admit("fox", request, state=state)
        return drain(slots)

    wanted = run()
    model.train()
    model.blocks[1].eval()  # as someone does who trains a part of a model
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    assert run() == wanted
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)


def test_an_engine_that_fails_leaves_the_mode_as_it_was():
    model = make_model().train()
    recorder = Recorder(model)
    recorder.fails_at = 0
    slots = Slots(recorder, BYTES, 1)
    slots.admit("x")
    with pytest.raises(MemoryError):
        slots.step()
    assert all(module.training for module in model.modules())


def test_digits_do_not_count(model, monkeypatch):
    """A frequency penalty lets a row repeat "1", and "a" only as long as it pays."""
    monkeypatch.setattr(
        Slots, "_logits", lambda self, x: torch.zeros(len(x), 256).index_fill_(1, at, 1.0)
    )
    for character, repeats in (("1", True), (" ", True), ("\t", True), ("a", False)):
        at = torch.tensor([ord(character)])
        for options, wanted in (({}, repeats), ({"count_digits": True}, False)):
            kind = Sampling(temperature=0, frequency_penalty=0.3, penalty_decay=1, **options)
            request = Request(sampling=kind, max_tokens=9, ignore_end_of_text=True)
            found = solo(model, "x", request)
            assert [t.text for t in found[:4]] == [character] * 4
            assert all(t.text == character for t in found) == wanted


def test_a_penalty_is_a_rows_own(model):
    """Of three greedy rows the penalized one repeats nothing."""
    slots = Slots(model, BYTES, 3)
    kinds = (GREEDY, Sampling(temperature=0, presence_penalty=1000), GREEDY)
    for kind in kinds:
        slots.admit("x", Request(sampling=kind, max_tokens=100, ignore_end_of_text=True))
    found = drain(slots)
    written = [[t.id for t in found[row]] for row in range(3)]
    assert len(set(written[1])) == 100
    assert written[0] == written[2] != written[1]
    assert len(set(written[0])) < 100


def test_states_of_any_dtype_are_taken(model):
    slots = Slots(model, BYTES, 2)
    slots.admit("one", Request(sampling=GREEDY, max_tokens=1))
    slots.step()
    state = slots.left[0].state
    assert state is not None
    double = broken(state, Tensor.double)
    request = Request(sampling=GREEDY, max_tokens=8)
    for own in (state, double):
        slots.admit("two", request, state=own)
    found = drain(slots)
    assert [t.id for t in found[1]] == [t.id for t in found[2]]
    assert double.tensors["time_shift"].dtype == torch.float64


def test_rows_begin_where_the_engine_does():
    """An adapter's learned state is what a row without a state begins from."""
    model = make_model()
    tuned = StateTuning(model, StateTuningOptions(start_key=1.0))
    with torch.no_grad():
        tuned.value.fill_(3.0)
    initial = tuned.initial_state().detach()
    request = Request(sampling=GREEDY, max_tokens=8)
    wanted = solo(model, "fox", request, initial)
    assert [t.id for t in wanted] != [t.id for t in solo(model, "fox", request)]
    slots = Slots(AdaptedModel(model, tuned), BYTES, 3, chunk=2)
    for _ in range(3):
        slots.admit("fox", request)
        slots.step()
    for tokens in drain(slots).values():
        assert [t.id for t in tokens] == [t.id for t in wanted][-len(tokens) :]

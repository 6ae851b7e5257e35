"""Prefill and decoding: the same whatever the chunks, the company, the cuts between tokens."""

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model, same_bits, small_bpe
from torch import Tensor

import receptance
from receptance.config import ModelConfig
from receptance.inference import generation
from receptance.inference.generation import Generation, Token, prefill
from receptance.inference.rows import Request
from receptance.inference.sampling import Sampling
from receptance.inference.scoring import negative_log_likelihood
from receptance.model import Model
from receptance.state import State
from receptance.tokenizer import ByteTokenizer, Tokenizer

BYTES = ByteTokenizer()
GREEDY = Sampling(temperature=0)
PENALISED = Sampling(top_p=0.9, presence_penalty=0.5, frequency_penalty=0.2, penalty_decay=0.9)


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model()


def ids(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (length,), generator=generator).tolist()


def rows_of(tokens: Sequence[Token], number: int) -> list[list[Token]]:
    """Tokens by row, as if each row had been alone; equal if their scores are nearly."""
    rows: list[list[Token]] = [[] for _ in range(number)]
    for token in tokens:
        score = pytest.approx(token.log_probability, abs=1e-4)
        rows[token.row].append(dataclasses.replace(token, row=0, log_probability=score))
    return rows


def text_of(tokens: Sequence[Token]) -> str:
    return "".join(token.text for token in tokens)


class TestPrefill:
    @pytest.mark.parametrize("chunk", [1, 3, 16, 17, 100])
    def test_chunks_change_nothing(self, chunk, model, monkeypatch):
        prompts = [ids(50), ids(17, seed=1), ids(1, seed=2), ids(33, seed=3)]
        wanted, state = prefill(model, prompts)
        monkeypatch.setattr(generation, "PREFILL_CHUNK", chunk)
        found, chunked = prefill(model, prompts)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        assert torch.equal(chunked.tokens, state.tokens)
        after = [model(torch.tensor([[7]] * 4), s)[0] for s in (state, chunked)]
        torch.testing.assert_close(*after, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("chunk", [4, 512])
    def test_each_row_is_as_if_alone(self, chunk, model, monkeypatch):
        monkeypatch.setattr(generation, "PREFILL_CHUNK", chunk)
        prompts = [ids(n, seed=n) for n in (1, 9, 4, 30, 8)]
        logits, state = prefill(model, prompts)
        for row, prompt in enumerate(prompts):
            alone, alone_state = prefill(model, [prompt])
            torch.testing.assert_close(logits[[row]], alone, atol=1e-5, rtol=1e-5)
            assert state.tokens[row] == alone_state.tokens == len(prompt)

    def test_it_is_the_model_at_the_last_position(self, model):
        prompt = ids(20)
        logits, _ = prefill(model, [prompt])
        wanted = model(torch.tensor([prompt]))[0][:, -1]
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
        assert not logits.requires_grad

    def test_it_continues_a_state(self, model):
        prompt = ids(20)
        _, state = prefill(model, [prompt[:13]])
        logits, after = prefill(model, [prompt[13:]], state)
        torch.testing.assert_close(logits, prefill(model, [prompt])[0], atol=1e-5, rtol=1e-5)
        assert after.tokens.tolist() == [20]

    @pytest.mark.parametrize(("rows", "longest"), [(1, 12), (5, 2), (30, 1)])
    def test_the_positions_of_a_call_are_bounded(self, rows, longest, model, monkeypatch):
        """Of all prompts together, but at least one of each."""
        monkeypatch.setattr(generation, "PREFILL_CHUNK", 12)
        shapes, features = [], model.features

        def watched(tokens: Tensor, *args: object, **kwargs: object) -> object:
            shapes.append(tuple(tokens.shape))
            return features(tokens, *args, **kwargs)

        monkeypatch.setattr(model, "features", watched)
        prefill(model, [ids(20 + n) for n in range(rows)])
        assert max(shapes) == (rows, longest)

    def test_a_prompt_without_tokens_is_refused(self, model):
        with pytest.raises(ValueError, match="without tokens"):
            prefill(model, [[1], []])
        with pytest.raises(ValueError, match="no prompt"):
            prefill(model, [])

    @pytest.mark.parametrize("wrong", ["Once", b"Once", ["Once"], [b"Once"]])
    def test_text_is_not_taken_for_ids(self, wrong, model):
        """Bytes are numbers too, but not the ids of a tokenizer."""
        with pytest.raises(ValueError, match="prefill reads token ids, not text; encode it"):
            prefill(model, wrong)

    @pytest.mark.parametrize("wrong", [None, 7, [1, 2], [None], [[0.5]], [["a"]]])
    def test_what_is_no_list_of_prompts_is_refused(self, wrong, model):
        with pytest.raises(ValueError, match=r"^(a prompt|prompts) is ") as caught:
            prefill(model, wrong)
        assert "\n" not in str(caught.value)

    def test_ids_in_tensors_and_arrays_will_do(self, model):
        wanted, _ = prefill(model, [[1, 2], [3]])
        for kind in (torch.tensor, np.array):
            assert torch.equal(prefill(model, [kind([1, 2]), kind([3])])[0], wanted)

    @pytest.mark.parametrize("chunk", [2, 512])
    def test_a_model_in_training_mode_drops_nothing_out(self, chunk, monkeypatch):
        monkeypatch.setattr(generation, "PREFILL_CHUNK", chunk)
        model = make_model()
        model.dropout = 0.5
        wanted, _ = prefill(model, [ids(9), ids(4)])
        assert torch.equal(prefill(model.train(), [ids(9), ids(4)])[0], wanted)
        assert all(module.training for module in model.modules())


class TestBatches:
    """Several prompts of different lengths are one batch whose rows equal solo runs."""

    PROMPTS = ("The quick brown fox", "", "été", "one two three four five six seven eight")

    @pytest.mark.parametrize("options", [GREEDY, Sampling(), PENALISED], ids=["t0", "t1", "pen"])
    @pytest.mark.parametrize("stop", [(), ("e", "\x13")])
    def test_rows_equal_solo_runs(self, options, stop, model):
        def run(prompts: Sequence[str], seeds: Sequence[int]) -> list[Token]:
            return list(
                Generation(
                    model,
                    BYTES,
                    prompts,
                    sampling=options,
                    seed=seeds,
                    stop=stop,
                    max_tokens=60,
                )
            )

        seeds = [3, 4, 5, 6]
        together = rows_of(run(self.PROMPTS, seeds), 4)
        for row, prompt in enumerate(self.PROMPTS):
            assert run([prompt], [seeds[row]]) == together[row]

    def test_rows_finish_at_different_times(self, model):
        tokens = list(Generation(model, BYTES, self.PROMPTS, stop=("e", "\x13"), seed=[3, 4, 5, 6]))
        rows = rows_of(tokens, 4)
        assert len({len(row) for row in rows}) > 2
        for row in rows:
            assert row[-1].finish_reason
            assert not any(token.finish_reason for token in row[:-1])

    def test_one_seed_serves_every_row(self, model):
        first, second = receptance.generate(model, BYTES, ["same", "same"], seed=7)
        assert first == second

    def test_seeds_may_be_numbers_of_numpy(self, model):
        wanted = receptance.generate(model, BYTES, "x", seed=7, max_tokens=9)
        for seed in (np.int64(7), np.array([7])):
            assert receptance.generate(model, BYTES, "x", seed=seed, max_tokens=9) == wanted

    def test_several_seeds_sample_one_prompt_several_times(self, model):
        texts = receptance.generate(model, BYTES, ["same"] * 3, seed=[7, 8, 7], max_tokens=20)
        assert texts[0] == texts[2] != texts[1]

    def test_the_global_generator_neither_decides_nor_moves(self, model):
        texts = []
        for seed in (0, 1):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                before = torch.get_rng_state()
                texts.append(receptance.generate(model, BYTES, "x", max_tokens=20))
                assert torch.equal(torch.get_rng_state(), before)
        assert texts[0] == texts[1]

    def test_generate_returns_what_it_was_given(self, model):
        one = receptance.generate(model, BYTES, "x", max_tokens=5, seed=1)
        assert isinstance(one, str)
        assert receptance.generate(model, BYTES, ["x"], max_tokens=5, seed=1) == [one]

    def test_token_ids_are_prompts_too(self, model):
        texts = [
            text_of(list(Generation(model, BYTES, [prompt], max_tokens=20)))
            for prompt in ("fox", [102, 111, 120], (102, 111, 120))
        ]
        assert texts[0] == texts[1] == texts[2]

    def test_a_loop_goes_on_where_the_last_one_stopped(self, model):
        """In the middle of a step too; nothing begins anew, and nothing comes after the end."""
        prompts = ["one", "two", "three"]
        wanted = list(Generation(model, BYTES, prompts, max_tokens=9, seed=3))
        generation = Generation(model, BYTES, prompts, max_tokens=9, seed=3)
        found = []
        for size in (4, 0, 1, 5):
            found += itertools.islice(generation, size)
        for token in generation:
            found.append(token)
            if len(found) == 14:
                break
        assert len(found) == 14
        found.append(next(generation))
        assert found + list(generation) == wanted
        assert list(generation) == []

    @pytest.mark.parametrize("single", ["Once", b"Once"])
    def test_a_single_text_is_one_prompt(self, model, single):
        wanted = list(Generation(model, BYTES, ["Once"], max_tokens=9))
        generation = Generation(model, BYTES, single, max_tokens=9)
        assert len(generation.states) == 1
        assert list(generation) == wanted
        assert receptance.generate(model, BYTES, single, max_tokens=9) == text_of(wanted)

    def test_an_empty_prompt_begins_after_an_end_of_text(self, model):
        empty, ended = rows_of(list(Generation(model, BYTES, ["", [0]], max_tokens=20)), 2)
        assert [token.id for token in empty] == [token.id for token in ended]


def script(monkeypatch: pytest.MonkeyPatch, *rows: Sequence[int]) -> None:
    """Let the sampler choose these ids, one row after another finishing with its last."""
    steps = iter([[row[i] for row in rows if i < len(row)] for i in range(max(map(len, rows)))])

    def choose(logits: Tensor, uniform: Tensor, options: Sampling) -> Tensor:
        return torch.tensor(next(steps))

    monkeypatch.setattr("receptance.inference.sampling.choose", choose)


def play(tokenizer: Tokenizer, written: Sequence[int], **options: object) -> list[Token]:
    """The tokens of a generation in which the model writes these ids."""
    with pytest.MonkeyPatch.context() as patch:
        script(patch, written)
        tiny = make_model(tokenizer.vocab_size, width=8, layers=1)
        return list(
            Generation(tiny, tokenizer, ["x"], max_tokens=len(written), **options)  # type: ignore[arg-type]
        )


class TestText:
    @given(st.lists(st.integers(0, 255), min_size=1, max_size=30))
    @settings(max_examples=40)
    def test_pieces_make_up_the_decoding_of_all_bytes(self, written):
        """Broken UTF-8 and token 0 included."""
        tokens = play(BYTES, written, ignore_end_of_text=True)
        assert [token.id for token in tokens] == written
        assert text_of(tokens) == BYTES.decode(written)

    @given(st.lists(st.integers(0, 299), min_size=1, max_size=30))
    @settings(max_examples=40)
    def test_pieces_make_up_the_decoding_of_all_ids(self, written):
        tokens = play(small_bpe(), written, ignore_end_of_text=True, stop=("zzz", "狐狸"))
        if tokens[-1].finish_reason == "length":
            assert text_of(tokens) == small_bpe().decode(written)

    @given(st.text(min_size=1, max_size=12))
    @settings(max_examples=40)
    def test_no_piece_holds_part_of_a_character(self, text):
        for token in play(BYTES, BYTES.encode(text), ignore_end_of_text=True):
            assert "\ufffd" not in token.text or "\ufffd" in text

    def test_text_comes_as_soon_as_it_is_certain(self):
        tokens = play(BYTES, "aé!".encode(), stop=("!?",))
        assert [token.text for token in tokens] == ["a", "", "é", "!"]

    def test_an_end_of_text_ends_it(self):
        tokens = play(BYTES, [97, 98, 0, 99])
        assert text_of(tokens) == "ab"
        assert tokens[-1].id == 0
        assert [token.finish_reason for token in tokens] == [None, None, "end_of_text"]

    def test_an_unfinished_character_is_shown_at_the_end(self):
        for written in ([97, 0xC3], [97, 0xC3, 0]):
            assert text_of(play(BYTES, written)) == "a\ufffd"

    def test_an_end_of_text_can_be_ignored(self):
        tokens = play(BYTES, [97, 0, 99], ignore_end_of_text=True)
        assert text_of(tokens) == "a\0c"
        assert tokens[-1].finish_reason == "length"


def stopped(text: str, stops: Sequence[str]) -> str | None:
    """What is left of a text that is read character by character until a stop string is complete;
    None if none ever is."""
    for end in range(1, len(text) + 1):
        if complete := [s for s in stops if text[:end].endswith(s)]:
            return text[: end - max(map(len, complete))]
    return None


class TestStops:
    @given(
        text=st.text("ab\n", min_size=1, max_size=20),
        stops=st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
        cuts=st.sets(st.integers(0, 19)),
    )
    @settings(max_examples=150)
    def test_however_the_text_is_cut_into_tokens(self, text, stops, cuts):
        class Pieces(ByteTokenizer):
            """Whose ids are the pieces of the text."""

            def __init__(self) -> None:
                super().__init__()
                edges = sorted({0, *(c for c in cuts if c < len(text)), len(text)})
                self._tokens = [text[a:b].encode() for a, b in pairwise(edges)]
                self.end_of_text = -1

        tokenizer = Pieces()
        with pytest.MonkeyPatch.context() as patch:
            script(patch, range(tokenizer.vocab_size))
            model = make_model(256, width=8, layers=1)
            tokens = list(
                Generation(model, tokenizer, [[1]], stop=stops, max_tokens=tokenizer.vocab_size)
            )
        wanted = stopped(text, stops)
        assert text_of(tokens) == (text if wanted is None else wanted)
        assert tokens[-1].finish_reason == ("length" if wanted is None else "stop")

    @pytest.mark.parametrize(
        ("written", "stops", "shown"),
        [
            ("hello\n\nworld", ["\n\n"], "hello"),
            ("aab", ["ab"], "a"),
            ("aaab", ["aab"], "a"),
            ("abcd", ["abcd", "bc"], "a"),
            ("stop", ["stop"], ""),
            ("naïve", ["ï"], "na"),
            ("nonstop", ["stops"], "nonstop"),
        ],
    )
    def test_examples(self, written, stops, shown):
        tokens = play(BYTES, written.encode(), stop=stops)
        assert text_of(tokens) == shown

    def test_one_that_is_complete_with_the_last_token(self):
        tokens = play(BYTES, b"ab", stop=["ab"])
        assert text_of(tokens) == ""
        assert tokens[-1].finish_reason == "stop"

    def test_its_first_half_is_shown_when_the_text_ends(self):
        for written in (b"xab", b"xab\0"):
            assert text_of(play(BYTES, written, stop=["abc"])) == "xab"

    def test_a_single_string_will_do(self, model):
        text = receptance.generate(model, BYTES, "x", max_tokens=40)
        stop = text[10:12]
        assert (
            receptance.generate(model, BYTES, "x", max_tokens=40, stop=stop)
            == (text[: text.index(stop)])
        )


class TestStates:
    @pytest.mark.parametrize("finish", ["length", "stop", "end_of_text"])
    def test_state_and_unread_tokens_continue_a_row(self, finish, model):
        """20 tokens are 9, their state, the one that was not read, and 11."""
        whole = [token.id for token in self.run(model, "12", 20)]
        last = whole[8]
        assert last < 128 and last not in whole[:8]
        tokenizer = ByteTokenizer()
        tokenizer.end_of_text = last if finish == "end_of_text" else 0
        first = Generation(
            model,
            tokenizer,
            ["12"],
            sampling=GREEDY,
            stop=(chr(last),) if finish == "stop" else (),
            max_tokens=9 if finish == "length" else 20,
        )
        tokens = list(first)
        assert [token.id for token in tokens] == whole[:9]
        assert tokens[-1].finish_reason == finish
        assert first.unread == [[last]]
        assert first.states[0].tokens.tolist() == [2 + 8]
        rest = self.run(model, first.unread[0], 11, first.states[0])
        assert [token.id for token in rest] == whole[9:]

    def run(
        self, model: Model, prompt: str | list[int], number: int, state: State | None = None
    ) -> list[Token]:
        return list(
            Generation(
                model,
                BYTES,
                [prompt],
                sampling=GREEDY,
                max_tokens=number,
                state=state,
                ignore_end_of_text=True,
            )
        )

    def test_a_batch_of_states_continues(self, model):
        prompts = ["one", "twenty two", ""]
        whole = rows_of(list(Generation(model, BYTES, prompts, max_tokens=20, sampling=GREEDY)), 3)
        first = Generation(model, BYTES, prompts, max_tokens=8, sampling=GREEDY)
        list(first)
        rest = Generation(
            model,
            BYTES,
            first.unread,
            max_tokens=12,
            sampling=GREEDY,
            state=State.cat(first.states),
        )
        for row, tokens in enumerate(rows_of(list(rest), 3)):
            assert [t.id for t in tokens] == [t.id for t in whole[row][8:]]

    def test_a_saved_state_continues(self, model, tmp_path):
        whole = [token.id for token in self.run(model, "fox", 20)]
        first = Generation(model, BYTES, ["fox"], sampling=GREEDY, max_tokens=8)
        list(first)
        first.states[0].save(tmp_path / "state", model.fingerprint())
        state = State.load(tmp_path / "state", model.fingerprint())
        rest = self.run(model, first.unread[0], 12, state)
        assert [token.id for token in rest] == whole[8:]

    @pytest.mark.parametrize("stop", [(), ("e",)])
    def test_the_final_state_has_read_all_tokens(self, stop, model):
        """What is left unread is fed, whatever ended the row; the rest stays as it was."""
        prompts = ["one", "twenty two", ""]
        generation = Generation(model, BYTES, prompts, max_tokens=20, stop=stop)
        tokens = list(generation)
        for row, prompt in enumerate(prompts):
            text = BYTES.encode(prompt) or [0]
            text += [token.id for token in tokens if token.row == row]
            unread, before = list(generation.unread[row]), generation.states[row]
            state = generation.final_state(row)
            assert state.tokens.tolist() == [len(text)]
            for name, x in prefill(model, [text])[1].tensors.items():
                torch.testing.assert_close(state.tensors[name], x, atol=1e-4, rtol=1e-4)
            assert generation.unread[row] == unread and generation.states[row] is before

    def test_there_is_no_final_state_before_the_end(self, model):
        generation = Generation(model, BYTES, "x", max_tokens=3, ignore_end_of_text=True)
        for _ in range(2):
            next(generation)
            with pytest.raises(ValueError, match="row 0 has not finished; take its tokens"):
                generation.final_state()
        next(generation)
        assert generation.final_state().tokens.tolist() == [1 + 3]

    def test_no_tokens_leave_the_state_behind_the_prompt(self, model):
        """A `max_tokens` of 0 reads the prompts; they go on as if nothing had been between."""
        prompts = ["one", "twenty two"]
        first = Generation(model, BYTES, prompts, max_tokens=0)
        assert list(first) == [] and first.unread == [[], []]
        wanted = [prefill(model, [BYTES.encode(prompt)])[1] for prompt in prompts]
        for row, state in enumerate(wanted):
            assert first.states[row].tokens.tolist() == state.tokens.tolist()
            assert same_bits(first.final_state(row).tensors, first.states[row].tensors)
            for name, x in state.tensors.items():
                found = first.states[row].tensors[name]
                torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-5)
        assert receptance.generate(model, BYTES, prompts, max_tokens=0) == ["", ""]

    def test_a_state_that_is_kept_stays_as_it_is(self, model):
        _, state = prefill(model, [ids(5)])
        before = {name: x.clone() for name, x in state.tensors.items()}
        texts = [
            receptance.generate(model, BYTES, "x", state=state, max_tokens=10) for _ in range(2)
        ]
        assert texts[0] == texts[1]
        assert same_bits(state.tensors, before)

    def test_a_state_of_too_many_rows_is_refused(self, model):
        _, state = prefill(model, [ids(5), ids(6)])
        with pytest.raises(ValueError, match="2 rows"):
            receptance.generate(model, BYTES, "x", state=state)


class TestProbabilities:
    @pytest.mark.parametrize("options", [GREEDY, Sampling(), PENALISED], ids=["t0", "t1", "pen"])
    def test_they_are_those_of_the_model(self, options, model):
        prompt = BYTES.encode("The quick brown fox")
        tokens = list(Generation(model, BYTES, [prompt], sampling=options, max_tokens=30))
        written = [token.id for token in tokens]
        logits, _ = model(torch.tensor([prompt + written]))
        scores = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        wanted = scores.gather(1, torch.tensor(written)[:, None])[:, 0]
        found = torch.tensor([token.log_probability for token in tokens])
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize(
        "options", [GREEDY, Sampling(temperature=5), Sampling(top_k=3)], ids=["t0", "t5", "k3"]
    )
    def test_rows_beyond_the_vocabulary_are_never_chosen(self, options):
        model = make_model(300)
        with torch.no_grad():
            model.head.weight[256:] = 50 * torch.sign(model.ln_out.bias)
        likeliest = model(torch.tensor([[65]]))[0][0, -1].argmax()
        tokens = list(Generation(model, BYTES, ["A"], sampling=options, max_tokens=50))
        assert likeliest >= 256
        assert max(token.id for token in tokens) < 256
        assert all(token.log_probability > -100 for token in tokens)

    def test_they_are_left_out_if_not_wanted(self, model):
        wanted = list(Generation(model, BYTES, ["a", "b"], max_tokens=9))
        found = list(Generation(model, BYTES, ["a", "b"], max_tokens=9, log_probabilities=False))
        assert found == [dataclasses.replace(t, log_probability=None) for t in wanted]

    def test_a_model_in_bfloat16(self):
        model = make_model().bfloat16()
        texts = receptance.generate(model, BYTES, ["a", "bcd"], max_tokens=20)
        assert all(texts)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g(["x"], max_tokens=-1), "max_tokens is -1; it must be at least 0"),
        (lambda g: g([]), "no prompts"),
        (lambda g: g(None), "prompts is None; give a text, or a list of texts"),
        (lambda g: g(7), "prompts is 7; give a text"),
        (lambda g: g([None]), "a prompt is a text or a list of token ids; found None"),
        (lambda g: g([65, 66]), "a prompt is a text or a list of token ids; found 65"),
        (lambda g: g([["a"]]), r"a prompt is a text or a list of token ids; found \['a'\]"),
        (lambda g: g(["x"], stop=b"x"), "a stop string is b'x'; it must be text"),
        (lambda g: g(["x"], stop=[b"x"]), "a stop string is b'x'; it must be text"),
        (lambda g: g(["x"], stop=7), "a stop string is 7; it must be text"),
        (lambda g: g(["x", "y"], seed="12"), "seed is '12'; it must be a whole number"),
        (lambda g: g(["x"], sampling="greedy"), "sampling is 'greedy'; it must be a Sampling"),
        (lambda g: g(["x"], stop=("a", "")), "empty stop string"),
        (lambda g: g(["x"], seed=[1, 2]), "2 seeds for 1 prompts"),
        (lambda g: g(["x"], seed=-1), "seed is -1"),
        (lambda g: g(["x"], seed=1.5), "seed is 1.5; it must be a whole number"),
        (lambda g: g(["x", "y"], seed=[0, 1 << 64]), "seed is 18446744073709551616"),
        (lambda g: g(["x", [65, 256]]), "token id 256 is out of range"),
        (lambda g: g([[-1]]), "token id -1 is out of range"),
    ],
)
def test_bad_requests_are_refused(call: Callable, message, model):
    with pytest.raises(ValueError, match=message) as caught:
        call(lambda prompts, **options: list(Generation(model, BYTES, prompts, **options)))
    assert "\n" not in str(caught.value)


def test_none_is_the_default_everywhere(model):
    """Of every option of every call."""
    wanted = list(Generation(model, BYTES, "x"))
    names = set(inspect.signature(Generation).parameters) - {"engine", "tokenizer", "prompts"}
    assert list(Generation(model, BYTES, "x", **dict.fromkeys(names))) == wanted
    names = set(inspect.signature(receptance.generate).parameters)
    assert names >= {field.name for field in dataclasses.fields(Sampling)}
    names -= {"engine", "tokenizer", "prompts"}
    assert receptance.generate(model, BYTES, "x", **dict.fromkeys(names)) == text_of(wanted)
    names = {field.name for field in dataclasses.fields(Request)}
    assert Request(**dict.fromkeys(names)) == Request()
    assert list(Generation(model, BYTES, ["x", "x"], seed=[None, 0])) == list(
        Generation(model, BYTES, ["x", "x"])
    )


@pytest.mark.parametrize(
    "use",
    [
        lambda model: receptance.generate(model, BYTES, "x"),
        lambda model: prefill(model, [[1]]),
        lambda model: negative_log_likelihood(model, np.array([1])),
    ],
)
def test_a_model_without_weights_is_refused(use):
    with torch.device("meta"):
        model = Model(ModelConfig(vocab_size=256, width=8, num_layers=1))
    with pytest.raises(ValueError, match=r"^the model has no weights: it is on the meta device"):
        use(model)


def test_generate_leaves_a_model_in_training_mode(model):
    trained = make_model()
    trained.dropout = 0.5
    trained.train()
    wanted = receptance.generate(model, BYTES, ["x", "yz"], max_tokens=20)
    assert receptance.generate(trained, BYTES, ["x", "yz"], max_tokens=20) == wanted
    generation = Generation(trained, BYTES, "x", max_tokens=5, ignore_end_of_text=True)
    for _ in generation:
        assert all(module.training for module in trained.modules())
    wanted_state = prefill(
        model,
        [
            [
                120,
                *(
                    t.id
                    for t in Generation(model, BYTES, "x", max_tokens=5, ignore_end_of_text=True)
                ),
            ]
        ],
    )[1]
    for name, x in generation.final_state().tensors.items():
        torch.testing.assert_close(x, wanted_state.tensors[name], atol=1e-4, rtol=1e-4)


def test_without_a_tokenizer_there_is_no_text(model):
    with pytest.raises(ValueError, match="tokenizer is None, and texts need one"):
        receptance.generate(model, None, "x")

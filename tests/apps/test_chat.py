"""receptance chat: the conversation is the state, and nothing else."""

import importlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from command import Result, call
from tiny import make_model, small_bpe

from receptance import save
from receptance.apps.chat import Chat, Options, _show
from receptance.data.examples import encode_record
from receptance.data.templates import TEMPLATES, TURN_END
from receptance.inference.generation import Generation, prefill
from receptance.inference.sampling import Sampling
from receptance.model import Model
from receptance.state import State
from receptance.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    Tokenizer,
    WorldTokenizer,
    load_tokenizer,
)

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model()


@pytest.fixture
def chat(model) -> Chat:
    return Chat(model, BYTES, Options(model="", max_tokens=20))


def same_memory(model: Model, one: State | None, text: str) -> bool:
    """Whether a state is the one after a text."""
    assert one is not None
    _, other = prefill(model, [BYTES.encode(text)])
    after = [model(torch.tensor([[65, 66]]), state)[0] for state in (one, other)]
    close = torch.allclose(*after, atol=1e-4)
    return close and one.tokens.tolist() == other.tokens.tolist()


def say(chat: Chat, message: str) -> str:
    return "".join(chat.answer(message))


class TestChat:
    def test_the_state_is_that_of_the_transcript(self, chat, model):
        text = ""
        for message in ("hi", "how are you?", "é"):
            reply = say(chat, message)
            text += f"User: {message}\n\nAssistant:{reply.rstrip()}\n\n"
            assert same_memory(model, chat.history.state, text)

    def test_what_follows_the_end_of_a_turn_is_forgotten(self, chat, model, monkeypatch):
        written = iter(b" hello \n\nUser: and so on")
        monkeypatch.setattr(
            "receptance.inference.sampling.choose", lambda *_: torch.tensor([next(written)])
        )
        assert say(chat, "hi") == " hello "
        assert same_memory(model, chat.history.state, "User: hi\n\nAssistant: hello\n\n")

    def test_a_blank_line_within_a_message_is_left_out(self, chat, model):
        reply = say(chat, "one\n\n  \ntwo")
        text = f"User: one\ntwo\n\nAssistant:{reply.rstrip()}\n\n"
        assert same_memory(model, chat.history.state, text)

    def test_names_are_options(self, model):
        raven = Chat(model, BYTES, Options(model="", user="Bob", assistant="Alice", max_tokens=3))
        reply = say(raven, "hi")
        assert same_memory(model, raven.history.state, f"Bob: hi\n\nAlice:{reply.rstrip()}\n\n")

    @pytest.mark.parametrize("template", TEMPLATES)
    def test_a_conversation_has_the_tokens_that_training_reads(self, template, monkeypatch):
        model, bpe = make_model(300), small_bpe()
        chat = Chat(model, bpe, Options(model="", template=template))
        said = []
        for question, answer in (("hi there", "12 little foxes"), ("12\n\nfoxes", "lazy\ndogs")):
            written = iter(bpe.encode(TEMPLATES[template].answer(answer)))
            monkeypatch.setattr(
                "receptance.inference.sampling.choose",
                lambda *_, w=written: torch.tensor([next(w)]),
            )
            assert say(chat, question).strip() == answer
            said += [("user", question), ("assistant", answer)]
        record = {"messages": [{"role": role, "content": text} for role, text in said]}
        ids, _ = encode_record(record, bpe, template)
        _, wanted = prefill(model, [ids])
        assert chat.history.state is not None
        assert chat.history.state.tokens.tolist() == [len(ids)]
        for name, tensor in wanted.tensors.items():
            torch.testing.assert_close(
                chat.history.state.tensors[name], tensor, rtol=1e-4, atol=1e-4
            )

    def test_every_template_can_be_chosen(self):
        assert set(get_args(get_type_hints(Options)["template"])) == set(TEMPLATES)

    def test_retry_answers_differently_from_the_same_history(self, chat, model):
        first = say(chat, "hi")
        second = say(chat, "what?")
        answers = {second}
        for _ in range(3):
            answers.add("".join(chat.retry()))
        assert len(answers) == 4
        again = "".join(chat.retry())
        text = f"User: hi\n\nAssistant:{first.rstrip()}\n\n"
        text += f"User: what?\n\nAssistant:{again.rstrip()}\n\n"
        assert same_memory(model, chat.history.state, text)

    def test_a_greedy_retry_has_nothing_else_to_say(self, model):
        chat = Chat(model, BYTES, Options(model="", max_tokens=9, sampling=Sampling(temperature=0)))
        assert say(chat, "hi") == "".join(chat.retry())

    def test_reset_forgets(self, chat, model):
        say(chat, "my name is Ann")
        chat.reset()
        reply = say(chat, "hi")
        assert same_memory(model, chat.history.state, f"User: hi\n\nAssistant:{reply.rstrip()}\n\n")

    def test_a_conversation_can_be_put_away(self, chat, model, tmp_path):
        say(chat, "hi")
        chat.save(str(tmp_path / "gespräch"))
        other = Chat(model, BYTES, Options(model="", max_tokens=20))
        other.load(str(tmp_path / "gespräch"))
        other.draws = chat.draws
        assert say(other, "and?") == say(chat, "and?")

    def test_an_interrupted_answer_is_remembered_as_far_as_it_was_shown(self, chat, model):
        pieces = chat.answer("hi")
        shown = "".join(next(pieces) for _ in range(6))
        pieces.close()
        assert same_memory(model, chat.history.state, f"User: hi\n\nAssistant:{shown.rstrip()}\n\n")


SHARED = Path(__file__).parents[3] / "shared/data"
PILE = SHARED / "20B_tokenizer.json"
WORLD = SHARED / "rwkv_vocab_v20230424.txt"


def crossing_world() -> WorldTokenizer:
    """A vocabulary with tokens that begin in one turn and end in the next."""
    longer = [b"\n\n", b".\n\n", b"\n\nUser", b"!\n\nQ", b":\n", b" ok.\n\nBob: "]
    tokens = [*(bytes([n]) for n in range(256)), *longer]
    lines = [f"{n} {token!r} {len(token)}\n" for n, token in enumerate(tokens, start=1)]
    return WorldTokenizer("".join(lines).encode())


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": ByteTokenizer,
    "bpe": small_bpe,
    "bpe of conversations": lambda: BPETokenizer.train(["User: a.\n\nAssistant: ok.\n\n" * 9], 300),
    "world": crossing_world,
    "World": lambda: WorldTokenizer.from_file(WORLD),
    "Pile": lambda: load_tokenizer(PILE),
}
FILES = {"World": WORLD, "Pile": PILE}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request) -> Tokenizer:
    if request.param in FILES and not FILES[request.param].exists():
        pytest.skip(f"there is no {FILES[request.param].name} here")
    return TOKENIZERS[request.param]()


class TestTokens:
    """What the model has read is the whole conversation, encoded as one text."""

    TURNS = (
        ("hi", " Hello there."),
        ("How are\nyou?", " ok."),
        ("naïve 狐!", " 12 foxes!"),
        ("and", ""),
        ("x", " spaces  "),
    )

    @pytest.fixture
    def talk(self, tokenizer, monkeypatch) -> Callable[..., Chat]:
        """A chat whose model writes given answers, in tokens of its own choice."""

        def talk(template: str) -> Chat:
            model = make_model(tokenizer.vocab_size + 1, width=8)
            return Chat(model, tokenizer, Options(model="", template=template, max_tokens=60))

        self.monkeypatch = monkeypatch
        return talk

    def turn(self, chat: Chat, question: str, answer: str) -> str:
        """The text that is added by a question and its answer."""
        # A heading is followed by what a model would go on with.
        behind = f"{chat.template.stops[0]} and so on" * 9
        written = iter(chat.tokenizer.encode(answer) + chat.tokenizer.encode(behind))
        self.monkeypatch.setattr(
            "receptance.inference.sampling.choose", lambda *_: torch.tensor([next(written)])
        )
        assert say(chat, question) == answer
        return chat.template.prompt(question) + answer.rstrip() + TURN_END

    @pytest.mark.parametrize("template", TEMPLATES)
    def test_over_a_conversation(self, template, talk, tokenizer, monkeypatch):
        chat, text, prompts = talk(template), "", []

        def record(*args: Any, **options: Any) -> Generation:
            prompts.append((args[2][0], options["state"]))
            return Generation(*args, **options)

        monkeypatch.setattr("receptance.apps.chat.Generation", record)
        for question, answer in self.TURNS:
            read = chat.history.ids
            whole = tokenizer.encode(text + chat.template.prompt(question))
            text += self.turn(chat, question, answer)
            prompt, state = prompts[-1]
            begun = 0 if state is None else int(state.tokens)
            assert begun in (0, len(read))
            assert read[:begun] + prompt == whole
            assert chat.history.text.decode() == text
            assert len(chat.history.ids) == int(chat.history.state.tokens)
            _, wanted = prefill(chat.engine, [chat.history.ids])
            for name, tensor in wanted.tensors.items():
                found = chat.history.state.tensors[name]
                torch.testing.assert_close(found, tensor, rtol=1e-3, atol=1e-3)
        following = tokenizer.encode(text + chat.template.prompt("x"))
        read = chat.history.ids
        assert following[: len(read)] == read
        assert len(following) - len(read) < len(tokenizer.encode(chat.template.prompt("x"))) + 9

    def test_nothing_is_read_twice(self, talk, tokenizer, monkeypatch):
        if tokenizer.kind == "world" and tokenizer.vocab_size < 1000:
            pytest.skip("its tokens cross the borders of turns, so that some are read again")
        chat, read = talk("world"), []
        features = Model.features

        def count(model: Model, tokens: torch.Tensor, *args: Any, **options: Any) -> Any:
            read.append(tokens.numel())
            return features(model, tokens, *args, **options)

        monkeypatch.setattr(Model, "features", count)
        for question, answer in (("hi", " Hello there."), ("how", " fine."), ("so", " well.")):
            self.turn(chat, question, answer)
        assert sum(read) <= len(chat.history.ids) + 3  # the last token of an answer, each time

    def test_a_stored_conversation_goes_on_with_the_same_tokens(self, talk, tokenizer, tmp_path):
        chat = talk("world")
        text = self.turn(chat, "hi", " Hello there.")
        chat.save(str(tmp_path / "state"))
        other = talk("world")
        other.load(str(tmp_path / "state"))
        text += self.turn(other, "how", " ok.")
        chat.engine = other.engine
        self.turn(chat, "how", " ok.")
        whole = tokenizer.encode(text + chat.template.prompt("x"))
        count = int(other.history.state.tokens)
        _, wanted = prefill(chat.engine, [whole[:count]])
        for name, tensor in wanted.tensors.items():
            found = other.history.state.tensors[name]
            torch.testing.assert_close(found, tensor, rtol=1e-3, atol=1e-3)

    def test_a_blank_line_is_two_tokens_of_the_pile(self, monkeypatch):
        if not PILE.exists():
            pytest.skip(f"there is no {PILE.name} here")
        self.monkeypatch, pile = monkeypatch, load_tokenizer(PILE)
        chat = Chat(make_model(pile.vocab_size, width=8), pile, Options(model="", max_tokens=60))
        self.turn(chat, "hi", " Hello there.")
        self.turn(chat, "how", " ok.")
        assert 535 in pile.encode("there.\n\n")
        assert 535 not in chat.history.ids and 187 in chat.history.ids


class TestTerminal:
    @pytest.fixture
    def talk(self, model, tmp_path, monkeypatch):
        """What is printed when these lines are typed; an exception is raised in place of one."""
        save(model, tmp_path / "model", BYTES)
        monkeypatch.chdir(tmp_path)

        def talk(*lines: str | type[BaseException]) -> Result:
            typed: Iterator[str | type[BaseException]] = iter([*lines, EOFError])

            def type_a_line(prompt: str) -> str:
                line = next(typed)
                if isinstance(line, str):
                    return line
                raise line

            monkeypatch.setattr("builtins.input", type_a_line)
            return call("chat", "model", "--max-tokens", 8)

        return talk

    def test_the_end_of_the_input_ends_it(self, talk):
        for lines in ((), (KeyboardInterrupt,), ("/quit", "never read"), ("/exit",)):
            result = talk(*lines)
            assert (result.code, result.err) == (0, "")
            assert "/help" in result.out and "Assistant" not in result.out

    def test_so_does_a_closed_standard_input(self, talk):
        result = talk(RuntimeError("input(): lost sys.stdin"))
        assert (result.code, result.err) == (0, "")
        assert result.out == talk().out

    def test_any_seed_lasts(self, model):
        chat = Chat(model, BYTES, Options(model="", max_tokens=2, seed=2**63 - 1))
        assert all(isinstance(say(chat, "hi"), str) for _ in range(2))

    def test_a_state_of_several_texts_is_no_conversation(self, chat, model, tmp_path):
        model.empty_state(2).save(tmp_path / "two", model.fingerprint())
        with pytest.raises(ValueError, match="holds 2 texts; a conversation is one"):
            chat.load(str(tmp_path / "two"))

    def test_turns(self, talk, model):
        chat = Chat(model, BYTES, Options(model="", max_tokens=8))
        wanted = [f"\nAssistant:{say(chat, message)}\n" for message in ("hi", "and?")]
        result = talk("hi", "", "   ", "and?")
        assert result.out.count("\nAssistant:") == 2
        assert all(turn in result.out for turn in wanted)

    def test_retry_reset_save_and_load(self, talk):
        lines = ("hi", "/save s.state", "/retry", "/load s.state", "/retry", "/reset", "/retry")
        result = talk(*lines, "/load s.state", "more")
        assert result.code == 0
        assert result.out.count("error: there is no message to answer again yet") == 2
        assert "(save s.state: done)" in result.out
        assert "(load s.state: done)" in result.out
        assert "(forgotten)" in result.out
        assert result.out.count("\nAssistant:") == 3

    def test_weights_are_not_overwritten(self, talk):
        weights = Path("model/model.safetensors")
        before = weights.read_bytes()
        result = talk("hi", f"/save {weights}")
        assert f"error: cannot write the state to {weights}: what is there is not" in result.out
        assert weights.read_bytes() == before

    @pytest.mark.parametrize(
        "lines", [("one\\", "two \\", "three"), ('"""', "one", "two ", "three", '"""')]
    )
    def test_several_lines_are_one_message(self, lines, talk, model):
        chat = Chat(model, BYTES, Options(model="", max_tokens=8))
        wanted = say(chat, "one\ntwo \nthree")
        out = talk(*lines).out
        assert f"\nAssistant:{wanted}\n" in out
        assert out.count("\nAssistant:") == 1

    def test_an_unfinished_message_is_not_sent(self, talk):
        for lines in (('"""', "one"), ("one\\",), ('"""', KeyboardInterrupt)):
            result = talk(*lines)
            assert result.code == 0
            assert "\nAssistant:" not in result.out

    @pytest.mark.parametrize("terminal", [True, False])
    def test_lines_are_edited_where_somebody_types(self, terminal, talk, monkeypatch):
        imported = []
        real = importlib.import_module
        monkeypatch.setattr(
            "importlib.import_module", lambda name, *a: imported.append(name) or real(name, *a)
        )
        monkeypatch.setattr("sys.stdin", keyboard := io.StringIO())
        monkeypatch.setattr(keyboard, "isatty", lambda: terminal)
        assert talk("/help").code == 0
        assert ("readline" in imported) == terminal

    def test_a_terminal_gets_no_commands_of_the_model(self, model, monkeypatch):
        written = iter(b"\x1b[2J\xc2\x9b1m\n\n")
        monkeypatch.setattr(
            "receptance.inference.sampling.choose", lambda *_: torch.tensor([next(written)])
        )
        monkeypatch.setattr("sys.stdout", output := io.StringIO())
        monkeypatch.setattr(output, "isatty", lambda: True)
        chat = Chat(model, BYTES, Options(model="", max_tokens=20))
        _show(chat, chat.answer("hi"))
        assert output.getvalue() == "\nAssistant:\\x1b[2J\\x9b1m\n"
        assert "\x1b[2J\x9b1m" in chat.history.text.decode()

    def test_help_lists_the_commands(self, talk):
        out = talk("/help").out
        for command in ("/reset", "/retry", "/save", "/load", "/help", "/quit"):
            assert command in out

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("/bogus", "error: unknown command /bogus; /help lists them"),
            ("/retry", "error: there is no message to answer again yet"),
            ("/save", "error: /save needs a file name"),
            ("/load  ", "error: /load needs a file name"),
            ("/load nowhere", "error: no state file at nowhere"),
            ("/load model/config.json", "is not a readable state file"),
            ("/save s", "error: nothing has been said yet"),
        ],
    )
    def test_mistakes_do_not_end_the_conversation(self, line, message, talk):
        result = talk(line, "hi")
        assert (result.code, result.err) == (0, "")
        assert message in result.out
        assert result.out.rindex("\nAssistant:") > result.out.index(message)

    @pytest.mark.parametrize("path", ["no/where", "file/x", "x" * 300, "~no one/x"])
    def test_files_that_cannot_be_do_not_end_it_either(self, path, talk):
        Path("file").touch()
        result = talk("hi", f"/save {path}", f"/load {path}", "hi")
        assert (result.code, result.err) == (0, "")
        assert f"error: cannot write the state to {path}: " in result.out
        assert "partial" not in result.out
        assert f"error: no state file at {path}" in result.out
        assert result.out.count("\nAssistant:") == 2

    def test_a_message_need_not_be_utf8(self, talk, model):
        """Python reads a byte that is no text as a lone surrogate."""
        latin = Chat(model, BYTES, Options(model="", max_tokens=8))
        prompt = b"User: caf\xe9\n\nAssistant:"
        options = {"max_tokens": 8, "sampling": latin.options.sampling, "stop": TURN_END}
        wanted = "".join(t.text for t in Generation(model, BYTES, [list(prompt)], **options))
        assert f"\nAssistant:{wanted}\n" in talk("caf\udce9").out

    @pytest.mark.parametrize("option", [("--max-tokens", 0), ("--seed", -1)])
    def test_options_are_checked_before_anything_is_loaded(self, option):
        result = call("chat", "nowhere", *option)
        assert result.code == 2
        assert f"error: {option[0]} is {option[1]}; it must be" in result.err

    def test_ctrl_c_ends_the_answer_only(self, talk, monkeypatch):
        interrupt = iter([False, False, True])
        choose = torch.tensor([65])

        def sometimes(*_: object) -> torch.Tensor:
            if next(interrupt, False):
                raise KeyboardInterrupt
            return choose

        monkeypatch.setattr("receptance.inference.sampling.choose", sometimes)
        result = talk("hi", "again")
        assert result.code == 0
        assert "\nAssistant:AA\n(interrupted)\n" in result.out
        assert "\nAssistant:AAAAAAAA\n" in result.out

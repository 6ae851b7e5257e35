"""receptance chat: the conversation is the state, and nothing else."""

from collections.abc import Iterator
from typing import get_args, get_type_hints

import pytest
import torch
from command import Result, call
from tiny import make_model, small_bpe

from receptance import save
from receptance.apps.chat import Chat, Options
from receptance.data.examples import encode_record
from receptance.data.templates import TEMPLATES, TURN_END
from receptance.inference.generation import Generation, prefill
from receptance.inference.sampling import Sampling
from receptance.model import Model
from receptance.state import State
from receptance.tokenizer import ByteTokenizer

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
            assert "Assistant" not in result.out

    def test_so_does_a_closed_standard_input(self, talk):
        assert talk(RuntimeError("input(): lost sys.stdin")).code == 0

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

    @pytest.mark.parametrize("path", ["no/where", "model/config.json/x", "x" * 300, "~no one/x"])
    def test_files_that_cannot_be_do_not_end_it_either(self, path, talk):
        result = talk("hi", f"/save {path}", f"/load {path}", "hi")
        assert (result.code, result.err) == (0, "")
        assert f"error: cannot write {path}: " in result.out
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
        assert f"error: {option[0][2:].replace('-', '_')} is {option[1]}" in result.err

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

"""The command as a whole: its front door, and one clear line for every bad input."""

import ast
import errno
import importlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from command import SMALL, call
from tiny import TEXT, make_model, small_bpe

import receptance
from receptance import save
from receptance.__main__ import APPS
from receptance.tokenizer import ByteTokenizer


class TestFrontDoor:
    def test_without_arguments_it_says_how_to_use_it(self):
        result = call()
        assert result.code == 2
        assert all(name in result.out for name in APPS)

    @pytest.mark.parametrize("option", ["-h", "--help"])
    def test_help(self, option):
        result = call(option)
        assert (result.code, result.err) == (0, "")
        assert all(f"{name} " in result.out and what in result.out for name, what in APPS.items())

    def test_version(self):
        result = call("--version")
        assert (result.code, result.out) == (0, f"receptance {receptance.__version__}\n")

    @pytest.mark.parametrize("word", ["fly", "--verbose", "", "../zzz"])
    def test_unknown_commands(self, word):
        result = call(word)
        assert (result.code, result.out) == (2, "")
        assert result.err == (
            f"receptance: error: unknown command {word!r}; there are {', '.join(APPS)}\n"
        )

    def test_a_mistyped_command_is_guessed(self):
        result = call("trian")
        assert (result.code, result.out) == (2, "")
        assert result.err == "receptance: error: unknown command 'trian'; did you mean train?\n"

    @pytest.mark.parametrize("name", APPS)
    def test_help_of_each_command(self, name):
        result = call(name, "--help")
        assert (result.code, result.err) == (0, "")
        assert f"usage: receptance {name}" in result.out

    @pytest.mark.parametrize("name", APPS)
    def test_unknown_options(self, name):
        result = call(name, "--no-such-option")
        assert (result.code, result.out) == (2, "")
        assert "Traceback" not in result.err

    @pytest.mark.parametrize("word", ["--help", "--version", "trian"])
    def test_what_needs_no_model_imports_none_of_it(self, word):
        code = (
            f"import sys; from receptance.__main__ import main; main([{word!r}]);"
            "print([m for m in ('torch', 'numpy', 'tyro', 'rich') if m in sys.modules])"
        )
        out = subprocess.check_output([sys.executable, "-c", code], text=True)
        assert out.splitlines()[-1] == "[]"

    def test_control_characters_of_an_argument_do_not_reach_the_terminal(self):
        result = call("inspect", "no\x1b[2Jthing")
        assert result.code == 2
        assert "no\\x1b[2Jthing" in result.err and "\x1b" not in result.err


class TestPublicNames:
    def test_each_is_what_its_module_has(self):
        namespace: dict[str, object] = {}
        exec("from receptance import *", namespace)
        assert set(receptance.__all__) <= namespace.keys()
        assert set(receptance.__all__) <= set(dir(receptance))
        assert receptance.State is importlib.import_module("receptance.state").State

    def test_type_checkers_and_programs_see_the_same(self):
        tree = ast.parse(Path(receptance.__file__).read_text())
        imported = {
            alias.name: node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        assert {n: imported[n] for n in receptance._HOMES} == receptance._HOMES
        assert {*receptance._HOMES, "__version__"} == set(receptance.__all__)

    def test_others_are_not_there(self):
        with pytest.raises(AttributeError, match="has no attribute 'Slot'"):
            receptance.Slot  # noqa: B018


@pytest.mark.parametrize(("cpus", "wanted"), [(1, 1), (2, 2), (64, 3)])
def test_a_command_takes_no_more_threads_than_there_are_cpus(monkeypatch, cpus, wanted):
    """torch counts those of the machine, not those that a container may use."""
    monkeypatch.setattr("receptance.ops.threads.available_cpus", lambda: cpus)
    seen: list[int] = []
    monkeypatch.setattr(
        "receptance.apps.doctor.main", lambda argv: seen.append(torch.get_num_threads())
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert call("doctor").code == 0
    finally:
        torch.set_num_threads(before)
    assert seen == [wanted]


@pytest.mark.skipif(os.name == "nt", reason="signals are those of POSIX")
class TestInterrupts:
    """Ctrl-C while torch is being imported, which takes seconds."""

    # The signal comes when so many modules have begun to be imported by the command.
    CODE = """
import signal, sys
import receptance.__main__ as command
begun = 0
def interrupt(event, _):
    global begun
    begun += event == "import"
    if event == "import" and begun == {moment}:
        signal.raise_signal(signal.SIGINT)
sys.addaudithook(interrupt)
sys.exit(command.main(["inspect", "nothing/here"]))
"""

    @pytest.mark.parametrize("moment", [1, 50, 300, 800])
    def test_is_one_line(self, moment):
        command = [sys.executable, "-c", self.CODE.format(moment=moment)]
        done = subprocess.run(command, capture_output=True, timeout=100, check=False)
        assert (done.returncode, done.stderr) == (130, b"\ninterrupted\n")

    def test_afterwards_it_is_an_exception_again(self):
        before = signal.getsignal(signal.SIGINT)
        call("doctor", "--no-such-option")
        assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Where the bad inputs lie."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    Path("text.txt").write_text(TEXT)
    Path("empty.txt").touch()
    Path("short.txt").write_text("hello")
    Path("bare").mkdir()
    save(make_model(), "model", ByteTokenizer())
    save(make_model(300), "other", small_bpe())
    save(make_model(300), "untold", None)
    torch.save({"weights": "none"}, "bogus.pth")
    torch.save(make_model(1000).state_dict(), "vocabulary.pth")
    return tmp_path


def cut(name: str) -> Callable[[], None]:
    return lambda: os.truncate(name, 500)


def flip(name: str) -> Callable[[], None]:
    def change() -> None:
        content = bytearray(Path(name).read_bytes())
        content[len(content) // 2] ^= 1
        Path(name).write_bytes(content)

    return change


def nothing() -> None:
    pass


TRAIN = f"{SMALL} --steps 3 --out run"
INIT = "--batch 2 --context 32 --steps 3 --out run --init"
WITH_300, WITH_1000 = (
    f"which has a vocabulary of {size}; put its tokenizer file there or pass --tokenizer FILE\n"
    for size in (300, 1000)
)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("prepare", "line", "message"),
    [
        # train
        (nothing, f"train missing.txt {TRAIN}", "no such file, folder or match: missing.txt"),
        (nothing, f"train missing/*.txt {TRAIN}", "no such file, folder or match: missing/*.txt"),
        (nothing, f"train bare {TRAIN}", "no text files in folder bare"),
        (nothing, f"train {TRAIN}", "no data; name a text file"),
        (nothing, f"train empty.txt {TRAIN}", "the text is empty: empty.txt"),
        (nothing, f"train short.txt {TRAIN}", "tokens and the context is 32"),
        (nothing, f"train text.txt {TRAIN} --size 9m", "unknown model size '9m'"),
        (nothing, f"train text.txt {TRAIN} --width 0", "width is 0"),
        (nothing, f"train text.txt {TRAIN} --steps -1", "steps is -1"),
        (nothing, f"train text.txt {TRAIN} --validation 1.5", "validation share is 1.5"),
        (nothing, f"train text.txt {TRAIN} --tokenizer bpe:lots", "for example bpe:2048"),
        (nothing, f"train text.txt {TRAIN} --tokenizer bpe:100", "vocab_size is 100"),
        (nothing, f"train text.txt {TRAIN} --tokenizer nope.json", "nope.json: no such file"),
        (nothing, f"train text.txt {TRAIN} --tokenizer text.txt", "text.txt"),
        (nothing, f"train text.txt {TRAIN} --device warp", "device 'warp' cannot be used"),
        (nothing, f"train text.txt {TRAIN} --learning-rate 1e30", "loss is nan at step 1"),
        (nothing, f"train text.txt {TRAIN} --out text.txt", "text.txt"),
        (nothing, "train --resume --out missing", "no run in missing"),
        (nothing, "train --resume --out bare", "no whole checkpoint in bare: it has none"),
        (nothing, f"train text.txt {INIT} untold", f"untold, {WITH_300}"),
        (nothing, f"train text.txt {INIT} vocabulary.pth", f"vocabulary.pth, {WITH_1000}"),
        # generate
        (nothing, "generate missing", "no such file or directory: missing"),
        (nothing, "generate bare", "bare: wanted a config.json"),
        (nothing, "generate text.txt", "weights are read from"),
        (nothing, "generate no/such-model", "hub model 'no/such-model'"),
        (nothing, "generate bogus.pth", "bogus.pth"),
        (cut("vocabulary.pth"), "generate vocabulary.pth", "vocabulary.pth"),
        (flip("model/model.safetensors"), "generate model", "model.safetensors does not match"),
        (cut("model/model.safetensors"), "generate model", "model.safetensors has 500 bytes"),
        (flip("model/config.json"), "generate model", "model/config.json"),
        (cut("other/tokenizer.json"), "generate other", "other/tokenizer.json"),
        (nothing, "generate other --tokenizer bytes", "wrong tokenizer"),
        (nothing, "generate vocabulary.pth", f"no tokenizer beside vocabulary.pth, {WITH_1000}"),
        (nothing, "generate untold", f"no tokenizer beside untold, {WITH_300}"),
        (nothing, "generate vocabulary.pth --tokenizer other", "wrong tokenizer: bpe has 300 ids"),
        (nothing, "generate model --tokenizer missing", "missing: no such file"),
        (nothing, "generate model --device warp", "device 'warp' cannot be used"),
        (nothing, "generate model --max-tokens -1", "--max-tokens is -1"),
        (nothing, "generate model --temperature -1", "--temperature is -1"),
        (nothing, "generate model --top-p nan", "--top-p is nan"),
        (nothing, "generate model --seed 99999999999999999999", "seed is 9999"),
        # chat
        (nothing, "chat missing", "no such file or directory: missing"),
        (flip("model/model.safetensors"), "chat model", "model.safetensors does not match"),
        (nothing, "chat untold", f"no tokenizer beside untold, {WITH_300}"),
        (nothing, "chat vocabulary.pth", f"no tokenizer beside vocabulary.pth, {WITH_1000}"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_a_bad_input_is_one_line(prepare, line, message):
    prepare()
    result = call(*line.split())
    assert result.code == 2
    assert result.err.startswith("receptance: error: ")
    assert result.err.count("\n") == 1
    assert message in result.err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("one\n  two"), 2, "receptance: error: one two"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 2, "a/b: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device"),
        (FileNotFoundError("tok.json: no such file"), 2, "error: tok.json: no such file"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 2, "error: not enough memory; take"),
    ],
)
def test_errors_of_an_app_become_one_line(error, code, line, monkeypatch):
    def fail(argv: Sequence[str]) -> None:
        raise error

    monkeypatch.setattr("receptance.apps.doctor.main", fail)
    result = call("doctor")
    assert result.code == code
    assert line in result.err
    assert result.err.strip().count("\n") == 0


def test_a_tensor_beyond_all_memory_is_one_line(monkeypatch):
    monkeypatch.setattr("receptance.apps.doctor.main", lambda argv: torch.empty(1 << 60))
    result = call("doctor")
    assert result.code == 2
    assert result.err.startswith("receptance: error: not enough memory; ")


@pytest.mark.parametrize("bug", [AssertionError, RuntimeError])
def test_bugs_keep_their_traceback(bug, monkeypatch):
    def fail(argv: Sequence[str]) -> None:
        raise bug("our own mistake")

    monkeypatch.setattr("receptance.apps.doctor.main", fail)
    with pytest.raises(bug):
        call("doctor")


@pytest.mark.usefixtures("place")
class TestPipes:
    """In processes of their own."""

    COMMAND = (sys.executable, "-m", "receptance", "generate", "model", "12 little")

    @pytest.mark.parametrize(
        "line",
        [
            "generate model 12",
            "--help",
            *(
                pytest.param(line, marks=pytest.mark.slow)
                for line in [
                    "doctor",
                    "inspect model",
                    "verify model",
                    "data inspect corpus",
                    "convert model out.pth",
                    "quantize model --to int8 --out out",
                    "bench model --seconds 0.001 --batches 1 --prefill 5 --dtypes float32",
                ]
            ),
        ],
    )
    def test_a_reader_that_goes_away(self, line):
        """`receptance generate ... | head -c 5`, written at once or, as usual, in blocks."""
        command = (*self.COMMAND[:3], *line.split())
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
        call("data", "prepare", "text.txt", "--out", "corpus", "--tokenizer", "bytes")
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(
            command, stdout=writing, stderr=subprocess.PIPE, timeout=100, env=environment
        )
        os.close(writing)
        assert (done.returncode, done.stderr) == (0, b"")

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is full")
    def test_a_full_disk_behind_the_output(self):
        with open("/dev/full", "w") as full:
            command = [*self.COMMAND[:3], "--help"]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=100)
        assert done.returncode != 0
        assert b"receptance: error: No space left on device" in done.stderr

    @pytest.mark.slow
    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is full")
    def test_training_goes_on_whatever_happens_to_its_output(self):
        command = [*self.COMMAND[:3], "train", "text.txt", *TRAIN.split(), "--reports", "1"]
        for number, output in enumerate(["> /dev/full", "> /dev/full 2>&1", ">&-"]):
            line = f"{shlex.join(command)} --out run{number} {output}"
            done = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, timeout=100)
            assert done.returncode == 0, done.stderr
            assert (b"no more output: No space left" in done.stderr) == (number == 0)
            assert Path(f"run{number}/step-00000003").is_dir()

    @pytest.mark.slow
    def test_no_output_at_all(self):
        line = shlex.join([*self.COMMAND, "--max-tokens", "1"])
        done = subprocess.run(["sh", "-c", f"{line} >&-"], stderr=subprocess.PIPE, timeout=100)
        assert (done.returncode, done.stderr) == (0, b"")

    @pytest.mark.parametrize(
        "encoding", [pytest.param("utf-8", marks=pytest.mark.slow), "utf-8:strict"]
    )
    def test_what_is_typed_need_not_be_text(self, encoding):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        command = [*self.COMMAND[:3], "chat", "model", "--max-tokens", "1"]
        talk = b"caf\xe9\n/reset\n"
        done = subprocess.run(
            command, input=talk, capture_output=True, timeout=100, env=environment
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"(forgotten)" in done.stdout

    @pytest.mark.slow
    def test_a_terminal_with_few_characters(self):
        command = [*self.COMMAND[:-1], "naïve", "--max-tokens", "1"]
        environment = os.environ | {"PYTHONIOENCODING": "ascii"}
        done = subprocess.run(command, capture_output=True, timeout=100, env=environment)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.startswith(b"na?ve")

"""The scripts that shells complete with, tried in a shell where there is one."""

import shutil
import subprocess

import pytest
from command import call

from receptance.__main__ import APPS


def completed(script: str, *words: str) -> list[str]:
    """What bash offers for the last word."""
    quoted = " ".join(f"'{word}'" for word in words)
    program = (
        f"{script}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}\n"
        "_tyro_receptance; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    out = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert out.stderr == ""
    return out.stdout.split("\n")[:-1]


@pytest.fixture(scope="module")
def bash() -> str:
    result = call("completion", "bash")
    assert (result.code, result.err) == (0, "")
    return result.out


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
class TestBash:
    def test_commands(self, bash):
        assert set(APPS) <= set(completed(bash, "receptance", ""))
        assert completed(bash, "receptance", "tr") == ["train"]

    def test_options(self, bash):
        assert completed(bash, "receptance", "train", "--le") == ["--learning-rate"]
        assert completed(bash, "receptance", "data", "prepare", "--tok") == ["--tokenizer"]

    def test_values(self, bash):
        found = completed(bash, "receptance", "generate", "--dtype", "in")
        assert sorted(found) == ["int4", "int8"]

    @pytest.mark.slow
    def test_every_completion_is_one_word(self, bash):
        found = [word for app in APPS for word in completed(bash, "receptance", app, "--")]
        assert all(word.startswith("--") and " " not in word for word in found)
        assert len(found) > 100


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells(shell):
    result = call("completion", shell)
    assert result.code == 0 and "learning-rate" in result.out
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=result.out, text=True, check=True)


def test_a_shell_that_is_not_known():
    result = call("completion", "tcsh")
    assert result.code == 2
    assert result.err == "receptance: error: SHELL is 'tcsh'; it must be one of bash, zsh, fish\n"

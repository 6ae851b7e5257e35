"""One writer per folder."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from receptance.storage.directories import write_directory
from receptance.storage.lock import RunLock
from receptance.storage.manifest import verify

HOLD = """
import sys
from receptance.storage.lock import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def lock(folder: Path) -> None:
    with RunLock(folder):
        pass


def save_one(path: Path) -> Path:
    write_directory(path, lambda partial: (partial / "a").write_text(path.name))
    return path


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen]:
    """Another process that holds the lock of a folder."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def holder(run) -> Iterator[subprocess.Popen]:
    with held(run) as process:
        yield process


class TestTheLock:
    def test_a_second_process_is_refused_and_told_who_and_what(self, holder, run):
        message = refusal(lambda: lock(run))
        assert f"run is in use by process {holder.pid} on " in message
        assert "choose another folder" in message
        assert refusal(lambda: lock(run)) == message

    @pytest.mark.parametrize("end", ["kill", "communicate"])
    def test_a_process_that_is_gone_holds_nothing(self, end, tmp_path):
        with held(tmp_path / "run") as process:
            getattr(process, end)()
            process.wait()
            lock(tmp_path / "run")
        assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]

    @pytest.mark.parametrize("wrote", [False, True])
    @pytest.mark.parametrize("there", [False, True])
    def test_a_failure_leaves_no_folder_that_holds_nothing(self, there, wrote, tmp_path):
        run = tmp_path / "run"
        if there:
            run.mkdir()

        def fails() -> None:
            with RunLock(run):
                if wrote:
                    (run / "data").mkdir()
                raise ValueError("wrong input")

        assert refusal(fails) == "wrong input"
        assert run.exists() == (there or wrote)
        lock(run)

    def test_it_holds_within_a_process_too(self, tmp_path):
        mine = RunLock(tmp_path)  # a lock that is gone holds nothing anyway
        with mine:
            assert "in use by process" in refusal(lambda: lock(tmp_path))
        lock(tmp_path)

    def test_another_folder_is_free(self, tmp_path):
        with RunLock(tmp_path / "a"), RunLock(tmp_path / "b"):
            for name in "ab":
                assert "in use by process" in refusal(lambda name=name: lock(tmp_path / name))

    def test_an_unknown_holder(self, holder, run):
        (run / ".lock-holder").write_text("")
        assert "in use by another process;" in refusal(lambda: lock(run))

    def test_it_tidies_up(self, tmp_path):
        save_one(tmp_path / "step-1").rename(tmp_path / ".step-1.old")
        (tmp_path / ".step-2.host-1-abcdef.partial").mkdir()
        (tmp_path / ".mine.partial").mkdir()
        with RunLock(tmp_path):
            verify(tmp_path / "step-1")
        assert {p.name for p in tmp_path.iterdir()} == {".lock", "step-1", ".mine.partial"}

    def test_it_tidies_nothing_that_is_in_use(self, holder, run):
        (run / ".step-2.host-1-abcdef.partial").mkdir()
        refusal(lambda: lock(run))
        assert (run / ".step-2.host-1-abcdef.partial").exists()

    def test_a_folder_that_cannot_be_is_one_line(self, tmp_path):
        (tmp_path / "file").touch()
        assert "cannot be locked" in refusal(lambda: lock(tmp_path / "file/run"))
        assert "[Errno" not in refusal(lambda: lock(tmp_path / "file/run"))
        message = refusal(lambda: lock(tmp_path / "file"))
        assert message == f"{tmp_path / 'file'} is a file; name a folder"
        (tmp_path / "link").symlink_to("nowhere")
        with pytest.raises(ValueError, match="link is a link to nothing; name a folder"):
            RunLock(tmp_path / "link").__enter__()

    def test_an_error_inside_passes_through_and_unlocks(self, tmp_path):
        mine = RunLock(tmp_path)
        with pytest.raises(KeyError), mine:
            raise KeyError
        lock(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]

"""Directories that are whole or absent: the order of their writing, and who may replace what."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from receptance.sealed import rendered
from receptance.storage import directories, manifest
from receptance.storage.directories import (
    Draft,
    clean,
    existing,
    newest_checkpoint,
    pin,
    prune,
    put_aside,
    step_directories,
    write_directory,
)
from receptance.storage.manifest import verify
from receptance.storage.opening import open_path


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save(path: Path, content: str = "content") -> Path:
    """A directory with two files."""

    def write(partial: Path) -> None:
        (partial / "a.txt").write_text(content)
        (partial / "b.txt").write_text(content[::-1])

    write_directory(path, write)
    return path


def content(path: Path) -> str:
    verify(path)
    return (path / "a.txt").read_text()


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob(".*"))


class TestTheOrder:
    @pytest.fixture
    def events(self, monkeypatch) -> list[str]:
        """What is forced to disk and renamed, without the names of temporary folders."""
        events: list[str] = []

        def name(path: Path) -> str:
            return "PARTIAL" if Path(path).suffix == ".partial" else Path(path).name

        def rename(source: Path, target: Path) -> None:
            events.append(f"{name(source)} -> {name(target)}")
            os.replace(source, target)

        def sync(path: Path) -> None:
            events.append(f"sync {name(path)}")

        monkeypatch.setattr(manifest, "sync", sync)
        monkeypatch.setattr(directories, "sync", sync)
        monkeypatch.setattr(os, "rename", rename)
        return events

    def test_of_a_new_one(self, events, tmp_path):
        (tmp_path / "run").mkdir()
        save(tmp_path / "run/new")
        files, rest = events[:2], events[2:]
        assert sorted(files) == ["sync a.txt", "sync b.txt"]
        assert rest == ["sync manifest.json", "sync PARTIAL", "PARTIAL -> new", "sync run"]

    def test_of_one_that_replaces_another(self, events, tmp_path):
        save(tmp_path / "it")
        del events[:]
        save(tmp_path / "it", "new")
        assert events[4:] == ["it -> .it.old", "PARTIAL -> it", f"sync {tmp_path.name}"]

    def test_new_folders_above_are_on_disk_too(self, events, tmp_path):
        save(tmp_path / "a/b/new")
        assert {"sync a", f"sync {tmp_path.name}"} <= set(events[:2])


class TestReadingBack:
    @pytest.fixture
    def bad_disk(self, monkeypatch) -> set[str]:
        """The files that this disk does not keep."""
        lost: set[str] = set()
        sync = manifest.sync

        def sync_and_damage(path: Path) -> None:
            sync(path)
            if path.name in lost:
                path.write_bytes(path.read_bytes()[:-2] + b"??")

        monkeypatch.setattr(manifest, "sync", sync_and_damage)
        return lost

    @pytest.mark.parametrize("name", ["a.txt", "manifest.json"])
    def test_what_the_disk_lost_replaces_nothing(self, name, bad_disk, tmp_path):
        save(tmp_path / "it", "old")
        bad_disk.add(name)
        message = refusal(lambda: save(tmp_path / "it", "new"))
        assert name in message
        assert content(tmp_path / "it") == "old"
        assert hidden(tmp_path) == []


class TestWhatIsNoManifestedFile:
    @pytest.fixture
    def saved(self, tmp_path) -> Path:
        return save(tmp_path / "saved")

    def test_a_surplus_file(self, saved):
        (saved / "c.txt").touch()
        assert "saved/c.txt is not in the manifest" in refusal(lambda: verify(saved))

    def test_a_folder(self, saved):
        (saved / "c").mkdir()
        assert "saved/c is a folder or a link" in refusal(lambda: verify(saved))

    @pytest.mark.parametrize("name", ["a.txt", "manifest.json"])
    def test_a_link(self, name, saved, tmp_path):
        os.rename(saved / name, tmp_path / "elsewhere")
        (saved / name).symlink_to(tmp_path / "elsewhere")
        assert str(saved / name) in refusal(lambda: verify(saved))

    @pytest.mark.parametrize("name", ["a.txt", "manifest.json"])
    def test_a_pipe_is_not_waited_for(self, name, saved):
        (saved / name).unlink()
        os.mkfifo(saved / name)
        assert str(saved / name) in refusal(lambda: verify(saved))

    def test_a_longer_file(self, saved):
        (saved / "a.txt").write_text("content and more")
        assert "16 bytes instead of 7; something was added" in refusal(lambda: verify(saved))

    @pytest.mark.parametrize("name", ["../saved/a.txt", "/etc/hosts", "", "..", "x/y", "a\0"])
    def test_a_name_elsewhere(self, name, saved):
        entries = manifest.read_manifest(saved)
        (saved / "manifest.json").write_bytes(rendered({name: entries["a.txt"]}))
        assert "no file beside it" in refusal(lambda: verify(saved))

    def test_a_folder_is_not_written_either(self, tmp_path):
        message = refusal(lambda: write_directory(tmp_path / "it", lambda p: (p / "x").mkdir()))
        assert "x is a folder" in message
        assert list(tmp_path.iterdir()) == []

    def test_a_disk_that_cannot_be_read(self, saved, monkeypatch):
        def fail(file: Path) -> None:
            raise OSError(errno.EIO, "Input/output error", str(file))

        monkeypatch.setattr(manifest, "_entry", fail)
        assert "cannot be read" in refusal(lambda: verify(saved))


@pytest.fixture(scope="module")
def listed(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("listed") / "it")


@given(position=st.integers(0, 10**6), change=st.integers(1, 255))
@settings(max_examples=300)
def test_no_byte_of_the_manifest_can_change(listed, position, change):
    """Spaces, line ends, names and digests alike."""
    content = (listed / "manifest.json").read_bytes()
    damaged = bytearray(content)
    damaged[position % len(content)] ^= change
    (listed / "manifest.json").write_bytes(damaged)
    try:
        assert "manifest.json is damaged" in refusal(lambda: verify(listed))
    finally:
        (listed / "manifest.json").write_bytes(content)
    verify(listed)


def test_the_manifest_can_be_checked_without_us(tmp_path):
    """With the sha256sum of every system."""
    import json

    listed = save(tmp_path / "it")
    files = json.loads((listed / "manifest.json").read_text())["files"]
    lines = "".join(f"{entry['sha256']}  {name}\n" for name, entry in files.items())
    if not shutil.which("sha256sum"):
        pytest.skip("no sha256sum")
    done = subprocess.run(["sha256sum", "--check", "--strict"], input=lines.encode(), cwd=listed,
                          capture_output=True)  # fmt: skip
    assert (done.returncode, done.stdout.count(b"\n")) == (0, 2), done.stderr


class TestReplacing:
    def test_a_manifest_of_something_else_protects_it(self, tmp_path):
        (tmp_path / "extension").mkdir()
        (tmp_path / "extension/manifest.json").write_text('{"files": {}, "name": "precious"}')
        assert "not a checkpoint" in refusal(lambda: save(tmp_path / "extension"))
        assert os.listdir(tmp_path / "extension") == ["manifest.json"]

    @pytest.mark.parametrize("name", ["model", "step-5"])
    def test_a_file_of_the_user_protects_a_checkpoint(self, name, tmp_path):
        save(tmp_path / name)
        (tmp_path / name / "thesis.txt").write_text("precious")
        assert "thesis.txt in it is not part" in refusal(lambda: save(tmp_path / name, "new"))
        assert (tmp_path / name / "thesis.txt").exists()

    def test_what_a_link_names_is_replaced_and_the_link_stays(self, tmp_path):
        save(tmp_path / "disk/model", "old")
        (tmp_path / "latest").symlink_to("disk/model")
        save(tmp_path / "latest", "new")
        assert (tmp_path / "latest").is_symlink()
        assert content(tmp_path / "disk/model") == "new"

    def test_what_came_while_it_was_written_is_never_replaced(self, tmp_path):
        def write(partial: Path) -> None:
            (partial / "a.txt").touch()
            (tmp_path / "it").mkdir()
            (tmp_path / "it/thesis.txt").write_text("precious")

        assert "not a checkpoint" in refusal(lambda: write_directory(tmp_path / "it", write))
        assert os.listdir(tmp_path) == ["it"] and os.listdir(tmp_path / "it") == ["thesis.txt"]

    def test_an_empty_folder_is_taken(self, tmp_path):
        (tmp_path / "empty").mkdir()
        assert content(save(tmp_path / "empty")) == "content"


class TestAfterAKill:
    """A process died between taking the old one's name away and giving it to the new one."""

    @pytest.fixture
    def run(self, tmp_path) -> Path:
        for step in (1, 2):
            save(tmp_path / f"run/step-{step}", f"step {step}")
        os.rename(tmp_path / "run/step-2", tmp_path / "run/.step-2.old")
        return tmp_path / "run"

    def test_the_old_one_is_found(self, run):
        newest, skipped = newest_checkpoint(run)
        assert (content(newest), skipped) == ("step 2", [])
        assert content(existing(run / "step-2")) == "step 2"
        assert existing(run / "step-1") == run / "step-1"
        assert existing(run / "step-3") == run / "step-3"

    def test_the_next_start_gives_it_its_name(self, run):
        clean(run)
        assert content(run / "step-2") == "step 2"
        assert hidden(run) == []

    def test_the_next_save_replaces_it(self, run):
        save(run / "step-2", "new")
        assert content(run / "step-2") == "new"
        assert hidden(run) == []

    def test_a_next_save_that_fails_gives_it_back(self, run):
        def fail(partial: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        refusal(lambda: write_directory(run / "step-2", fail))
        assert content(run / "step-2") == "step 2"

    def test_one_that_was_replaced_goes_only_if_the_new_one_is_whole(self, run):
        save(run / "step-3")
        os.rename(run / "step-3", run / "step-2")
        os.truncate(run / "step-2/a.txt", 1)
        clean(run)
        assert hidden(run) == [".step-2.old"]
        save(run / "step-2", "new")
        assert hidden(run) == []


class TestLeftovers:
    def partial(self, folder: Path, owner: str) -> Path:
        partial = folder / f".it.{owner}-abcdef.partial"
        partial.mkdir()
        (partial / "model.safetensors").touch()
        return partial

    def dead(self) -> int:
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        return process.pid

    def test_those_of_the_dead_go(self, tmp_path):
        self.partial(tmp_path, f"{socket.gethostname()}-{self.dead()}")
        save(tmp_path / "it")
        assert hidden(tmp_path) == []

    def test_those_of_the_living_and_of_strangers_stay(self, tmp_path):
        mine = self.partial(tmp_path, f"{socket.gethostname()}-{os.getpid()}")
        theirs = self.partial(tmp_path, f"{socket.gethostname()}-1")
        other = self.partial(tmp_path, f"elsewhere.example-{self.dead()}")
        odd = self.partial(tmp_path, f"{socket.gethostname()}-me")
        save(tmp_path / "it")
        assert all(partial.exists() for partial in (mine, theirs, other, odd))

    def test_two_writers_of_one_name_do_not_mix(self, tmp_path):
        def write(partial: Path) -> None:
            (partial / "a.txt").write_text("outer")
            save(tmp_path / "it", "inner")  # all of another save in the middle of this one

        write_directory(tmp_path / "it", write)
        assert content(tmp_path / "it") == "outer"
        assert not (tmp_path / "it/b.txt").exists()
        assert hidden(tmp_path) == []


class TestSeveralWriters:
    """As in distributed training: each process writes and seals files of its own."""

    def test_together_they_make_a_directory(self, tmp_path):
        draft = Draft.begin(tmp_path / "it")
        entries = {}
        for rank in range(3):
            (draft.folder / f"{rank}.txt").write_text(str(rank))
            entries |= Draft(draft.path, draft.folder).seal([f"{rank}.txt"])
        draft.finish(entries)
        draft.discard()
        verify(tmp_path / "it")
        assert len(list((tmp_path / "it").iterdir())) == 4
        assert hidden(tmp_path) == []

    @pytest.mark.parametrize(
        ("harm", "complaint"),
        [
            (lambda folder: (folder / "1.txt").touch(), "1.txt is not in the manifest"),
            (lambda folder: (folder / "0.txt").unlink(), "0.txt is missing"),
            (lambda folder: os.truncate(folder / "0.txt", 0), "0 bytes instead of 4"),
        ],
        ids=["not sealed", "missing", "truncated"],
    )
    def test_what_does_not_fit_together_replaces_nothing(self, harm, complaint, tmp_path):
        save(tmp_path / "it", "old")
        draft = Draft.begin(tmp_path / "it")
        (draft.folder / "0.txt").write_text("zero")
        entries = draft.seal()
        harm(draft.folder)
        assert complaint in refusal(lambda: draft.finish(entries))
        draft.discard()
        assert content(tmp_path / "it") == "old"
        assert hidden(tmp_path) == []

    def test_sealing_what_is_not_there_says_so(self, tmp_path):
        draft = Draft.begin(tmp_path / "it")
        assert "0.txt" in refusal(lambda: draft.seal(["0.txt"]))


class TestPruning:
    def run(self, folder: Path, *steps: int) -> Path:
        for step in steps:
            save(folder / f"step-{step}", str(step))
        return folder

    def steps(self, run: Path) -> list[str]:
        return [path.name for path in step_directories(run)]

    def test_the_last_ones_stay(self, tmp_path):
        run = self.run(tmp_path, 1, 2, 3, 20)
        prune(run / "step-20", keep=3)
        assert self.steps(run) == ["step-2", "step-3", "step-20"]
        assert hidden(run) == []

    def test_a_pinned_one_stays_as_long_as_its_mark(self, tmp_path):
        run = self.run(tmp_path, 1, 2, 3, 4)
        pin(run / "step-1", "needed by one")
        pin(run / "step-1", "needed by another")
        prune(run / "step-4", keep=2)
        assert self.steps(run) == ["step-1", "step-3", "step-4"]
        assert (run / "step-1.pinned").read_text() == "needed by one\nneeded by another\n"
        verify(run / "step-1")
        (run / "step-1.pinned").unlink()
        prune(run / "step-4", keep=2)
        assert self.steps(run) == ["step-3", "step-4"]

    def test_one_alone_is_too_few(self, tmp_path):
        assert "at least 2" in refusal(lambda: prune(tmp_path / "step-1", keep=1))

    def test_damaged_later_ones_do_not_count(self, tmp_path):
        """A run that fell back to step 2 keeps what it writes now, not what it could not read."""
        run = self.run(tmp_path, 1, 2, 50, 60)
        for step in (50, 60):
            os.truncate(run / f"step-{step}/a.txt", 0)
        save(run / "step-3", "3")
        prune(run / "step-3", keep=2)
        assert self.steps(run) == ["step-2", "step-3", "step-50", "step-60"]
        assert newest_checkpoint(run)[0].name == "step-3"

    def test_nor_do_they_when_the_run_has_passed_them(self, tmp_path):
        run = self.run(tmp_path, 1, 2, 50)
        os.truncate(run / "step-50/a.txt", 0)
        assert put_aside(newest_checkpoint(run)[0]) == [run / "step-50.damaged"]
        self.run(tmp_path, 49, 60)
        prune(run / "step-60", keep=2)
        assert self.steps(run) == ["step-49", "step-60"]
        assert (run / "step-50.damaged/a.txt").exists()

    def test_nothing_is_removed_under_its_own_name(self, tmp_path, monkeypatch):
        """A kill in the middle of it leaves no checkpoint that looks damaged."""
        run = self.run(tmp_path, 1, 2, 3)
        rmtree = shutil.rmtree
        removed: list[Path] = []
        monkeypatch.setattr(shutil, "rmtree", lambda path, **_: removed.append(path))
        prune(run / "step-3", keep=2)
        assert [path.suffix for path in removed] == [".partial"]
        assert self.steps(run) == ["step-2", "step-3"]
        monkeypatch.setattr(shutil, "rmtree", rmtree)
        clean(run)
        assert hidden(run) == []


def test_the_current_one_of_a_run_says_what_was_passed_over(tmp_path):
    for step in (1, 2):
        save(tmp_path / f"run/step-{step}")
    assert open_path(tmp_path / "run").path == tmp_path / "run/step-2"
    assert open_path(tmp_path / "run/step-1").path == tmp_path / "run/step-1"
    assert open_path(tmp_path / "absent").path == tmp_path / "absent"
    os.truncate(tmp_path / "run/step-2/a.txt", 1)
    with pytest.warns(UserWarning, match=r"damaged checkpoint: .*step-2/a\.txt has 1 bytes"):
        assert open_path(tmp_path / "run").path == tmp_path / "run/step-1"


def test_home_directories(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert existing("~/it") == tmp_path / "it"
    assert existing("~no one has this name/it") == Path("~no one has this name/it")


def test_a_path_that_cannot_be_looked_at_is_one_line(tmp_path):
    assert "cannot be read: File name too long" in refusal(lambda: existing(tmp_path / ("x" * 300)))
    assert "cannot be read: No such file" in refusal(lambda: newest_checkpoint(tmp_path / "absent"))


def test_a_checkpoint_under_the_name_of_another_step_is_passed_over(tmp_path):
    for step in (1, 2, 3):
        write_directory(
            tmp_path / f"step-{step}",
            lambda new, n=step: (new / "training.json").write_text(json.dumps({"step": n})),
        )
    (tmp_path / "step-3").rename(tmp_path / "step-999")
    newest, skipped = newest_checkpoint(tmp_path)
    assert newest.name == "step-2"
    assert skipped == [f"{tmp_path}/step-999 holds step 3; give it back the name of that step"]


def test_step_directories_are_ordered_by_number(tmp_path):
    for name in ("step-3", "step-00000020", "step-100", "step-", "step-4x", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-7").touch()
    assert [p.name for p in step_directories(tmp_path)] == ["step-3", "step-00000020", "step-100"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be limited")
@pytest.mark.parametrize("limit", [0, 3, 20, 200])
def test_files_that_may_not_grow(limit, tmp_path):
    """The kernel refuses to write on, as a quota would: in a.txt, b.txt or the manifest."""
    import resource

    save(tmp_path / "it", "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(ValueError, match=r"cannot write .*it: .*File too large"):
            save(tmp_path / "it", "content" * 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert content(tmp_path / "it") == "old"
    assert hidden(tmp_path) == []

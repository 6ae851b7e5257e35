"""Files appear whole or not at all, and errors name the file that was to appear."""

import errno
import os

import pytest

from receptance.atomic import check_folder, written


def test_a_file_appears_when_it_is_whole(tmp_path):
    with written(tmp_path / "a") as file:
        file.write(b"whole")
        assert not (tmp_path / "a").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path):
    """The error of a write knows no name."""
    (tmp_path / "a").write_bytes(b"old")

    def write() -> None:
        with written(tmp_path / "a") as file:
            file.write(b"n")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left on device") as caught:
        write()
    assert caught.value.filename == str(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_what_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    check_folder(tmp_path)
    check_folder(tmp_path / "new")
    for name, what in (("file", "a file"), ("link", "a link to nothing")):
        with pytest.raises(ValueError, match=f"{name} is {what}; name a folder"):
            check_folder(tmp_path / name)

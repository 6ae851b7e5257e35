"""Finding text, and choosing what is kept for validation."""

import bz2
import gzip
import lzma
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from receptance.data.files import choose, find_files


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """Files of every kind; the working directory is its root."""
    for name, content in {
        "b.txt": b"b",
        "a.py": b"a",
        "sub/deep/c.txt": b"c",
        "sub/skip/d.txt": b"d",
        "sub/übung 1.txt": "ü".encode(),
        "sub/[x].txt": b"x",
        ".hidden.txt": b"h",
        ".git/config.txt": b"g",
        "image.png": b"\x89PNG\0\0",
        "latin.txt": b"caf\xe9",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*sources: str, exclude: tuple[str, ...] = ()) -> list[str]:
    return [path.name for path in find_files(sources, exclude)]


NO_TEXT = [
    ("a.png", b"\x89PNG\0\0", "looks like binary data, not text; unpack it, or give .gz"),
    ("a.jsonl", b"{}\n\0", "looks like binary data"),
    ("a.jsonl.xz", lzma.compress(b"text"), "looks like an xz file"),
    ("a.txt.bz2", bz2.compress(b"text"), "looks like a bzip2 file"),
    ("a.zst", b"\x28\xb5\x2f\xfd text", "looks like a zstd file"),
    ("a.epub", b"PK\3\4 text", "looks like a zip file"),
    ("a.txt", gzip.compress(b"text"), "looks like a gzip file without .gz"),
    ("a.tar.gz", gzip.compress(b"name\0\0\0"), "looks like binary data"),
    ("a.txt.gz", b"text", "cannot read a.txt.gz: Not a gzipped file"),
    ("a.txt", "text".encode("utf-16"), "is UTF-16; save it as UTF-8"),
    ("a.json", b"\xef\xbb\xbf\n[1]", ".json holds one document; give records as .jsonl"),
    ("a.JSON.GZ", gzip.compress(b'{"text": "a"}'), "holds one document"),
]


class TestFindFiles:
    ALL = ("a.py", "b.txt", "latin.txt", "[x].txt", "c.txt", "d.txt", "übung 1.txt")

    @pytest.mark.usefixtures("tree")
    def test_a_folder_gives_its_text_files_in_order(self):
        found = find_files(["."])
        assert found == sorted(found)
        assert sorted(names(".")) == sorted(self.ALL)

    def test_absolute_paths_are_no_different(self, tree):
        assert sorted(names(str(tree))) == sorted(self.ALL)

    @pytest.mark.usefixtures("tree")
    def test_globs(self):
        assert names("*.txt") == ["b.txt", "latin.txt"]
        assert names("sub/*/c.txt") == ["c.txt"]
        assert sorted(names("**/*.txt")) == sorted(set(self.ALL) - {"a.py"})

    @pytest.mark.usefixtures("tree")
    def test_a_file_with_wildcards_in_its_name(self):
        assert names("sub/[x].txt") == ["[x].txt"]

    @pytest.mark.usefixtures("tree")
    def test_named_files_are_taken_whatever_their_names(self):
        named = ["latin.txt", ".hidden.txt", "sub/übung 1.txt"]
        assert names(*named, exclude=("*",)) == ["latin.txt", ".hidden.txt", "übung 1.txt"]

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        NO_TEXT,
        ids=[f"{name}: {words}" for name, _, words in NO_TEXT],
    )
    def test_what_is_named_and_no_text_is_refused(self, name, content, words, tree):
        Path(name).write_bytes(content)
        with pytest.raises(ValueError, match=f"^{re.escape(name)}|^cannot read {name}") as caught:
            find_files([name], also=(".txt.gz", ".jsonl.gz"))
        assert words in str(caught.value) and "\n" not in str(caught.value)
        if not name.endswith((".json", ".txt.gz")):
            assert Path(name) not in find_files([str(tree), "*"], also=(".txt.gz", ".jsonl.gz"))

    @pytest.mark.usefixtures("tree")
    def test_text_that_looks_a_little_like_something_else(self):
        for name, content in {"a.json": b"json5", "BZ.txt": b"BZh", "PK.txt": b"PK"}.items():
            Path(name).write_bytes(content)
            assert names(name) == [name]

    @pytest.mark.parametrize("source", ["sub", "sub/*.json", "sub/a.json"])
    @pytest.mark.parametrize(
        ("content", "instead"),
        [
            (b'[{"text": "a"}]', ""),
            (b"\xef\xbb\xbf\n[\n {}]", ""),
            (b"[ ]", ""),
            (b"{}", "a JSON document"),
            (b"[1]", "a JSON document"),
            (b"// json5", ""),
        ],
    )
    def test_json_is_the_same_wherever_it_is_found(self, source, content, instead, tree):
        (tree / "sub/a.json").write_bytes(content)
        (tree / "sub/b.json").write_bytes(b"[{}]")
        left_out: dict[Path, str] = {}
        if instead and source == "sub/a.json":
            with pytest.raises(ValueError, match=r"^sub/a\.json: \.json holds one document"):
                find_files([source])
            return
        found = find_files([source], left_out=left_out.setdefault)
        assert (Path("sub/a.json") in found) == (not instead)
        assert left_out == ({Path("sub/a.json"): instead} if instead else {})

    @pytest.mark.usefixtures("tree")
    def test_a_list_that_is_too_long_to_be_read_whole(self, monkeypatch):
        monkeypatch.setattr("receptance.data.files.LIST_BYTES", 5)
        Path("sub/a.json").write_text("[{}, {}]")
        with pytest.raises(
            ValueError, match=r"^sub/a.json is a list .* more than 5 bytes; make it"
        ):
            find_files(["sub/a.json"])
        left_out: dict[Path, str] = {}
        assert Path("sub/a.json") not in find_files(["sub"], left_out=left_out.setdefault)
        assert "too long to be read whole" in left_out[Path("sub/a.json")]

    @pytest.mark.usefixtures("tree")
    def test_what_is_no_file_is_refused_by_name_and_never_opened(self):
        os.mkfifo("pipe.txt")
        Path("link.txt").symlink_to("nowhere")
        with pytest.raises(ValueError, match=r"^pipe.txt is a named pipe, not a file; write the"):
            find_files(["pipe.txt"])
        with pytest.raises(ValueError, match=r"^link.txt is a link to nothing, not a file"):
            find_files(["link.txt"])
        with pytest.raises(ValueError, match=r"^/dev/null is a device, not a file"):
            find_files(["/dev/null"])

    @pytest.mark.usefixtures("tree")
    def test_a_folder_of_other_files_says_what_they_are(self):
        Path("odd").mkdir()
        Path("odd/a.txt").write_text("text", encoding="utf-16")
        Path("odd/b.gz").write_bytes(gzip.compress(b"text"))
        with pytest.raises(ValueError) as caught:
            find_files(["odd"])
        assert str(caught.value) == (
            "no text files in folder odd; files left out: 2 (UTF-16: 1, a gzip file: 1), the first "
            "is odd/a.txt"
        )

    @pytest.mark.usefixtures("tree")
    def test_files_that_cannot_be_read_are_left_out_or_named(self, monkeypatch):
        """Whoever runs the tests may be allowed to read everything."""
        real = Path.open

        def refusing(path, *how):
            if path.name == "c.txt":
                raise PermissionError(13, "Permission denied")
            return real(path, *how)

        monkeypatch.setattr(Path, "open", refusing)
        left_out: dict[Path, str] = {}
        assert "c.txt" not in [p.name for p in find_files(["sub"], left_out=left_out.setdefault)]
        assert left_out == {Path("sub/deep/c.txt"): "unreadable: Permission denied"}
        with pytest.raises(ValueError, match=r"^cannot read sub/deep/c.txt: Permission denied$"):
            find_files(["sub/deep/c.txt"])

    @pytest.mark.usefixtures("tree")
    def test_what_nobody_asked_for_is_not_said(self):
        Path(".hidden.png").write_bytes(b"\0")
        left_out: dict[Path, str] = {}
        find_files(["."], ("*.png",), left_out=left_out.setdefault)
        assert left_out == {}

    @pytest.mark.usefixtures("tree")
    def test_a_glob_of_folders_gives_what_is_in_them(self):
        assert sorted(names("s*")) == ["[x].txt", "c.txt", "d.txt", "übung 1.txt"]
        assert names("sub/*", exclude=("skip",)) == ["[x].txt", "c.txt", "übung 1.txt"]

    @pytest.mark.usefixtures("tree")
    def test_excluded_components(self):
        assert "d.txt" not in names(".", exclude=("skip",))
        assert names("**/*.txt", exclude=("sub", "l*")) == ["b.txt"]

    def test_components_above_the_source_do_not_count(self, tree):
        inside = tree / ".cache" / "skip"
        inside.mkdir(parents=True)
        (inside / "e.txt").write_text("e")
        for source in (inside, inside / "*.txt"):
            assert names(str(source), exclude=("skip",)) == ["e.txt"]

    def test_each_file_comes_once(self, tree):
        os.symlink("b.txt", tree / "link.txt")
        assert names("b.txt", "./b.txt", str(tree / "b.txt"), "*.txt") == ["b.txt", "latin.txt"]

    def test_the_home_directory(self, tree, monkeypatch):
        monkeypatch.setenv("HOME", str(tree))
        assert names("~/b.txt", "~/a.*") == ["b.txt", "a.py"]

    @pytest.mark.usefixtures("tree")
    @pytest.mark.parametrize("source", ["nothing.txt", "*.md", "bare", "no/*.txt", "image*", ".h*"])
    def test_a_source_without_text_is_named(self, source):
        Path("bare").mkdir()
        with pytest.raises(ValueError, match=r"^no ") as caught:
            find_files(["b.txt", source])
        assert source in str(caught.value)

    def test_a_name_with_a_tilde_that_is_nobodys_home(self, tree):
        (tree / "~$draft.txt").write_text("~")
        assert names("~$draft.txt") == ["~$draft.txt"]

    def test_output_is_no_source_unless_it_is_named(self, tree):
        (tree / "link").symlink_to(tree / "sub", target_is_directory=True)
        for output in (tree / "sub", Path("sub"), Path("link")):
            found = find_files(["sub/skip/d.txt", ".", "**/*.txt"], output=output)
            assert [str(p) for p in found] == ["sub/skip/d.txt", "a.py", "b.txt", "latin.txt"]
        assert "d.txt" in [p.name for p in find_files(["sub"], output=tree / "sub")]
        with pytest.raises(ValueError, match=r"no text files behind s\*/skip"):
            find_files(["s*/skip/*"], output=tree / "sub")


sizes = st.lists(st.integers(1, 400), min_size=1, max_size=12).map(np.array)
shares = st.floats(0.01, 0.6)


class TestChoose:
    @given(sizes, shares, st.integers(0, 9))
    def test_whole_documents_stay_within_the_share(self, sizes, share, seed):
        chosen, cut = choose(sizes, share, seed)
        assert len(set(chosen.tolist())) == len(chosen)
        assert sizes[chosen].sum() <= share * sizes.sum()
        if cut is not None:
            assert cut[0] not in chosen
            assert sizes[cut[0]] == np.delete(sizes, chosen).max()

    @given(sizes, shares, st.integers(0, 9))
    def test_there_is_always_something_to_train_on(self, sizes, share, seed):
        chosen, cut = choose(sizes, share, seed)
        assert len(chosen) < len(sizes)
        assert cut is None or 1 <= cut[1] <= sizes[cut[0]]

    @given(sizes, shares, st.integers(0, 9))
    def test_it_depends_on_nothing_but_its_arguments(self, sizes, share, seed):
        before, given_sizes = torch.get_rng_state(), sizes.copy()
        (one, cut), (other, cut_too) = choose(sizes, share, seed), choose(sizes, share, seed)
        assert np.array_equal(one, other) and cut == cut_too
        assert np.array_equal(sizes, given_sizes)
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_seed_decides(self):
        one, other = (choose(np.full(50, 10), 0.2, seed)[0].tolist() for seed in (0, 1))
        assert sorted(one) != sorted(other)

    @pytest.mark.parametrize("seed", range(5))
    def test_the_share_holds_for_many_documents(self, seed):
        sizes = np.arange(10, 210)
        chosen, cut = choose(sizes, 0.1, seed)
        assert cut is None
        assert 0.09 < sizes[chosen].sum() / sizes.sum() <= 0.1

    @pytest.mark.parametrize("seed", range(5))
    def test_a_large_document_beside_a_small_one_is_not_given_away(self, seed):
        chosen, cut = choose(np.array([10_000, 8]), 0.1, seed)
        assert chosen.tolist() == [1]
        assert cut == (0, round(10_000 - (0.1 * 10_008 - 8)))

    @pytest.mark.parametrize("share", [0, 1, -1, float("nan")])
    def test_a_share_outside_0_and_1_is_refused(self, share):
        with pytest.raises(ValueError, match="between 0 and 1"):
            choose(np.array([4]), share, seed=0)


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40), st.floats(0.01, 0.9), st.integers(0, 3)
)
def test_the_choice_is_that_of_one_document_after_another(sizes, share, seed):
    chosen, cut = choose(np.array(sizes), share, seed)
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted, size, slowly = share * sum(sizes), 0, []
    for i in order:
        if size + sizes[i] <= wanted:
            slowly.append(i)
            size += sizes[i]
    assert chosen.tolist() == slowly
    assert (cut is not None) == (size < wanted / 2)

"""Files of benchmarks: idx images, series, and the release of Long Range Arena, in tiny."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch

from receptance.data.arena import (
    read_image,
    read_listops,
    read_pathfinder,
    read_retrieval,
    read_text,
)
from receptance.data.idx import is_idx_folder, read_idx, read_idx_folder
from receptance.data.series import SeriesWindows, read_archive, read_columns, read_ts


def idx(values: np.ndarray) -> bytes:
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return header + values.astype(np.uint8).tobytes()


def write_images(folder, counts=(20, 4), packed=True) -> None:
    rng = np.random.default_rng(0)
    for stem, count in zip(("train", "t10k"), counts, strict=True):
        parts = {
            "images-idx3": rng.integers(256, size=(count, 3, 2)),
            "labels-idx1": rng.integers(3, size=count),
        }
        for name, values in parts.items():
            content = idx(values)
            path = folder / f"{stem}-{name}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)


class TestIdx:
    @pytest.mark.parametrize("packed", [True, False])
    def test_a_folder(self, tmp_path, packed):
        write_images(tmp_path, packed=packed)
        assert is_idx_folder(tmp_path)
        examples = read_idx_folder(tmp_path)
        assert [examples.count(s) for s in ("train", "validation", "test")] == [18, 2, 4]
        assert examples.part("test").inputs[0].shape == (6, 1)
        assert examples.problem.channels == 1

    def test_values(self, tmp_path):
        values = np.arange(24).reshape(2, 3, 4)
        (tmp_path / "a").write_bytes(idx(values))
        assert np.array_equal(read_idx(tmp_path / "a"), values)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "no idx file"),
            (b"\0\0\x0d\1\0\0\0\1\0\0\0\0", "no idx file of bytes"),
            (idx(np.zeros((2, 2)))[:-1], "3 values; its header says"),
            (b"\0\0\x08\x02\xff\xff\xff\xff\xff\xff\xff\xff", "0 values"),
            (b"\0\0\x08\x04\0", "cut short"),
            (b"\x1f\x8bnonsense", "cannot be read"),
        ],
    )
    def test_damage(self, tmp_path, content, message):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_idx(tmp_path / "a")

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(ValueError, match="has no train-images"):
            read_idx_folder(tmp_path)


TS = """# a comment
% another
@problemName Tiny
@timeStamps false
@univariate false
@classLabel true up down
@data
1,2,3:4,5,6:up
3,2:1,0:down
"""


class TestTs:
    def test_series_of_two_dimensions(self, tmp_path):
        (tmp_path / "a.ts").write_text(TS)
        found = read_ts(tmp_path / "a.ts")
        assert found.classes == ["up", "down"] and found.labels == ["up", "down"]
        assert found.series[0].tolist() == [[1, 4], [2, 5], [3, 6]]

    def test_an_archive(self, tmp_path):
        lines = "".join(f"{n},{n + 1}:{n},0:{'up' if n % 2 else 'down'}\n" for n in range(20))
        header = TS.partition("@data\n")[0] + "@data\n"
        (tmp_path / "Tiny_TRAIN.ts").write_text(header + lines)
        (tmp_path / "Tiny_TEST.ts").write_text(TS)
        examples, classes = read_archive(tmp_path / "Tiny_TRAIN.ts", "classify")
        assert classes == ["up", "down"]
        assert [examples.count(s) for s in ("train", "validation", "test")] == [16, 4, 2]
        inside = [*examples.part("train").inputs, *examples.part("validation").inputs]
        joined = np.concatenate(inside)
        assert abs(joined.mean(axis=0)).max() < 1e-5
        assert abs(joined.std(axis=0) - 1).max() < 1e-5
        with pytest.raises(ValueError, match="it is for classification"):
            read_archive(tmp_path / "Tiny_TRAIN.ts", "regress")
        with pytest.raises(ValueError, match=r"NAME_TRAIN\.ts"):
            read_archive(tmp_path / "a.ts", "classify")

    @pytest.mark.parametrize("wide", ["TRAIN", "TEST"])
    def test_parts_of_other_dimensions(self, tmp_path, wide):
        header = TS.partition("@data\n")[0] + "@data\n"
        for part in ("TRAIN", "TEST"):
            line = "1,2:3,4:up\n" if part == wide else "1,2:up\n"
            (tmp_path / f"A_{part}.ts").write_text(header + line * 20)
        with pytest.raises(ValueError, match=r"A_TEST\.ts has . dimensions, and A_TRAIN\.ts has"):
            read_archive(tmp_path / "A_TRAIN.ts", "classify")

    def test_an_answer_that_is_no_number(self, tmp_path):
        for part in ("TRAIN", "TEST"):
            (tmp_path / f"N_{part}.ts").write_text("@data\n" + "1,2:nan\n" * 10)
        with pytest.raises(ValueError, match="an answer is not finite"):
            read_archive(tmp_path / "N_TRAIN.ts", "regress")

    def test_numbers_to_predict(self, tmp_path):
        lines = "@data\n" + "".join(f"{n},{n + 1}:{n / 2}\n" for n in range(10))
        for part in ("TRAIN", "TEST"):
            (tmp_path / f"N_{part}.ts").write_text("@targetLabel true\n" + lines)
        examples, _ = read_archive(tmp_path / "N_TRAIN.ts", "regress")
        center, spread = (examples.about[f"answers' {x}"] for x in ("mean", "deviation"))
        numbers = examples.part("test").targets[:, 0] * spread + center
        np.testing.assert_allclose(numbers, np.arange(10) / 2, atol=1e-6)
        with pytest.raises(ValueError, match="names no classes"):
            read_archive(tmp_path / "N_TRAIN.ts", "classify")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("1,2:a\n", "line 1: wanted a header"),
            ("@data\n", "no example"),
            ("@data\n1,x:a\n", "line 2: could not convert"),
            ("@data\n1,?:a\n", "a value is missing"),
            ("@data\n1,2:3:a\n", "different lengths"),
            ("@data\n12\n", "no colon"),
            ("@timestamps true\n@data\n1:a\n", "time stamps"),
            ("@data\n1,2:3,4:a\n1,2:a\n", "line 3: it has 1 dimensions, and those before it 2"),
            ("@data\n1,nan:a\n", "line 2: a value is not finite"),
            ("@data\n1,1e39:a\n", "line 2: a value is not finite"),
        ],
    )
    def test_mistakes(self, tmp_path, text, message):
        (tmp_path / "a.ts").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_ts(tmp_path / "a.ts")


class TestWindows:
    values = np.cumsum(np.random.default_rng(0).normal(size=(100, 2)), axis=0)

    def windows(self) -> SeriesWindows:
        return SeriesWindows(self.values, history=8, horizon=3, about={})

    def test_answers_are_what_follows_less_what_is(self):
        windows = self.windows()
        scaled = windows.values
        for origin, batch in zip(
            windows._origins("test"), windows.held_out("test", 1), strict=True
        ):
            assert batch.places[0].tolist() == [False] * 7 + [True]
            np.testing.assert_array_equal(batch.inputs[0], scaled[origin - 7 : origin + 1])
            wanted = scaled[origin + 1 : origin + 4] - scaled[origin]
            np.testing.assert_allclose(batch.answers[0], wanted.ravel(), atol=1e-6)

    def test_answers_lie_in_their_own_part(self):
        windows = self.windows()
        ends = {"train": (0, 70), "validation": (70, 80), "test": (80, 100)}
        for split, (start, end) in ends.items():
            origins = windows._origins(split)
            assert origins[0] + 1 >= start and origins[-1] + 3 < end
        assert windows._origins("validation")[0] == 69 and windows._origins("test")[-1] == 96

    def test_scales_come_from_training_alone(self):
        other = self.values.copy()
        other[70:] += 100
        moved = SeriesWindows(other, history=8, horizon=3, about={})
        assert np.array_equal(moved.mean, self.windows().mean)

    def test_training_asks_everywhere_and_once_an_epoch(self):
        windows = self.windows()
        count = windows.count("train")
        batch = windows.train(0, count, seed=1)
        assert batch.places.all() and batch.targets.shape == (count, 8, 6)
        ends = sorted(batch.inputs[:, -1, 0].tolist())
        assert ends == sorted(windows.values[7:67, 0].tolist())

    def test_too_short(self):
        with pytest.raises(ValueError, match="too few for parts"):
            SeriesWindows(self.values[:20], history=8, horizon=3, about={})
        with pytest.raises(ValueError, match="missing or infinite"):
            SeriesWindows(np.full((100, 1), np.nan), history=8, horizon=3, about={})


class TestColumns:
    def test_columns_of_numbers(self, tmp_path):
        (tmp_path / "a.csv").write_text("date,x,y\nmon,1,2\ntue,3,4.5\n")
        values, names = read_columns(tmp_path / "a.csv")
        assert names == ["x", "y"] and values.tolist() == [[1, 2], [3, 4.5]]
        assert read_columns(tmp_path / "a.csv", ("y",))[0].tolist() == [[2], [4.5]]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "not a .csv"),
            ("a\nx\n", "no column of numbers"),
            ("a,b\n1\n", "line 2 has 1 fields"),
            ("a\n", "no column of numbers"),
            ("a,b\n1,2\n\n\n1,\n", "line 5: '' in column 'b' is no number"),
            ("a,b\n\n1,2\n1,2,3\n", "line 4 has 3 fields"),
            ("1,2\n3,4\n", "begins with numbers"),
            ("a,b,a\n1,2,3\n", "two columns 'a'"),
        ],
    )
    def test_mistakes(self, tmp_path, text, message):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_columns(tmp_path / "a.csv")

    def test_a_column_that_is_missing(self, tmp_path):
        (tmp_path / "a.csv").write_text("a,b\n1,x\n")
        with pytest.raises(ValueError, match="no column 'c'; there are a, b"):
            read_columns(tmp_path / "a.csv", ("c",))
        with pytest.raises(ValueError, match="column 'b'"):
            read_columns(tmp_path / "a.csv", ("b",))


class TestArena:
    def test_listops(self, tmp_path):
        row = "( ( ( [MAX 2 ) ( ( ( [MIN 4 ) 3 ) ] ) ) ] )\t3\r\n"
        for name in ("train", "val", "test"):
            (tmp_path / f"basic_{name}.tsv").write_text("Source\tTarget\r\n" + 2 * row)
        examples = read_listops(tmp_path)
        assert examples.part("train").inputs[0].tolist() == [1, 7, 0, 9, 8, 4, 4]
        assert examples.part("test").targets.tolist() == [3, 3]
        (tmp_path / "basic_val.tsv").write_text("Source\tTarget\n[MOD 1 ]\t1\n")
        with pytest.raises(ValueError, match=r"basic_val\.tsv line 2 is not an example"):
            read_listops(tmp_path)
        (tmp_path / "basic_val.tsv").unlink()
        with pytest.raises(ValueError, match=r"basic_val\.tsv cannot be read"):
            read_listops(tmp_path)

    def test_text(self, tmp_path):
        for split in ("train", "test"):
            for name in ("pos", "neg"):
                folder = tmp_path / split / name
                folder.mkdir(parents=True)
                for n in range(10):
                    (folder / f"{n}_7.txt").write_bytes(f"{name} née {n}".encode())
        examples = read_text(tmp_path, max_length=6)
        assert [examples.count(s) for s in ("train", "validation", "test")] == [18, 2, 20]
        part = examples.part("test")
        assert bytes(part.inputs[0]) == b"neg n\xc3" and part.targets[0] == 0
        assert bytes(part.inputs[-1]) == b"pos n\xc3" and part.targets[-1] == 1
        with pytest.raises(ValueError, match="name aclImdb"):
            read_text(tmp_path / "train")

    def test_retrieval(self, tmp_path):
        for name in ("train", "eval", "test"):
            (tmp_path / f"new_aan_pairs.{name}.tsv").write_bytes(
                b"1.0\tA\tB\tone text\tanother\n0.0\tC\tD\tx\ty\n"
            )
        examples = read_retrieval(tmp_path, max_length=5)
        assert examples.problem.pairs
        batch = next(examples.held_out("test", 2))
        assert batch.inputs.shape == (4, 5) and sorted(batch.targets.tolist()) == [0, 1]
        assert bytes(examples.part("train").inputs[0]) == b"one t"
        (tmp_path / "new_aan_pairs.test.tsv").write_bytes(b"1.0\tA\tB\n")
        with pytest.raises(ValueError, match="line 1 is not an example"):
            read_retrieval(tmp_path)

    def test_image(self, tmp_path):
        rng = np.random.default_rng(0)
        pixels = rng.integers(256, size=(4, 3072), dtype=np.uint8)
        labels = np.arange(4, dtype=np.uint8)[:, None]
        for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
            content = np.concatenate([labels, pixels], axis=1).tobytes()
            (tmp_path / f"{name}.bin").write_bytes(content)
        examples = read_image(tmp_path)
        assert [examples.count(s) for s in ("train", "validation", "test")] == [18, 2, 4]
        image_module = pytest.importorskip("PIL.Image")
        colors = pixels[1].reshape(3, 32, 32).transpose(1, 2, 0)
        gray = np.asarray(image_module.fromarray(colors).convert("L")).astype(int)
        ours = examples.part("test").inputs[1].reshape(32, 32).astype(int)
        assert abs(ours - gray).max() <= 1  # Pillow cuts where we round
        (tmp_path / "test_batch.bin").write_bytes(b"x")
        with pytest.raises(ValueError, match="no multiple of 3073"):
            read_image(tmp_path)

    def test_pathfinder(self, tmp_path):
        image_module = pytest.importorskip("PIL.Image")
        for folder in ("imgs/0", "metadata"):
            (tmp_path / folder).mkdir(parents=True)
        lines = []
        for n in range(20):
            image = np.full((4, 4), n, np.uint8)
            image_module.fromarray(image).save(tmp_path / f"imgs/0/sample_{n}.png")
            lines.append(f"imgs/0 sample_{n}.png {n} {n % 2} 1.0 14 4 2 0.5 1 1")
        (tmp_path / "imgs/0/sample_7.png").write_bytes(b"")
        (tmp_path / "metadata/0.npy").write_text("\n".join(lines) + "\n")
        examples = read_pathfinder(tmp_path)
        sizes = [examples.count(s) for s in ("train", "validation", "test")]
        assert sum(sizes) == 19 and sizes[1] == sizes[2] == 2
        for split in ("train", "validation", "test"):
            part = examples.part(split)
            for row, label in zip(part.inputs, part.targets, strict=True):
                assert row.shape == (16, 1) and row[0, 0] % 2 == label
        (tmp_path / "imgs/0/sample_3.png").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"sample_3\.png is not an image"):
            read_pathfinder(tmp_path)
        with pytest.raises(ValueError, match="has no metadata"):
            read_pathfinder(tmp_path / "imgs")


def test_parts_are_read_by_a_model_in_batches(tmp_path):
    write_images(tmp_path)
    batch = read_idx_folder(tmp_path).train(0, 4, seed=0)
    assert batch.inputs.dtype == torch.float32 and batch.inputs.shape == (4, 6, 1)

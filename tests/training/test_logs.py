"""Logs: what goes in comes out again, also after a resume, and nothing of it can stop a run."""

import json
import math
import os
import struct
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receptance.training.logs import (
    MetricsLog,
    TensorBoardLog,
    WandbLog,
    check_kinds,
    open_logs,
)

FIGURES = st.one_of(st.integers(-(2**53), 2**53), st.floats(), st.text(max_size=20))
RECORDS = st.lists(
    st.dictionaries(st.text(min_size=1, max_size=5), FIGURES, max_size=4).map(
        lambda record: record | {"step": 1}
    ),
    max_size=8,
)


def steps(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


class TestMetrics:
    @given(RECORDS)
    def test_what_goes_in_comes_out(self, tmp_path_factory, records):
        folder = tmp_path_factory.mktemp("metrics")
        log = MetricsLog(folder)
        for record in records:
            log.record(record)
        log.close()
        text = (folder / "metrics.jsonl").read_text() if records else ""
        found = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
        assert found == [
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()}
            for r in records
        ]

    def test_a_new_log_adds_to_what_is_there(self, tmp_path):
        for step in (1, 2):
            MetricsLog(tmp_path).record({"step": step})
        assert steps(tmp_path) == [1, 2]

    @pytest.mark.parametrize(
        "ending", ["", '{"step": 2, "lo', '{"step": 2}', "\x00" * 9, "[2]\n", '{"tokens": 3}\n']
    )
    def test_a_resumed_run_forgets_what_it_does_again(self, ending, tmp_path):
        lines = [f'{{"step": {step}}}\n' for step in (1, 2, 3, 3, 4)]
        (tmp_path / "metrics.jsonl").write_text("".join(lines) + ending)
        log = MetricsLog(tmp_path, resumed_step=3)
        assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:4])
        log.record({"step": 4})
        assert steps(tmp_path) == [1, 2, 3, 3, 4]
        assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]

    def test_resuming_without_metrics(self, tmp_path):
        MetricsLog(tmp_path, resumed_step=3).record({"step": 4})
        assert steps(tmp_path) == [4]

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is full")
    def test_a_full_disk_is_waited_for(self, tmp_path):
        log = MetricsLog(tmp_path)
        log.record({"step": 1})
        log.path = Path("/dev/full")
        log.record({"step": 2})
        log.close()
        assert log.unwritten == b'{"step": 2}\n'
        log.path = tmp_path / "metrics.jsonl"
        log.record({"step": 3})
        assert steps(tmp_path) == [1, 2, 3]
        assert log.unwritten == b""

    def test_half_a_line_is_completed(self, tmp_path, monkeypatch):
        """As when the last free bytes of a disk take the first part of a line."""

        class Short:
            def __enter__(self):
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def write(self, content: bytes) -> int:
                with open(tmp_path / "metrics.jsonl", "ab") as file:
                    return file.write(content[:7])

        log = MetricsLog(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", lambda *_, **__: Short())
            log.record({"step": 1, "loss": 2.5})
        log.record({"step": 2})
        assert steps(tmp_path) == [1, 2]


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """As TensorBoard shows them, by its own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


class TestTensorBoard:
    @pytest.fixture(autouse=True)
    def _needs_tensorboard(self):
        pytest.importorskip("tensorboard")

    def record(self, log: TensorBoardLog, numbers: range, scale: float = 0.5) -> None:
        for step in numbers:
            log.record({"step": step, "tokens": 100 * step, "loss": scale * step})

    def test_round_trip(self, tmp_path):
        log = TensorBoardLog(tmp_path)
        self.record(log, range(1, 6))
        log.record({"step": 5, "validation_bits_per_byte": 1.25, "sample": "naïve <b>狐</b>"})
        log.close()
        assert scalars(tmp_path, "loss") == [(step, 0.5 * step) for step in range(1, 6)]
        assert scalars(tmp_path, "tokens")[-1] == (5, 500)
        assert scalars(tmp_path, "validation_bits_per_byte") == [(5, 1.25)]

    def test_text_is_kept(self, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        log = TensorBoardLog(tmp_path)
        log.record({"step": 7, "sample": "naïve 狐"})
        log.close()
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        (event,) = events.Tensors("sample/text_summary")
        assert (event.step, event.tensor_proto.string_val[0].decode()) == (7, "naïve 狐")

    @pytest.mark.parametrize("resumed", [0, 3, 6])
    def test_a_resumed_run_replaces_what_it_does_again(self, resumed, tmp_path):
        first = TensorBoardLog(tmp_path)
        self.record(first, range(1, 7))
        first.close()
        second = TensorBoardLog(tmp_path, resumed_step=resumed)
        self.record(second, range(resumed + 1, 9), scale=2)
        second.close()
        wanted = [(s, 0.5 * s) for s in range(1, resumed + 1)]
        wanted += [(s, 2.0 * s) for s in range(resumed + 1, 9)]
        assert scalars(tmp_path, "loss") == wanted

    def test_an_error_ends_the_log_and_not_the_run(self, tmp_path, monkeypatch):
        log = TensorBoardLog(tmp_path)
        assert log.writer is not None

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        writer = log.writer
        monkeypatch.setattr(writer, "add_scalar", full)
        with pytest.warns(UserWarning, match="nothing more for TensorBoard: .*No space left"):
            log.record({"step": 1, "loss": 2.0})
        log.record({"step": 2, "loss": 2.0})
        log.close()
        writer.close()


def rows(file: Path) -> dict[int, dict[str, object]]:
    """What every step of a small W&B file holds, by W&B's own messages.

    It is a LevelDB log: after 7 bytes, records of a checksum, a length, a kind, and the message.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, found = file.read_bytes()[7:], {}
    assert len(content) < 1 << 15, "a block, beyond which messages are cut into pieces"
    while content:
        (length,) = struct.unpack("<H", content[4:6])
        record = Record.FromString(content[7 : 7 + length])
        content = content[7 + length :]
        for item in record.history.item:
            row = found.setdefault(record.history.step.num, {})
            row[item.key or item.nested_key[0]] = json.loads(item.value_json)
    return found


class TestWandb:
    """Offline: the folder holds a run that `wandb sync` would send."""

    @pytest.fixture
    def _quiet(self, monkeypatch, tmp_path):
        wandb = pytest.importorskip("wandb")
        for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            monkeypatch.setenv(name, str(tmp_path / "home"))
        monkeypatch.setenv("WANDB_SILENT", "true")
        monkeypatch.setenv("WANDB__SERVICE_WAIT", "600")  # a busy machine starts it slowly
        yield
        wandb.teardown()

    @pytest.mark.slow
    @pytest.mark.usefixtures("_quiet")
    def test_a_run_and_its_continuation_share_an_id(self, tmp_path):
        import wandb

        folder = tmp_path / "my-run"
        folder.mkdir()
        for numbers in ((1, 2), (2, 3)):
            log = WandbLog(folder, {"steps": 3, "betas": (0.9, 0.99)}, offline=True)
            assert log.run is not None
            assert (log.run.name, log.run.offline) == ("my-run", True)
            assert log.run.id == (folder / "wandb-id").read_text()
            assert log.run.config["steps"] == 3
            for step in numbers:
                log.record({"step": step, "loss": 1 / step})
                log.record({"step": step, "sample": f"naïve {step}"})
            log.close()
            wandb.teardown()  # offline files are complete when its process has ended
        found = [
            [(step, row["loss"], row["sample"]) for step, row in rows(file).items()]
            for file in folder.glob("wandb/offline-run-*/*.wandb")
        ]
        assert sorted(found) == [
            [(1, 1.0, "naïve 1"), (2, 0.5, "naïve 2")],
            [(2, 0.5, "naïve 2"), (3, 1 / 3, "naïve 3")],
        ]

    def test_without_an_account_it_is_one_line(self, tmp_path, monkeypatch):
        wandb = pytest.importorskip("wandb")

        def refuse(**_: object) -> None:
            raise wandb.errors.UsageError("api_key not configured")

        monkeypatch.setattr(wandb, "init", refuse)
        with pytest.raises(ValueError, match=r"W&B did not start: api_key not conf.*wandb-offline"):
            WandbLog(tmp_path, {})


class TestOpening:
    def test_metrics_are_always_there(self, tmp_path):
        (log,) = open_logs(tmp_path, (), None, {})
        assert isinstance(log, MetricsLog)

    def test_others_if_asked(self, tmp_path):
        pytest.importorskip("tensorboard")
        logs = open_logs(tmp_path, ["tensorboard"], 5, {})
        for log in logs:
            log.record({"step": 6, "loss": 2.0})
            log.close()
        assert scalars(tmp_path, "loss") == [(6, 2.0)]
        assert steps(tmp_path) == [6]

    def test_a_kind_there_is_not(self, tmp_path):
        with pytest.raises(ValueError, match="no log 'csv'; there are tensorboard, wandb, wandb-"):
            open_logs(tmp_path, ["csv"], None, {})
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("kind", ["tensorboard", "wandb", "wandb-offline"])
    def test_a_package_that_is_missing(self, kind, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ValueError, match=rf"pip install {kind.split('-')[0]}$"):
            check_kinds([kind])

    def test_nothing_is_imported_for_nothing(self):
        assert "wandb" not in vars(sys.modules["receptance.training.logs"])

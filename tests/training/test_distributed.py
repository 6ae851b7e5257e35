"""Two processes train what one would: copies, shares, pieces of a sequence; and one that dies."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from tiny import TEXT, same_bits
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from training_cases import SIZES, same_files, save
from two_ranks import CASES, COMMAND, NARROW, STEPS, agree, figures, make

from receptance.config import published
from receptance.model import Model, starting_values
from receptance.storage.checkpoint import load, read_tensors
from receptance.storage.manifest import verify
from receptance.training import TrainOptions
from receptance.training.ranks import Ranks, joined
from receptance.training.saving import restore
from receptance.training.sharding import build, whole_model, working_device

HERE = Path(__file__).parent
# A Windows or macOS build of torch may come without.
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def meeting_place() -> dist.TCPStore:
    """What two processes meet at, at a port that is nobody else's as long as this object lives."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(HERE), str(HERE.parent), *sys.path])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | more


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With what two processes found and said, and the checkpoints of theirs and of a single one."""
    folder = tmp_path_factory.mktemp("ranks")
    alone = make("one", "reset", Ranks())
    figures(alone)
    save(alone, folder / "one")
    (folder / "text.txt").write_text(TEXT)
    # As torchrun would, whose agent also holds the store.
    stores = [meeting_place() for _ in range(3)]
    first, *ports = (str(store.port) for store in stores)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": first}
    shared |= {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0"}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    processes = [
        subprocess.Popen(
            [sys.executable, HERE / "two_ranks.py", folder, *ports],
            env=environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=300)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    for rank, said in enumerate(errors):
        (folder / f"said-{rank}.txt").write_text(said)
    return folder


@pytest.fixture(scope="module")
def found(folder) -> dict:
    return json.loads((folder / "found.json").read_text())


def close(one: list[list[float]], other: list[list[float]]) -> bool:
    """Whether losses agree, and what differences add up in: norms, and the validation."""
    (*steps, validation), (*wanted, wanted_validation) = one, other
    for (loss, norm), (wanted_loss, wanted_norm) in zip(steps, wanted, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=1e-5)
        assert norm == pytest.approx(wanted_norm, rel=1e-4)
    assert validation == pytest.approx(wanted_validation, rel=1e-4)
    return True


@pytest.mark.slow
class TestTwoProcesses:
    @pytest.mark.parametrize("mode", ["ddp", "fsdp", "context"])
    @pytest.mark.parametrize("case", CASES)
    def test_losses_norms_and_validation(self, mode, case, found):
        assert close(found[f"{mode}, {case}"], figures(make("one", case, Ranks())))

    def test_an_adapter(self, found):
        assert close(found["lora, plain"], figures(make("lora", "plain", Ranks())))

    def test_a_batch_too_small_is_refused(self, found):
        assert "batch is 1, fewer rows than the 2 processes" in found["too small"]

    def test_with_shares_each_holds_its_half(self, found):
        assert found["ddp share"] == found["context share"] == 1
        assert found["fsdp share"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.slow
class TestAsOnGPUs:
    """Mixed precision and offload, by the policies that GPUs get."""

    @pytest.mark.parametrize("case", ["plain", "everything"])
    def test_losses_are_those_of_one_process(self, case, found):
        """To what bfloat16 makes of sums in another order."""
        ours, alone = found["as on GPUs"][case], figures(make("one", case, Ranks(), **NARROW))
        assert ours[0] == pytest.approx(alone[0], rel=1e-3)
        for one, other in zip(ours, alone, strict=True):
            assert one == pytest.approx(other, rel=2e-2)

    def test_matrices_travel_narrow_and_all_else_stays_wide(self, found):
        found = found["as on GPUs"]
        assert (found["matrix"], found["vector"]) == ("torch.bfloat16", "torch.float32")
        assert found["kept"] == ["torch.float32"]
        assert not found["rounded"], "gradients are summed in float32"

    def test_a_checkpoint_has_the_masters_and_is_continued_exactly(self, found):
        found = found["as on GPUs"]
        assert found["saved"]
        assert found["again"] == found["further"]


@pytest.mark.slow
class TestTheirCheckpoints:
    @pytest.mark.parametrize("mode", ["ddp", "fsdp", "context"])
    def test_they_are_what_was_trained(self, mode, found, folder):
        assert found[f"{mode} as written"]
        directory = folder / mode / f"step-{STEPS:08d}"
        verify(directory)
        shards = {file.name for file in directory.glob("*.safetensors")}
        assert shards == {
            f"{stem}-0000{k}-of-00002.safetensors"
            for stem in ("model", "optimizer")
            for k in (1, 2)
        }

    @pytest.mark.parametrize("source", ["one", "ddp", "fsdp", "context"])
    def test_any_number_of_processes_reads_and_continues_them(self, source, found, folder):
        directory = folder / source / f"step-{STEPS:08d}"
        alone = make("one", "reset", Ranks())
        restore(alone, directory)
        assert agree(alone, directory)
        wanted = figures(alone)
        for mode in ("ddp", "fsdp"):
            assert found[f"{source} read by {mode}"]
            assert close(found[f"{source} continued by {mode}"], wanted)

    def test_they_are_models(self, folder):
        model, _ = load(folder / "fsdp")
        tensors = read_tensors(folder / "fsdp" / f"step-{STEPS:08d}", "model")
        assert same_bits(model.state_dict(), tensors)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_nodes_that_share_no_disk_are_told_so(rank, folder):
    """Each would train alone, or wait for ever for checkpoints of the other."""
    last = (folder / f"said-{rank}.txt").read_text().splitlines()[-1]
    assert "is not one folder for all processes: 1 of 2 do not see what the first one" in last
    assert not list((folder / "of-0-alone").glob("[!.]*"))
    assert not list((folder / "of-0-alone").glob(".seen-*"))


class TestRanks:
    @given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 40), st.integers(1, 40))
    def test_every_position_of_every_row_falls_to_one(self, groups, neighbors, batch, context):
        count = groups * neighbors
        seen = torch.zeros(batch, context, dtype=torch.int64)
        for rank in range(count):
            ranks = Ranks(rank, count, neighbors)
            seen[ranks.rows(batch), ranks.time(context)] += 1
        assert (seen == 1).all()

    def test_neighbors_hand_on_within_their_group(self):
        places = [Ranks(rank, 6, 3) for rank in range(6)]
        assert [p.previous for p in places] == [None, 0, 1, None, 3, 4]
        assert [p.next for p in places] == [1, 2, None, 4, 5, None]

    @pytest.mark.parametrize("neighbors", [0, 3])
    def test_they_divide_the_processes(self, neighbors):
        with pytest.raises(ValueError, match=f"context ranks are {neighbors}; they must divide"):
            Ranks(0, 4, neighbors)

    def test_alone_without_torchrun(self):
        with joined("cpu") as (ranks, device):
            assert (ranks, device.type) == (Ranks(), "cpu")
            assert ranks.sum([1.5, 2], device) == [1.5, 2]
        needs = pytest.raises(ValueError, match="context_ranks is 2, which needs as many processes")
        with needs, joined("cpu", 2):
            pass


class TestOffload:
    def test_work_is_done_where_the_mesh_is(self):
        """As when a shard on the host is of a mesh of GPUs; there is no GPU to ask."""
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            whole = distribute_tensor(torch.ones(2), DeviceMesh("meta", [0]), [Shard(0)])
            kept = torch.empty_like(whole, device="cpu")  # as build does it
            assert (kept.device.type, working_device(kept).type) == ("cpu", "meta")
        finally:
            dist.destroy_process_group()
        assert working_device(torch.ones(1)).type == "cpu"

    @pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
    def test_without_shares_there_is_nothing_to_keep(self, parallel):
        with pytest.raises(ValueError, match="start several processes with torchrun"):
            build(SIZES, (), TrainOptions(), parallel=parallel, offload=True)


class TestBuild:
    def test_nothing_is_allocated_before_its_place_is_known(self, monkeypatch):
        """Not even for the largest model there is."""
        made = []
        monkeypatch.setattr(Model, "to_empty", lambda self, *, device: made.append(self))
        objective = build(published("14b"), (), TrainOptions())
        assert made == [whole_model(objective)]
        assert {p.device.type for p in made[0].parameters()} == {"meta"}
        assert sum(p.numel() for p in made[0].parameters()) > 14e9

    def test_it_is_the_model_itself(self):
        options = TrainOptions(dropout=0.25, recompute=True)
        model = whole_model(build(SIZES, starting_values(SIZES, seed=3), options))
        assert same_bits(model.state_dict(), Model(SIZES, seed=3).state_dict())
        assert (model.dropout, model.recompute) == (0.25, True)
        assert all(p.requires_grad and p.is_leaf for p in model.parameters())


# The first process kills itself between two checkpoints, the first time that it is started.
MORTAL = """
import os
import signal
import sys
from receptance.__main__ import main
from receptance.training.run import Run

record = Run._record

def record_and_die(self, values):
    record(self, values)
    if self.trainer.ranks.first and values["step"] == 30:
        self.saver.wait()
        os.kill(os.getpid(), signal.SIGKILL)

if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    Run._record = record_and_die
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill -9")
def test_a_process_that_is_killed_is_started_again(folder):
    """With the other one; the run goes on from its checkpoint and ends as if nothing had been."""
    (folder / "mortal.py").write_text(MORTAL)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--standalone", "--max-restarts", "1", "--monitor-interval", "0.1"]
    job = subprocess.Popen(
        [*torchrun, "mortal.py", *COMMAND.split(), "--out", "run"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        said = job.communicate(timeout=600)[0].decode()
    finally:
        job.kill()
    assert job.returncode == 0, said
    assert "resumed run/step-00000020 at step 20" in said
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if '"loss"' in line]
    assert steps == list(range(1, 81))
    last = [folder / out / "step-00000080" for out in ("run", "undisturbed")]
    assert same_bits(*(read_tensors(path, "model") for path in last))
    assert same_files(*last)

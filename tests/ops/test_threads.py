"""The number of CPUs that a process may use, by its affinity and by quotas of control groups."""

import os
from pathlib import Path

import pytest
import torch

from receptance.ops import native, threads, wkv4
from receptance.ops.threads import available_cpus, usable_threads


@pytest.fixture(autouse=True)
def _eight_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def files(root: Path, contents: dict[str, str]) -> Path:
    """The folder, with these files in it."""
    for name, text in contents.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/cpu"


@pytest.mark.parametrize(
    ("contents", "cpus"),
    [
        pytest.param({}, 8, id="no control groups"),
        pytest.param({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "max 100000\n"}, 8, id="max"),
        pytest.param({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "300000 100000\n"}, 3, id="3"),
        pytest.param({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "75000 50000\n"}, 1, id="1.5"),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "5000 100000\n"}, 1, id="0.05"
        ),
        pytest.param({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "1600000 100000"}, 8, id="16"),
        pytest.param(
            {
                "proc/self/cgroup": "0::/user.slice/job\n",
                f"{V2}/user.slice/cpu.max": "200000 100000\n",
                f"{V2}/user.slice/job/cpu.max": "max 100000\n",
            },
            2,
            id="a limit of the group above",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/docker/1234\n", f"{V2}/cpu.max": "400000 100000\n"},
            4,
            id="a group that the container sees as its root",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/docker/1234\n0::/\n",
                f"{V1}/cpu.cfs_quota_us": "250000\n",
                f"{V1}/cpu.cfs_period_us": "100000\n",
            },
            2,
            id="version 1",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "500000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            5,
            id="version 1 under the controllers' name",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "1:cpu:/\n",
                f"{V1}/cpu.cfs_quota_us": "-1\n",
                f"{V1}/cpu.cfs_period_us": "100000\n",
            },
            8,
            id="version 1 without a limit",
        ),
        pytest.param(
            {"proc/self/cgroup": "3:cpuset:/\n", f"{V2}/cpu.max": "100000 100000\n"},
            8,
            id="groups that limit no time",
        ),
    ],
)
def test_quotas_of_control_groups_count(tmp_path, contents, cpus):
    assert available_cpus(files(tmp_path, contents)) == cpus


def test_affinity_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5})
    assert available_cpus(tmp_path) == 2
    quota = {"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "100000 100000\n"}
    assert available_cpus(files(tmp_path / "limited", quota)) == 1


def test_without_affinity_all_cpus_count(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert available_cpus(tmp_path) == 6


@pytest.mark.parametrize(("of_torch", "cpus", "usable"), [(4, 2, 2), (4, 8, 4), (1, 8, 1)])
def test_threads_are_those_of_torch_but_no_more_than_there_are_cpus(
    monkeypatch, of_torch, cpus, usable
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: of_torch)
    monkeypatch.setattr(threads, "available_cpus", lambda: cpus)
    assert usable_threads() == usable


@pytest.mark.skipif(not native.is_available(), reason="kernels not built")
def test_the_kernels_are_given_no_more_threads_than_there_are_cpus(monkeypatch):
    given = []

    class Library:
        @staticmethod
        def wkv4_forward(*arguments):
            given.append(arguments[4])
            return native_library.wkv4_forward(*arguments)

    native_library = native.library()
    monkeypatch.setattr(native, "library", lambda: Library)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for cpus in (1, 2):
        monkeypatch.setattr(threads, "available_cpus", lambda cpus=cpus: cpus)
        key = torch.zeros(1, 64, 256)
        wkv4(-torch.ones(256), torch.zeros(256), key, key, backend="native")
    assert given == [1, 2]

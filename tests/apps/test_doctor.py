"""receptance doctor: what there is, and the command for what there is not; it never fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import call

from receptance.apps import doctor
from receptance.apps.doctor import Finding, findings
from receptance.ops import native


@pytest.fixture(autouse=True)
def _patient(monkeypatch) -> None:
    """Programs print their version, however busy the machine is."""
    monkeypatch.setattr(doctor, "_PATIENCE", 600.0)


def test_it_reports_versions_and_kernels():
    result = call("doctor")
    assert (result.code, result.err) == (0, "")
    for word in ("receptance", torch.__version__, "native kernels", "chunked", "matplotlib"):
        assert word in result.out


def test_json_is_the_same():
    result = call("doctor", "--json")
    assert (result.code, result.err) == (0, "")
    found = {name: Finding(**fields) for name, fields in json.loads(result.out).items()}
    assert found == findings()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux says what it has")
def test_kernels_use_what_the_processor_has():
    has = findings()["CPU"].found
    used = native.instruction_sets()
    assert ("avx2" in used) <= ("avx2" in has)
    assert ("avx512" in used) <= ("avx512f" in has)


def test_it_says_how_many_cores_this_process_may_use(monkeypatch):
    monkeypatch.setattr(doctor, "available_cpus", lambda: 3)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert ", 3 of 64 cores usable; has " in findings()["CPU"].found


def test_without_native_kernels_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    found = findings()
    assert "not built" in found["native kernels"].found
    assert found["native kernels"].fix == "pip install --force-reinstall --no-deps receptance"
    assert found["wkv4 on cpu"].found == "chunked, reference"
    assert call("doctor").code == 0


@pytest.mark.parametrize(
    ("system", "command"), [("Linux", "sudo apt install g++"), ("Darwin", "xcode-select --install")]
)
def test_without_a_compiler_it_says_which_to_install(system, command, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("platform.system", lambda: system)
    assert findings()["compiler"].fix == command
    assert f"; {command}" in call("doctor").out


def test_without_an_optional_package_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert findings()["matplotlib"] == Finding("absent (plots)", "pip install 'matplotlib>=3.8'")
    assert findings()["triton"].found.startswith("absent")


@pytest.fixture
def nvidia(tmp_path, monkeypatch) -> Path:
    """A driver's program that does what the test writes into it."""
    program = tmp_path / "nvidia-smi"
    monkeypatch.setattr("shutil.which", lambda name: str(program))
    return program


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 580.12; echo 580.12", "580.12"),
        ("echo broken; exit 9", "nvidia-smi does not answer"),
        ("exit 0", "nvidia-smi does not answer"),
        ("printf '\\377\\n'", "\ufffd"),
    ],
)
def test_a_driver_is_asked(nvidia, script, words):
    nvidia.write_text(f"#!/bin/sh\n{script}\n")
    nvidia.chmod(0o755)
    assert findings()["GPU driver"].found == words


def test_a_driver_is_not_waited_for(nvidia, monkeypatch):
    monkeypatch.setattr(doctor, "_PATIENCE", 0.01)
    nvidia.write_text("#!/bin/sh\nexec sleep 100000\n")
    nvidia.chmod(0o755)
    assert findings()["GPU driver"].found == "nvidia-smi does not answer"


def test_a_gpu_without_a_torch_for_it(nvidia, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", None)
    assert findings()["GPU"].fix == "pip install --force-reinstall torch"


def test_a_driver_that_fails_is_no_failure(monkeypatch):
    def fail() -> bool:
        raise RuntimeError("CUDA driver initialization failed\nand more")

    monkeypatch.setattr("torch.cuda.is_available", fail)
    assert findings()["GPU"].found == "not usable: CUDA driver initialization failed"


def test_bandwidth_is_measured_when_asked(monkeypatch):
    monkeypatch.setattr(doctor, "read_bandwidth", lambda: (12.3e9, "a test"))
    assert "read at 12.3 GB/s" in call("doctor", "--bandwidth").out


def test_nothing_is_measured_unasked(monkeypatch):
    monkeypatch.setattr(doctor, "read_bandwidth", lambda: pytest.fail("this takes seconds"))
    result = call("doctor")
    assert (result.code, result.err) == (0, "")
    assert "native kernels" in result.out
    assert "GB/s" not in result.out


def test_it_runs_as_a_program_of_its_own():
    done = subprocess.run([sys.executable, "-m", "receptance", "doctor"], check=True,
                          capture_output=True, text=True)  # fmt: skip
    assert "native kernels" in done.stdout

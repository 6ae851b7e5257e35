"""receptance doctor: what there is, and what to do about what there is not."""

import torch
from command import call

from receptance.apps.doctor import findings
from receptance.ops import native


def test_it_reports_versions_and_kernels():
    result = call("doctor")
    assert (result.code, result.err) == (0, "")
    for word in ("receptance", torch.__version__, "native kernels", "chunked", "matplotlib"):
        assert word in result.out


def test_without_native_kernels_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    found = findings()
    assert "not built, so the chunked torch path is used" in found["native kernels"]
    assert "g++" in found["native kernels"] and "reinstall" in found["native kernels"]
    assert found["wkv4 on cpu"] == "chunked, reference"
    assert call("doctor").code == 0


def test_without_an_optional_package_it_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert findings()["matplotlib"] == "absent (loss plots); pip install 'receptance[plot]'"

"""The last step of `make demo`, on a run of a few steps."""

import json
import sys
from pathlib import Path

import pytest
from command import call

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not here")


@pytest.fixture
def demo(monkeypatch):
    """The module, imported from benchmarks/."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import demo

    return demo


@pytest.mark.slow
def test_it_measures_draws_and_advises(demo, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    lines = [f"def f{n}(x):\n    return x + {n}\n" for n in range(400)]
    Path("text.py").write_text("\n".join(lines))
    trained = call(
        *("train", "text.py", "--out", "run", "--tokenizer", "bytes", "--width", 16, "--layers", 2),
        *("--steps", 4, "--context", 32, "--batch", 2, "--validation", 0.2),
    )
    assert trained.code == 0, trained.err
    monkeypatch.setattr(sys, "argv", ["demo.py", "run", "--seconds", "0.05"])
    demo.main()
    shown = capsys.readouterr().out
    results = json.loads(Path("run", demo.FIGURES).read_text())
    assert 0 < results["bits/byte, this model"] <= 8.5
    assert 0 < results["bits/byte, xz -9e"] < results["bits/byte, byte frequencies"]
    assert results["parallel - recurrent, largest logit difference"] < 1e-4
    first = f"ms/token, after {demo.WINDOW:,} tokens"
    assert results[first] > 0
    assert Path("run", demo.PICTURE).read_bytes().startswith(b"\x89PNG")
    for word in ("loss.png", "chat", "train my-texts/", "generate RWKV-4"):
        assert word in shown

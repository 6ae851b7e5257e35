"""A file of every kind that is read, cut off behind each of its bytes: is any taken for whole?

    python benchmarks/truncations.py [--kinds pth safetensors ...]

The kinds are those of tests/formats/hostile_files.py, and so are the bounds: a result or an error
of one line, in under a second of processor time and 16 MB. Prints how many cuts each kind had and
how many of them were read as something, which only formats without an end can be: lines of a
vocabulary, a description in JSON that `inspect` shows, a file of rwkv.cpp behind its last tensor.
JSON on the last line.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from _common import report
from rich.progress import track

TESTS = Path(__file__).resolve().parents[1] / "tests"


def main() -> None:
    """Cut, read, count."""
    sys.path[:0] = [str(TESTS), str(TESTS / "formats")]
    from hostile_files import KINDS, outcome

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    results = {}
    for name in parser.parse_args().kinds:
        kind = KINDS[name]
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            kind.write(folder)
            kind.read(folder)
            content = (folder / kind.file).read_bytes()
            taken = 0
            for size in track(range(len(content)), name, transient=True):
                (folder / kind.file).write_bytes(content[:size])
                taken += outcome(kind.read, folder) is None
        results[name] = {"cuts": len(content), "read as something": taken}
        print(name, results[name], flush=True)
    report(results)


if __name__ == "__main__":
    main()

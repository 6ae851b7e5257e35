"""Instructions per 64 weights and row of the products with packed matrices, counted by valgrind.

    python benchmarks/instructions.py [--set avx2 portable] [--rows 1 4 16] [--source FOLDER]

Compiles instructions.cpp with the kernels in src/receptance/native, or in another FOLDER to compare
with, and subtracts the count of one product from that of three. The table has both layouts of a
matrix: tiles, and rows with half of the activations zero, where only weights of the others count.
Needs g++ and valgrind, which knows no AVX-512 and no VNNI. JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent / "src/receptance/native"
# As in CMakeLists.txt.
FLAGS = [
    *("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    "-Wno-psabi",
]
SETS = {
    "avx2": ["-DRECEPTANCE_LANES=8", "-mavx2", "-mfma", "-mf16c"],
    "portable": ["-DRECEPTANCE_LANES=4"],
}
KINDS = ("float32", "bfloat16", "float16", "int8", "int4")
INPUTS = OUTPUTS = 768
NONZERO = {"tiles": 1.0, "rows": 0.5}


def build(name: str, sources: Path, program: Path) -> None:
    """Compile the program for an instruction set."""
    words = ["g++", *FLAGS, *SETS[name], f"-DRECEPTANCE_KERNELS={name}", f"-I{sources}"]
    words += [str(HERE / "instructions.cpp"), "-o", str(program), "-pthread", "-ldl"]
    subprocess.run(words, check=True)


def count(program: Path, layout: str, kind: str, rows: int) -> float:
    """Instructions per 64 weights and row."""
    ran = [_executed(program, layout, kind, rows, repeats) for repeats in (1, 3)]
    return (ran[1] - ran[0]) / 2 / (INPUTS * OUTPUTS * rows * NONZERO[layout]) * 64


def _executed(program: Path, layout: str, kind: str, rows: int, repeats: int) -> int:
    sizes = [str(number) for number in (rows, INPUTS, OUTPUTS, repeats)]
    words = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", str(program)]
    done = subprocess.run(
        [*words, layout, kind, *sizes], check=True, capture_output=True, text=True
    )
    found = re.search(r"Collected : (\d+)", done.stderr)
    if found is None:
        raise SystemExit(f"valgrind printed no count: {done.stderr[-500:]}")
    return int(found[1])


def main() -> None:
    """Compile, count, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", nargs="+", default=["avx2"], choices=SETS, dest="sets")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--source", type=Path, default=SOURCES)
    options = parser.parse_args()
    results: dict[str, float] = {}
    console = Console(width=100)
    for name in options.sets:
        table = Table("weights", title=f"{name}: instructions per 64 weights and row")
        for layout in NONZERO:
            for rows in options.rows:
                table.add_column(f"{layout}, {rows}", justify="right")
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder, "instructions")
            build(name, options.source, program)
            for kind in KINDS:
                cells = []
                for layout in NONZERO:
                    for rows in options.rows:
                        figure = count(program, layout, kind, rows)
                        results[f"{name} {layout} {kind} {rows}"] = figure
                        cells.append(f"{figure:.1f}")
                table.add_row(kind, *cells)
        console.print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()

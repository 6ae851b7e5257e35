"""What cpu_inference.py is compared with: ratios of medians of the same run.

Some bars depend on the version of RWKV, or on the instructions of the processor: without AVX-512
integer products are bound by arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from receptance.config import ModelConfig

Results = dict[str, Any]
Verdict = dict[str, Any]

OURS, BUS = "receptance", "memory bus"

# Our type, the peer's, and the least ratio of tokens per second.
DECODING = {
    "rwkv.cpp": {
        "float32": ("FP32", 1.0),
        "bfloat16": ("FP16", 1.0),
        "float16": ("FP16", 1.0),
        "int8": ("Q8_0", 1.5),
        "int4": ("Q4_0", 2.2),
    },
    "llama.cpp": {"float16": ("F16", 1.2), "int8": ("Q8_0", 1.3), "int4": ("Q4_0", 1.3)},
}
OF_BANDWIDTH = 0.95
NARROW = ("int8", "int4")
OF_LIMIT_7 = 0.85  # RWKV-7, in the types that llama.cpp has
BATCHED, BATCHED_AVX2, BATCHED_7 = 6.0, 3.5, 4.0
INT4_OVER_INT8 = 1.5  # RWKV-4 on AVX2
PREFILL = {"rwkv bfloat16": 1.3, "rwkv.cpp": 3.0, "llama.cpp": 1.5}
FIRST_TOKEN_SECONDS = 1.0
FIRST_TOKEN_SIZE = "430m"
MEMORY_ABOVE_WEIGHTS = 150e6


def bars(results: Results) -> list[Verdict]:
    """Every bar that something was measured for."""
    found = []
    for size, sections in results.items():
        for section, judge in _JUDGES.items():
            if section in sections:
                found += [{"size": size} | bar for bar in judge(size, sections)]
    return found


def measured(contest: Results, *names: str) -> bool:
    """Whether all of these were measured in a round at least, so each in its best way."""
    return all(contest.get(name, {}).get("rates") for name in names)


def limit(contest: Results) -> float:
    """Our tokens per second if reading all weights but the embedding took all the time."""
    return float(contest[BUS]["rate"] / contest[OURS]["bytes per token"])


def read(contest: Results, sizes: dict[str, Any]) -> float:
    """The share of the weights that a token needed: less than all where activations are zero."""
    config = ModelConfig.from_dict(sizes)
    shapes = config.architecture.shapes(config)
    read = [name for name in config.architecture.layouts(config) if name != "emb.weight"]
    skipped = [name for name in read if name.endswith("ffn.value.weight")]
    share = sum(math.prod(shapes[name]) for name in skipped) / sum(
        math.prod(shapes[name]) for name in read
    )
    return float(1 - contest[OURS]["skipped"] * share)


def _decode(size: str, sections: Results) -> Iterator[Verdict]:
    for dtype, contest in sections["decode"].items():
        for peer, kinds in DECODING.items():
            if dtype in kinds and measured(contest, OURS, peer):
                theirs, least = kinds[dtype]
                ratio = contest[OURS]["rate"] / contest[peer]["rate"]
                yield _at_least(f"decode {dtype} / {peer} {theirs}", ratio, least)
        if measured(contest, OURS, BUS):
            yield from _of_limit(dtype, contest, sections["sizes"])
    narrow = [sections["decode"].get(dtype, {}) for dtype in NARROW]
    of_4 = sections["sizes"]["version"] == 4
    if of_4 and _is_avx2(sections) and all(measured(contest, OURS) for contest in narrow):
        int8, int4 = (contest[OURS]["rate"] for contest in narrow)
        yield _at_least("decode int4 / int8", int4 / int8, INT4_OVER_INT8)


def _of_limit(dtype: str, contest: Results, sizes: dict[str, Any]) -> Iterator[Verdict]:
    share = contest[OURS]["rate"] / limit(contest)
    if sizes["version"] == 7:
        if dtype in DECODING["llama.cpp"]:
            yield _at_least(f"decode {dtype} / memory limit", share, OF_LIMIT_7)
    elif dtype not in NARROW:
        yield _at_least(f"decode {dtype} / memory limit", share, OF_BANDWIDTH)
        used = share * read(contest, sizes)
        yield _at_least(f"decode {dtype}: bandwidth used / measured", used, OF_BANDWIDTH)


def _is_avx2(sections: Results) -> bool:
    """Whether the fastest instructions of the processor are those of AVX2 or AVX-VNNI."""
    return sections["instructions"] in ("avx2", "avxvnni")


def _sparse(size: str, sections: Results) -> Iterator[Verdict]:
    for dtype, contest in sections["sparse"].items():
        if measured(contest, OURS, BUS):
            share, skipped = contest[OURS]["rate"] / limit(contest), contest[OURS]["skipped"]
            yield _at_least(f"decode {dtype}, {skipped:.0%} zeros / dense memory limit", share, 1.0)


def _batches(size: str, sections: Results) -> Iterator[Verdict]:
    for dtype, contest in sections["batches"].items():
        if measured(contest, "16", "1"):
            ratio = contest["16"]["rate"] / contest["1"]["rate"]
            least = BATCHED_AVX2 if _is_avx2(sections) else BATCHED
            least = BATCHED_7 if sections["sizes"]["version"] == 7 else least
            yield _at_least(f"decode {dtype}, batch 16 / batch 1", ratio, least)


def _prefill(size: str, sections: Results) -> Iterator[Verdict]:
    for length, contest in sections["prefill"].items():
        for peer, least in PREFILL.items():
            if measured(contest, OURS, peer):
                ratio = contest[OURS]["rate"] / contest[peer]["rate"]
                yield _at_least(f"prompt of {length} / {peer}", ratio, least)


def _load(size: str, sections: Results) -> Iterator[Verdict]:
    if size == FIRST_TOKEN_SIZE:
        for dtype, found in sections["load"].items():
            if "first token s" in found:
                seconds = found["first token s"]
                yield _at_most(f"load {dtype} to first token, s", seconds, FIRST_TOKEN_SECONDS)


def _memory(size: str, sections: Results) -> Iterator[Verdict]:
    for dtype, found in sections["memory"].items():
        if "resident" in found:
            above = found["resident"] - found["weights"]
            yield _at_most(f"memory {dtype}: process - weights, MB", above / 1e6, 150)
            grown = above - found["bare"]
            yield _at_most(f"memory {dtype}: the same - Python and torch, MB", grown / 1e6, 150)


_JUDGES = {
    "decode": _decode,
    "sparse": _sparse,
    "batches": _batches,
    "prefill": _prefill,
    "load": _load,
    "memory": _memory,
}


def _at_least(what: str, found: float, wanted: float) -> Verdict:
    return {"what": what, "found": found, "wanted": f">= {wanted:g}", "passed": found >= wanted}


def _at_most(what: str, found: float, wanted: float) -> Verdict:
    return {"what": what, "found": found, "wanted": f"<= {wanted:g}", "passed": found <= wanted}


def show(console: Console, results: Results, verdicts: list[Verdict]) -> None:
    """Decoding against the memory limit, then the bars."""
    for size, sections in results.items():
        if "decode" in sections:
            console.print(_decoding_table(size, sections))
    table = Table("size", "bar", title="bars", title_justify="left", box=None, pad_edge=False)
    for column in ("found", "wanted"):
        table.add_column(column, justify="right")
    table.add_column("")
    for bar in verdicts:
        verdict = "[green]passed[/]" if bar["passed"] else "[red]failed[/]"
        table.add_row(bar["size"], bar["what"], f"{bar['found']:.3g}", bar["wanted"], verdict)
    console.print(table)


def _decoding_table(size: str, sections: Results) -> Table:
    title = f"{size}: tokens/s at batch 1"
    table = Table("weights", title=title, title_justify="left", box=None, pad_edge=False)
    peers = [OURS, "rwkv.cpp", "llama.cpp", "rwkv", "transformers"]
    peers = [name for name in peers if any(name in x for x in sections["decode"].values())]
    for column in ("GB/s", "limit", *peers, "of the limit", "zeros", "of the GB/s"):
        table.add_column(column, justify="right")
    for dtype, contest in sections["decode"].items():
        bus, limits, shares = "", "", ["", "", ""]
        if measured(contest, BUS, OURS):
            share = contest[OURS]["rate"] / limit(contest)
            used = share * read(contest, sections["sizes"])
            bus, limits = f"{contest[BUS]['rate'] / 1e9:.1f}", f"{limit(contest):.1f}"
            shares = [f"{x:.0%}" for x in (share, contest[OURS]["skipped"], used)]
        cells = [_cell(contest.get(name, {})) for name in peers]
        table.add_row(dtype, bus, limits, *cells, *shares)
        if any(cell.endswith("*") for cell in cells):
            table.caption = "* stopped before all rounds were measured, as said above"
    return table


def _cell(found: Results) -> str:
    rate = f"{found['rate']:.1f}" if "rate" in found else ""
    return rate + "*" * ("stopped" in found)

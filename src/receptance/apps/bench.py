"""receptance bench: measure how fast a model runs, and compare that with the limit of memory."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import tyro
from rich.table import Table

from receptance.apps.console import Console
from receptance.apps.options import parse
from receptance.atomic import check_replaceable, written
from receptance.config import ModelConfig, published
from receptance.engine import load_engine
from receptance.engine.load import check_threads
from receptance.engine.native import supports
from receptance.errors import out_of_memory
from receptance.inference import measure
from receptance.ops import native
from receptance.progress import progress_bar, say
from receptance.quantize.packing import Kind
from receptance.storage.directories import existing
from receptance.storage.quantized import is_quantized

# The number of tokens that are read and generated before the memory of the process is measured.
_MEMORY_TOKENS = 100
# The size of the random weights that are measured without a model.
_SIZE = "169m"
_NARROW = ("int8", "int4")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure how fast a model runs on this machine's CPU, and compare it with its memory."""

    EXAMPLES: ClassVar[tuple[str, ...]] = ("receptance bench runs/mine --dtypes int8",)

    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = None
    """The model, as for `receptance generate`. Without it, random weights of a published size are
    measured."""
    size: str | None = None
    """Give the random weights this published size: 169m (the default) to 14b, or rwkv5-0.1b to
    rwkv7-13.3b."""
    dtypes: tuple[Kind | Literal["stored"], ...] = ()
    """Compare these types of weights; "stored" is the type in the files. The default is float32 and
    bfloat16, and int8 and int4 if kernels run the model; a quantized model has its own."""
    batches: tuple[int, ...] = (1, 4, 16)
    """Decode this number of rows together."""
    prefill: tuple[int, ...] = (256, 2048)
    """Read a prompt of this length."""
    threads: int | None = None
    """Compute with this number of threads; the default is that of torch."""
    seconds: float = 2.0
    """Measure each figure for at least this number of seconds."""
    tokenizer: str | None = None
    """Use this tokenizer file, or "bytes", instead of the tokenizer beside the weights."""
    json: Path | None = None
    """Write all figures to this file as well."""


def _check(options: Options) -> None:
    check_threads(options.threads)
    if options.model is not None and options.size is not None:
        raise ValueError(
            f"--size is for random weights; leave it out to measure {options.model}, or that"
        )
    if least := [n for n in (*options.batches, *options.prefill) if n < 1]:
        raise ValueError(f"{least[0]} rows or tokens; give at least 1")
    if not 0 < options.seconds < 3600:
        raise ValueError(f"seconds is {options.seconds}; it must be above 0 and below an hour")
    if options.json and not options.json.parent.is_dir():
        raise ValueError(f"there is no folder {options.json.parent} to write {options.json} into")
    if options.json and options.json.is_dir():
        raise ValueError(f"{options.json} is a folder; give --json the name of a file")
    if options.json:
        check_replaceable(options.json, "the figures", "a file of figures", _holds_figures)


def _holds_figures(path: Path) -> bool:
    """Whether the file is empty or what an earlier benchmark wrote; other JSON is not replaced."""
    content = path.read_bytes()
    try:
        found = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        return False
    return not content or (isinstance(found, dict) and found.keys() >= {"read bytes/s", "results"})


@dataclass
class Findings:
    """The figures that were measured so far."""

    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The figures by type of weights, then by name."""
    about: dict[str, object] = field(default_factory=dict)

    @property
    def bandwidth(self) -> float:
        """The highest speed at which memory was read, in bytes per second."""
        return max((found["bandwidth"] for found in self.results.values()), default=0.0)


def main(argv: list[str]) -> None:
    """Parse, measure each type in a process of its own, report; Ctrl-C reports what is there."""
    options = parse(Options, argv, "receptance bench")
    _check(options)
    console, findings = Console(), Findings()
    with _model(options) as source, _reporting(console, options, findings):
        _measure_all(options, source, findings)


@contextmanager
def _model(options: Options) -> Iterator[str]:
    """The model to load: the one that was named, or a temporary file of random weights."""
    if options.model is not None:
        yield options.model
        return
    from safetensors.torch import save_file

    tensors = measure.random_tensors(published(options.size or _SIZE), dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory(prefix="receptance-bench-") as folder:
        path = Path(folder, "random.safetensors")
        save_file(tensors, path)
        del tensors
        yield str(path)


@contextmanager
def _reporting(console: Console, options: Options, findings: Findings) -> Iterator[None]:
    """Show and write the figures at the end, even if the measurements were interrupted."""
    try:
        yield
    finally:
        if findings.about:
            say(console, _title(findings), style="bold")
            console.print(table(options, findings))
        if findings.about and options.json:
            with written(options.json) as file:
                file.write(json.dumps(summary(options, findings), indent=1).encode() + b"\n")


def _usual_dtypes(source: str) -> tuple[str, ...]:
    if is_quantized(existing(source)):
        return ("stored",)
    return ("float32", "bfloat16", *(_NARROW if native.is_available() else ()))


def _has_kernels(findings: Findings) -> bool:
    """Whether native kernels run the model, whose sizes were found with its first type."""
    return supports(ModelConfig.from_dict(findings.about["sizes"]))


def _measure_all(options: Options, source: str, findings: Findings) -> None:
    steps = 3 + len(options.batches) + len(options.prefill)
    dtypes = options.dtypes or _usual_dtypes(source)
    console = Console(stderr=True)
    console.quiet = not console.is_terminal
    with progress_bar(console) as bar:
        task = bar.add_task("bench", total=steps * len(dtypes), note="")
        for dtype in dtypes:
            if not options.dtypes and dtype in _NARROW and not _has_kernels(findings):
                bar.update(task, advance=steps)
                continue
            bar.update(task, note=f"{dtype}: loading")
            for figures in _in_a_process(options, source, dtype):
                findings.about = figures.pop("about", findings.about)
                findings.results.setdefault(dtype, {}).update(figures)
                bar.update(task, advance=1, note=f"{dtype}: {next(iter(figures))}")


# ---- one type, in a process of its own, so that its memory is its own ----------------------------


def _in_a_process(options: Options, source: str, dtype: str) -> Iterator[dict[str, Any]]:
    """The figures of `measure_one`, which runs in a new process, one after another."""
    fields = dataclasses.asdict(options) | {"model": source, "dtypes": [dtype], "json": None}
    command = [sys.executable, "-c", "from receptance.apps.bench import worker; worker()"]
    process = subprocess.Popen(
        [*command, json.dumps(fields), (options.size or _SIZE) if options.model is None else ""],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C reaches only this process, which then ends the other.
    )
    assert process.stdout is not None
    with process:
        try:
            yield from map(_checked, process.stdout)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise ValueError(
            f"the process that measured {dtype} ended with {process.returncode}; "
            "is there enough memory for the model?"
        )


def _checked(line: str) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(line)
    if "error" in figures:
        raise ValueError(figures["error"])
    return figures


def worker() -> None:
    """Measure as the arguments of the process say, and print a line of JSON for each figure."""
    fields, size = json.loads(sys.argv[1]), sys.argv[2]
    try:
        for figures in measure_one(Options(**fields), size or None):
            print(json.dumps(figures), flush=True)
    except (ValueError, OSError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(json.dumps({"error": "not enough memory for this model or batch"}), flush=True)


def measure_one(options: Options, size: str | None = None) -> Iterator[dict[str, Any]]:
    """The figures for the first of the types; size is given if the weights are random."""
    if options.threads:
        torch.set_num_threads(options.threads)
    bandwidth, how = measure.read_bandwidth()
    yield {"bandwidth": bandwidth}
    tokenizer = measure.NumberedTokens(published(size).vocab_size) if size else options.tokenizer
    dtype = None if options.dtypes[0] == "stored" else options.dtypes[0]
    began = time.perf_counter()
    engine, _ = load_engine(str(options.model), tokenizer=tokenizer, dtype=dtype)
    yield {
        "load s": time.perf_counter() - began,
        "first token s": measure.first_token(engine),
        "weights": engine.weight_bytes,
        "bytes per token": engine.bytes_per_token,
        "about": {
            "model": options.model if size is None else f"random weights of {size}",
            "sizes": engine.config.to_dict(),
            "machine": measure.machine(),
            "memory was read by": how,
        },
    }
    measure.decoder(engine)(_MEMORY_TOKENS)
    yield {"resident": measure.resident_bytes()}
    for batch in options.batches:
        yield {_batch(batch): measure.decode_speed(engine, batch, options.seconds)}
    for length in options.prefill:
        yield {_prompt(length): measure.prefill_speed(engine, length, options.seconds)}


# ---- what is shown ------------------------------------------------------------------------------


def _batch(rows: int) -> str:
    return f"batch {rows} tokens/s"


def _prompt(length: int) -> str:
    return f"prompt of {length} tokens/s"


def table(options: Options, findings: Findings) -> Table:
    """The table of figures, with a row for each figure and a column for each type of weights."""
    columns = [_column(found, options, findings.bandwidth) for found in findings.results.values()]
    shown = Table("", box=None, pad_edge=False)
    for dtype in findings.results:
        shown.add_column(dtype, justify="right")
    for name in columns[0]:
        values = (column[name] for column in columns)
        shown.add_row(name, *("" if x is None else f"{x:,.4g}" for x in values))
    return shown


def _column(found: dict[str, Any], options: Options, bandwidth: float) -> dict[str, float | None]:
    column = {
        "weights, MB": _scaled(found.get("weights"), 1e-6),
        "load, s": found.get("load s"),
        "first token after that, ms": _scaled(found.get("first token s"), 1e3),
        "memory of the process, MB": _scaled(found.get("resident"), 1e-6),
    }
    for batch in options.batches:
        column[_batch(batch)] = found.get(_batch(batch))
        share = share_of_limit(found, batch, bandwidth)
        column[f"  % of the memory limit, {batch}"] = _scaled(share, 100)
    return column | {_prompt(length): found.get(_prompt(length)) for length in options.prefill}


def share_of_limit(found: dict[str, Any], batch: int, bandwidth: float) -> float | None:
    """The speed at which steps used the weights, divided by the speed of reading memory.

    A step computes `batch` rows. The share is above 1 if many activations were zero, because the
    weights that they are multiplied with were not read.
    """
    speed = found.get(_batch(batch))
    return None if speed is None else speed / batch * found["bytes per token"] / bandwidth


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _title(findings: Findings) -> str:
    machine = findings.about["machine"]
    assert isinstance(machine, dict)
    return (
        f"{findings.about['model']}; {machine['cpu']} ({machine['instructions']}), "
        f"{machine['threads']} threads, memory read at {findings.bandwidth / 1e9:.1f} GB/s"
    )


def summary(options: Options, findings: Findings) -> dict[str, Any]:
    """All figures for JSON: sizes in bytes, times in seconds, speeds in tokens per second."""
    results = {}
    for dtype, found in findings.results.items():
        shares = {
            f"{_batch(batch)}, share of the memory limit": share_of_limit(
                found, batch, findings.bandwidth
            )
            for batch in options.batches
        }
        results[dtype] = found | shares
    return findings.about | {"read bytes/s": findings.bandwidth, "results": results}

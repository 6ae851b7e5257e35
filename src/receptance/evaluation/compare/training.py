"""The loop that trains any of the architectures: same optimizer, schedule, batches and loss.

The steps are those of `training.Trainer`, with its optimizer, its schedule and its objective, for
models that a Trainer does not know: it handles states, adapters and several processes, which the
Transformers here do not have.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from receptance.atomic import written
from receptance.data import Batches, TokenFiles
from receptance.data.batches import Batch
from receptance.errors import one_line
from receptance.evaluation.compare.runs import RUNS, Job, Point, Record, finished
from receptance.evaluation.compare.table import family
from receptance.inference.scoring import bits_per_byte, negative_log_likelihood
from receptance.storage.checkpoint import read_tensors
from receptance.tokenizer import Tokenizer
from receptance.training import learning_rate, make_optimizer

MODELS = "models"
# A run is saved after so many seconds, and loses no more when its process is killed.
_SAVE_SECONDS = 120.0
# It is saved before it is judged if its last save is longer ago than this.
_SHORT_SECONDS = 20.0
_SHOW_SECONDS = 0.5
# The text that is held out is read in so many pieces, over which there is an interval.
_PIECES = 50
# At a point of a curve, this share of it is read.
JUDGED_PART = 8
# Judging reads so many rows at a time.
_ROWS = 16


class Stopped(Exception):
    """A run was asked to stop; it has been saved and can go on from there."""


class Diverged(Exception):
    """The loss or the gradient of a step is not finite; nothing was changed."""


class HeldOut:
    """The text that is held out, as rows of a context that each begin from nothing.

    All architectures see at most the context before a token.
    """

    def __init__(self, corpus: TokenFiles, tokenizer: Tokenizer, context: int, most: int) -> None:
        tokens = np.asarray(corpus.validation[: most + 1])
        if len(tokens) <= context:
            raise ValueError(
                f"{len(tokens)} tokens are held out, which is not one context of {context}; give "
                "more text, a larger validation, or a shorter context"
            )
        self.rows = Batches(tokens, context=context, batch=1, seed=0, packing="stream")
        self.pieces = [
            range(int(part[0]), int(part[-1]) + 1)
            for part in np.array_split(
                np.arange(self.rows.windows), min(_PIECES, self.rows.windows)
            )
        ]
        self.text = tokens[: self.rows.windows * context + 1]
        self.start = corpus.end_of_text
        ids = [self.text[p.start * context + 1 : p.stop * context + 1] for p in self.pieces]
        kept = (part[part != corpus.end_of_text].tolist() for part in ids)
        self.byte_counts = [len(tokenizer.decode_bytes(part)) for part in kept]

    @property
    def part(self) -> int:
        """The number of pieces that are read at a point of a curve."""
        return max(1, len(self.pieces) // JUDGED_PART)

    @torch.no_grad()
    def nats(self, objective: torch.nn.Module, device: torch.device, pieces: int) -> list[float]:
        """The loss of each of the first pieces, in nats."""
        found = []
        with _in_float32(objective):
            for piece in self.pieces[:pieces]:
                total = 0.0
                for at in range(piece.start, piece.stop, _ROWS):
                    batch = self.rows.rows(at, min(at + _ROWS, piece.stop)).to(device)
                    total += float(objective(batch, None, 1.0)[1])
                found.append(total)
        return found


class Training:
    """A run of a job, which can be saved and continued at any step."""

    def __init__(
        self, job: Job, corpus: TokenFiles, tokenizer: Tokenizer, device: torch.device
    ) -> None:
        self.job, self.device = job, device
        self.family = family(job.family)
        self.objective = self.family.objective(job.shape, job.train).to(device)
        self.model = self.family.model(self.objective)
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = make_optimizer(
            self.parameters.items(),
            dict(self.family.learning_rate_scales(self.model)),
            job.train,
            self.family.is_decayed(job.shape),
        )
        self.batches = Batches(
            corpus.train,
            context=job.train.context,
            batch=job.train.batch,
            seed=job.train.seed,
            packing="stream",
        )
        self.held_out = HeldOut(corpus, tokenizer, job.train.context, job.held_out)
        self.step, self.seconds, self.digest = 0, 0.0, ""
        self.losses: list[float] = []
        self.points: list[Point] = []

    # ---- steps ----------------------------------------------------------------------------------

    def run_step(self) -> float:
        """Make one update, and return the cross entropy of its batch before it, in nats per token.

        Diverged, before anything is changed, if the loss or the gradient is not finite.
        """
        began = time.perf_counter()
        batch = self.batches.at(self.step)
        rate = learning_rate(self.step, self.job.train)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.objective.train()
        self.optimizer.zero_grad(set_to_none=True)
        value, entropy, _ = self.objective(batch.to(self.device), None, batch.learned)
        value.backward()
        limit = self.job.train.clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit))
        loss = float(entropy)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged
        self.optimizer.step()
        self.step += 1
        self.seconds += time.perf_counter() - began
        self.digest = _chained(self.digest, batch)
        self.losses.append(loss)
        if self._is_point:
            self._judge()
        return loss

    @property
    def _is_point(self) -> bool:
        """Whether the step that was just made reaches another of the points."""
        points, total = self.job.points, self.job.train.total_steps
        return self.step * points // total > (self.step - 1) * points // total

    def _judge(self) -> None:
        self.objective.eval()
        part = self.held_out.part
        nats = self.held_out.nats(self.objective, self.device, part)
        self.points.append(
            Point(
                tokens=self.step * self.job.train.batch * self.job.train.context,
                seconds=self.seconds,
                training=sum(self.losses) / len(self.losses),
                bits_per_byte=bits_per_byte(sum(nats), sum(self.held_out.byte_counts[:part])),
            )
        )
        self.losses = []

    def record(self, diverged: int | None = None) -> Record:
        """What the run found, judged on all of the text that is held out."""
        found: dict[str, Any] = {"name": self.job.name, "job": self.job.to_json()}
        found |= {"points": self.points, "digest": self.digest}
        found |= {"seconds": self.seconds, "diverged": diverged}
        if diverged is not None:
            return Record(**found)
        self.objective.eval()
        held = self.held_out
        nats = held.nats(self.objective, self.device, len(held.pieces))
        engine, carried = self.family.carried(self.model), None
        if engine is not None and not self.job.search:
            total = negative_log_likelihood(engine, held.text[1:], start=int(held.text[0]))
            carried = bits_per_byte(total, sum(held.byte_counts))
        return Record(**found, nats=nats, byte_counts=held.byte_counts, carried=carried)

    # ---- saving ---------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write everything that the run needs to go on to one file."""
        from safetensors.torch import save

        tensors = {f"model/{name}": x.detach() for name, x in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer/{name}/{key}"] = value
        about = {
            "job": self.job.to_json(),
            "step": self.step,
            "seconds": self.seconds,
            "digest": self.digest,
            "losses": self.losses,
            "points": [asdict(point) for point in self.points],
        }
        with written(path) as file:
            file.write(save({n: x.cpu().contiguous() for n, x in tensors.items()}, _header(about)))

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        """Go on from a file that `save` wrote; ValueError if it belongs to another run."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["about"])
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it to begin again") from None
        if about["job"] != self.job.to_json():
            raise ValueError(f"{path} belongs to another run; delete it, or choose another folder")
        tensors = read_tensors(path.parent, path.stem)
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"model/{name}"])
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "optimizer":
                name, _, key = rest.rpartition("/")
                self.optimizer.state[self.parameters[name]][key] = value.clone().to(self.device)
        self.step, self.seconds = about["step"], about["seconds"]
        self.digest, self.losses = about["digest"], about["losses"]
        self.points = [Point(**point) for point in about["points"]]


def run_job(
    job: Job,
    corpus: TokenFiles,
    tokenizer: Tokenizer,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    stop: Callable[[], bool] = lambda: False,
) -> Record:
    """Train and judge a model, or go on with that, and write what was found to out/runs.

    The model of a run that is not part of a search is kept in out/models. While it trains,
    out/runs/NAME.step holds the number of steps that are done. Stopped is raised, after the run
    was saved, when stop() becomes true.
    """
    if (found := finished(out, job)) is not None:
        return found
    if stop():
        raise Stopped
    (out / RUNS).mkdir(parents=True, exist_ok=True)
    saved, steps = (out / RUNS / f"{job.name}.{end}" for end in ("safetensors", "step"))
    training = Training(job, corpus, tokenizer, torch.device(device))
    if saved.exists():
        training.restore(saved)
    diverged = _train(training, saved, steps, stop)
    record = training.record(diverged)
    if diverged is None and not job.search:
        training.family.save(training.model, out / MODELS / job.name, tokenizer)
    record.save(out / RUNS / f"{job.name}.json")
    _remove([saved, steps])
    return record


def _train(training: Training, saved: Path, steps: Path, stop: Callable[[], bool]) -> int | None:
    """Make all steps that are left; the number of the step that diverged, if one did."""
    shown = last = time.monotonic()
    while training.step < training.job.train.total_steps:
        if stop():
            with one_line(saved, "the run "):
                training.save(saved)
            raise Stopped
        try:
            training.run_step()
        except Diverged:
            return training.step + 1
        now, ended = time.monotonic(), training.step == training.job.train.total_steps
        if now - shown > _SHOW_SECONDS:
            with suppress(OSError):  # a full disk
                steps.write_text(str(training.step))
            shown = now
        if now - last > (_SHORT_SECONDS if ended else _SAVE_SECONDS):
            _save(training, saved)
            last = now
    return None


def _save(training: Training, path: Path) -> None:
    """Save a run that goes on, even if that fails."""
    try:
        training.save(path)
    except OSError as error:
        reason = error.strerror or error
        warnings.warn(f"cannot save {path}: {reason}; the run goes on", stacklevel=2)


def steps_done(out: Path, job: Job) -> int:
    """The steps that an unfinished run has made, as far as it has told."""
    try:
        return int((out / RUNS / f"{job.name}.step").read_text() or 0)
    except (OSError, ValueError):
        return 0


@contextmanager
def _in_float32(objective: Any) -> Iterator[None]:
    """Let the objective's activations be float32, whatever it is trained with."""
    dtype, objective.dtype = objective.dtype, torch.float32
    try:
        yield
    finally:
        objective.dtype = dtype


def _chained(digest: str, batch: Batch) -> str:
    """The digest of everything read so far, this batch included."""
    chain = hashlib.sha256(digest.encode())
    for tensor in (batch.inputs, batch.targets):
        chain.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    return chain.hexdigest()


def _header(about: dict[str, Any]) -> dict[str, str]:
    return {"format": "pt", "about": json.dumps(about)}


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)

"""Training in one process: the objective, the optimizer, one step, and what a run must keep.

A step is a pure function of the parameters, the optimizer's state and the step's number: batches
and dropout are drawn from (seed, step), so a run that stopped continues as if it had not.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from receptance.data import Batches
from receptance.model import Model

_DEFAULT_STEPS = 1000
# More steps than anyone will wait for.
_UNLIMITED = 10**9

# Elements of the logits that exist at one time.
_LOGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train. Betas, epsilon, clipping and the schedule's form are those of the paper."""

    steps: int = 0
    """Updates in all; 0 means 1000 or, if --minutes is given, as many as that allows."""
    minutes: float = 0.0
    """Stop after this much training time if that comes first; the learning rate then follows the
    clock. 0 means no limit. A run with a limit is not reproducible to the bit."""
    batch: int = 8
    """Sequences per step."""
    context: int = 256
    """Tokens per sequence, T. The model itself has no limit."""
    learning_rate: float = 6e-4
    """At the start and through constant_steps."""
    final_learning_rate: float = 1e-5
    """At the last step, reached by exponential decay."""
    warmup_steps: int = 0
    """Steps over which the learning rate grows from a fifth of itself, as in RWKV-LM."""
    constant_steps: int = 0
    """Steps after the warm-up before the decay begins (the paper's 169M model: 4.5 % of all)."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's decay rates."""
    epsilon: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """On matrices only; the paper uses none."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 means no clipping."""
    dropout: float = 0.0
    """Share of activations dropped after the embedding and each residual sum."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations. Parameters and optimizer stay float32."""
    seed: int = 0
    """Decides the starting values, the split, the order and the dropout."""

    def __post_init__(self) -> None:
        wanted = {
            "at least 1": {n: getattr(self, n) >= 1 for n in ("batch", "context")},
            "at least 0": {
                n: getattr(self, n) >= 0
                for n in (
                    "steps",
                    "minutes",
                    "warmup_steps",
                    "constant_steps",
                    "weight_decay",
                    "clip",
                )
            },
            "a number over 0": {
                n: 0 < getattr(self, n) < math.inf
                for n in ("learning_rate", "final_learning_rate", "epsilon")
            },
            "at least 0 and less than 1": {
                "dropout": 0 <= self.dropout < 1,
                "betas": all(0 <= beta < 1 for beta in self.betas),
            },
            "at least 0 and less than 2**32": {"seed": 0 <= self.seed < 1 << 32},
        }
        for limits, fields in wanted.items():
            for name, holds in fields.items():
                if not holds:
                    raise ValueError(f"{name} is {getattr(self, name)}; it must be {limits}")

    @property
    def total_steps(self) -> int:
        """`steps`, or what its 0 stands for."""
        return self.steps or (_UNLIMITED if self.minutes else _DEFAULT_STEPS)


def learning_rate(step: int, options: TrainOptions, clock: float = 0.0) -> float:
    """Of a step counted from 0: warm-up, constant, exponential decay (RWKV-v4neo, trainer.py).

    clock is the share of a time limit that is used up; the decay follows it if it is ahead.
    """
    warmup, constant = options.warmup_steps, options.constant_steps
    span = max(1, options.total_steps - constant - warmup)
    progress = min(1.0, max(0.0, clock, (step - constant - warmup + 1) / span))
    ratio = options.final_learning_rate / options.learning_rate
    rate = options.learning_rate * ratio**progress
    return rate * (0.2 + 0.8 * step / warmup) if step < warmup else rate


class _HeadLoss(torch.autograd.Function):
    """Mean cross entropy of x W^T, a few rows of logits at a time, gradients in the same pass.

    x [N,C], weight [V,C], targets [N]. The logits [N,V] never exist as a whole.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wants_gradient = any(ctx.needs_input_grad[:2])
        # Few CPUs multiply bfloat16 fast, and there the float32 masters are the better operand.
        matrix = weight if x.device.type == "cpu" else weight.to(x.dtype)
        grad_x = x.new_empty(x.shape, dtype=matrix.dtype) if wants_gradient else None
        grad_weight = torch.empty_like(weight) if wants_gradient else None
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        rows = max(1, _LOGITS_AT_ONCE // weight.shape[0])
        for at in range(0, x.shape[0], rows):
            part, wanted = x[at : at + rows].to(matrix.dtype), targets[at : at + rows, None]
            scores = torch.log_softmax((part @ matrix.T).float(), dim=-1)
            total -= scores.gather(1, wanted).sum()
            if grad_x is not None and grad_weight is not None:
                error = scores.exp_()
                error.scatter_add_(1, wanted, torch.full_like(error[:, :1], -1))
                error = error.div_(x.shape[0]).to(matrix.dtype)
                torch.mm(error, matrix, out=grad_x[at : at + rows])
                pair = error.T.to(weight.dtype), part.to(weight.dtype)
                grad_weight.addmm_(*pair, beta=float(at > 0))  # 0 overwrites
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.dtype = x.dtype
        return total / x.shape[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_x, grad_weight = ctx.saved_tensors
        if grads[0].is_cpu and float(grads[0]) == 1:  # nearly always: spare a pass over [V,C]
            return grad_x.to(ctx.dtype), grad_weight, None
        return (grad_x * grads[0]).to(ctx.dtype), grad_weight * grads[0], None


def head_loss(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean next-token cross entropy in nats: features [B,T,C], head [V,C], targets [B,T] -> []."""
    loss: Tensor = _HeadLoss.apply(features.flatten(0, 1), weight, targets.flatten())
    return loss


def make_optimizer(model: Model, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW with one group per (learning-rate scale, decayed or not)."""
    scales = model.learning_rate_scales()
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        is_matrix = sum(size > 1 for size in parameter.shape) >= 2
        groups.setdefault((scales.get(name, 1.0), is_matrix), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": group, "scale": scale, "weight_decay": options.weight_decay * is_matrix}
            for (scale, is_matrix), group in groups.items()
        ],
        lr=options.learning_rate,
        betas=options.betas,
        eps=options.epsilon,
        fused=True,
    )


@dataclass(frozen=True)
class StepReport:
    """What one step did."""

    step: int
    """Steps done so far, this one included."""
    loss: float
    """Mean cross entropy of the batch before the update, in nats per token."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    tokens_per_second: float


class Trainer:
    """A model in training: steps, and everything needed to continue them."""

    def __init__(self, model: Model, batches: Batches, options: TrainOptions) -> None:
        self.model, self.batches, self.options = model, batches, options
        self.optimizer = make_optimizer(model, options)
        self.step = 0
        self.seconds = 0.0
        self.dtype = getattr(torch, options.dtype)
        self.device = model.emb.weight.device

    @property
    def progress(self) -> float:
        """The share of the run that is done, by steps or by the clock, whichever is further."""
        return min(1.0, max(self.step / self.options.total_steps, self._clock))

    @property
    def _clock(self) -> float:
        return self.seconds / (60 * self.options.minutes) if self.options.minutes else 0.0

    @property
    def finished(self) -> bool:
        """Whether the steps or the minutes are used up."""
        return self.progress >= 1

    def run_step(self) -> StepReport:
        """One update; ValueError, before anything is changed, if loss or gradient is not finite."""
        began = time.perf_counter()
        inputs, targets = (x.to(self.device) for x in self.batches.at(self.step))
        rate = self._set_learning_rate()
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with _seeded(self.options.seed, self.step, needed=self.options.dropout > 0):
            features, _ = self.model.features(inputs, dtype=self.dtype)
        loss = head_loss(features, self.model.head.weight, targets)
        value = self._finite("loss", float(loss.detach()))
        loss.backward()
        limit = self.options.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        value_norm = self._finite("gradient norm", float(norm))
        self.optimizer.step()
        self.step += 1
        took = time.perf_counter() - began
        self.seconds += took
        return StepReport(self.step, value, rate, value_norm, inputs.numel() / took)

    def _finite(self, what: str, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError(
                f"{what} is {value} at step {self.step + 1}; stopped before the update. Start "
                "again with a lower --learning-rate or more --warmup-steps"
            )
        return value

    def _set_learning_rate(self) -> float:
        rate = learning_rate(self.step, self.options, self._clock)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        return rate

    def write(self, directory: Path) -> None:
        """Put into a checkpoint what the model's own files do not hold."""
        from safetensors.torch import save_file

        tensors = {}
        for name, parameter in self.model.named_parameters():
            for key, tensor in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = tensor.detach().cpu().contiguous()
        save_file(tensors, directory / "optimizer.safetensors")
        about = {
            "step": self.step,
            "tokens": self.step * self.options.batch * self.options.context,
            "seconds": self.seconds,
            "options": asdict(self.options),
        }
        (directory / "training.json").write_text(json.dumps(about, indent=1))

    def restore(self, directory: Path) -> None:
        """Continue from what `write` stored; the model's own tensors are loaded already."""
        from safetensors.torch import load_file

        about = json.loads((directory / "training.json").read_text())
        self.step, self.seconds = about["step"], about["seconds"]
        stored = load_file(directory / "optimizer.safetensors", device=str(self.device))
        for name, parameter in self.model.named_parameters():
            prefix = f"{name}/"
            self.optimizer.state[parameter] = {
                key.removeprefix(prefix): tensor
                for key, tensor in stored.items()
                if key.startswith(prefix)
            }


def stored_options(directory: Path) -> TrainOptions:
    """The options that a checkpoint was trained with."""
    try:
        fields = json.loads((directory / "training.json").read_text())["options"]
        return TrainOptions(**fields | {"betas": tuple(fields["betas"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory} is not a checkpoint to resume from: {error}") from None


@contextlib.contextmanager
def _seeded(seed: int, step: int, *, needed: bool) -> Iterator[None]:
    """Draw what torch draws by itself (dropout) from (seed, step), and leave no trace."""
    if not needed:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed * 1_000_003 + step)
        yield

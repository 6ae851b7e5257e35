"""The objective: cross entropy through the head, without ever holding all logits.

Both penalties keep the softmax's normalizer in check: RWKV-LM's L2Wrap pulls the largest logit of
a position towards zero, PaLM's z-loss (arXiv 2204.02311) the logarithm of the normalizer.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from receptance.data.batches import Batch
from receptance.engine.wide import cpu_multiplies_bfloat16, widen
from receptance.model import Model
from receptance.state import State
from receptance.training.options import TrainOptions
from receptance.training.recomputing import Recomputing

# How many logits exist at one time: on a CPU few, for its caches. On a GPU every piece reads and
# writes the gradient of the whole head, so that pieces want to be large: 0.27 GB in float32.
LOGITS_AT_ONCE = 1 << 24
CUDA_LOGITS_AT_ONCE = 1 << 26


def logits_at_once(device_type: str) -> int:
    """How many logits exist at one time on a device: "cpu", "cuda", ..."""
    return CUDA_LOGITS_AT_ONCE if device_type == "cuda" else LOGITS_AT_ONCE


class _HeadLoss(torch.autograd.Function):
    """Objective and cross entropy of x W^T, some rows of logits at a time, gradients as well.

    x [N,C], weight [V,C], targets [N]. The logits [N,V] never exist as a whole.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        total: float,
        max_logit_penalty: float,
        z_loss: float,
    ) -> tuple[Tensor, Tensor]:
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        # A CPU's products are no wider than their factors: the logits take the float32 masters. So
        # do the gradients where bfloat16 is multiplied slowly.
        narrow = not x.is_cpu or (x.dtype == torch.bfloat16 and cpu_multiplies_bfloat16())
        matrix = weight.to(x.dtype) if narrow else weight
        scorer = weight if x.is_cpu else matrix
        grad_x = x.new_empty(x.shape, dtype=matrix.dtype) if wants_x else None
        grad_weight = torch.empty_like(weight) if wants_weight else None
        exact = torch.promote_types(matrix.dtype, torch.float32)
        entropy = torch.zeros((), dtype=exact, device=x.device)
        penalty = torch.zeros_like(entropy)
        rows = max(1, logits_at_once(x.device.type) // weight.shape[0])
        # Fresh memory is slow on a CPU: all logits, and then their scores, take the same.
        room = x.new_empty(min(rows, len(x)), len(weight), dtype=exact) if x.is_cpu else None
        for at in range(0, x.shape[0], rows):
            part, wanted = x[at : at + rows].to(matrix.dtype), targets[at : at + rows, None]
            out = None if room is None else room[: len(part)]
            logits = _wide_product(part.to(scorer.dtype), scorer.T, exact, out)
            # Pulls on the largest logit, and in proportion to the probabilities.
            pull = torch.zeros_like(wanted, dtype=exact)
            if max_logit_penalty:
                largest, place = logits.max(dim=-1, keepdim=True)
                penalty += max_logit_penalty / 2 * largest.square().sum()
            normalizer = logits[:, :1].clone()
            scores = torch.log_softmax(logits, dim=-1, out=out)
            entropy -= scores.gather(1, wanted).sum()
            if z_loss:
                normalizer -= scores[:, :1]
                penalty += z_loss * normalizer.square().sum()
                pull = 2 * z_loss * normalizer
            if wants_x or wants_weight:
                error = scores.exp_()
                if z_loss:
                    error *= 1 + pull
                error.scatter_add_(1, wanted, torch.full_like(error[:, :1], -1))
                if max_logit_penalty:
                    error.scatter_add_(1, place, max_logit_penalty * largest)
                error = error.div_(total).to(matrix.dtype)
                if grad_x is not None:
                    torch.mm(error, matrix, out=grad_x[at : at + rows])
                if grad_weight is not None:
                    _add_product(grad_weight, error.T, part, first=at == 0)
        if grad_weight is not None and not x.shape[0]:
            grad_weight.zero_()
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.dtype = x.dtype
        entropy = entropy / total
        ctx.mark_non_differentiable(entropy)
        return entropy + penalty / total, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        if not grads[0].is_cpu or float(grads[0]) != 1:  # nearly always 1: spare a pass over [V,C]
            grad_x, grad_weight = (x if x is None else x * grads[0] for x in (grad_x, grad_weight))
        grad_x = None if grad_x is None else grad_x.to(ctx.dtype)
        return grad_x, grad_weight, None, None, None, None


def _wide_product(
    left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """A matrix product in a type that may be wider than that of its factors, on a CPU in `out`.

    NVIDIA's GPUs sum products of narrow numbers in float32; they need not be widened first.
    """
    on_nvidia = left.is_cuda and torch.version.hip is None
    if on_nvidia and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left.to(dtype), right.to(dtype), out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """total += left right; the first time total holds nothing yet."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=float(not first))  # 0 overwrites
    else:
        product = left @ right if left.is_cpu else _wide_product(left, right, total.dtype)
        total.copy_(product) if first else total.add_(product)


def head_loss(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    *,
    total: float | None = None,
    max_logit_penalty: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """What to minimize, and the cross entropy in it, in nats: two scalars.

    features [B,T,C], head [V,C], targets [B,T]; mask [B,T] bool chooses the positions that count.
    Sums are divided by total, by default the number of those positions: parts of a batch add up
    when each is given the whole's. Added to the cross entropy are max_logit_penalty / 2 times the
    square of each position's largest logit (RWKV-LM: 1e-4, in the gradient only), and z_loss
    times that of its log-normalizer (PaLM: 1e-4).
    """
    x, wanted = features.flatten(0, 1), targets.flatten()
    if mask is not None:
        chosen = mask.flatten()
        x, wanted = x[chosen], wanted[chosen]
    total = max(1, len(wanted)) if total is None else total
    found: tuple[Tensor, Tensor] = _HeadLoss.apply(
        x, weight, wanted, total, max_logit_penalty, z_loss
    )
    return found


class Objective(nn.Module):
    """A model and its training objective as one module, for torch's DDP and FSDP to wrap."""

    def __init__(self, model: Model, options: TrainOptions) -> None:
        super().__init__()
        widen(model)
        self.model = model
        # torch.compile chooses itself what it saves.
        self.recomputes = not options.compile
        self.dtype = getattr(torch, options.dtype)
        self.penalties = {
            "max_logit_penalty": options.max_logit_penalty,
            "z_loss": options.z_loss,
        }

    def forward(
        self, batch: Batch, state: dict[str, Tensor] | None, total: float | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Objective and cross entropy of the rows, both over total, and the state behind them.

        A total of None asks for the state alone.
        state holds the tensors of a State, None for rows that have read nothing.
        """
        before = None
        if state is not None:
            tokens = torch.zeros(len(batch.inputs), dtype=torch.int64, device=batch.inputs.device)
            before = State(state, tokens)
        watching = self.recomputes and torch.is_grad_enabled()
        with Recomputing() if watching else contextlib.nullcontext():
            features, after = self.model.features(
                batch.inputs, before, resets=batch.resets, dtype=self.dtype
            )
        if total is None:
            nothing = features.new_zeros(())
            return nothing, nothing, after.tensors
        value, entropy = head_loss(
            features,
            self.model.head.weight,
            batch.targets,
            batch.mask,
            total=total,
            **self.penalties,
        )
        return value, entropy, after.tensors

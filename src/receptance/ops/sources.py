"""What an output of the recurrence is made of: the weight of every token that it reads from.

The operators compute the same outputs without ever knowing these weights, of which there are as
many as pairs of tokens. They exist for analysis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from receptance.ops.wkv import WKVState


class Sources(NamedTuple):
    """Outputs at P positions as sums over the T tokens of a text, and over the state before it.

    The C channels are G groups of one weight each, channels in RWKV-4 and heads in later versions.
    """

    weights: Tensor  # [B,P,T,G], how much of each token's value is in the output; 0 for later ones
    values: Tensor  # [B,T,C]
    carried: Tensor  # [B,P,C], what comes out of the state before the first token
    carried_weight: Tensor | None  # [B,P,G] beside `weights`, where there is one number for it

    def outputs(self) -> Tensor:
        """The outputs [B,P,C], which are those of the operator up to rounding."""
        values = self.values.unflatten(-1, (self.weights.shape[-1], -1))
        return self.carried + torch.einsum("bptg,btgn->bpgn", self.weights, values).flatten(2)

    def shares(self) -> Tensor:
        """The share of each source in an output, [B,P,1+T], the state before the text first.

        A source adds a vector to each group of channels. Its share is the sum of the lengths of
        these vectors, divided by that of all sources.
        """
        groups = self.weights.shape[-1]
        sizes = self.values.unflatten(-1, (groups, -1)).norm(dim=-1)
        added = torch.einsum("bptg,btg->bpt", self.weights.abs(), sizes)
        carried = self.carried.unflatten(-1, (groups, -1)).norm(dim=-1).sum(-1, keepdim=True)
        whole = torch.cat([carried, added], dim=-1)
        return whole / whole.sum(-1, keepdim=True).clamp(min=torch.finfo(whole.dtype).tiny)


def wkv4_sources(
    log_decay: Tensor,
    bonus: Tensor,
    key: Tensor,
    value: Tensor,
    state: WKVState,
    *,
    positions: Tensor,
    resets: Tensor | None = None,
) -> Sources:
    """The weights of equation 16 of arXiv 2305.13048 at `positions` [P]; see wkv4 for the others.

    At position t the token i < t has the weight e^{(t - 1 - i) w + k_i}, the token itself e^{u +
    k_t}, and the state before the text e^{t w} b. All are divided by their sum, so that they add up
    to 1 unless the state has a negative denominator.
    """
    wide = state.numerator.dtype
    key, value = key.to(wide), value.to(wide)
    log_decay, bonus = log_decay.to(wide).clamp(min=-1e30), bonus.to(wide)
    time = torch.arange(key.shape[1], device=key.device)
    visible, carries = _visible(positions, time, resets)

    ago = (positions[:, None] - 1 - time).clamp(min=0).to(wide)  # [P,T]
    exponent = key[:, None] + ago[..., None] * log_decay  # [B,P,T,C]
    now = (time == positions[:, None])[..., None]
    exponent = torch.where(now, (bonus + key)[:, None], exponent)
    exponent = exponent.masked_fill(~visible[..., None], -torch.inf)
    before = state.exponent[:, None] + positions[:, None].to(wide) * log_decay  # [B,P,C]
    before = before.masked_fill(~carries[..., None], -torch.inf)

    top = torch.maximum(exponent.amax(2), before)
    weights, kept = (exponent - top[:, :, None]).exp(), (before - top).exp()
    carried_weight = kept * state.denominator[:, None]
    total = weights.sum(2) + carried_weight
    return Sources(
        weights / total[:, :, None],
        value,
        kept * state.numerator[:, None] / total,
        carried_weight / total,
    )


def wkv6_sources(
    inputs: Sequence[Tensor],
    bonus: Tensor,
    state: Tensor,
    *,
    positions: Tensor,
    resets: Tensor | None = None,
) -> Sources:
    """The weights of the recurrence of RWKV-5 and RWKV-6 at `positions` [P].

    inputs are the first four arguments of wkv6, for which see there, all [B,T,H,N]; bonus and state
    are its others. The output at t is the sum of v_i (r_t . (w_{i+1} ... w_{t-1} k_i)) over i < t,
    of v_t (r_t . (u k_t)), and of what r_t reads of the faded state from before the text. The
    weights are one number for each head, may be negative, and do not add up to 1.
    """
    receptance, log_decay, key, value = (x.to(state.dtype) for x in inputs)
    decay = log_decay.exp()
    asked = receptance[:, positions]  # [B,P,H,N], what is read from the state before a token
    weights = asked.new_zeros(*asked.shape[:2], key.shape[1], asked.shape[2])
    for i in reversed(range(key.shape[1])):
        now, later = ((positions == i)[:, None, None], (positions > i)[:, None, None])
        k = key[:, i, None]
        share = torch.where(now, bonus.to(state.dtype), later.to(state.dtype)) * k
        weights[:, :, i] = (asked * share).sum(-1)
        asked = torch.where(later, asked * decay[:, i, None], asked)
        if resets is not None:
            gone = resets[:, i, None, None, None] & (now | later)
            asked = asked.masked_fill(gone, 0)
    carried = torch.einsum("bhkv,bphk->bphv", state, asked).flatten(2)
    return Sources(weights, value.flatten(2), carried, None)


def wkv7_sources(
    inputs: Sequence[Tensor],
    state: Tensor,
    *,
    positions: Tensor,
    resets: Tensor | None = None,
) -> Sources:
    """The weights of RWKV-7's recurrence at `positions` [P].

    inputs are the first six arguments of wkv7, for which see there, and state is its state. With
    M_j = diag(w_j) + a_j b_j^T the output at t is the sum of v_i (k_i . M_{i+1} ... M_t r_t) over
    i <= t, and of S M_1 ... M_t r_t for the state S before the text. The weights are one number for
    each head, may be negative, and do not add up to 1.
    """
    receptance, log_decay, key, value, removal, replacement = (x.to(state.dtype) for x in inputs)
    decay = log_decay.exp()
    asked = receptance[:, positions]  # [B,P,H,N], what is read from the state after a token
    weights = asked.new_zeros(*asked.shape[:2], key.shape[1], asked.shape[2])
    for i in reversed(range(key.shape[1])):
        k, w, a, b = (x[:, i, None] for x in (key, decay, removal, replacement))
        reached = (positions >= i)[None, :, None]
        weights[:, :, i] = ((asked * k).sum(-1)).masked_fill(~reached, 0)
        before = w * asked + a * (asked * b).sum(-1, keepdim=True)
        if resets is not None:
            before = before.masked_fill(resets[:, i, None, None, None], 0)
        asked = torch.where(reached[..., None], before, asked)
    carried = torch.einsum("bhvk,bphk->bphv", state, asked).flatten(2)
    return Sources(weights, value.flatten(2), carried, None)


def _visible(positions: Tensor, time: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Whether a position reads from a token, [B or 1,P,T], and from the state before, [B or 1,P].

    A token is read from unless it comes later, or the row begins afresh between the two.
    """
    causal = (time <= positions[:, None])[None]
    if resets is None:
        return causal, torch.ones_like(causal[..., 0])
    documents = resets.long().cumsum(1)  # the number of the document that a token belongs to
    here = documents[:, positions]
    return causal & (documents[:, None] == here[..., None]), here == 0

"""Appendix H: how large gradients are over length and depth, and whether their bounds hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from receptance.analysis.decays import starting_log_decays
from receptance.config import ModelConfig
from receptance.evaluation.intervals import mean
from receptance.evaluation.results import Curve, Figure, Result, Subject
from receptance.plots.panels import Line, Panel
from receptance.reproduce.bounds import IDENTITIES, SHARES, derivatives
from receptance.reproduce.experiment import Check, Experiment, Found, Piece, Work
from receptance.reproduce.norms import NETWORKS, backward, parameters

RWKV, LSTM, TRANSFORMER = NETWORKS
_BOUNDS, _LENGTH, _DEPTH = "bounds", "length", "depth"
# Float64 rounds at 1e-16; sums over thousands of positions and exponents lose some digits of it.
_EXACT = 1e-9
# What float32 cannot hold has no point.
_LEAST = 1e-38
# Pictures end here.
_DRAWN = 1e-20
# A gradient is stable if its largest norm is at most so many times the smallest.
_STABLE = 10.0
# A gradient vanishes with the decay if it falls at most by so many times what the decays say.
_REACHES = 3.0
# The figure of each question, and over what it is drawn.
WHOLE = "gradient of the last loss, all weights of the layers"
FIRST = "gradient of the last loss, weights of the first layer"
BACK = "gradient of the last loss at an input, as a share of the last input's"


@dataclass(frozen=True, kw_only=True)
class Gradients(Experiment):
    """Gradients of RWKV, an LSTM and a Transformer over length and depth, and RWKV's bounds."""

    NAME: ClassVar[str] = "gradients"
    SHOWS: ClassVar[str] = "Appendix H"
    CLAIM: ClassVar[str] = (
        "The derivatives of wkv by W_v and W_k are a weighted mean and a weighted covariance, "
        "bounded whatever the length: gradients neither explode nor vanish, save by the decay."
    )
    DOES: ClassVar[str] = (
        "compares these derivatives in float64 with the two formulas and their bounds, and takes "
        "norms of gradients of RWKV, torch's LSTM and torch's Transformer over length and depth"
    )
    TAKES: ClassVar[tuple[str, str]] = ("1 minute", "5 minutes")
    PARALLEL: ClassVar[bool] = True

    width: int = 64
    """Channels of all networks, a multiple of 8."""
    lengths: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048)
    """T."""
    layers: int = 4
    """Layers while T changes."""
    depths: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Numbers of layers."""
    length: int = 64
    """T while the depth changes."""
    rows: int = 8
    """Texts per measurement, drawn at random."""
    seeds: int = 5
    """Networks and texts of each measurement."""

    def __post_init__(self) -> None:
        for name in ("lengths", "depths"):
            if len({*getattr(self, name)}) < 3 or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} are {getattr(self, name)}; give three or more, from 1 on")
        if min(self.lengths) < 4:
            raise ValueError(f"lengths has {min(self.lengths)}; wanted at least 4")
        if self.width < 8 or self.width % 8:
            raise ValueError(f"width is {self.width}; wanted a multiple of 8")
        if min(self.layers, self.length, self.rows) < 1 or self.seeds < 2:
            raise ValueError("layers, length and rows must be at least 1, and seeds at least 2")

    @classmethod
    def quick(cls) -> Gradients:
        """Narrow networks, and shorter texts."""
        return cls(width=32, lengths=(16, 32, 64, 128, 256, 512), rows=4, seeds=3)

    def pieces(self) -> list[Piece]:
        """The bounds at every T, then every network at every T and every depth; all seeds."""
        seeds = range(self.seeds)
        bounds = [{"over": _BOUNDS, "T": t, "seed": n} for t in self.lengths for n in seeds]
        places = [(_LENGTH, t, self.layers) for t in self.lengths]
        places += [(_DEPTH, self.length, depth) for depth in self.depths]
        return bounds + [
            {"over": over, "model": name, "T": t, "layers": layers, "seed": seed}
            for name in NETWORKS
            for over, t, layers in places
            for seed in seeds
        ]

    def cost(self, piece: Piece) -> float:
        """About the positions that are read."""
        return float(piece["T"] * piece.get("layers", 1) + 100)

    def measure(self, piece: Piece, work: Work) -> dict[str, Any]:
        """One backward pass."""
        if piece["over"] == _BOUNDS:
            return derivatives(self.width, piece["T"], piece["seed"])
        shape = (self.rows, piece["T"])
        return backward(piece["model"], self.width, piece["layers"], shape, piece["seed"])

    def conclude(self, found: Sequence[tuple[Piece, Mapping[str, Any]]]) -> Found:
        """Bounds, stability over length and depth, and reach."""
        curves = [*self._bounds(found), *self._norms(found)]
        return Found(
            checks=[
                *bound_checks(curves),
                *stability_checks(curves, starting_weights(self.width, self.layers)),
            ],
            models=[
                Subject(
                    name=name,
                    about={"parameters": parameters(name, self.width, self.layers)},
                )
                for name in NETWORKS
            ],
            figures=[_ratio(curve) for curve in curves if curve.name in (WHOLE, FIRST)],
            curves=curves,
            caption=f"Parameters are those of {self.layers} layers of {self.width} channels. "
            f"Before training; {self.rows} rows of random tokens, {self.layers} layers over T, "
            f"T = {self.length} over layers; {self.seeds} seeds, bands are 95 %. Float32, bounds "
            "in float64",
            notes=[
                "RWKV has its starting decays and mixes. Its matrices, some of which begin at 0, "
                "are drawn with deviation 1/√C, as if training had begun; the others have torch's "
                "starting values, the Transformer with its layer norms first.",
                "RWKV and the Transformer add what a layer finds to its input, and the layers of "
                "the LSTM do not: over depth it is these residual connections that are compared.",
                "The bound of a weighted mean is the largest value; that of a weighted covariance "
                "is a quarter of the product of both ranges (Grüss). Token shift is left out of "
                "the bounds, as in the appendix, and is in the networks.",
            ],
        )

    def panels(self, result: Result) -> list[Panel]:
        """The bounds, then the three questions about whole networks."""
        made = [
            Panel(
                title="Derivatives of wkv, float64",
                x="T, tokens",
                y="largest, as a share of its bound",
                lines=[Line(x.name, x.x, x.y) for x in result.curves if x.name in SHARES],
                log_x=True,
            )
        ]
        for name, unit in ((WHOLE, ", tokens"), (FIRST, ""), (BACK, "")):
            curves = [curve for curve in result.curves if curve.name == name]
            made.append(
                Panel(
                    title=name,
                    x=f"{curves[0].x_name}{unit}",
                    y=curves[0].y_name,
                    lines=[_line(curve) for curve in curves],
                    log_x=True,
                    log_y=True,
                )
            )
        return made

    def _bounds(self, found: Sequence[tuple[Piece, Mapping[str, Any]]]) -> list[Curve]:
        """The worst over seeds of each identity and each bound, at every T."""
        made = []
        for name in (*IDENTITIES, *SHARES):
            values = [
                max(it[name] for p, it in found if p["over"] == _BOUNDS and p["T"] == t)
                for t in self.lengths
            ]
            unit = "share of the bound" if name in SHARES else "difference"
            x = [*map(float, self.lengths)]
            made.append(Curve(name=name, x_name="T", x=x, y_name=unit, y=values, model="wkv"))
        return made

    def _norms(self, found: Sequence[tuple[Piece, Mapping[str, Any]]]) -> list[Curve]:
        made = []
        for model in NETWORKS:
            mine = [(p, it) for p, it in found if p.get("model") == model]
            over_t = {
                t: [it for p, it in mine if (p["over"], p["T"]) == (_LENGTH, t)]
                for t in self.lengths
            }
            over_depth = {
                n: [it for p, it in mine if (p["over"], p["layers"]) == (_DEPTH, n)]
                for n in self.depths
            }
            whole = {t: [it["whole"] for it in some] for t, some in over_t.items()}
            first = {n: [it["first"] for it in some] for n, some in over_depth.items()}
            far = over_t[max(self.lengths)]
            back = {d: [it["back"][n] for it in far] for n, d in enumerate(far[0]["distances"])}
            made += [
                _curve(WHOLE, "T", whole, model),
                _curve(FIRST, "layers", first, model),
                _curve(BACK, "tokens between", back, model),
            ]
        return made


def _curve(name: str, x_name: str, values: Mapping[int, Sequence[float]], model: str) -> Curve:
    """Geometric means over seeds, and their intervals; up to where float32 holds them."""
    values = {place: some for place, some in values.items() if min(some) > _LEAST}
    means = [mean([math.log(x) for x in some], "seeds").map(math.exp) for some in values.values()]
    return Curve(
        name=name,
        x_name=x_name,
        x=[*map(float, values)],
        y_name="share of the gradient" if name == BACK else "norm of the gradient",
        y=[x.value for x in means],
        low=[x.low for x in means if x.low is not None],
        high=[x.high for x in means if x.high is not None],
        interval=means[0].interval if means else "",
        model=model,
    )


def _line(curve: Curve) -> Line:
    """The part of a curve that is not lost in nothing."""
    assert curve.low is not None and curve.high is not None
    rows = zip(curve.x, curve.y, curve.low, curve.high, strict=True)
    x, y, low, high = zip(*(row for row in rows if row[1] > _DRAWN), strict=True)
    return Line(str(curve.model), x, y, [max(n, _DRAWN) for n in low], high)


def _spread(curve: Curve) -> float:
    """By which factor the largest value exceeds the smallest."""
    return max(curve.y) / min(curve.y)


def _widest(curve: Curve) -> float:
    """The same within the bands: from the highest to the lowest end."""
    return max(curve.high or curve.y) / min(curve.low or curve.y)


def _ratio(curve: Curve) -> Figure:
    return Figure(
        name=f"largest over smallest {curve.name}",
        value=_spread(curve),
        model=curve.model,
        about={"over": curve.x_name, "from": curve.x[0], "to": curve.x[-1]},
    )


# ---- what the appendix says ---------------------------------------------------------------------


def bound_checks(curves: Sequence[Curve]) -> list[Check]:
    """The two formulas, and that they bound the derivatives at every length."""
    worst = {curve.name: max(curve.y) for curve in curves if curve.model == "wkv"}
    off = max(worst[name] for name in IDENTITIES)
    shares = [worst[name] for name in SHARES]
    longest = max(max(curve.x) for curve in curves if curve.model == "wkv")
    return [
        Check(
            claim="The derivative of wkv by W_v is the weighted mean of the inputs, and that by "
            "W_k their weighted covariance with the values (equations 30 to 33).",
            rule=f"autograd's derivatives differ from both by at most {_EXACT:g} of the largest.",
            found=f"They differ by at most {off:.1e}.",
            agrees=off <= _EXACT,
        ),
        Check(
            claim="Both are bounded whatever the length.",
            rule="no derivative exceeds its bound at any T.",
            found=f"Up to T = {longest:,.0f} they reach at most {shares[0]:.1%} of the largest "
            f"input, and {shares[1]:.1%} of a quarter of the product of both ranges.",
            agrees=max(shares) <= 1 + _EXACT,
        ),
    ]


def stability_checks(
    curves: Sequence[Curve], weights: Callable[[float], float] = lambda distance: 1.0
) -> list[Check]:
    """Gradients of whole networks; weights are those that the decays alone give to a distance."""
    found = {(curve.name, curve.model): curve for curve in curves}
    made = []
    for name, over in ((WHOLE, "length"), (FIRST, "depth")):
        spreads = {model: _spread(found[name, model]) for model in NETWORKS}
        x = found[name, RWKV].x
        made.append(
            Check(
                claim=f"Gradients of RWKV neither explode nor vanish with the {over}.",
                rule=f"from {x[0]:g} to {x[-1]:g} the largest norm is at most {_STABLE:g} times "
                "the smallest, both in the geometric mean over seeds.",
                found="The factor is "
                + ", ".join(f"{n:.3g} for {model}" for model, n in spreads.items())
                + f"; within the bands of RWKV it is at most {_widest(found[name, RWKV]):.3g}.",
                agrees=spreads[RWKV] <= _STABLE,
            )
        )
    return [*made, _vanishes_with_the_decay({m: found[BACK, m] for m in NETWORKS}, weights)]


def _vanishes_with_the_decay(
    curves: Mapping[str, Curve], weights: Callable[[float], float]
) -> Check:
    shares = {model: dict(zip(it.x, it.y, strict=True)) for model, it in curves.items()}
    far = max(x for some in shares.values() for x in some)
    near = min(x for some in shares.values() for x in some)
    fall = shares[RWKV].get(far, 0.0) / shares[RWKV].get(near, math.inf)
    wanted = weights(far) / weights(near)
    others = ", ".join(
        f"{model} keeps {some[far] / some[near]:.2e}"
        if far in some
        else f"{model} keeps less than float32 can hold"
        for model, some in shares.items()
        if model != RWKV
    )
    return Check(
        claim="A gradient vanishes over time only as far as the decay makes it.",
        rule=f"from {near:g} to {far:,.0f} tokens the share of RWKV falls at most {_REACHES:g} "
        "times as far as the weights that its decays alone give to these tokens in the average.",
        found=f"It falls to {fall:.2e}, the weights to {wanted:.2e}; {others}, without decays.",
        agrees=fall >= wanted / _REACHES and fall > 0,
    )


def starting_weights(width: int, layers: int) -> Callable[[float], float]:
    """The weight of a token so many tokens back by the decays of a new model, over its channels.

    Keys are taken as equal: what is left of equation 16 is (1 - exp(-w)) exp(-(d - 1) w) at a
    distance d, and its root mean square over all channels of all layers is the weight.
    """
    config = ModelConfig(vocab_size=1, width=width, num_layers=layers, ffn_width=1)
    log_decay = starting_log_decays(config).double()

    def weight(distance: float) -> float:
        share = -log_decay.expm1() * ((distance - 1) * log_decay).exp()
        return float(share.square().mean().sqrt())

    return weight

"""The equations of steering: each a small pure function of the residual h, one number and one direction.

    h [N, T, D]   activations at a site: N rows, T positions
    c [N, 1, 1]   the number, one a row
    d [N, 1, D]   the direction, one a row: a decoder row W_dec[i], or a vector of one's own; u = d/‖d‖
    f [N, T, 1]   the feature's activation, read from this h

Every function returns a new tensor in h's dtype. They compute at least in float32, and round only the change that is
added to h, so a change of 0 leaves h bit-equal; `add` alone computes in h's dtype, as Neuronpedia does. Where a push is
not wanted (positions, conditions) is not their business. SAEs decode linearly, so dec(f with f_i := c) + (h - dec(f)),
the clamp that keeps the reconstruction error, is h + (c - f_i)·d and costs no decoding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mistudio.sae import SAE


def add(h: Float[Tensor, "N T D"], c: Float[Tensor, "N 1 1"], d: Float[Tensor, "N 1 D"]) -> Float[Tensor, "N T D"]:
    """h + c·d. c in residual units: with a unit decoder row, the length added. Neuronpedia's SIMPLE_ADDITIVE.

    With unit "max" c = s·m_i: s multiples of the feature's largest activation (SAELens; AxBench, s = 0.2 … 5).
    """
    return h + c.to(h) * d.to(h)


def add_keeping_norm(
    h: Float[Tensor, "N T D"], c: Float[Tensor, "N 1 1"], d: Float[Tensor, "N 1 D"]
) -> Float[Tensor, "N T D"]:
    """(h + c·u)·‖h‖/‖h + c·u‖: turned towards u and of the old length. c in residual units. repeng's `normalize`."""
    x, c, d = _wide(h, c, d)
    moved = x + c * _unit(d)
    new, old = _norm(moved), _norm(x)
    return (moved * torch.where(new > 0, old / new, 1.0)).to(h.dtype)


def add_relative(
    h: Float[Tensor, "N T D"], c: Float[Tensor, "N 1 1"], d: Float[Tensor, "N 1 D"]
) -> Float[Tensor, "N T D"]:
    """h + c·‖h‖·u. c is a share of the residual's norm: comparable across layers and models. mistudio."""
    x, c, d = _wide(h, c, d)
    return _moved(h, c * _norm(x) * _unit(d))


def ablate_direction(h: Float[Tensor, "N T D"], d: Float[Tensor, "N 1 D"]) -> Float[Tensor, "N T D"]:
    """h - (h·u)u: nothing is left along d. Refusal direction (arXiv 2406.11717); Neuronpedia's orthogonal at c = 0."""
    x, d = _wide(h, d)
    return _moved(h, -_along(x, d) * _unit(d))


def orthogonal(
    h: Float[Tensor, "N T D"], c: Float[Tensor, "N 1 1"], d: Float[Tensor, "N 1 D"]
) -> Float[Tensor, "N T D"]:
    """h + (c - 1)(h·u)u: the part along d times c; 1 changes nothing, 0 removes it. Neuronpedia's ORTHOGONAL_DECOMP."""
    x, c, d = _wide(h, c, d)
    return _moved(h, (c - 1) * _along(x, d) * _unit(d))


def projection_set(
    h: Float[Tensor, "N T D"], c: Float[Tensor, "N 1 1"], d: Float[Tensor, "N 1 D"]
) -> Float[Tensor, "N T D"]:
    """h + (c - h·u)u: the projection on u becomes c, in residual units. mistudio, after Neuronpedia's cap."""
    x, c, d = _wide(h, c, d)
    return _moved(h, (c - _along(x, d)) * _unit(d))


def projection_cap(
    h: Float[Tensor, "N T D"], c: Float[Tensor, "N 1 1"], d: Float[Tensor, "N 1 D"]
) -> Float[Tensor, "N T D"]:
    """h + (min(h·u, c) - h·u)u: the projection is at most c, in residual units. Neuronpedia's PROJECTION_CAP."""
    x, c, d = _wide(h, c, d)
    p = _along(x, d)
    return _moved(h, (torch.minimum(p, c) - p) * _unit(d))


def projection_floor(
    h: Float[Tensor, "N T D"], c: Float[Tensor, "N 1 1"], d: Float[Tensor, "N 1 D"]
) -> Float[Tensor, "N T D"]:
    """h + (max(h·u, c) - h·u)u: the projection is at least c, in residual units. mistudio, after Neuronpedia's cap."""
    x, c, d = _wide(h, c, d)
    p = _along(x, d)
    return _moved(h, (torch.maximum(p, c) - p) * _unit(d))


def clamp(
    h: Float[Tensor, "N T D"], c: Float[Tensor, "N 1 1"], d: Float[Tensor, "N 1 D"], f: Float[Tensor, "N T 1"]
) -> Float[Tensor, "N T D"]:
    """h + (c - f)·d: the feature is at c, the error is kept. c in activation units. Scaling Monosemanticity; AxBench.

    At BOS some models' activations are huge, and f with them; leave it out with positions "no-bos".
    """
    _, c, d, f = _wide(h, c, d, f)
    return _moved(h, (c - f) * d)


def clamp_at_least(
    h: Float[Tensor, "N T D"], c: Float[Tensor, "N 1 1"], d: Float[Tensor, "N 1 D"], f: Float[Tensor, "N T 1"]
) -> Float[Tensor, "N T D"]:
    """h + (max(f, c) - f)·d: the feature is at c or above, in activation units. AxBench's variant of the clamp."""
    _, c, d, f = _wide(h, c, d, f)
    return _moved(h, (torch.maximum(f, c) - f) * d)


def clamp_where_active(
    h: Float[Tensor, "N T D"], c: Float[Tensor, "N 1 1"], d: Float[Tensor, "N 1 D"], f: Float[Tensor, "N T 1"]
) -> Float[Tensor, "N T D"]:
    """h + (c - f)·d where f > 0, else h. c in activation units; -25 … -200 in SAEBench's unlearning."""
    _, c, d, f = _wide(h, c, d, f)
    return _moved(h, torch.where(f > 0, c - f, 0.0) * d)


def scale(
    h: Float[Tensor, "N T D"], c: Float[Tensor, "N 1 1"], d: Float[Tensor, "N 1 D"], f: Float[Tensor, "N T 1"]
) -> Float[Tensor, "N T D"]:
    """h + (c - 1)·f·d: the feature's activation times c; 1 changes nothing. Goodfire's kind of steering."""
    _, c, d, f = _wide(h, c, d, f)
    return _moved(h, (c - 1) * f * d)


def ablate_feature(
    h: Float[Tensor, "N T D"], d: Float[Tensor, "N 1 D"], f: Float[Tensor, "N T 1"]
) -> Float[Tensor, "N T D"]:
    """h - f·d: what the feature writes is gone; where it is off, nothing changes. arXiv 2403.19647, 2410.19278."""
    _, d, f = _wide(h, d, f)
    return _moved(h, -f * d)


def reconstruct(
    h: Float[Tensor, "N T D"], c: Float[Tensor, "N 1 1"], d: Float[Tensor, "N 1 D"], f: Float[Tensor, "N T 1"], sae: SAE
) -> Float[Tensor, "N T D"]:
    """x̂ + (c - 1)·f·d, where x̂ = dec(enc(h)): the reconstruction, the error left out, the feature's activation times c.

    At c = 1 the plain splice of delta loss (Gemma Scope, section 4.1). Costs a decoding. With the error kept,
    dec(f with f_i := c·f_i) + (h - x̂), it would be `scale`.
    """
    x_hat = sae(h)[0]
    wide, c, d, f = _wide(x_hat, c, d, f)
    return (wide + (c - 1) * f * d).to(h.dtype)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One equation, and what may be said about it without running it."""

    apply: Callable[..., Tensor]
    """The function of this module."""

    equation: str
    """As a person reads it."""

    unit: Literal["residual", "activation", "share", "factor"] | None
    """What its number counts in; None: it takes none. "residual" and "activation" may be given in multiples of max."""

    no_op: float | None
    """The number at which it changes nothing; None where there is none (which may still depend on f)."""

    reads: Literal["direction", "feature", "sae"] = "direction"
    """What it needs: any direction; a feature's activation too; the whole SAE."""

    signed: bool = False
    """Whether -c is the opposite push, so that a sign-flipped control means something."""


_FAR = 1e30

METHODS: dict[str, Method] = {
    "add": Method(apply=add, equation="h + c·d", unit="residual", no_op=0.0, signed=True),
    "add-keeping-norm": Method(
        apply=add_keeping_norm, equation="(h + c·u)·‖h‖/‖h + c·u‖", unit="residual", no_op=0.0, signed=True
    ),
    "add-relative": Method(apply=add_relative, equation="h + c·‖h‖·u", unit="share", no_op=0.0, signed=True),
    "clamp": Method(apply=clamp, equation="h + (c - f)·d", unit="activation", no_op=None, reads="feature", signed=True),
    "clamp-at-least": Method(
        apply=clamp_at_least, equation="h + (max(f, c) - f)·d", unit="activation", no_op=0.0, reads="feature"
    ),
    "clamp-where-active": Method(
        apply=clamp_where_active,
        equation="h + (c - f)·d where f > 0",
        unit="activation",
        no_op=None,
        reads="feature",
        signed=True,
    ),
    "scale": Method(apply=scale, equation="h + (c - 1)·f·d", unit="factor", no_op=1.0, reads="feature"),
    "ablate-feature": Method(apply=ablate_feature, equation="h - f·d", unit=None, no_op=None, reads="feature"),
    "ablate-direction": Method(apply=ablate_direction, equation="h - (h·u)u", unit=None, no_op=None),
    "orthogonal": Method(apply=orthogonal, equation="h + (c - 1)(h·u)u", unit="factor", no_op=1.0),
    "projection-set": Method(
        apply=projection_set, equation="h + (c - h·u)u", unit="residual", no_op=None, signed=True
    ),
    "projection-cap": Method(
        apply=projection_cap, equation="h + (min(h·u, c) - h·u)u", unit="residual", no_op=_FAR
    ),
    "projection-floor": Method(
        apply=projection_floor, equation="h + (max(h·u, c) - h·u)u", unit="residual", no_op=-_FAR
    ),
    "reconstruct": Method(
        apply=reconstruct, equation="dec(f with f_i·c)", unit="factor", no_op=None, reads="sae"
    ),
}  # fmt: skip
"""Name → method. The table and these functions are all there is to add for another one."""


def _wide(h: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """All in h's dtype, or in float32 where that is narrower."""
    x = h.to(torch.promote_types(h.dtype, torch.float32))
    return x, *(other.to(x) for other in others)


def _moved(h: Tensor, change: Tensor) -> Tensor:
    return h + change.to(h.dtype)


def _norm(x: Tensor) -> Tensor:
    return x.norm(dim=-1, keepdim=True)


def _unit(d: Tensor) -> Tensor:
    return d / _norm(d)


def _along(x: Tensor, d: Tensor) -> Tensor:
    """h·u, the signed length of the projection."""
    return (x * _unit(d)).sum(dim=-1, keepdim=True)

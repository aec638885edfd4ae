"""Dose and response: what each strength does to the target and to the text, and the strength that one would take."""

from collections.abc import Sequence
from dataclasses import dataclass

from mistudio.errors import ConfigError
from mistudio.steer.effects import Interval


@dataclass(frozen=True, kw_only=True)
class Dose:
    """One strength. Both numbers are differences from the unsteered arm, paired by seed."""

    strength: float
    """Of the first push, as given."""

    response: Interval
    """Rise of what is aimed at: the share of the given words, else the target's activation."""

    ce_rise: Interval
    """Rise in cross-entropy under the unsteered model, nats/token: the price."""


@dataclass(frozen=True, kw_only=True)
class DoseResponse:
    """A sweep of strengths."""

    measure: str
    """What `response` is."""

    doses: list[Dose]
    """By strength, ascending."""

    ce_bound: float
    """The rise in cross-entropy that one would put up with, nats/token."""

    recommended: float | None
    """The largest strength before the price first passes the bound; None: even the smallest one does."""


def check_strengths(strengths: Sequence[float]) -> None:
    """ConfigError: there are none, one comes twice, or they lie on both sides of 0."""
    if not strengths or min(strengths) < 0 < max(strengths) or len(set(strengths)) < len(strengths):
        raise ConfigError("A sweep wants different strengths of one sign, such as 0, 10, 20, 40, 80.")


def dose_response(doses: Sequence[Dose], *, measure: str, ce_bound: float) -> DoseResponse:
    """The sweep, with its recommendation. ConfigError: no doses, or strengths on both sides of 0.

    Too strong a push makes loops, whose cross-entropy is low again; so a strength counts as within the bound only if
    all smaller ones are.
    """
    check_strengths([dose.strength for dose in doses])
    recommended = None
    for dose in sorted(doses, key=lambda dose: abs(dose.strength)):
        if dose.ce_rise.mean > ce_bound:
            break
        recommended = dose.strength
    ordered = sorted(doses, key=lambda dose: dose.strength)
    return DoseResponse(measure=measure, doses=ordered, ce_bound=ce_bound, recommended=recommended)

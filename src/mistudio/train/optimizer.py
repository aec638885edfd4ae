"""Adam without a first moment (β₁ = 0), dense or row by row, and the constraint that decoder rows have norm 1.

Gemma Scope uses β = (0, 0.999); dropping the first moment then saves a third of the optimiser's memory. The arithmetic
is `torch.optim.Adam`'s (a test compares them), in the parameters' dtype, float32.

It has a second use. Where a row's gradient is 0, so is its update, and its second moment only decays: so a row may be
left alone until it is touched again, after n steps, and then its moment be multiplied by β₂ⁿ. That is the same
algorithm, not an approximation (β₁ > 0 or weight decay would end that). `row_steps` says up to which step each row has
decayed; a dense update first brings all rows up to date.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mistudio.mesh import SOLO, Mesh

FEATURE_AXIS = {"W_enc": 1, "W_dec": 0}
"""The parameters that have a row for each feature, and along which axis features lie."""
SHARED = ("b_dec", "W_skip")
"""The parameters that belong to no feature."""

PIECE_NUMBERS = 1 << 24
"""Numbers of a weight matrix that are updated at once: 64 MB in float32."""


class Adam:
    """p ← p - lr · g / (√(v / (1 - β₂ᵗ)) + eps) with v ← β₂·v + (1 - β₂)·g²."""

    def __init__(self, parameters: Mapping[str, Tensor], beta2: float, eps: float, vector_lr: float = 1.0):
        """`vector_lr`: what the learning rate of parameters with one axis is multiplied by."""
        self.parameters, self.beta2, self.eps, self.vector_lr = parameters, beta2, eps, vector_lr
        self.second = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.steps = 0
        by_feature = [p.shape[FEATURE_AXIS[name]] for name, p in parameters.items() if name in FEATURE_AXIS]
        device = next(iter(parameters.values())).device
        self.row_steps = torch.zeros(max(by_feature, default=0), dtype=torch.int64, device=device)
        """For each feature, the step up to which the second moments of its rows have decayed."""
        self.behind = False
        """Whether any of row_steps may be less than `steps`."""

    @torch.no_grad()
    def update(self, gradients: Mapping[str, Tensor], lr: float) -> None:
        """One step of the parameters in `gradients`, in place; rows by feature that are not in it keep their clock."""
        if set(gradients) & set(FEATURE_AXIS):
            self.catch_up()
            self.row_steps += 1
        self.steps += 1
        correction = math.sqrt(1 - self.beta2**self.steps)
        for name, gradient in gradients.items():
            whole = (self.parameters[name].detach(), self.second[name], gradient)
            step = lr if gradient.ndim > 1 else lr * self.vector_lr
            for p, v, g in _pieces(FEATURE_AXIS.get(name, 0), *whole):
                v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
                p.addcdiv_(g, v.sqrt().div_(correction).add_(self.eps), value=-step)

    def rows(self, name: str) -> tuple[Float[Tensor, "F D"], Float[Tensor, "F D"]]:
        """A parameter and its second moment with features first: views."""
        axis = FEATURE_AXIS[name]
        return self.parameters[name].detach().movedim(axis, 0), self.second[name].movedim(axis, 0)

    def row_decay(self) -> Float[Tensor, " F"]:
        """β₂ⁿ of every feature, n = the coming step less row_steps; in the parameters' dtype, computed in float64."""
        dtype = next(iter(self.parameters.values())).dtype
        return (self.beta2 ** (self.steps + 1 - self.row_steps).double()).to(dtype)

    @torch.no_grad()
    def update_rows(self, features: Int[Tensor, " n"], gradients: Mapping[str, Tensor], lr: float) -> None:
        """The coming step of the rows of these features, in place, before `update` takes it for the vectors; gradients
        [n, D] or [n, E] in their order."""
        decay, correction = self.row_decay()[features, None], math.sqrt(1 - self.beta2 ** (self.steps + 1))
        for name, g in gradients.items():
            p, v = self.rows(name)
            second = (v[features] * decay).addcmul_(g, g, value=1 - self.beta2)
            v[features] = second
            p[features] = p[features].addcdiv_(g, second.sqrt().div_(correction).add_(self.eps), value=-lr)
        self.mark(features)

    def mark(self, features: Int[Tensor, " n"] | Bool[Tensor, " F"]) -> None:
        """The rows of these features have taken the coming step."""
        self.row_steps[features] = self.steps + 1
        self.behind = True

    @torch.no_grad()
    def catch_up(self) -> None:
        """Every second moment is decayed up to the last step."""
        if not self.behind:
            return
        factor = self.beta2 ** (self.steps - self.row_steps).double()
        for name in FEATURE_AXIS:
            v = self.rows(name)[1]
            v.mul_(factor.to(v.dtype)[:, None])
        self.row_steps.fill_(self.steps)
        self.behind = False


@torch.no_grad()
def remove_parallel_(gradient: Float[Tensor, "F D"], W_dec: Float[Tensor, "F D"]) -> None:
    """In place: each row of the gradient loses its component along the decoder row, which renormalising would undo
    anyway."""
    for g, W in _pieces(0, gradient, W_dec):
        along = (g * W).sum(1, keepdim=True) / W.square().sum(1, keepdim=True)
        g.addcmul_(along, W, value=-1)


@torch.no_grad()
def normalise_rows_(W_dec: Float[Tensor, "F D"]) -> None:
    """In place: each decoder row is divided by its norm."""
    W_dec.div_(W_dec.norm(dim=1, keepdim=True))


def _pieces(axis: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, of one shape, some million numbers at a time, so that what is computed on the way stays small."""
    size = tensors[0].shape[axis]
    part = max(1, PIECE_NUMBERS * size // max(1, tensors[0].numel()))
    return zip(*(tensor.split(part, axis) for tensor in tensors), strict=True)


def clip_factor(
    gradients: Iterable[Tensor], clip_norm: float, mesh: Mesh = SOLO, shared: Iterable[Tensor] = ()
) -> Float[Tensor, ""]:
    """What gradients are multiplied by so that their norm, over all of them together, is at most `clip_norm`.

    On a mesh `gradients` are of this process's features; `shared` are those that all processes have.
    """
    norm = torch.stack([torch.linalg.vector_norm(g) for g in gradients]).norm()
    if mesh.features > 1:
        norm = mesh.sum_features(norm.square()).sqrt()
    whole = torch.stack([norm, *(torch.linalg.vector_norm(g) for g in shared)]).norm()
    return (clip_norm / whole).clamp(max=1)

"""Adam, dense or row by row, and the constraint that decoder rows have norm 1.

Gemma Scope uses β = (0, 0.999); dropping the first moment then saves a third of the optimiser's memory. The arithmetic
is `torch.optim.Adam`'s (a test compares them), in the parameters' dtype, float32.

It has a second use. Where a row's gradient is 0, so is its update, and its second moment only decays: so a row may be
left alone until it is touched again, after n steps, and then its moment be multiplied by β₂ⁿ. That is the same
algorithm, not an approximation. `row_steps` says up to which step each row has decayed; a dense update first brings all
rows up to date.

With β₁ > 0 a row would move on without a gradient. There, as in `torch.optim.SparseAdam`, a step leaves the weights and
both moments of a row without a gradient as they are, whichever way the step is computed (a test compares them). The
corrections for moments that began at 0 go by the number of all steps.
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
    """p ← p - lr · m / (1 - β₁ᵗ) / (√(v / (1 - β₂ᵗ)) + eps) with m ← β₁·m + (1 - β₁)·g and v ← β₂·v + (1 - β₂)·g²."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        beta2: float,
        eps: float,
        vector_lr: float = 1.0,
        beta1: float = 0.0,
        matrix_lr: float = 1.0,
    ):
        """vector_lr, matrix_lr: what the learning rate of parameters with one and with two axes is multiplied by."""
        self.parameters, self.beta2, self.eps, self.vector_lr, self.beta1 = parameters, beta2, eps, vector_lr, beta1
        self.matrix_lr, self._betas = matrix_lr, (beta1, beta2)
        self.second = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.first = {name: torch.zeros_like(p) for name, p in parameters.items()} if beta1 > 0 else {}
        """Empty where β₁ = 0: the first moment is then the gradient."""
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
        on = None
        if set(gradients) & set(FEATURE_AXIS):
            if self.first:
                on = with_gradient(*(gradients[name].movedim(axis, 0) for name, axis in FEATURE_AXIS.items()))
            else:
                self.catch_up()
                self.row_steps += 1
        self.steps += 1
        correction, unbias = math.sqrt(1 - self.beta2**self.steps), 1 - self.beta1**self.steps
        for name, gradient in gradients.items():
            axis = FEATURE_AXIS.get(name, 0)
            whole = [self.parameters[name].detach(), self.second[name], gradient]
            step = lr * (self.matrix_lr if gradient.ndim > 1 else self.vector_lr) / unbias
            if self.first:
                whole.append(self.first[name])
                if on is not None and name in FEATURE_AXIS:
                    whole.append(on.unsqueeze(1 - axis))
            for p, v, g, *more in _pieces(axis, *whole):
                moved = self._moments(v, g, *more)
                p.addcdiv_(moved, v.sqrt().div_(correction).add_(self.eps), value=-step)

    def _moments(self, v: Tensor, g: Tensor, m: Tensor | None = None, on: Tensor | None = None) -> Tensor:
        """The first moment, after both took in the gradient; `on`: where not, they stay, and 0 is returned."""
        beta1, beta2 = (b if on is None else torch.where(on, torch.full_like(v[:1, :1], b), 1.0) for b in self._betas)
        v.mul_(beta2).addcmul_(g, g, value=1 - self.beta2)
        if m is None:
            return g
        m.mul_(beta1).add_(g, alpha=1 - self.beta1)
        return m if on is None else m * on

    def rows(self, name: str) -> tuple[Float[Tensor, "F D"], Float[Tensor, "F D"]]:
        """A parameter and its second moment with features first: views."""
        axis = FEATURE_AXIS[name]
        return self.parameters[name].detach().movedim(axis, 0), self.second[name].movedim(axis, 0)

    def first_rows(self, name: str) -> Float[Tensor, "F D"] | None:
        """The first moment with features first, a view; None where β₁ = 0."""
        return self.first[name].movedim(FEATURE_AXIS[name], 0) if self.first else None

    def row_decay(self) -> Float[Tensor, " F"]:
        """β₂ⁿ of every feature, n = the coming step less row_steps, or 1 where β₁ > 0; in the parameters' dtype,
        computed in float64."""
        dtype = next(iter(self.parameters.values())).dtype
        if self.first:
            return torch.full(self.row_steps.shape, self.beta2, dtype=dtype, device=self.row_steps.device)
        return (self.beta2 ** (self.steps + 1 - self.row_steps).double()).to(dtype)

    @torch.no_grad()
    def update_rows(self, features: Int[Tensor, " n"], gradients: Mapping[str, Tensor], lr: float) -> None:
        """The coming step of the rows of these features, in place, before `update` takes it for the vectors; gradients
        [n, D] or [n, E] in their order."""
        decay, correction = self.row_decay()[features, None], math.sqrt(1 - self.beta2 ** (self.steps + 1))
        unbias = 1 - self.beta1 ** (self.steps + 1)
        for name, g in gradients.items():
            (p, v), m = self.rows(name), self.first_rows(name)
            second = (v[features] * decay).addcmul_(g, g, value=1 - self.beta2)
            v[features] = second
            if m is not None:
                g = m[features].lerp_(g, 1 - self.beta1)
                m[features] = g
            p[features] = p[features].addcdiv_(
                g, second.sqrt().div_(correction).add_(self.eps), value=-lr * self.matrix_lr / unbias
            )
        self.mark(features)

    def mark(self, features: Int[Tensor, " n"] | Bool[Tensor, " F"]) -> None:
        """The rows of these features have taken the coming step."""
        if self.first:
            return
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


def with_gradient(*gradients: Float[Tensor, "F _"]) -> Bool[Tensor, " F"]:
    """The features with a gradient, given with features first, that is not 0. Copies no matrix, waits for no GPU."""
    return torch.stack([torch.linalg.vector_norm(g, math.inf, dim=1) != 0 for g in gradients]).any(0)


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

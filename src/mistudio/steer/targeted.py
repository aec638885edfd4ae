"""SAE-targeted vectors (SAE-TS, arXiv 2411.02193): a direction made for its effect, not taken from a decoder row.

What steering by a vector x does to the features of the text that follows is nearly linear in x:

    y(x) = x·M + b        y [F]: mean activations of the written tokens, re-read by the unsteered model

M [D, F] and b [F] are fitted by ridge regression to texts written under many directions of one length. The direction
that raises feature j, and little else, is then

    v_j = M_j/‖M_j‖ - λ·Mb/‖Mb‖, of length 1

where Mb is the direction that raises what texts raise anyway. How well the map holds is measured on directions that
were not fitted: `r2`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mistudio.errors import ConfigError, SAEError
from mistudio.files import write_tensors
from mistudio.lm import Site
from mistudio.steer.arms import Arm, write_arms
from mistudio.steer.lab import Lab
from mistudio.steer.measures import read_again
from mistudio.steer.push import Push

FORMAT = "mistudio.effects/1"
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Penalties tried, in units of the mean squared size of a direction's entries times their number."""
HELD_OUT = 5
"""Of so many directions one chooses the penalty and one measures the fit; the rest are fitted."""


@dataclass(frozen=True, kw_only=True)
class Effects:
    """The fitted map from a steering vector to the mean features of the text it leads to."""

    M: Float[Tensor, "D F"]
    b: Float[Tensor, " F"]
    length: float
    """‖x‖ of the directions that were tried, residual units."""
    r2: float
    """On directions held out: 1 - Σ‖y - xM - b‖² / Σ‖y - mean of the fitted y‖². 0: no better than the mean."""

    def vector(self, feature: int, *, penalty: float = 1.0) -> Float[Tensor, " D"]:
        """v of that feature, of length 1; `penalty` is λ. SAEError: no such feature. ConfigError: it had no effect."""
        if not 0 <= feature < self.M.shape[1]:
            raise SAEError(f"There is no feature {feature}; these effects are of 0 to {self.M.shape[1] - 1}.")
        M, b = self.M.double(), self.b.double()
        aim, common = M[:, feature], M @ b
        if float(aim.norm()) == 0:
            raise ConfigError(f"No direction that was tried raised feature {feature}, so none can be made for it.")
        v = aim / aim.norm()
        if float(common.norm()) > 0:
            v = v - penalty * common / common.norm()
        return (v / v.norm()).float()

    def save(self, path: Path) -> Path:
        """The path of the file."""
        numbers = torch.tensor([self.length, self.r2], dtype=torch.float64)
        write_tensors(path, {"M": self.M, "b": self.b, "numbers": numbers}, {"format": FORMAT})
        return path

    @classmethod
    def load(cls, path: Path) -> "Effects":
        """The map that `save` wrote. ConfigError: the file is none."""
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("format") != FORMAT:
                    raise ConfigError(f"{path} is no file of effects (format {FORMAT}); make it with steer-vector.")
                M, b, numbers = (file.get_tensor(name) for name in ("M", "b", "numbers"))
        except (SafetensorError, OSError, ValueError) as error:
            raise ConfigError(f"{path} does not read as a file of effects: {error}.") from error
        return cls(M=M, b=b, length=float(numbers[0]), r2=float(numbers[1]))


@torch.no_grad()
def fit_effects(
    lab: Lab,
    site: Site,
    prompts: Sequence[str],
    *,
    length: float,
    directions: int = 400,
    max_new_tokens: int = 32,
    temperature: float = 0.7,
    seed: int = 0,
) -> Effects:
    """The effects of directions at `site` of that length, half of them decoder rows of live features, half random.

    Writes one text for each direction and prompt. ConfigError: too few directions, or no prompt.
    """
    if directions < 2 * HELD_OUT or not prompts:
        raise ConfigError(f"Effects need at least {2 * HELD_OUT} directions and one prompt, not {directions}.")
    X = length * _directions(lab, site, directions, seed)
    vectors = {f"x{n}": x for n, x in enumerate(X)}
    trial = replace(lab, vectors=vectors)
    arms = [Arm(name=name, pushes=((Push(vector=name, strength=1.0, site=str(site)),),)) for name in vectors]
    rows = write_arms(trial, prompts, arms, seeds=[seed], max_new_tokens=max_new_tokens, temperature=temperature)
    read = read_again(trial, prompts, rows, site=site)
    number = {name: n for n, name in enumerate(vectors)}
    Y = torch.zeros(len(X), trial.sae(site).config.d_sae, dtype=torch.float64)
    for row, found in zip(rows, read, strict=True):
        Y[number[row.arm]] += found.features.double() / len(prompts)
    return fitted(X, Y, length=length)


def fitted(X: Float[Tensor, "n D"], Y: Float[Tensor, "n F"], *, length: float) -> Effects:
    """The ridge regression of Y on X; its penalty is chosen, and r2 measured, on directions that are not fitted.

    The held-out directions are halved: one half chooses the penalty, the other gives r2.
    """
    X, Y = X.double(), Y.double()
    index = torch.arange(len(X))
    choosing, testing = index % HELD_OUT == 0, index % HELD_OUT == 1
    fitting = ~(choosing | testing)
    maps = [_ridge(X[fitting], Y[fitting], ridge) for ridge in RIDGES]
    mean = Y[fitting].mean(0)
    M, b = max(maps, key=lambda found: _r2(X[choosing], Y[choosing], found[0], found[1], mean))
    r2 = _r2(X[testing], Y[testing], M, b, mean)
    return Effects(M=M.float(), b=b.float(), length=length, r2=r2)


def _ridge(X: Tensor, Y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    x, y = X.mean(0), Y.mean(0)
    Z = X - x
    penalty = ridge * len(X) * X.square().mean() * torch.eye(X.shape[1], dtype=X.dtype)
    M = torch.linalg.solve(Z.T @ Z + penalty, Z.T @ (Y - y))
    return M, y - x @ M


def _r2(X: Tensor, Y: Tensor, M: Tensor, b: Tensor, mean: Tensor) -> float:
    """1 - the error of the map over that of the mean of what was fitted."""
    total = float((Y - mean).square().sum())
    return 1 - float((Y - X @ M - b).square().sum()) / total if total else 0.0


def _directions(lab: Lab, site: Site, n: int, seed: int) -> Float[Tensor, "n D"]:
    """Unit vectors: decoder rows of live features, drawn without replacement, then random ones; shuffled together."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = lab.sae(site).W_dec.detach().float().cpu()
    live = torch.arange(len(W_dec)) if site not in lab.known else (lab.known[site].maxima > 0).nonzero()[:, 0].cpu()
    rows = W_dec[live[torch.randperm(len(live), generator=generator)[: n // 2]]]
    random = torch.randn(n - len(rows), W_dec.shape[1], generator=generator)
    X = torch.cat([rows, random])
    X /= X.norm(dim=1, keepdim=True)
    return X[torch.randperm(n, generator=generator)]

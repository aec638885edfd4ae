"""`mistudio steer-vector`: a direction of one's own, from texts or from what steering was seen to do, in a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import RenderableType

from mistudio.errors import ConfigError
from mistudio.steer import (
    SUFFIXES,
    Effects,
    fit_effects,
    mean_difference,
    principal_direction,
    prompt_norm,
    write_vectors,
)
from mistudio.studio.steer_lab import load_lab
from mistudio.studio.workspace import refuse_unwritable


@dataclass(frozen=True, kw_only=True)
class Config:
    """Either two files of texts, or a feature that the vector should raise."""

    sae: Path
    """Folder of an SAE: it says the model and the site, and names the target feature."""
    out: Path
    """File of the vector: .safetensors, .npz or .gguf."""
    positive: Path | None = None
    """Texts that have what the vector should add, one a line."""
    negative: Path | None = None
    """Texts that have it not, one a line; for --how pca line by line the counterparts of the others."""
    how: Literal["difference", "pca"] = "difference"
    """difference: the mean over positive texts less that over negative ones. pca: the first principal direction of
    the pairs' differences, of length 1."""
    target: int | None = None
    """Instead of texts, a feature to raise: SAE-TS (arXiv 2411.02193)."""
    effects: Path | None = None
    """With target: the file of fitted effects; made if it is not there, which takes minutes, and used again."""
    directions: int = 400
    """With target: directions tried for the fit. More than the model's width are needed for a good one."""
    prompt: tuple[str, ...] = ("Once upon a time",)
    """With target: beginnings that texts are written from."""
    penalty: float = 1.0
    """With target: how much of the common effect is taken off (lambda)."""
    model: str | None = None
    """Language model; None: the one the SAE was trained on."""

    def __post_init__(self) -> None:
        from_texts = self.positive is not None and self.negative is not None
        if from_texts == (self.target is not None):
            raise ConfigError("Give either --positive FILE --negative FILE, or --target FEATURE --effects FILE.")
        if self.target is not None and self.effects is None:
            raise ConfigError("--target needs a file for the fitted effects: --effects effects.safetensors.")
        if self.out.suffix not in SUFFIXES:
            raise ConfigError(f"--out {self.out} has none of the endings {', '.join(SUFFIXES)}.")


@dataclass(frozen=True, kw_only=True)
class Result:
    """The vector."""

    out: str
    """Its file."""
    sae: str
    """The SAE's folder."""
    site: str
    """Where it is added."""
    norm: float
    """Its length, residual units."""
    residual_norm: float | None
    """Mean norm of the residual there over the first prompt or text."""
    r2: float | None
    """With target: how much of the effects of unseen directions the fit explains."""


def run(config: Config) -> Result:
    """Makes the vector and writes it. ConfigError: a file cannot be read or written, or the vector is zero."""
    refuse_unwritable(config.out, config.effects)
    lab, site = load_lab(config.sae, config.model)
    r2 = None
    if config.target is not None:
        assert config.effects is not None
        lab.sae(site).feature(config.target)
        sample = config.prompt[0]
        norm = prompt_norm(lab.lm, site, sample) or 1.0
        if config.effects.exists():
            effects = Effects.load(config.effects)
        else:
            effects = fit_effects(lab, site, config.prompt, length=norm / 2, directions=config.directions)
            effects.save(config.effects)
        vector, r2 = effects.vector(config.target, penalty=config.penalty), effects.r2
    else:
        assert config.positive is not None
        assert config.negative is not None
        positive, negative = _lines(config.positive), _lines(config.negative)
        make = mean_difference if config.how == "difference" else principal_direction
        vector, sample = make(lab.lm, site, positive, negative), positive[0]
        if not bool(vector.any()):
            raise ConfigError(f"{config.positive} and {config.negative} give the same activations, so no direction.")
    write_vectors(config.out, {site: vector}, model=lab.lm.name)
    return Result(
        out=str(config.out),
        sae=str(config.sae),
        site=str(site),
        norm=float(vector.norm()),
        residual_norm=prompt_norm(lab.lm, site, sample),
        r2=r2,
    )


def show(result: Result) -> RenderableType:
    """Where it is, how long, and the command that steers by it."""
    against = "" if result.residual_norm is None else f"; the residual's mean norm is {result.residual_norm:.3g}"
    fit = "" if result.r2 is None else f"\nThe effects explain {result.r2:.1%} of those of directions not fitted (R2)."
    strength = 1 if result.residual_norm is None else round(result.residual_norm / 2 / result.norm, 2)
    return (
        f"{result.out}: a vector for {result.site} of length {result.norm:.3g}{against}.{fit}\n"
        f'Next: mistudio steer "Once upon a time" --sae {result.sae} --vector {result.out} --strength {strength}'
    )


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ConfigError(f"There is no file {path}.")
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"{path} holds no texts; write one a line.")
    return lines

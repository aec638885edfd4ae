"""What an evaluation found: `EvalReport`, the numbers of an SAE as a whole, and `FeatureStats`, those of each feature.

Both are saved beside the SAE: `evaluation.json` and `feature_stats.safetensors`. Reading is strict.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mistudio import config
from mistudio.errors import SAEError
from mistudio.files import write_json, write_tensors
from mistudio.metrics import FeatureSums

REPORT_FILE = "evaluation.json"
STATS_FILE = "feature_stats.safetensors"
STATS_FORMAT = "mistudio.feature_stats.1"
DENSE_ABOVE = 0.1
_STATS_DTYPES = {"count": torch.int64, "mean": torch.float32, "max": torch.float32}


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """The numbers of one SAE on held-out text. Activations are in raw units; losses in nats per predicted token.

    BOS, EOS and PAD positions count neither for L0, FVU and the features, nor are they touched by any intervention.
    """

    model: str
    """Language model."""

    site: str
    """Where in the model the activations were read and replaced."""

    rows: int
    """Rows of tokens read."""

    tokens: int
    """Positions behind l0, fvu and the feature statistics: all but BOS, EOS and PAD."""

    predictions: int
    """Predictions behind the losses: those of any token but BOS and PAD, from any position before it, BOS included."""

    n_features: int
    """Features of the SAE."""

    l0: float
    """Mean number of features active on a token."""

    fvu: float
    """E‖x − x_hat‖² / E‖x − E[x]‖², E[x] the mean over all evaluated tokens: 0 is exact, 1 no better than the mean."""

    loss_clean: float
    """Loss of the untouched model, nats/token."""

    loss_spliced: float
    """Loss with the SAE's reconstruction in place of the activations, nats/token."""

    delta_loss: float
    """loss_spliced − loss_clean, nats/token: what the reconstruction costs the model."""

    loss_zero: float
    """Loss with zeros in place of the activations, nats/token."""

    loss_mean: float
    """Loss with the mean of the evaluated activations in place of each of them, nats/token."""

    recovered_zero: float | None
    """(loss_zero − loss_spliced) / (loss_zero − loss_clean): 1 is lossless. None where zeros do not raise the loss."""

    recovered_mean: float | None
    """(loss_mean − loss_spliced) / (loss_mean − loss_clean), stricter. None where the mean does not raise the loss."""

    dead: int
    """Features that never fired on the evaluated tokens (on few tokens, rare features look dead)."""

    dead_fraction: float
    """dead / n_features."""

    dense: int
    """Features that fired on more than 10 % of the evaluated tokens."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = self.__dict__[field.name]
            if isinstance(value, float) and not math.isfinite(value):
                raise SAEError(
                    f"The evaluation at {self.site} came out with {field.name} = {value}, not a finite number."
                )

    def save(self, folder: Path) -> Path:
        """The path of the report's JSON file, written into `folder` (the SAE's)."""
        path = folder / REPORT_FILE
        write_json(path, config.to_dict(self))
        return path

    @classmethod
    def load(cls, folder: Path) -> "EvalReport":
        """The report saved in `folder`. ConfigError: there is none, or it is not one."""
        return config.load_file(cls, folder / REPORT_FILE)


@dataclass(frozen=True)
class FeatureStats:
    """What each feature did on the evaluated tokens; activations in raw units."""

    tokens: int
    """Positions seen: all but BOS, EOS and PAD."""

    count: Int[Tensor, " F"]
    """Tokens on which the feature fired, int64."""

    mean: Float[Tensor, " F"]
    """Mean activation over the tokens on which it fired, float32; 0 for a dead feature."""

    max: Float[Tensor, " F"]
    """Largest activation, float32; 0 for a dead feature."""

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise SAEError(f"These feature statistics cannot be right: {problem}.")

    @classmethod
    def of(cls, sums: FeatureSums) -> "FeatureStats":
        """The statistics behind the sums of a whole evaluation."""
        mean = torch.minimum(sums.mean_active.to(torch.float32), sums.max)  # a mean rounded up may pass the maximum
        return cls(tokens=sums.tokens, count=sums.count, mean=mean, max=sums.max)

    @property
    def n_features(self) -> int:
        """F."""
        return self.count.shape[0]

    @property
    def density(self) -> Float[Tensor, " F"]:
        """Share of the tokens on which each feature fires, float64, in [0, 1]."""
        return self.count.to(torch.float64) / self.tokens

    def save(self, folder: Path) -> Path:
        """The path of the safetensors file, written into `folder` (the SAE's)."""
        path = folder / STATS_FILE
        tensors = {"count": self.count, "mean": self.mean, "max": self.max}
        write_tensors(path, tensors, {"format": STATS_FORMAT, "tokens": str(self.tokens)})
        return path

    @classmethod
    def load(cls, folder: Path) -> "FeatureStats":
        """The statistics saved in `folder`. SAEError: there are none, or the file is not exactly what `save` writes."""
        path = folder / STATS_FILE
        if not path.is_file():
            raise SAEError(f"There is no {path}, so this SAE has not been evaluated. Write it with `mistudio eval`.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise SAEError(f"{path} is not a whole safetensors file: {error}.") from error
        found = {name: tensor.dtype for name, tensor in tensors.items()}
        if metadata.get("format") != STATS_FORMAT or found != _STATS_DTYPES:
            raise SAEError(
                f"{path} holds {found} in format {metadata.get('format')!r}, not {_STATS_DTYPES} in {STATS_FORMAT!r}. "
                "Write it again with `mistudio eval`."
            )
        shapes = {tuple(tensor.shape) for tensor in tensors.values()}
        if len(shapes) != 1 or tensors["count"].ndim != 1:
            raise SAEError(f"{path} holds tensors of the shapes {sorted(shapes)}, not all of one shape [F].")
        if not metadata.get("tokens", "").isdecimal():
            raise SAEError(f"{path} says tokens = {metadata.get('tokens')!r}, not a whole number.")
        return cls(tokens=int(metadata["tokens"]), **tensors)


def _problem(stats: FeatureStats) -> str | None:
    """What makes the statistics impossible, or None."""
    if stats.tokens < 1:
        return f"they are over {stats.tokens} tokens"
    if bool(((stats.count < 0) | (stats.count > stats.tokens)).any()):
        return f"a feature fired on fewer than 0 or more than all {stats.tokens} tokens"
    if not bool((stats.mean.isfinite() & stats.max.isfinite()).all()):
        return "a mean or a maximum is not finite"
    if bool(((stats.mean < 0) | (stats.mean > stats.max)).any()):
        return "a mean lies outside 0 … maximum"
    return None

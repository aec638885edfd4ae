"""The JumpReLU SAE: f = JumpReLU_θ(x·W_enc + b_enc), x̂ = f·W_dec + b_dec, in Gemma Scope's released orientation.

An SAE has two forms. In the *training form* it reads normalised rows x/C with E‖x/C‖² = 1, may subtract b_dec before
the encoder and may hold log θ. In the *released form* it reads raw activations and needs none of these. `fold` goes
from the first to the second (Gemma Scope report, appendix A) and `save` writes only the second, so that a file on disk
has one meaning. The weights of a run that is still training are in its checkpoints.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mistudio.config import from_dict, to_dict
from mistudio.errors import ConfigError, SAEError
from mistudio.files import read_json, write_json, write_tensors
from mistudio.sae.base import SAE, UNIT_ROW_TOLERANCE, SAEConfig, check_weights
from mistudio.sae.gemma_scope import read_weights

FORMAT, VERSION = "mistudio-sae", 1
DRAWN_AT_ONCE = 1 << 14
"""Rows of first weights."""


def initial_weights(
    config: SAEConfig, *, seed: int = 0, threshold: float = 0.001, part: slice | None = None
) -> dict[str, Tensor]:
    """Gemma Scope's starting point in float32: He-uniform decoder rows rescaled to norm 1, W_enc = W_decᵀ (untied),
    biases 0.

    He's bound is lost in the rescaling, so the rows are drawn from U(-1, 1). `part`: of these features alone, the same
    numbers; the others are never in memory together.
    """
    W_dec = unit_rows(config.d_sae, config.d_model, torch.Generator().manual_seed(seed), part)
    return {
        "W_enc": W_dec.T.clone(memory_format=torch.contiguous_format),
        "b_enc": torch.zeros(len(W_dec)),
        "theta": torch.full((len(W_dec),), math.log(threshold) if config.log_threshold else threshold),
        "W_dec": W_dec,
        "b_dec": torch.zeros(config.d_model),
    }


def unit_rows(
    count: int, width: int, generator: torch.Generator, part: slice | None = None
) -> Float[Tensor, "n width"]:
    """Rows of norm 1 in directions drawn from U(-1, 1): of `count` that are drawn, those in `part`; None: all."""
    wanted = range(count)[part or slice(None)]
    rows = torch.empty(len(wanted), width)
    for first in range(0, count, DRAWN_AT_ONCE):
        last = min(first + DRAWN_AT_ONCE, count)
        drawn = torch.empty(last - first, width).uniform_(-1, 1, generator=generator)
        lo, hi = max(first, wanted.start), min(last, wanted.stop)
        if lo < hi:
            rows[lo - wanted.start : hi - wanted.start] = drawn[lo - first : hi - first]
    return rows.div_(rows.norm(dim=1, keepdim=True))


class JumpReLUSAE(SAE):
    """A JumpReLU SAE; calling it gives (x̂, f).

    Parameters: W_enc [D, F], b_enc [F], theta [F] (threshold or its logarithm), W_dec [F, D], b_dec [D].
    Computes in the parameters' dtype and never below float32, whatever x's dtype is, because a threshold is a fine
    comparison; x̂ comes back in x's dtype and f in the dtype of the computation. This is inference: no gradient reaches
    theta here, since its pseudo-derivative belongs to a loss (`mistudio.train.loss`).
    """

    Config = SAEConfig

    def __init__(self, config: SAEConfig, weights: Mapping[str, Tensor] | None = None):
        """`weights`: the five tensors, by name; None: `initial_weights(config)`. SAEError: a name or shape is wrong."""
        super().__init__()
        weights = initial_weights(config) if weights is None else weights
        check_weights(config, weights)
        self.config = config
        self.W_enc = nn.Parameter(weights["W_enc"])
        self.b_enc = nn.Parameter(weights["b_enc"])
        self.theta = nn.Parameter(weights["theta"])
        self.W_dec = nn.Parameter(weights["W_dec"])
        self.b_dec = nn.Parameter(weights["b_dec"])

    @property
    def threshold(self) -> Float[Tensor, " F"]:
        """θ, in the units of the pre-activations."""
        return self.theta.exp() if self.config.log_threshold else self.theta

    def encoder_bias(self) -> Float[Tensor, " F"]:
        """What is added to x·W_enc: b_enc, or b_enc - b_dec·W_enc where the SAE has a pre-encoder bias.

        (x - b_dec)·W_enc in this form costs a vector product instead of a pass over x, forward and backward.
        """
        return self.b_enc - self.b_dec @ self.W_enc if self.config.pre_encoder_bias else self.b_enc

    def pre_activations(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows F"]:
        """z = x·W_enc + encoder_bias, in float32 or the parameters' wider dtype."""
        dtype = torch.promote_types(self.W_enc.dtype, torch.float32)
        return x.to(dtype) @ self.W_enc.to(dtype) + self.encoder_bias()

    def encode(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows F"]:
        """Feature activations f: z where z > θ, else 0."""
        z = self.pre_activations(x)
        return torch.where(z > self.threshold, z, 0.0)

    def decode(self, f: Float[Tensor, "*rows F"]) -> Float[Tensor, "*rows D"]:
        """The reconstruction f·W_dec + b_dec."""
        return f @ self.W_dec.to(f.dtype) + self.b_dec

    def forward(self, x: Float[Tensor, "*rows D"]) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows F"]]:
        """(x̂, f)."""
        f = self.encode(x)
        return self.decode(f).to(x.dtype), f

    @torch.no_grad()
    def fold(self) -> "JumpReLUSAE":
        """The same SAE in released form: f and x̂ of raw x are C times those of x/C (computed in float64).

        b_enc' = C·b_enc - C·b_dec·W_enc, b_dec' = C·b_dec, θ' = C·θ, W_enc and W_dec as they were.
        """
        C = 1.0 if self.config.scale is None else self.config.scale
        b_enc, b_dec = self.b_enc.double(), self.b_dec.double()
        if self.config.pre_encoder_bias:
            b_enc = b_enc - b_dec @ self.W_enc.double()
        theta = self.theta.double().exp() if self.config.log_threshold else self.theta.double()
        weights = {"W_enc": self.W_enc, "b_enc": C * b_enc, "theta": C * theta, "W_dec": self.W_dec, "b_dec": C * b_dec}
        config = dataclasses.replace(self.config, pre_encoder_bias=False, log_threshold=False, scale=None)
        return JumpReLUSAE(config, {name: w.detach().to(self.W_enc.dtype, copy=True) for name, w in weights.items()})

    def save(self, folder: str | Path) -> None:
        """`folder` holds sae.safetensors (float32) and sae.json, which is written last. SAEError: not in released
        form."""
        if not self.folded:
            raise SAEError(
                "This SAE is in training form (normalised units); save its released form: sae.fold().save(...)."
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sae.json").unlink(missing_ok=True)
        tensors = {_FILE_NAMES[name]: tensor.float() for name, tensor in self.state_dict().items()}
        write_tensors(folder / "sae.safetensors", tensors)
        write_json(folder / "sae.json", {"format": FORMAT, "version": VERSION, "config": to_dict(self.config)})

    @torch.no_grad()
    def load_from_gemma_scope(self, params_path: str | Path) -> None:
        """Takes over the weights of a Gemma Scope params.npz. SAEError: they have other sizes, or are unsound.

        `mistudio.hub.load.load_sae` makes the SAE from the file instead, sizes and site included.
        """
        if not self.folded:
            raise SAEError("A params.npz holds released weights, in raw units; this SAE is in training form.")
        weights = read_weights(Path(params_path), self.W_enc.dtype)
        check_weights(self.config, weights)
        for name, parameter in self.named_parameters():
            parameter.copy_(weights[name])

    @staticmethod
    def load(folder: str | Path) -> "JumpReLUSAE":
        """The SAE that `save` wrote. SAEError: a file is missing or damaged, or does not hold a sound SAE."""
        folder = Path(folder)
        config = _read_config(folder)
        tensors = _read_tensors(folder / "sae.safetensors")
        if sorted(tensors) != sorted(_FILE_NAMES.values()):
            expected = ", ".join(_FILE_NAMES.values())
            raise SAEError(f"{folder}/sae.safetensors holds {', '.join(sorted(tensors))}; expected {expected}.")
        sae = JumpReLUSAE(config, {name: tensors[stored] for name, stored in _FILE_NAMES.items()})
        _check_sound(sae, f"{folder}/sae.safetensors")
        return sae


_FILE_NAMES = {"W_enc": "W_enc", "b_enc": "b_enc", "theta": "threshold", "W_dec": "W_dec", "b_dec": "b_dec"}


def _read_config(folder: Path) -> SAEConfig:
    path = folder / "sae.json"
    if not path.is_file():
        raise SAEError(f"{folder} holds no SAE: there is no {path.name}.")
    try:
        data = read_json(path)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise SAEError(f"{path} is not an SAE of mistudio (format {FORMAT!r}).")
        if data.get("version") != VERSION:
            raise SAEError(
                f"{path} has version {data.get('version')}; JumpReLU SAEs have version {VERSION}. Other architectures "
                "are read by mistudio.hub.formats.load_any."
            )
        if set(data) != {"format", "version", "config"}:
            raise SAEError(f"{path} is not an SAE of mistudio (format {FORMAT!r}): it holds {', '.join(data)}.")
        config = from_dict(SAEConfig, data["config"], source=str(path))
    except ConfigError as error:
        raise SAEError(str(error)) from error
    if config.scale is not None or config.pre_encoder_bias or config.log_threshold:
        raise SAEError(f"{path} says the weights are in training form; an SAE folder holds the released form only.")
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise SAEError(f"{path} is missing.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise SAEError(f"{path} is damaged: {error}") from error


def _check_sound(sae: JumpReLUSAE, place: str) -> None:
    for name, tensor in sae.state_dict().items():
        if tensor.dtype != torch.float32:
            raise SAEError(f"{place}: {_FILE_NAMES[name]} is {tensor.dtype}; expected torch.float32.")
        if not tensor.isfinite().all():
            raise SAEError(f"{place}: {_FILE_NAMES[name]} holds NaN or infinite values.")
    if not (sae.theta > 0).all():
        raise SAEError(f"{place}: {int((sae.theta <= 0).sum())} thresholds are not positive.")
    off = (sae.W_dec.norm(dim=1) - 1).abs().max().item()
    if off > UNIT_ROW_TOLERANCE:
        raise SAEError(f"{place}: decoder rows must have norm 1, one is off by {off:.3g}.")

"""SAELens: a folder with sae_weights.safetensors and cfg.json. Read as of any version, written as 6.54 writes it.

SAELens's matrices lie as ours. By default (`apply_b_dec_to_input`) it subtracts b_dec from x; that is folded into the
encoder's biases here, and what is written says false. What its run time does to every row (`layer_norm`,
`constant_norm_rescale`), or presumes was done by a factor that the folder does not hold, is refused.

| SAELens                                   | here       |                                                             |
|-------------------------------------------|------------|-------------------------------------------------------------|
| standard                                  | relu       |                                                             |
| topk                                      | topk       | `rescale_acts_by_decoder_norm` is folded into the weights   |
| jumprelu                                  | jumprelu   | a batchtopk is written as one, with F equal thresholds      |
| batchtopk, matryoshka_batchtopk           | batchtopk  | folders of training; SAELens releases them as jumprelu      |
| gated                                     | gated      |                                                             |
| transcoder, skip_transcoder               | transcoder | threshold 0; W_skip is stored [E, D], the transpose of ours |
| jumprelu_transcoder, jumprelu_skip_transcoder | transcoder |                                                         |

Before version 6 there was no `metadata`, TopK was an `activation_fn_str`, and there could be a `log_threshold`.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistudio.errors import ModelError, SAEError
from mistudio.files import write_json, write_tensors
from mistudio.hub.formats.reading import (
    Weights,
    at_hook,
    build,
    check_matrices,
    check_names,
    fold_b_dec,
    fold_row_norms,
    peek_object,
    read_object,
    read_tensors,
    refuse_unfolded,
    tensor_names,
)
from mistudio.lm.site import Site
from mistudio.sae import SAE, BatchTopKSAE, GatedSAE, JumpReLUSAE, ReLUSAE, TopKSAE, Transcoder

WEIGHTS_FILE, CONFIG_FILE = "sae_weights.safetensors", "cfg.json"
VERSION = "6.54.12"
"""The version whose layout is written; without one SAELens would take the folder for an old one."""

_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_JUMP, _SKIP = {"threshold": "theta"}, {"W_skip": "W_skip"}
_GATED = {name: name for name in ("W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec")}
_LAYOUTS: dict[str, tuple[str, dict[str, str]]] = {
    "standard": ("relu", _PLAIN),
    "topk": ("topk", _PLAIN),
    "jumprelu": ("jumprelu", _PLAIN | _JUMP),
    "batchtopk": ("batchtopk", _PLAIN | {"topk_threshold": "theta"}),
    "matryoshka_batchtopk": ("batchtopk", _PLAIN | {"topk_threshold": "theta"}),
    "gated": ("gated", _GATED),
    "transcoder": ("transcoder", _PLAIN),
    "skip_transcoder": ("transcoder", _PLAIN | _SKIP),
    "jumprelu_transcoder": ("transcoder", _PLAIN | _JUMP),
    "jumprelu_skip_transcoder": ("transcoder", _PLAIN | _JUMP | _SKIP),
}
"""SAELens's architecture → ours, and its tensors' names → ours."""

_OLD_KEYS = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
_HOOKS = {"ln2_normalized": "ln2.hook_normalized", "mlp_in": "hook_mlp_in"}
"""What transcoders read, which is no site: our name → SAELens's."""


def matches(path: Path) -> bool:
    """Whether this is a folder with SAELens's cfg.json and a sae_weights.safetensors that has W_enc and W_dec."""
    if not path.is_dir() or not {"d_in", "d_sae"} <= set(peek_object(path / CONFIG_FILE)):
        return False
    return {"W_enc", "W_dec"} <= tensor_names(path / WEIGHTS_FILE)


def load(path: Path, dtype: torch.dtype = torch.float32) -> SAE:
    """The SAE or transcoder in a folder of SAELens's, in released form; matrices in `dtype`.

    SAEError: an architecture or normalisation that is not read, or weights that do not fit cfg.json.
    """
    settings = _settings(path / CONFIG_FILE)
    name = settings["architecture"]
    architecture, layout = _LAYOUTS[name]
    stored = _stored(path, layout)
    weights = {ours: stored[theirs] for theirs, ours in layout.items()}
    fields = _fields(settings, weights, architecture)
    if architecture == "transcoder":
        weights.setdefault("theta", torch.zeros_like(weights["b_enc"]))
        if "W_skip" in weights:
            weights["W_skip"] = weights["W_skip"].T
    folds: list[Callable[[Weights], Weights]] = []
    if settings.get("apply_b_dec_to_input", True) and architecture != "transcoder":
        folds.append(fold_b_dec)
    if settings.get("rescale_acts_by_decoder_norm", False):
        folds.append(_fold_ranked_rows)
    return build(architecture, fields, weights, place=str(path), dtype=dtype, folds=folds)


def save(sae: SAE, path: Path) -> None:
    """Writes the folder `path`, cfg.json last, for SAELens to load. SAEError: the SAE is in training form."""
    refuse_unfolded(sae)
    architecture, weights = _exported(sae)
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG_FILE).unlink(missing_ok=True)
    write_tensors(path / WEIGHTS_FILE, {name: weight.float() for name, weight in weights.items()})
    hook = _saelens_hook(sae.config.hook_name)
    metadata: dict[str, Any] = {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": sae.config.model,
        "hook_name": hook,
        "hook_head_index": None,
        "prepend_bos": True,
    }
    settings: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if hook is not None and hook.endswith("hook_z") else "none",
        "metadata": metadata,
    }
    if isinstance(sae, TopKSAE):
        settings |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    if isinstance(sae, Transcoder):
        settings["d_out"] = sae.d_out
        metadata |= {"hook_name_out": _saelens_hook(sae.config.hook_name_out), "hook_head_index_out": None}
    write_json(path / CONFIG_FILE, settings)


def _exported(sae: SAE) -> tuple[str, dict[str, Tensor]]:
    """SAELens's architecture and tensors."""
    weights = {name: weight.detach() for name, weight in sae.named_parameters()}
    theta = weights.pop("theta", None)
    if isinstance(sae, ReLUSAE):
        return "standard", weights
    if isinstance(sae, TopKSAE):
        return "topk", weights
    if isinstance(sae, GatedSAE):
        return "gated", weights
    assert theta is not None
    if isinstance(sae, JumpReLUSAE | BatchTopKSAE):
        return "jumprelu", weights | {"threshold": theta.expand(sae.config.d_sae)}
    skip = {"W_skip": weights.pop("W_skip").T} if "W_skip" in weights else {}
    name = "skip_transcoder" if skip else "transcoder"
    if not bool(theta.any()):
        return name, weights | skip
    return f"jumprelu_{name}", weights | skip | {"threshold": theta}


def _settings(path: Path) -> dict[str, Any]:
    """cfg.json with `metadata` beside the rest and old keys renamed. SAEError: something that must not be ignored."""
    data = read_object(path)
    metadata = data.pop("metadata", {})
    data = (metadata if isinstance(metadata, dict) else {}) | data
    settings = {_OLD_KEYS.get(name, name): value for name, value in data.items()}
    activation = settings.get("activation_fn") or "relu"
    settings["architecture"] = settings.get("architecture") or "standard"
    if activation == "topk":
        keywords = settings.get("activation_fn_kwargs")
        settings |= {"architecture": "topk", "k": keywords.get("k") if isinstance(keywords, dict) else None}
    elif activation != "relu":
        raise SAEError(f"{path} has activation_fn {activation!r}; relu and topk are read.")
    if settings["architecture"] not in list(_LAYOUTS):
        raise SAEError(f"{path} has the architecture {settings['architecture']!r}; read are {', '.join(_LAYOUTS)}.")
    normalised = settings.get("normalize_activations")
    if normalised not in (None, False, "none"):
        raise SAEError(
            f"{path} has normalize_activations {normalised!r}: these weights do not read raw activations, and what "
            "would turn them is not in the folder. Fold it in SAELens first, where it can be."
        )
    if settings.get("finetuning_scaling_factor"):
        raise SAEError(f"{path} has a finetuning_scaling_factor, which SAELens 6 does not read either.")
    return settings


def _stored(path: Path, layout: dict[str, str]) -> dict[str, Tensor]:
    file = path / WEIGHTS_FILE
    stored = read_tensors(file)
    if "log_threshold" in stored:
        stored["threshold"] = stored.pop("log_threshold").exp()
    scaling = stored.pop("scaling_factor", None)
    if scaling is not None and not bool((scaling == 1).all()):
        raise SAEError(f"{file} has a scaling_factor other than 1, which SAELens 6 does not read either.")
    check_names(stored, set(layout), str(file))
    check_matrices(stored, "W_enc", "W_dec", str(file))
    return stored


def _fields(settings: dict[str, Any], weights: Weights, architecture: str) -> dict[str, Any]:
    fields = {
        "d_model": settings["d_in"],
        "d_sae": settings["d_sae"],
        "model": settings.get("model_name"),
        **at_hook(_our_hook(settings.get("hook_name"))),
    }
    if architecture == "topk":
        fields["k"] = settings.get("k")
    if architecture == "transcoder":
        fields["d_out"] = settings.get("d_out")
        fields["skip"] = "W_skip" in weights
        fields["hook_name_out"] = at_hook(_our_hook(settings.get("hook_name_out")))["hook_name"]
    return fields


def _fold_ranked_rows(weights: Weights) -> Weights:
    """`fold_row_norms` where the threshold is already in units of z·‖W_dec‖, as BatchTopK's is in SAELens."""
    return fold_row_norms(weights) | {name: w for name, w in weights.items() if name == "theta"}


def _our_hook(hook: Any) -> str | None:
    if not isinstance(hook, str):
        return None
    for ours, theirs in _HOOKS.items():
        if match := re.fullmatch(rf"blocks\.(\d+)\.{re.escape(theirs)}", hook):
            return f"layers.{match[1]}.{ours}"
    return hook


def _saelens_hook(name: str | None) -> str | None:
    """TransformerLens's name of one of our sites, or of what a transcoder reads; another hook's name as it is."""
    if name is None:
        return None
    match = re.fullmatch(r"layers\.(\d+)\.(\w+)", name)
    if match and match[2] in _HOOKS:
        return f"blocks.{match[1]}.{_HOOKS[match[2]]}"
    try:
        return Site.parse(name).hook_name
    except ModelError:
        return name

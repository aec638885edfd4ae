"""Gemma Scope 2: params.safetensors with lower-case names, beside a config.json that is sometimes absent.

    w_enc [D, F]   b_enc [F]   threshold [F]   w_dec [F, E]   b_dec [E]   affine_skip_connection [D, E], where affine

The configuration names Hugging Face modules (`hf_hook_point_in`, `hf_hook_point_out`), which are what counts; where the
file is absent, the path tells the same. Cross-layer transcoders and crosscoders are refused: they are other objects.
"""

import re
from pathlib import Path
from typing import Any

import torch

from mistudio.errors import SAEError
from mistudio.hub.entry import Entry
from mistudio.hub.formats.reading import (
    at_hook,
    build,
    candidates,
    check_matrices,
    check_names,
    entry_of,
    read_object,
    read_tensors,
    tensor_names,
    the_file,
)
from mistudio.sae import SAE

WHAT = "Gemma Scope 2 safetensors"
SKIP = "affine_skip_connection"

_NAMES = {"w_enc": "W_enc", "b_enc": "b_enc", "threshold": "theta", "w_dec": "W_dec", "b_dec": "b_dec", SKIP: "W_skip"}
_SITES = {
    "output": "resid_post",
    "self_attn.o_proj.input": "attn_z",
    "post_feedforward_layernorm.output": "mlp_out",
    "pre_feedforward_layernorm.output": "mlp_in",
}


def matches(path: Path) -> bool:
    """Whether this is a safetensors file with w_enc and w_dec, or a folder with one in it."""
    return bool(candidates(path, _is_params))


def load(path: Path, dtype: torch.dtype = torch.float32) -> SAE:
    """The SAE or transcoder in a params.safetensors (or in the folder that holds it); matrices in `dtype`.

    SAEError: a cross-layer object, wrong arrays, or a config.json that contradicts them.
    """
    file = the_file(path, _is_params, WHAT)
    stored = read_tensors(file)
    check_names(stored, set(_NAMES) - ({SKIP} - set(stored)), str(file))
    if stored["w_dec"].ndim == 3 or stored["w_enc"].ndim == 3:
        raise SAEError(f"{file} is a cross-layer transcoder or crosscoder; only single-layer ones are read.")
    check_matrices(stored, "w_enc", "w_dec", str(file))
    described = _description(file.with_name("config.json"), skip=SKIP in stored)
    weights = {_NAMES[name]: tensor for name, tensor in stored.items()}
    entry = entry_of(file)
    reads, writes = _hooks(described, entry)
    (d_in, d_sae), d_out = weights["W_enc"].shape, weights["W_dec"].shape[1]
    fields = {"d_model": d_in, "d_sae": d_sae, "model": _model(described, entry), **at_hook(reads)}
    if "W_skip" not in weights and d_in == d_out and not _says_transcoder(described, entry):
        return build("jumprelu", fields, weights, place=str(file), dtype=dtype)
    fields |= {"d_out": d_out, "skip": "W_skip" in weights, "hook_name_out": writes}
    return build("transcoder", fields, weights, place=str(file), dtype=dtype)


def _is_params(file: Path) -> bool:
    return {"w_enc", "w_dec"} <= tensor_names(file)


def _description(path: Path, *, skip: bool) -> dict[str, Any]:
    """config.json, empty where it is absent. SAEError: it describes another kind of thing than the arrays."""
    if not path.exists():
        return {}
    data = read_object(path)
    if data.get("architecture") != "jump_relu":
        raise SAEError(f"{path} has the architecture {data.get('architecture')!r}; Gemma Scope 2 is 'jump_relu'.")
    kind = data.get("type")
    if kind not in (None, "sae", "transcoder"):
        raise SAEError(f"{path} describes a {kind}; only single-layer SAEs and transcoders are read.")
    affine = data.get("affine_connection")
    if (affine is not None and bool(affine) != skip) or (kind == "sae" and skip):
        raise SAEError(f"{path} and the weights disagree whether there is an affine skip connection.")
    return data


def _says_transcoder(described: dict[str, Any], entry: Entry | None) -> bool:
    if "type" in described:
        return described["type"] == "transcoder"
    if "hf_hook_point_out" in described:
        return described["hf_hook_point_out"] not in (None, described.get("hf_hook_point_in"))
    return entry is not None and entry.site == "transcoder"


def _hooks(described: dict[str, Any], entry: Entry | None) -> tuple[str | None, str | None]:
    """What it reads and what it writes, by our names where we have them."""
    if "hf_hook_point_in" in described:
        return _site(described["hf_hook_point_in"]), _site(described.get("hf_hook_point_out"))
    if entry is None or entry.site_name is None:
        return None, None
    return entry.site_name if isinstance(entry.site_name, tuple) else (entry.site_name, None)


def _site(hf_hook: Any) -> str | None:
    if not isinstance(hf_hook, str):
        return None
    match = re.fullmatch(r"model\.(?:language_model\.)?layers\.(\d+)\.(.+)", hf_hook)
    return f"layers.{match[1]}.{_SITES[match[2]]}" if match and match[2] in _SITES else hf_hook


def _model(described: dict[str, Any], entry: Entry | None) -> str | None:
    """The model's hub id; the configurations write some as `gemma-v3-…` and without `google/`."""
    name = described.get("model_name")
    if entry is not None:
        return entry.model
    if not isinstance(name, str):
        return None
    name = name.replace("gemma-v3", "gemma-3")
    name = name if "/" in name else f"google/{name}"
    return name.removesuffix("-pt") if "270m" in name else name

"""EleutherAI's sparsify: a folder with cfg.json and sae.safetensors, one a hook point; TopK SAEs.

    encoder.weight [F, D]   encoder.bias [F]   W_dec [F, D]   b_dec [D]

With z = (x - b_dec)·encoder.weightᵀ + encoder.bias, the k largest of ReLU(z) are kept. Its transcoders (`transcode`,
`skip_connection`: a TopK encoder), `groupmax` and the old `signed` activation compute something that no architecture
here does, and are refused.
"""

import re
from pathlib import Path
from typing import Any

import torch

from mistudio.errors import SAEError
from mistudio.hub.formats.reading import (
    at_hook,
    build,
    check_matrices,
    check_names,
    fold_b_dec,
    peek_object,
    read_object,
    read_tensors,
    tensor_names,
)
from mistudio.sae import SAE


def matches(path: Path) -> bool:
    """Whether this is a folder with sparsify's cfg.json and a sae.safetensors that has encoder.weight."""
    if not path.is_dir() or not {"d_in", "k"} <= set(peek_object(path / "cfg.json")):
        return False
    return "encoder.weight" in tensor_names(path / "sae.safetensors")


def load(path: Path, dtype: torch.dtype = torch.float32) -> SAE:
    """The TopK SAE in a folder of sparsify's, b_dec folded into the encoder; matrices in `dtype`.

    SAEError: another activation, a transcoder, or weights that do not fit cfg.json.
    """
    settings = read_object(path / "cfg.json")
    _refuse_others(settings, path)
    file = path / "sae.safetensors"
    stored = read_tensors(file)
    check_names(stored, {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}, str(file))
    check_matrices(stored, "encoder.weight", "W_dec", str(file))
    d_sae, d_in = stored["encoder.weight"].shape
    if settings["d_in"] != d_in:
        raise SAEError(f"{path}/cfg.json says d_in {settings['d_in']}, but encoder.weight has {d_in} columns.")
    weights = {
        "W_enc": stored["encoder.weight"].T,
        "b_enc": stored["encoder.bias"],
        "W_dec": stored["W_dec"],
        "b_dec": stored["b_dec"],
    }
    fields = {"d_model": d_in, "d_sae": d_sae, "k": settings["k"], **_place_in_model(path)}
    return build("topk", fields, weights, place=str(path), dtype=dtype, folds=[fold_b_dec])


def _refuse_others(settings: dict[str, Any], path: Path) -> None:
    for name, plain in (("activation", "topk"), ("signed", False), ("transcode", False), ("skip_connection", False)):
        if settings.get(name, plain) != plain:
            raise SAEError(
                f"{path}/cfg.json has {name} {settings[name]!r}; only {name} {plain!r} is read from sparsify."
            )


def _place_in_model(path: Path) -> dict[str, Any]:
    """sparsify names the folder by the module that it hooks; `layers.5` is the residual stream after layer 5."""
    match = re.fullmatch(r"(?:\w+\.)*(?:layers|h)[._](\d+)", path.absolute().name)
    model = peek_object(path.absolute().parent / "config.json").get("model")
    return {
        "model": model if isinstance(model, str) else None,
        **at_hook(f"layers.{match[1]}.resid_post" if match else None),
    }

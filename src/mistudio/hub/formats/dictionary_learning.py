"""dictionary_learning: a state dict in ae.pt beside a config.json. Its matrices are `nn.Linear`'s: ours, transposed.

AutoEncoder             encoder.weight encoder.bias decoder.weight bias            ReLU((x - bias)·W_enc + b_enc)
AutoEncoderNew          encoder.weight encoder.bias decoder.weight decoder.bias    ReLU(x·W_enc + b_enc)
GatedAutoEncoder        encoder.weight gate_bias r_mag mag_bias decoder.weight decoder_bias
                        gated, x - decoder_bias; features are multiplied by the norm of their decoder row
JumpReluAutoEncoder     W_enc b_enc W_dec b_dec threshold
                        JumpReLU and then ReLU, so that a threshold below 0 acts as 0; multiplied likewise
AutoEncoderTopK         encoder.weight encoder.bias decoder.weight b_dec k (threshold)
                        the k largest of ReLU(z), z = (x - b_dec)·W_enc + b_enc
BatchTopKSAE            the same, with threshold                                   z where z > threshold
MatryoshkaBatchTopKSAE  W_enc b_enc W_dec b_dec k threshold group_sizes            the same

BatchTopKSAE is told from AutoEncoderTopK by config.json. The file is a pickle: it is read by torch's restricted
unpickler (`weights_only=True`), which makes tensors and nothing else, after its declared sizes were held against the
file's.
"""

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistudio.errors import SAEError
from mistudio.hub.formats.reading import (
    Weights,
    at_hook,
    build,
    candidates,
    first_member,
    fold_b_dec,
    fold_row_norms,
    peek_object,
    the_file,
)
from mistudio.sae import SAE

WHAT = "dictionary_learning state dict"


def _raise_thresholds(weights: Weights) -> Weights:
    return weights | {"theta": weights["theta"].clamp(min=0)}


_LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_LAYOUTS: dict[str, dict[str, str]] = {
    "AutoEncoder": _LINEAR | {"bias": "b_dec"},
    "AutoEncoderNew": _LINEAR | {"decoder.bias": "b_dec"},
    "GatedAutoEncoder": {
        "encoder.weight": "W_enc",
        "gate_bias": "b_gate",
        "r_mag": "r_mag",
        "mag_bias": "b_mag",
        "decoder.weight": "W_dec",
        "decoder_bias": "b_dec",
    },
    "JumpReluAutoEncoder": _PLAIN | {"threshold": "theta"},
    "AutoEncoderTopK": _LINEAR | {"b_dec": "b_dec", "k": "k"},
    "BatchTopKSAE": _LINEAR | {"b_dec": "b_dec", "k": "k", "threshold": "theta"},
    "MatryoshkaBatchTopKSAE": _PLAIN | {"k": "k", "threshold": "theta", "group_sizes": "group_sizes"},
}
"""Class → its tensors' names → ours."""
_ARCHITECTURES: dict[str, tuple[str, list[Callable[[Weights], Weights]]]] = {
    "AutoEncoder": ("relu", [fold_b_dec]),
    "AutoEncoderNew": ("relu", []),
    "GatedAutoEncoder": ("gated", [fold_b_dec, fold_row_norms]),
    "JumpReluAutoEncoder": ("jumprelu", [_raise_thresholds, fold_row_norms]),
    "AutoEncoderTopK": ("topk", [fold_b_dec]),
    "BatchTopKSAE": ("batchtopk", [fold_b_dec]),
    "MatryoshkaBatchTopKSAE": ("batchtopk", [fold_b_dec]),
}


def matches(path: Path) -> bool:
    """Whether this is a file that torch.save wrote, or a folder with such a file in it."""
    return bool(candidates(path, _is_torch_zip))


def load(path: Path, dtype: torch.dtype = torch.float32) -> SAE:
    """The SAE in an ae.pt (or in the folder that holds it), in our orientation and released form; matrices in `dtype`.

    SAEError: the file holds other objects than tensors, or tensors of no known class, or config.json is needed to tell
    the class and is not there.
    """
    file = the_file(path, _is_torch_zip, WHAT)
    state = _read_state(file)
    trainer = peek_object(file.with_name("config.json")).get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    cls = _class_of(state, trainer, file)
    architecture, folds = _ARCHITECTURES[cls]
    weights, fields = _weights(state, cls, file)
    return build(architecture, fields | _place_in_model(trainer), weights, place=str(file), dtype=dtype, folds=folds)


def _is_torch_zip(file: Path) -> bool:
    return first_member(file).endswith("/data.pkl")


def _read_state(file: Path) -> Weights:
    size = file.stat().st_size
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
            raise SAEError("it is a compressed zip, which torch.save does not write")
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and the unpickler can raise anything on a hostile file
        first = str(error).strip().split("\n")[0]
        raise SAEError(f"{file} is not a state dict of tensors alone, so it is not read: {first}") from error
    if not isinstance(state, dict) or not all(isinstance(n, str) and isinstance(w, Tensor) for n, w in state.items()):
        raise SAEError(f"{file} holds something else than tensors by name.")
    if any(w.layout != torch.strided or w.nbytes > size for w in state.values()):
        raise SAEError(f"{file} holds a tensor larger than the file.")
    return dict(state)


def _class_of(state: Weights, trainer: dict[str, Any], file: Path) -> str:
    fits = [cls for cls, layout in _LAYOUTS.items() if set(state) == set(layout)]
    if fits == ["BatchTopKSAE"]:  # newer versions of AutoEncoderTopK hold a threshold too, which they do not use
        fits.append("AutoEncoderTopK")
    named = trainer.get("dict_class")
    if "AutoEncoderTopK" in fits:
        if named in fits:
            return named
        raise SAEError(
            f"{file} can be an AutoEncoderTopK or a BatchTopKSAE; config.json beside it says dict_class {named!r}."
        )
    if not fits:
        raise SAEError(f"{file} holds {', '.join(sorted(state)) or 'nothing'}; known are {', '.join(_LAYOUTS)}.")
    return fits[0]


def _weights(state: Weights, cls: str, file: Path) -> tuple[Weights, dict[str, Any]]:
    """The tensors in our names and orientation, and the sizes and k that they tell."""
    weights = {ours: state[theirs] for theirs, ours in _LAYOUTS[cls].items()}
    k = weights.pop("k", None)
    weights.pop("group_sizes", None)
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise SAEError(f"{file}: {name} is {weight.dtype}; expected floating point.")
    if weights["W_enc"].ndim != 2:
        raise SAEError(f"{file}: the encoder has shape {list(weights['W_enc'].shape)}; expected a matrix.")
    if "encoder.weight" in state:
        weights |= {"W_enc": weights["W_enc"].T, "W_dec": weights["W_dec"].T}
    d_model, d_sae = weights["W_enc"].shape
    fields: dict[str, Any] = {"d_model": d_model, "d_sae": d_sae}
    if cls == "AutoEncoderTopK" and k is not None:
        if k.numel() != 1:
            raise SAEError(f"{file}: k has shape {list(k.shape)}; expected one number.")
        fields["k"] = k.item()
    if _ARCHITECTURES[cls][0] == "batchtopk" and weights["theta"].numel() == 1 and weights["theta"] < 0:
        raise SAEError(f"{file}: its threshold was never set, so that it selects by batch only; train it for longer.")
    return weights, fields


def _place_in_model(trainer: dict[str, Any]) -> dict[str, Any]:
    """What the trainer's record says of model and site; `resid_post_layer_8` is the one submodule name that tells."""
    name, lm_name = trainer.get("submodule_name"), trainer.get("lm_name")
    match = re.fullmatch(r"resid_post_layer_(\d+)", name) if isinstance(name, str) else None
    model = {"model": lm_name} if isinstance(lm_name, str) else {}
    return at_hook(f"layers.{match[1]}.resid_post" if match else None) | model

"""What the formats share: telling files apart, reading them strictly, and bringing weights into our form.

Our form is the released one: x̂ = f·W_dec + b_dec with W_enc [D, F] and W_dec [F, E], nothing subtracted from x. Where
an origin subtracts b_dec or divides by the norms of decoder rows, that is folded into the weights, in float64, so that
f and x̂ are the origin's own to rounding. Where it does not, the numbers are taken as they lie.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mistudio.config import from_dict
from mistudio.errors import ConfigError, ModelError, SAEError
from mistudio.files import read_json
from mistudio.hub.entry import Entry, parse
from mistudio.lm.site import Site
from mistudio.sae import ARCHITECTURES, SAE
from mistudio.sae.base import UNIT_ROW_TOLERANCE, check_weights

JSON_BYTES_MAX = 16 * 2**20
HEADER_BYTES_MAX = 16 * 2**20

Weights = dict[str, Tensor]
"""Parameters by the names that the code gives them."""

STORED_NAMES = {"theta": "threshold"}
"""Parameters that files call otherwise than the code does."""


def first_bytes(path: Path, n: int) -> bytes:
    """The first `n` bytes of a file, or fewer; nothing where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(n)
    except OSError:
        return b""


def first_member(path: Path) -> str:
    """The name of the first member of a zip file, by its local header; empty where it is no zip."""
    head = first_bytes(path, 300)
    name_bytes = int.from_bytes(head[26:28], "little")
    return head[30 : 30 + name_bytes].decode("latin-1") if head[:4] == b"PK\x03\x04" else ""


def candidates(path: Path, is_one: Callable[[Path], bool]) -> list[Path]:
    """The files that `is_one` accepts: `path` itself, or those lying in it where it is a folder."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in files if file.is_file() and is_one(file)]


def the_file(path: Path, is_one: Callable[[Path], bool], what: str) -> Path:
    """The one file of `candidates`. SAEError: there is none, or several."""
    found = candidates(path, is_one)
    if not found:
        raise SAEError(f"{path} is no {what} and holds none.")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise SAEError(f"{path} holds {len(found)} files of the kind {what} ({names}); give one of them.")
    return found[0]


def read_object(path: Path) -> dict[str, Any]:
    """The data of a JSON file that holds an object. SAEError: it is missing, huge, damaged, or holds something else."""
    try:
        size = path.stat().st_size
        if size > JSON_BYTES_MAX:
            raise SAEError(f"{path} is {size:,} bytes long, which no configuration of an SAE is.")
        data = read_json(path)
    except (OSError, ConfigError, RecursionError) as error:
        raise SAEError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise SAEError(f"{path} holds a {type(data).__name__}; a configuration is an object.")
    return data


def peek_object(path: Path) -> dict[str, Any]:
    """As `read_object`, but empty where that would be an error: for telling formats apart."""
    try:
        return read_object(path)
    except SAEError:
        return {}


def tensor_names(path: Path) -> set[str]:
    """The names in a safetensors file; none where it is not one. Reads the header alone."""
    head = first_bytes(path, 9)
    if len(head) < 9 or head[8:9] != b"{" or int.from_bytes(head[:8], "little") > HEADER_BYTES_MAX:
        return set()
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError, ValueError):
        return set()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, as stored; copies, which do not change if the file does. SAEError: it is
    missing or damaged, or one is not of floats."""
    if not path.is_file():
        raise SAEError(f"{path} is missing.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise SAEError(f"{path} is damaged: {error}") from error
    return {name: tensor.clone() for name, tensor in tensors.items()}


def check_names(weights: Mapping[str, Tensor], expected: set[str], place: str) -> None:
    """SAEError: the names are others than `expected`, or a tensor does not hold floats."""
    if set(weights) != expected:
        found, wanted = ", ".join(sorted(weights)), ", ".join(sorted(expected))
        raise SAEError(f"{place} holds {found or 'nothing'}; expected {wanted}.")
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise SAEError(f"{place}: {name} is {tensor.dtype}; expected floating point.")


def check_matrices(weights: Mapping[str, Tensor], encoder: str, decoder: str, place: str) -> None:
    """SAEError: the two named tensors are not matrices, so that there are no sizes to read off."""
    for name in (encoder, decoder):
        if weights[name].ndim != 2 or 0 in weights[name].shape:
            raise SAEError(f"{place}: {name} has shape {list(weights[name].shape)}; expected a matrix.")


def build(
    architecture: str,
    fields: dict[str, Any],
    weights: Weights,
    *,
    place: str,
    dtype: torch.dtype,
    folds: Sequence[Callable[[Weights], Weights]] = (),
) -> SAE:
    """The SAE of that architecture: `fields` make its configuration, `folds` are applied to its weights in order.

    SAEError, naming `place`: a field is wrong, a weight has another shape, is not finite, or is a negative threshold.
    """
    cls = ARCHITECTURES[architecture]
    try:
        config = from_dict(cls.Config, fields, source=place)
        check_weights(config, weights)
    except ConfigError as error:
        raise SAEError(str(error)) from error
    except SAEError as error:
        raise SAEError(f"{place}: {error}") from error
    if folds:
        weights = {name: w.to(torch.promote_types(w.dtype, torch.float32)) for name, w in weights.items()}
    for fold in folds:
        weights = fold(weights)
    return check_sound(cls(config, in_dtype(weights, dtype)), place)  # type: ignore[call-arg]


def fold_b_dec(weights: Weights) -> Weights:
    """The weights of an SAE that subtracts b_dec from x, as those of one that does not: b - b_dec·W_enc for its biases.

    (x - b_dec)·W_enc = x·W_enc - b_dec·W_enc; a gated SAE's magnitudes see the latter times exp(r_mag).
    """
    shift = weights["b_dec"].double() @ weights["W_enc"].double()  # [F]
    folded = dict(weights)
    for name in ("b_enc", "b_gate"):
        if name in weights:
            folded[name] = (weights[name].double() - shift).to(weights[name].dtype)
    if "b_mag" in weights:
        b_mag = weights["b_mag"].double() - weights["r_mag"].double().exp() * shift
        folded["b_mag"] = b_mag.to(weights["b_mag"].dtype)
    return folded


def fold_row_norms(weights: Weights) -> Weights:
    """The weights with decoder rows of norm 1 and features n times as large, n the norm that each row had.

    W_dec / n, and n times the columns of W_enc, the biases and the threshold; a row of zeros stays. exp(r_mag)
    multiplies x·W_enc, which has grown already.
    """
    n = weights["W_dec"].double().norm(dim=1)  # [F]
    n = torch.where(n > 0, n, 1.0)
    folded = dict(weights)
    folded["W_enc"] = (weights["W_enc"] * n).to(weights["W_enc"].dtype)
    folded["W_dec"] = (weights["W_dec"] / n[:, None]).to(weights["W_dec"].dtype)
    for name in ("b_enc", "b_gate", "b_mag", "theta"):
        if name in weights:
            folded[name] = (weights[name] * n).to(weights[name].dtype)
    return folded


def in_dtype(weights: Mapping[str, Tensor], dtype: torch.dtype) -> Weights:
    """The matrices in `dtype`; vectors and thresholds not below float32, since a threshold is a fine comparison."""
    small = torch.promote_types(dtype, torch.float32)
    return {name: w.detach().to(dtype if w.ndim == 2 else small).contiguous() for name, w in weights.items()}


def convert(sae: SAE, dtype: torch.dtype) -> SAE:
    """The same SAE with its parameters as `in_dtype` has them; in place."""
    for name, weight in in_dtype(dict(sae.named_parameters()), dtype).items():
        setattr(sae, name, nn.Parameter(weight))
    return sae


def check_sound(sae: SAE, place: str) -> SAE:
    """The SAE itself. SAEError: a weight is NaN or infinite, or a threshold negative."""
    for name, weight in sae.named_parameters():
        low, high = torch.aminmax(weight.detach())
        if not (low.isfinite() and high.isfinite()):
            raise SAEError(f"{place}: {STORED_NAMES.get(name, name)} holds NaN or infinite values.")
        if name == "theta" and low < 0:
            raise SAEError(f"{place}: {int((weight < 0).sum())} thresholds are negative.")
    return sae


def has_unit_rows(W_dec: Float[Tensor, "F E"]) -> bool:
    """Whether every decoder row has norm 1, to `UNIT_ROW_TOLERANCE`."""
    norms = torch.cat([rows.detach().float().norm(dim=1) for rows in W_dec.split(4096)])
    return bool(((norms - 1).abs() <= UNIT_ROW_TOLERANCE).all())


def refuse_unfolded(sae: SAE) -> None:
    """SAEError: the SAE is in training form."""
    if not sae.folded:
        raise SAEError("This SAE is in training form (normalised units); save its released form: sae.fold().")


def at_hook(hook: str | None) -> dict[str, Any]:
    """The fields `hook_name` and `hook_layer`: our site's name where the hook is one, else the hook verbatim."""
    if hook is None:
        return {"hook_name": None, "hook_layer": None}
    try:
        site = Site.parse(hook)
    except ModelError:
        layer = re.search(r"(?:layers|blocks|h)\.(\d+)(?:\.|$)", hook)
        return {"hook_name": hook, "hook_layer": int(layer[1]) if layer else None}
    return {"hook_name": str(site), "hook_layer": site.layer}


def entry_of(file: Path) -> Entry | None:
    """The released Gemma Scope file that the path of a weights file names; None where it names none.

    Understood are a clone or copy (`…/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71/params.npz`) and the
    Hugging Face cache (`…/models--google--gemma-scope-2b-pt-res/snapshots/COMMIT/layer_20/…`).
    """
    parts = file.absolute().parts
    for i in reversed(range(len(parts) - 1)):
        repo, tail = parts[i].removeprefix("models--google--"), parts[i + 1 : -1]
        if tail[:1] == ("snapshots",):
            tail = tail[2:]
        if repo.startswith("gemma-scope-") and (entry := parse(f"google/{repo}", "/".join(tail))):
            return entry
    return None


def describe(path: Path) -> str:
    """What lies at a path, in words, for a message that it is no SAE."""
    if path.is_dir():
        names = sorted(file.name for file in path.iterdir())
        listed = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
        return f"a folder holding {listed}" if names else "an empty folder"
    if not path.exists():
        return "nothing"
    head = first_bytes(path, 64)
    if names := sorted(tensor_names(path)):
        return f"a safetensors file of {', '.join(names[:6])}" + (", …" if len(names) > 6 else "")
    for start, words in ((b"PK\x03\x04", "a zip file"), (b"\x80", "a pickle"), (b"{", "JSON text"), (b"<", "markup")):
        if head.startswith(start):
            return words
    if head.startswith(b"version https://git-lfs"):
        return "a pointer to a file in Git LFS, not the file"
    return f"a file that starts with {json.dumps(head[:12].decode('latin-1'))}" if head else "an empty file"

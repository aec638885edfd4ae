"""mistudio's own folder: sae.safetensors (float32) and sae.json, which is written last.

sae.json is strict: exactly these keys, and a reader refuses a version it does not know.

version 1  {"format", "version", "config"}: a JumpReLU SAE as trained and released here, with decoder rows of norm 1
           and thresholds above 0. `JumpReLUSAE.save` and `.load` are its writer and reader, and those are still
           written in it, so that any mistudio reads what any mistudio trained.
version 2  {"format", "version", "architecture", "config"}: any of `ARCHITECTURES`, which decides the fields of
           "config" and the names and shapes of the tensors. Also a JumpReLU SAE from elsewhere that version 1 would
           refuse: nothing is said of the rows' norms, and thresholds may be 0.

A version is raised when a reader of the one before would misread the folder, not when an architecture is added: an
unknown architecture is refused by name.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistudio.config import from_dict, to_dict
from mistudio.errors import ConfigError, SAEError
from mistudio.files import write_json, write_tensors
from mistudio.hub.formats.reading import (
    STORED_NAMES,
    check_names,
    check_sound,
    convert,
    has_unit_rows,
    peek_object,
    read_object,
    read_tensors,
    refuse_unfolded,
)
from mistudio.sae import ARCHITECTURES, SAE, JumpReLUSAE
from mistudio.sae.model import FORMAT

VERSION = 2


def matches(path: Path) -> bool:
    """Whether this is a folder with a sae.json of mistudio's."""
    return path.is_dir() and peek_object(path / "sae.json").get("format") == FORMAT


def load(path: Path, dtype: torch.dtype = torch.float32) -> SAE:
    """The SAE that `save` or `JumpReLUSAE.save` wrote; matrices in `dtype`. SAEError: the folder is damaged, or of a
    version or architecture that this mistudio does not know."""
    data = read_object(path / "sae.json")
    if data.get("version") != VERSION:
        return convert(JumpReLUSAE.load(path), dtype)
    if set(data) != {"format", "version", "architecture", "config"} or data["format"] != FORMAT:
        raise SAEError(f"{path}/sae.json is not an SAE of mistudio: it holds {', '.join(data)}.")
    architecture = _architecture(data["architecture"], path)
    try:
        config = from_dict(architecture.Config, data["config"], source=f"{path}/sae.json")
    except ConfigError as error:
        raise SAEError(str(error)) from error
    names = {name: STORED_NAMES.get(name, name) for name in config.shapes()}
    tensors = _float32_tensors(path / "sae.safetensors", set(names.values()))
    sae = architecture(config, {name: tensors[stored] for name, stored in names.items()})  # type: ignore[call-arg]
    refuse_unfolded(sae)
    return convert(check_sound(sae, f"{path}/sae.safetensors"), dtype)


def save(sae: SAE, path: Path) -> None:
    """Writes the folder `path`, in version 1 where that can hold the SAE. SAEError: the SAE is in training form."""
    refuse_unfolded(sae)
    if isinstance(sae, JumpReLUSAE) and has_unit_rows(sae.W_dec) and bool((sae.theta > 0).all()):
        sae.save(path)
        return
    path.mkdir(parents=True, exist_ok=True)
    (path / "sae.json").unlink(missing_ok=True)
    tensors = {STORED_NAMES.get(name, name): tensor.float() for name, tensor in sae.state_dict().items()}
    write_tensors(path / "sae.safetensors", tensors)
    architecture = next(name for name, cls in ARCHITECTURES.items() if type(sae) is cls)
    description = {"format": FORMAT, "version": VERSION, "architecture": architecture, "config": to_dict(sae.config)}
    write_json(path / "sae.json", description)


def _architecture(name: Any, path: Path) -> type[SAE]:
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise SAEError(f"{path}/sae.json has the architecture {name!r}; there are {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[name]


def _float32_tensors(file: Path, names: set[str]) -> dict[str, Tensor]:
    tensors = read_tensors(file)
    check_names(tensors, names, str(file))
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise SAEError(f"{file}: {name} is {tensor.dtype}; expected torch.float32.")
    return tensors

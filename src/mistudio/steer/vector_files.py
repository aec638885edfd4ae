"""Vectors in files: .safetensors and .npz, one array a vector, and .gguf, llama.cpp's control vectors.

A control vector has an array `direction.N` for a layer N, which is added to the residual after that layer; llama.cpp
has no place for layer 0, and for other sites than resid_post.
"""

import io
import os
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mistudio.errors import ConfigError
from mistudio.files import write_bytes, write_tensors
from mistudio.lm import Site
from mistudio.steer.apply import Pushes
from mistudio.steer.lab import Lab

SUFFIXES = (".safetensors", ".npz", ".gguf")


def added_vectors(lab: Lab, pushes: Pushes) -> dict[Site, Float[Tensor, " D"]]:
    """Site → the vector Σ c·d that the pushes add there, float32, raw units.

    ConfigError: a push is not a plain addition on every position, so that no vector says what it does.
    """
    found: dict[Site, Tensor] = {}
    for push in pushes:
        if push.method != "add" or push.when is not None or push.turned is not None or push.positions != "all":
            raise ConfigError(
                f"A vector says what `add` on all positions does, and this push is {push.method} on {push.positions}"
                f"{' with a condition' if push.when else ''}. Export a program instead: --export steer.py."
            )
        site = lab.site(push)
        added = lab.number(push) * lab.direction(push).double().cpu()
        found[site] = found[site] + added if site in found else added
    return {site: vector.float() for site, vector in found.items()}


def write_vectors(path: Path, vectors: Mapping[Site, Float[Tensor, " D"]], *, model: str) -> Path:
    """The path of a file with a vector for each site, its suffix one of SUFFIXES; the sites are the arrays' names.

    ConfigError: another suffix; for .gguf, a site that llama.cpp has not, or the package gguf is missing.
    """
    arrays = {str(site): vector.detach().float().cpu() for site, vector in vectors.items()}
    if path.suffix == ".safetensors":
        write_tensors(path, arrays, {"format": "mistudio.vector/1", "model": model})
    elif path.suffix == ".npz":
        data = io.BytesIO()
        np.savez(data, allow_pickle=False, **{name: array.numpy() for name, array in arrays.items()})  # type: ignore[arg-type]
        write_bytes(path, data.getvalue())
    elif path.suffix == ".gguf":
        write_bytes(path, _gguf_bytes(vectors, model))
    else:
        raise ConfigError(f"{path} has none of the endings {', '.join(SUFFIXES)}.")
    return path


def read_vector(path: Path, key: str | None = None) -> Float[Tensor, " D"]:
    """A vector from a .safetensors, .npz or .gguf file, float32; `key` may be left out where the file holds one array.

    ConfigError: no such file or key, not one axis, or not finite. Nothing is unpickled.
    """
    arrays = _read_arrays(path)
    if key is None and len(arrays) != 1:
        raise ConfigError(f"{path} holds {', '.join(arrays) or 'nothing'}; say which: {path}:NAME.")
    name = next(iter(arrays)) if key is None else key
    if name not in arrays:
        raise ConfigError(f"{path} has no array {name!r}; it holds {', '.join(arrays)}.")
    vector = arrays[name].float()
    if vector.dim() != 1 or not bool(vector.isfinite().all()):
        raise ConfigError(f"{name} in {path} has shape {list(vector.shape)}; wanted one axis [D] of finite numbers.")
    return vector


def _read_arrays(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ConfigError(f"There is no file {path}.")
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path} has none of the endings {', '.join(SUFFIXES)}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: torch.from_numpy(np.asarray(file[name], dtype=np.float64)) for name in file.files}
        return _gguf_arrays(path)
    except (SafetensorError, ValueError, OSError, KeyError, IndexError, OverflowError) as error:
        raise ConfigError(f"{path} does not read as {path.suffix[1:]}: {error}.") from error


def _gguf() -> Any:
    try:
        return import_module("gguf")
    except ImportError as error:
        raise ConfigError(".gguf files need the package gguf: pip install 'mistudio[gguf]'.") from error


def _gguf_bytes(vectors: Mapping[Site, Float[Tensor, " D"]], model: str) -> bytes:
    for site in vectors:
        if site.kind != "resid_post" or site.layer == 0:
            raise ConfigError(
                f"llama.cpp adds control vectors to the residual after layers 1 and up; {site} is no such place. "
                "Export to .safetensors or .npz, or a program: --export steer.py."
            )
    gguf = _gguf()
    handle, name = tempfile.mkstemp(suffix=".gguf")
    os.close(handle)
    try:
        writer = gguf.GGUFWriter(name, "controlvector")
        writer.add_string("controlvector.model_hint", model)
        writer.add_uint32("controlvector.layer_count", len(vectors))
        for site, vector in sorted(vectors.items()):
            writer.add_tensor(f"direction.{site.layer}", vector.detach().float().cpu().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return Path(name).read_bytes()
    finally:
        Path(name).unlink()


def _gguf_arrays(path: Path) -> dict[str, Tensor]:
    """The float32 directions; other tensors, such as a model's quantised ones, are left out."""
    gguf = _gguf()
    reader = gguf.GGUFReader(path)
    return {
        tensor.name: torch.from_numpy(np.array(tensor.data))
        for tensor in reader.tensors
        if tensor.name.startswith("direction.") and tensor.tensor_type == gguf.GGMLQuantizationType.F32
    }

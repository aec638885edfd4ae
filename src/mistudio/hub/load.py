"""An SAE by whatever a person calls it: a path, or any name of a released one; and the names that the brief used.

load_sae("gemma-2-2b/20-gemmascope-res-16k")          downloaded, verified, loaded
load_sae("saes/layers.3.resid_post")                  a folder or file in any format
load_neuronpedia_sae("20-gemmascope-res-16k")         a Neuronpedia id; of Gemma 2 2B unless said otherwise
load_gemma_scope_sae("gemma-2-2b", 20, "residual", "16k")
"""

from pathlib import Path

import torch

from mistudio.errors import HubError
from mistudio.hub.download import Downloaded, download
from mistudio.hub.entry import Entry
from mistudio.hub.formats import load_any
from mistudio.hub.index import find, menu
from mistudio.hub.names import resolve
from mistudio.hub.verify import Verified, verify_file
from mistudio.sae import SAE

DEFAULT_MODEL = "gemma-2-2b"


def load_sae(
    name: str | Path,
    *,
    model: str | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    offline: bool = False,
) -> SAE:
    """The SAE at a path, or the released one of that name, which is downloaded into Hugging Face's cache and verified.

    model: completes a name that does not say of which model it is. dtype: of the matrices. revision, offline: as for
    `download`. SAEError, HubError: one sentence.
    """
    if Path(name).exists():
        return load_any(name, dtype)
    return load_any(download(resolve(str(name), model), revision=revision, offline=offline).path, dtype)


def load_neuronpedia_sae(neuronpedia_id: str, model: str = DEFAULT_MODEL) -> SAE:
    """The SAE behind a Neuronpedia id such as `20-gemmascope-res-16k`. HubError: none; it lists the nearest names."""
    return load_sae(neuronpedia_id, model=model)


def load_gemma_scope_sae(model_name: str, layer: int, site: str, width: str, l0: str | int = "canonical") -> SAE:
    """The released SAE of a model, layer, site and width; `l0`: canonical, an average L0, or near:100.

    HubError: there is none; the message lists what there is.
    """
    return load_any(download(the_one(model_name, layer, site, width, l0)).path)


def download_gemma_scope_sae(
    layer: int = 20,
    width: str = "16k",
    l0: str | int = "canonical",
    save_dir: str | Path = "./saes/gemma-2-2b",
    *,
    model_name: str = DEFAULT_MODEL,
    site: str = "residual",
) -> Downloaded:
    """The released SAE in `save_dir`, verified. The canonical one has L0 71 at layers 8 and 20 only."""
    return download(the_one(model_name, layer, site, width, l0), folder=save_dir)


def verify_sae_download(sae_dir: str | Path, layer: int = 20) -> list[Verified]:
    """What the files of that layer under `sae_dir` hold, each checked whole. HubError: none, or an unsound one."""
    folders = (f"layer_{layer}", f"layer_{layer}_*")
    paths = sorted(
        path
        for folder in folders
        for name in ("npz", "safetensors")
        for path in Path(sae_dir).rglob(f"{folder}/**/*.{name}")
    )
    if not paths:
        raise HubError(
            f"There is no weights file of layer {layer} under {sae_dir}. "
            f"Download one: mistudio sae download {DEFAULT_MODEL}/{layer}-gemmascope-res-16k --folder {sae_dir}"
        )
    return [verify_file(path) for path in paths]


def the_one(model: str, layer: int, site: str, width: str | int, l0: str | int) -> Entry:
    """The one entry that all five say. HubError: none or several; the message lists the L0s."""
    found = find(model=model, layer=layer, site=site, width=width, l0=l0)
    if len(found) != 1:
        raise HubError(f"{len(found)} released SAEs fit. {menu(found)}")
    return found[0]

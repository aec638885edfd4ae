"""SAELens itself as the other party: what we write it loads, what it writes we load, and both compute the same.

SAELens cannot share our environment, so it lives in its own (`MISTUDIO_SAELENS_PYTHON`, or .venv-peers in the root of
the repository) and runs as one subprocess. Everything is exchanged as files.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistudio.hub.formats import load_any, save_as
from mistudio.sae import ARCHITECTURES
from test_architectures import D, E, F, make, rows

VERSION = "6.54.12"
PEERS = Path(__file__).parent.parent / ".venv-peers/bin/python"
PYTHON = Path(os.environ.get("MISTUDIO_SAELENS_PYTHON", PEERS))

pytestmark = pytest.mark.skipif(
    not PYTHON.is_file(),
    reason=f"SAELens lives in an environment of its own: python3 -m venv .venv-peers && "
    f".venv-peers/bin/pip install sae-lens=={VERSION}, or set MISTUDIO_SAELENS_PYTHON to a Python that has it.",
)

MADE_THERE = {
    "standard": {},
    "standard-raw": {"architecture": "standard", "apply_b_dec_to_input": False},
    "topk": {"k": 4},
    "topk-rescaled": {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {},
    "gated": {},
    "transcoder": {"d_out": E, "apply_b_dec_to_input": False},
    "skip_transcoder": {"d_out": E, "apply_b_dec_to_input": False},
    "jumprelu_transcoder": {"d_out": E, "apply_b_dec_to_input": False},
    "jumprelu_skip_transcoder": {"d_out": E, "apply_b_dec_to_input": False},
    "batchtopk-trained": {"architecture": "batchtopk", "k": 4, "rescale_acts_by_decoder_norm": True},
}
"""What SAELens is asked to make and save; the architecture is the name, where not given."""

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
import sae_lens
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.registry import get_sae_class, get_sae_training_class

assert sae_lens.__version__ == "VERSION", sae_lens.__version__
folder, made_there, d_in, d_sae = Path(sys.argv[1]), json.loads(sys.argv[2]), *map(int, sys.argv[3:])
torch.set_num_threads(1)

def answer(sae, name):
    x = load_file(folder / "x.safetensors")["x"]
    if sae.cfg.reshape_activations == "hook_z":
        x = x.view(*x.shape[:-1], 2, -1)
    with torch.no_grad():
        f, x_hat = sae.encode(x), sae(x)
    save_file({"f": f.contiguous(), "x_hat": x_hat.flatten(1).contiguous()}, folder / f"{name}.answer")

for ours in sorted((folder / "ours").iterdir()):
    answer(SAE.load_from_disk(ours), f"ours {ours.name}")

loaders.hf_hub_download = lambda repo_id, filename, subfolder, force_download: str(folder / "params.npz")
def converter(path, device, cfg_overrides):
    sizes = {"d_in": d_in, "d_sae": d_sae}
    where = "google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71"
    return loaders.gemma_2_sae_huggingface_loader(*where, device, cfg_overrides=sizes)[:2]
answer(SAE.load_from_disk(folder, converter=converter), "npz")

for name, settings in made_there.items():
    architecture = settings.pop("architecture", name)
    find = get_sae_training_class if name.endswith("trained") else get_sae_class
    cls, config = find(architecture)
    sae = cls(config(d_in=d_in, d_sae=d_sae, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            if parameter_name == "threshold":
                parameter.abs_()
    if name.endswith("trained"):
        sae.topk_threshold.fill_(1.5)
        sae.save_inference_model(folder / "theirs" / f"{name}-released")
        answer(SAE.load_from_disk(folder / "theirs" / f"{name}-released"), name)
    else:
        answer(sae, name)
    sae.save_model(folder / "theirs" / name)
"""


@pytest.fixture(scope="module")
def exchange(tmp_path_factory):
    """A folder with what we wrote, what SAELens wrote, and its features and reconstructions of x for both."""
    folder = tmp_path_factory.mktemp("exchange")
    save_file({"x": rows(40, dtype=torch.float32)}, folder / "x.safetensors")
    (folder / "ours").mkdir()
    for name, sae in ours().items():
        save_as(sae, folder / "ours" / name, "saelens")
    save_as(make("jumprelu"), folder / "params.npz", "gemma_scope")
    script = SCRIPT.replace("VERSION", VERSION)
    command = [str(PYTHON), "-c", script, str(folder), json.dumps(MADE_THERE), str(D), str(F)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def ours():
    """One of each architecture, and one at the attention site, whose rows SAELens flattens itself."""
    saes = {name: make(name, unit_rows=False) for name in ARCHITECTURES}
    saes["no skip"] = make("transcoder", skip=False)
    saes["attention"] = make("jumprelu", hook_name="layers.3.attn_z", hook_layer=3, model="google/gemma-2-2b")
    for name, skip in (("relu transcoder", False), ("relu skip transcoder", True)):
        saes[name] = make("transcoder", skip=skip)
        saes[name].theta.data.zero_()
    return saes


def assert_computes(sae, folder, name):
    x_hat, f = sae(load_file(folder / "x.safetensors")["x"])
    theirs = load_file(folder / f"{name}.answer")
    torch.testing.assert_close(f, theirs["f"], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(x_hat, theirs["x_hat"], atol=1e-4, rtol=2e-5)
    assert 0 < (f > 0).sum() < f.numel()


@pytest.mark.parametrize("name", list(ours()))
def test_saelens_loads_what_we_save_and_computes_the_same(exchange, name):
    assert_computes(ours()[name], exchange, f"ours {name}")


@pytest.mark.parametrize("name", MADE_THERE)
def test_we_load_what_saelens_saves_and_compute_the_same(exchange, name):
    assert_computes(load_any(exchange / "theirs" / name), exchange, name)


def test_what_saelens_releases_of_a_batchtopk_is_its_training_folder(exchange):
    released = load_any(exchange / "theirs/batchtopk-trained-released")
    trained = load_any(exchange / "theirs/batchtopk-trained")
    assert_computes(released, exchange, "batchtopk-trained")
    torch.testing.assert_close(released.theta, trained.theta.expand(F))
    torch.testing.assert_close(released.W_dec, trained.W_dec)


def test_a_gemma_scope_file_is_the_same_sae_in_both(exchange):
    assert_computes(load_any(exchange / "params.npz"), exchange, "npz")

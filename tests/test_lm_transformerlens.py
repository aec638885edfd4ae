"""Our sites on Gemma 2 against TransformerLens's hooks, on the same random weights."""

from importlib.util import find_spec

import pytest
import torch

from mistudio.lm import KINDS, LanguageModel, Site
from tiny_models import tiny_gemma2, tiny_tokenizer

pytestmark = pytest.mark.skipif(find_spec("transformer_lens") is None, reason="TransformerLens is not installed")
TOKENS = torch.randint(4, 260, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def theirs() -> dict[str, torch.Tensor]:
    """TransformerLens's cache of a forward pass, by hook name."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = tiny_gemma2()  # its own copy: the bridge takes it apart
    bridge = build_bridge_from_module(model, "Gemma2ForCausalLM", hf_config=model.config, model_name="tiny")
    with torch.no_grad():
        _, cache = bridge.run_with_cache(TOKENS)
    return dict(cache.items())


@pytest.fixture(scope="module")
def ours() -> dict[Site, torch.Tensor]:
    lm = LanguageModel(tiny_gemma2(), tiny_tokenizer(), name="tiny")
    return lm.run(TOKENS, read=[Site(layer, kind) for layer in range(lm.shape.n_layers) for kind in KINDS]).activations


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_site_is_the_hook_of_its_transformerlens_name(ours, theirs, layer, kind):
    site = Site(layer, kind)
    hook = theirs[site.hook_name]
    torch.testing.assert_close(ours[site], hook.reshape(ours[site].shape), rtol=1e-5, atol=1e-5)

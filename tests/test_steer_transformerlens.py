"""Steered greedy text against TransformerLens's hooks, on the same random weights and the same vector."""

from importlib.util import find_spec

import pytest
import torch

from mistudio.lm import LanguageModel, Site
from mistudio.steer import Lab, Push, steered
from tiny_lab import PROMPT
from tiny_models import tiny_gemma2, tiny_tokenizer

pytestmark = pytest.mark.skipif(find_spec("transformer_lens") is None, reason="TransformerLens is not installed")
NEW = 12


@pytest.mark.parametrize("kind", ["resid_post", "mlp_out", "attn_z"])
@pytest.mark.parametrize("strength", [0.0, 2.0, -6.0])
def test_the_same_vector_at_the_same_hook_writes_the_same_greedy_tokens(kind, strength):
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    site = Site(1, kind)
    lm = LanguageModel(tiny_gemma2(), tiny_tokenizer(), name="tiny")
    vector = torch.randn(lm.width(site), generator=torch.Generator().manual_seed(3))
    lab = Lab(lm=lm, saes={}, vectors={"v": vector})
    tokens = lm.to_tokens(PROMPT)
    with steered(lab, [(Push(vector="v", strength=strength, site=str(site)),)], [len(tokens)]):
        ours = lm.generate(PROMPT, max_new_tokens=NEW)[0].tokens

    model = tiny_gemma2()
    bridge = build_bridge_from_module(model, "Gemma2ForCausalLM", hf_config=model.config, model_name="tiny")
    theirs = list(tokens)
    for _ in range(NEW):
        with torch.no_grad():
            logits = bridge.run_with_hooks(
                torch.tensor([theirs]),
                fwd_hooks=[(site.hook_name, lambda h, hook: h + (strength * vector).view(h.shape[2:]))],
            )
        theirs.append(int(logits[0, -1].argmax()))
        if theirs[-1] == lm.eos_id:
            theirs.pop()
            break
    assert list(ours) == theirs[len(tokens) :]
    assert (ours != lm.generate(PROMPT, max_new_tokens=NEW)[0].tokens) == (strength != 0)

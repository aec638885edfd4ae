"""Every claim here is made of every family of the table, on a tiny random model."""

import pytest
import torch

from mistudio.lm import FAMILIES, KINDS, LanguageModel, Site
from tiny_models import TINY, tiny_lm

PROMPT = "the hen had a hat"  # no family goes on from it with one token only
TOKENS = torch.randint(4, 260, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=list(TINY), scope="module")
def lm(request) -> LanguageModel:
    return tiny_lm(request.param)


def sites(lm: LanguageModel) -> list[Site]:
    return [Site(layer, kind) for layer in range(lm.shape.n_layers) for kind in KINDS]


def into_the_stream(lm: LanguageModel, site: Site, z: torch.Tensor) -> torch.Tensor:
    """What attention adds to the residual stream, from its site: the output matrix, and the norm after it in Gemma."""
    path, _ = lm.shape.family.locate(site)
    added = lm.model.get_submodule(path)(z)
    if lm.model.config.model_type.startswith("gemma"):
        layer, _ = lm.shape.family.locate(Site(site.layer, "resid_post"))
        added = lm.model.get_submodule(layer).post_attention_layernorm(added)
    return added


def layers_called(lm: LanguageModel, work) -> set[int]:
    called, handles = set(), []
    for layer in range(lm.shape.n_layers):
        module = lm.model.get_submodule(lm.shape.family.locate(Site(layer, "resid_post"))[0])
        handles.append(module.register_forward_hook(lambda *_, layer=layer: called.add(layer)))
    work()
    for handle in handles:
        handle.remove()
    return called


def test_every_row_of_the_table_is_tested():
    assert set(TINY) == set(FAMILIES)


def test_the_residual_stream_read_is_the_models_own_hidden_state(lm):
    read = lm.run(TOKENS, read=[Site(layer, "resid_post") for layer in range(3)]).activations
    with torch.no_grad():
        own = lm.model(TOKENS, output_hidden_states=True).hidden_states
        assert torch.equal(read[Site(0, "resid_post")], own[1])
        assert torch.equal(read[Site(1, "resid_post")], own[2])
        last_layer = []  # the last hidden state comes after the final norm; the layer itself says what it puts out
        module = lm.model.get_submodule(lm.shape.family.locate(Site(2, "resid_post"))[0])
        handle = module.register_forward_hook(
            lambda _, __, out: last_layer.append(out[0] if isinstance(out, tuple) else out)
        )
        lm.model(TOKENS)
        handle.remove()
    assert torch.equal(read[Site(2, "resid_post")], last_layer[0])
    assert not torch.equal(read[Site(2, "resid_post")], own[3])


@torch.no_grad()
def test_attention_and_mlp_add_up_to_the_residual_stream(lm):
    """resid_post of layer L = resid_post of L-1 + (attn_z through W_O and its norm) + mlp_out, at every layer."""
    read = lm.run(TOKENS, read=sites(lm)).activations
    stream = lm.model(TOKENS, output_hidden_states=True).hidden_states[0]
    for layer in range(lm.shape.n_layers):
        z = Site(layer, "attn_z")
        stream = stream + into_the_stream(lm, z, read[z]) + read[Site(layer, "mlp_out")]
        torch.testing.assert_close(read[Site(layer, "resid_post")], stream, rtol=1e-5, atol=1e-5)
        stream = read[Site(layer, "resid_post")]


def test_the_width_said_is_the_width_read(lm):
    for site, h in lm.run(TOKENS, read=sites(lm)).activations.items():
        assert h.shape == (2, 20, lm.width(site))


def test_a_run_stops_after_the_last_site_read(lm):
    assert layers_called(lm, lambda: lm.run(TOKENS, read=[Site(0, "mlp_out"), Site(1, "attn_z")])) == {0}
    assert layers_called(lm, lambda: lm.run(TOKENS, read=[Site(1, "resid_post")])) == {0, 1}
    assert layers_called(lm, lambda: lm.run(TOKENS, read=[Site(0, "attn_z")], logits=True)) == {0, 1, 2}


def test_the_lm_head_runs_only_for_logits(lm):
    calls = []
    handle = lm.model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    readout = lm.run(TOKENS, read=sites(lm))
    assert readout.logits is None
    assert not calls
    lm.run(TOKENS, logits=True)
    handle.remove()
    assert len(calls) == 1


def test_an_identity_edit_leaves_the_logits_bit_equal(lm):
    plain = lm.run(TOKENS, logits=True).logits
    with lm.editing(dict.fromkeys(sites(lm), torch.clone)):
        edited = lm.run(TOKENS, logits=True).logits
    with lm.editing({site: lambda h: None for site in sites(lm)}):
        only_read = lm.run(TOKENS, logits=True).logits
    assert torch.equal(plain, edited)
    assert torch.equal(plain, only_read)


def test_an_edit_at_any_site_changes_the_logits_and_is_what_a_read_sees(lm):
    plain = lm.run(TOKENS, logits=True, read=sites(lm))
    for site in sites(lm):
        with lm.editing({site: lambda h: h + 0.5}):
            edited = lm.run(TOKENS, read=[site], logits=True)
        assert torch.equal(edited.activations[site], plain.activations[site] + 0.5)
        assert not torch.equal(edited.logits, plain.logits)
    assert torch.equal(lm.run(TOKENS, logits=True).logits, plain.logits)  # the hooks are gone


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_cache_does_not_change_what_is_generated(lm, temperature):
    with_cache, without = (
        lm.generate(PROMPT, max_new_tokens=12, samples=2, temperature=temperature, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert with_cache == without


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_does_not_change_what_is_generated_under_an_edit(lm, kind):
    direction = torch.linspace(-2, 2, lm.width(Site(1, kind)))
    with lm.editing({Site(1, kind): lambda h: h + direction}):
        with_cache, without = (
            lm.generate(PROMPT, max_new_tokens=12, samples=2, temperature=1.0, use_cache=use_cache)
            for use_cache in (True, False)
        )
    assert with_cache == without


def test_greedy_generation_is_the_libraries_own(lm):
    prompt = lm.to_tokens(PROMPT)
    own = lm.model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=1)[
        0, len(prompt) :
    ].tolist()
    ours = lm.generate(PROMPT, max_new_tokens=16)[0].tokens
    assert len(set(ours)) > 1
    assert list(ours) == [token for token in own if token != 1]


def test_token_losses_are_the_models_own_loss(lm):
    losses = lm.token_losses(TOKENS)
    assert losses.shape == (2, 19)
    own = lm.model(TOKENS, labels=TOKENS).loss
    torch.testing.assert_close(losses.mean(), own.detach())

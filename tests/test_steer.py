"""Steering on a tiny random model: what is added, where, and that nothing else changes."""

import dataclasses
import math

import pytest
import torch

from mistudio import config
from mistudio.errors import ConfigError, EditError, ModelError, SAEError
from mistudio.lm import LanguageModel, Site
from mistudio.sae import JumpReLUSAE, SAEConfig
from mistudio.steer import Comparison, Steering, compare, random_controls, steering_edit, steering_vector
from tiny_lab import PROMPT, SITE
from tiny_models import tiny_lm

FEATURES = ((3, 40.0), (0, -25.0))


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return tiny_lm("gemma2")


@pytest.fixture(scope="module")
def sae(lm: LanguageModel) -> JumpReLUSAE:
    return _sae(lm.width(SITE))


def _sae(width: int, hook_name: str | None = str(SITE)) -> JumpReLUSAE:
    sae = JumpReLUSAE(SAEConfig(d_model=width, d_sae=12, hook_name=hook_name))
    rows = torch.randn(12, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
    return sae


def test_strength_zero_writes_the_unsteered_text_token_for_token(lm, sae):
    for temperature, samples in ((0.0, 1), (0.8, 3)):
        found = compare(
            lm, sae, PROMPT, ((3, 0.0), (5, 0.0)), max_new_tokens=12, temperature=temperature, samples=samples
        )
        assert found.steered == found.unsteered
        assert found.delta_norm == 0
        assert found.edits_fired > 0


def test_steering_changes_the_text_and_says_how_hard_it_pushed(lm, sae):
    found = compare(lm, sae, PROMPT, FEATURES, max_new_tokens=12, temperature=0.0)
    assert found.steered != found.unsteered
    expected = (40.0 * sae.W_dec[3] - 25.0 * sae.W_dec[0]).norm().item()
    assert found.delta_norm == pytest.approx(expected, rel=1e-5)
    tokens = torch.tensor([lm.to_tokens(PROMPT)])
    norms = lm.run(tokens, read=(SITE,)).activations[SITE][0, 1:].norm(dim=-1)
    assert found.prompt_norm == pytest.approx(norms.mean().item(), rel=1e-5)


def test_the_edit_adds_the_decoder_rows_at_every_position_bos_included(lm, sae):
    tokens = torch.tensor([lm.to_tokens(PROMPT)])
    before = lm.run(tokens, read=(SITE,)).activations[SITE]
    with lm.editing({SITE: steering_edit(sae, FEATURES)}):
        after = lm.run(tokens, read=(SITE,)).activations[SITE]
    added = 40.0 * sae.W_dec[3] - 25.0 * sae.W_dec[0]
    torch.testing.assert_close(after - before, added.expand_as(after), rtol=1e-4, atol=1e-4)


def test_several_features_add_up_in_any_order(sae):
    both = steering_vector(sae, FEATURES)
    torch.testing.assert_close(both, steering_vector(sae, FEATURES[::-1]))
    torch.testing.assert_close(both, steering_vector(sae, FEATURES[:1]) + steering_vector(sae, FEATURES[1:]))
    torch.testing.assert_close(steering_vector(sae, ((3, 1.0), (3, 2.0))), steering_vector(sae, ((3, 3.0),)))


def test_the_edit_keeps_the_dtype_of_the_activations(sae):
    h = torch.zeros(1, 2, sae.config.d_model, dtype=torch.bfloat16)
    assert steering_edit(sae, FEATURES)(h).dtype == torch.bfloat16


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_key_value_cache_does_not_change_steered_text(lm, sae, temperature):
    with_cache, without = (
        compare(lm, sae, PROMPT, FEATURES, max_new_tokens=12, temperature=temperature, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert with_cache.steered == without.steered
    assert with_cache.unsteered == without.unsteered


def test_every_generated_token_is_steered(lm, sae):
    found = compare(lm, sae, PROMPT, FEATURES, max_new_tokens=8, temperature=0.0)
    text = lm.to_tokens(PROMPT)
    for token in found.steered[0].tokens:  # one full steered pass per token must choose the same token
        with lm.editing({SITE: steering_edit(sae, FEATURES)}):
            logits = lm.run(torch.tensor([text]), logits=True).logits
        assert int(logits[0, -1].argmax()) == token
        text.append(token)
    assert found.edits_fired >= len(found.steered[0].tokens)


def test_samples_repeat_with_the_seed_and_differ_without_it(lm, sae):
    first, again, other = (
        compare(lm, sae, PROMPT, FEATURES, max_new_tokens=12, temperature=1.0, samples=3, seed=seed)
        for seed in (5, 5, 6)
    )
    assert first == again
    assert first.steered != other.steered
    assert len(first.steered) == len(first.unsteered) == 3
    assert len({generation.tokens for generation in first.unsteered}) > 1


def test_comparing_leaves_the_model_and_the_global_random_numbers_as_they_were(lm, sae):
    tokens = torch.tensor([lm.to_tokens(PROMPT)])
    before, state = lm.token_losses(tokens), torch.get_rng_state()
    compare(lm, sae, PROMPT, FEATURES, max_new_tokens=4)
    assert torch.equal(lm.token_losses(tokens), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_comparison_survives_plain_data(lm, sae):
    found = compare(lm, sae, PROMPT, FEATURES, max_new_tokens=4)
    assert config.from_dict(Comparison, config.to_dict(found)) == found
    assert config.from_dict(Steering, {"features": [[3, 40]]}) == Steering(features=((3, 40.0),))


def test_an_empty_prompt_has_no_norm(lm, sae):
    assert compare(lm, sae, "", FEATURES, max_new_tokens=2).prompt_norm is None


def test_the_site_is_the_one_the_sae_names_unless_another_is_given(lm, sae):
    assert compare(lm, sae, PROMPT, FEATURES, max_new_tokens=2).site == str(SITE)
    elsewhere = compare(lm, sae, PROMPT, FEATURES, site=Site(0, "resid_post"), max_new_tokens=2)
    assert elsewhere.site == "layers.0.resid_post"
    with pytest.raises(SAEError, match="give `site`"):
        compare(lm, _sae(lm.shape.d_model, hook_name=None), PROMPT, FEATURES)


def test_wrong_features_strengths_and_samples_are_refused_in_words(lm, sae):
    with pytest.raises(SAEError, match="no feature 12; this SAE has features 0 to 11"):
        compare(lm, sae, PROMPT, ((12, 1.0),))
    for strength in (math.nan, math.inf):
        with pytest.raises(ConfigError, match="finite"):
            compare(lm, sae, PROMPT, ((3, strength),))
    with pytest.raises(ConfigError, match="indices start at 0"):
        Steering(features=((-1, 1.0),))
    with pytest.raises(ConfigError, match="at least one feature"):
        steering_edit(sae, ())
    with pytest.raises(ConfigError, match="same text"):
        compare(lm, sae, PROMPT, FEATURES, temperature=0.0, samples=2)
    with pytest.raises(ModelError, match="temperature"):
        compare(lm, sae, PROMPT, FEATURES, temperature=math.nan)
    with pytest.raises(ModelError):
        compare(lm, sae, PROMPT, FEATURES, site=Site(99, "resid_post"))


def test_an_sae_of_another_width_is_refused_naming_both(lm):
    wrong = _sae(lm.shape.d_model + 3)
    with pytest.raises(SAEError, match=rf"(?s){lm.shape.d_model + 3}.*{lm.shape.d_model}"):
        compare(lm, wrong, PROMPT, FEATURES)
    with (
        pytest.raises(EditError, match=str(lm.shape.d_model + 3)),
        lm.editing({SITE: steering_edit(wrong, FEATURES)}),
    ):
        lm.run(torch.tensor([lm.to_tokens(PROMPT)]), read=(SITE,))


def test_random_controls_are_live_other_features_of_equal_strength(sae):
    uneven = _sae(sae.config.d_model)
    with torch.no_grad():
        uneven.W_dec.mul_(torch.linspace(0.5, 2.0, 12)[:, None])
    density = torch.tensor([0.1, 0, 0.2, 0.3, 0, 0.1, 0.1, 0.5, 0, 0.1, 0.1, 0.1])
    controls = random_controls(uneven, density, ((3, -40.0),), n=7, seed=0)
    assert controls == random_controls(uneven, density, ((3, -40.0),), n=7, seed=0)
    assert controls != random_controls(uneven, density, ((3, -40.0),), n=7, seed=1)
    drawn = [index for control in controls for index, _ in control]
    assert len(set(drawn)) == 7
    assert set(drawn) < {0, 2, 5, 6, 7, 9, 10, 11}
    wanted = steering_vector(uneven, ((3, -40.0),)).norm()
    for control in controls:
        torch.testing.assert_close(steering_vector(uneven, control).norm(), wanted)
        assert control[0][1] < 0


def test_random_controls_of_several_features_never_overlap(sae):
    controls = random_controls(sae, torch.ones(12), FEATURES, n=5, seed=0)
    drawn = [index for control in controls for index, _ in control]
    assert len(set(drawn)) == 10
    assert not {0, 3} & set(drawn)
    with pytest.raises(SAEError, match="12 other live features, but this SAE has 10"):
        random_controls(sae, torch.ones(12), FEATURES, n=6, seed=0)
    with pytest.raises(SAEError, match="shape"):
        random_controls(sae, torch.ones(11), FEATURES, n=1, seed=0)


def test_steering_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Steering(features=FEATURES).features = ()  # type: ignore[misc]

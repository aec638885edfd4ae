"""The brief's own names, the comparison of two SAEs, and the self-check's verdicts."""

import dataclasses

import pytest
import torch

from mistudio.errors import HubError, SAEError
from mistudio.evaluate import evaluate
from mistudio.hub import load
from mistudio.hub.anchors import ANCHORS, anchor_of
from mistudio.hub.compare import compare_saes
from mistudio.hub.formats import save_as
from mistudio.hub.names import resolve
from mistudio.lm import Site
from mistudio.sae import JumpReLUSAE, SAEConfig, Transcoder, TranscoderConfig
from mistudio.steer import compare
from mistudio.studio import sae_self_check_verb
from mistudio.studio.sae_self_check_verb import check
from tiny_models import tiny_lm


def small(seed=0, features=12):
    config = SAEConfig(d_model=8, d_sae=features, hook_name="layers.1.resid_post")
    torch.manual_seed(seed)
    rows = torch.randn(features, 8)
    rows /= rows.norm(dim=1, keepdim=True)
    weights = {"W_enc": torch.randn(8, features), "b_enc": torch.zeros(features), "theta": torch.full((features,), 0.1)}
    return JumpReLUSAE(config, weights | {"W_dec": rows, "b_dec": torch.zeros(8)})


def test_a_neuronpedia_id_alone_means_gemma_2_2b(monkeypatch):
    asked = []
    monkeypatch.setattr(load, "load_sae", lambda name, model: asked.append(resolve(name, model).hf_path))
    load.load_neuronpedia_sae("20-gemmascope-res-16k")
    assert asked == ["google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"]


@pytest.mark.parametrize(("layer", "l0"), [(20, 71), (12, 82), (2, 141), (0, 105), (25, 116)])
def test_the_canonical_sae_of_a_layer_has_the_l0_that_exists(layer, l0):
    assert load.the_one("gemma-2-2b", layer, "residual", "16k", "canonical").l0 == l0


def test_the_l0_of_the_briefs_guide_is_refused_with_what_there_is():
    with pytest.raises(HubError, match=r"22, 41, 82 \(canonical\), 176, 445"):
        load.load_gemma_scope_sae("gemma-2-2b", 12, "residual", "16k", l0=71)


def test_a_downloaded_folder_is_verified_file_by_file(tmp_path):
    folder = tmp_path / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    save_as(small(), folder / "params.npz", "gemma_scope")
    (verified,) = load.verify_sae_download(tmp_path, layer=20)
    assert (verified.d_in, verified.d_sae) == (8, 12)
    with pytest.raises(HubError, match="no weights file of layer 3"):
        load.verify_sae_download(tmp_path, layer=3)


def test_a_path_is_loaded_whatever_its_format(tmp_path):
    save_as(small(), tmp_path / "a.npz", "gemma_scope")
    save_as(small(), tmp_path / "b", "native")
    assert compare_saes(load.load_sae(tmp_path / "a.npz"), load.load_sae(tmp_path / "b")).same_bits


def test_a_permuted_sae_is_not_the_same_but_has_the_same_features():
    a = small()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    weights = {
        name: tensor[..., order] for name, tensor in a.state_dict().items() if name in ("W_enc", "b_enc", "theta")
    }
    b = JumpReLUSAE(a.config, weights | {"W_dec": a.W_dec.detach()[order], "b_dec": a.b_dec.detach()})
    found = compare_saes(a, b)
    assert not found.same_bits
    assert found.cosine_same_index_mean < 0.9
    assert abs(found.cosine_best_match_mean - 1) < 1e-6
    assert found.matched_share == 1.0


def test_one_changed_bit_is_a_difference():
    a, b = small(), small()
    assert compare_saes(a, b).same_bits
    with torch.no_grad():
        b.b_enc[3] = 1e-30
    found = compare_saes(a, b)
    assert not found.same_bits
    assert 0 < found.largest_difference["b_enc"] < 1e-29


def test_saes_of_other_widths_are_compared_by_their_nearest_rows():
    found = compare_saes(small(), small(features=20))
    assert found.cosine_same_index_mean is None
    assert "W_dec" in found.only_in_one


def test_every_anchor_belongs_to_a_released_sae():
    for name, anchor in ANCHORS.items():
        entry = resolve(name)
        assert anchor_of(entry) == anchor
        assert abs(anchor.l0 / entry.l0 - 1) < 0.15
        assert 0 < anchor.explained_variance < 1
    assert anchor_of(dataclasses.replace(entry, path="layer_0/width_16k/average_l0_13")) is None


@pytest.mark.parametrize(("measured", "passed"), [(71, True), (78, True), (79, False), (63, False)])
def test_a_number_passes_within_its_band(measured, passed):
    assert check("L0", measured, 71, "its name", 0.10).passed is passed


def test_the_briefs_loader_takes_over_the_weights_of_a_params_npz(tmp_path):
    save_as(small(seed=1), tmp_path / "layer_20_16k_l0_71.npz", "gemma_scope")
    sae = small(seed=2)
    sae.load_from_gemma_scope(tmp_path / "layer_20_16k_l0_71.npz")
    assert compare_saes(sae, small(seed=1)).same_bits
    with pytest.raises(SAEError, match="want"):
        small(features=20).load_from_gemma_scope(tmp_path / "layer_20_16k_l0_71.npz")


def test_a_transcoder_is_neither_evaluated_nor_steered_with():
    lm = tiny_lm()
    config = TranscoderConfig(
        d_model=lm.shape.d_model, d_sae=6, d_out=lm.shape.d_model, hook_name="layers.1.resid_post"
    )
    transcoder = Transcoder(config, {name: torch.ones(shape) for name, shape in config.shapes().items()})
    site = Site(1, "resid_post")
    with pytest.raises(SAEError, match="transcoder"):
        evaluate(lm, transcoder, site, torch.full((1, 4), 9))
    with pytest.raises(SAEError, match="transcoder"):
        compare(lm, transcoder, "a", ((0, 1.0),), site=site)


def test_the_self_check_measures_through_the_model_and_fails_an_sae_that_is_not_what_its_name_says(monkeypatch):
    entry = dataclasses.replace(resolve("gemma-2-2b/20-gemmascope-res-16k"), model="demo", layer=2)
    config = SAEConfig(d_model=192, d_sae=64, hook_name="layers.2.resid_post")
    monkeypatch.setattr(sae_self_check_verb, "resolve", lambda name: entry)
    monkeypatch.setattr(sae_self_check_verb, "load_sae", lambda name: JumpReLUSAE(config))
    result = sae_self_check_verb.run(sae_self_check_verb.Config(name="x", text="stories", rows=2, context=32))
    (l0,) = result.checks
    assert (l0.known, l0.source) == (71, "the SAE's name")
    assert 0 < l0.measured < 64
    assert l0.passed == (abs(l0.measured - 71) <= 0.25 * 71)
    assert sae_self_check_verb.failed(result) == (not l0.passed)
    assert "demo" not in result.sae


def test_a_transcoder_has_no_self_check(monkeypatch):
    with pytest.raises(HubError, match="no SAE of one site"):
        sae_self_check_verb.run(
            sae_self_check_verb.Config(name="gemma-2-2b/19-gemmascope-transcoder-16k", text="stories")
        )

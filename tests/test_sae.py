"""The SAE: its two forms, folding, and the strict reader."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistudio.errors import ConfigError, SAEError
from mistudio.sae import JumpReLUSAE, SAEConfig, initial_weights


def small(threshold=0.05, double=True, **changes):
    """A random SAE, D = 6 and F = 20, with biases, in float64."""
    config = SAEConfig(d_model=6, d_sae=20, **changes)
    sae = JumpReLUSAE(config, initial_weights(config, seed=1, threshold=threshold))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * torch.randn(20, generator=generator))
        sae.b_dec.copy_(0.3 * torch.randn(6, generator=generator))
        sae.theta.add_(0.1 * torch.rand(20, generator=generator))
    return sae.double() if double else sae


def rows(*shape):
    return torch.randn(*shape, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_the_briefs_script_works():
    sae = JumpReLUSAE(SAEConfig(d_model=16, d_sae=64, hook_name="layers.2.resid_post", hook_layer=2))
    reconstructed, features = sae(torch.randn(3, 5, 16))
    assert reconstructed.shape == (3, 5, 16)
    assert features.shape == (3, 5, 64)
    assert torch.equal(sae.feature(7), sae.W_dec[7])


def test_forward_is_the_dense_mathematics():
    for pre_encoder_bias in (False, True):
        sae, x = small(pre_encoder_bias=pre_encoder_bias), rows(4)
        z = (x - sae.b_dec if pre_encoder_bias else x) @ sae.W_enc + sae.b_enc
        f = z * (z > sae.theta)
        x_hat, features = sae(x)
        torch.testing.assert_close(features, f)
        torch.testing.assert_close(x_hat, f @ sae.W_dec + sae.b_dec)


def test_weights_start_as_gemma_scopes_do():
    sae = JumpReLUSAE(SAEConfig(d_model=32, d_sae=100))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(100))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()
    torch.testing.assert_close(sae.threshold, torch.full((100,), 0.001))


def test_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone():
    config = SAEConfig(d_model=4, d_sae=8)
    before = torch.get_rng_state()
    assert torch.equal(initial_weights(config, seed=5)["W_dec"], initial_weights(config, seed=5)["W_dec"])
    assert not torch.equal(initial_weights(config, seed=5)["W_dec"], initial_weights(config, seed=6)["W_dec"])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("pre_encoder_bias", [False, True])
@pytest.mark.parametrize("log_threshold", [False, True])
def test_folding_changes_units_and_nothing_else(pre_encoder_bias, log_threshold):
    sae = small(pre_encoder_bias=pre_encoder_bias, log_threshold=log_threshold, scale=7.3)
    raw = 7.3 * rows(50)
    folded = sae.fold()
    x_hat, f = sae(raw / 7.3)
    raw_hat, raw_f = folded(raw)
    assert folded.folded
    assert not sae.folded
    torch.testing.assert_close(raw_f, 7.3 * f, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(raw_hat, 7.3 * x_hat, atol=1e-12, rtol=1e-12)
    assert torch.equal(raw_f > 0, f > 0)
    torch.testing.assert_close(folded.theta, 7.3 * sae.threshold)


def test_folding_copies_the_weights():
    sae = small(scale=2.0)
    folded = sae.fold()
    with torch.no_grad():
        folded.W_dec.zero_()
    assert sae.W_dec.any()


def test_a_wrong_fold_of_the_bias_would_be_seen():
    sae = small(pre_encoder_bias=True, scale=7.3)
    folded = sae.fold()
    with torch.no_grad():
        folded.b_enc.add_(7.3 * (sae.b_dec @ sae.W_enc))  # the term left out
    assert not torch.allclose(folded(7.3 * rows(50))[0], 7.3 * sae(rows(50))[0], atol=1e-3)


def test_thresholds_are_compared_in_float32_whatever_the_dtype_of_x():
    config = SAEConfig(d_model=1, d_sae=1)
    one = {"W_enc": [[1.001]], "b_enc": [0.0], "theta": [1.0005], "W_dec": [[1.0]], "b_dec": [0.0]}
    sae = JumpReLUSAE(config, {name: torch.tensor(value) for name, value in one.items()})
    x_hat, f = sae(torch.ones(1, 1, dtype=torch.bfloat16))
    assert f.item() > 0  # in bfloat16 both 1.001 and 1.0005 round to 1
    assert f.dtype == torch.float32
    assert x_hat.dtype == torch.bfloat16


def test_feature_out_of_range_is_refused():
    with pytest.raises(SAEError, match="features 0 to 19"):
        small().feature(20)


def test_weights_of_another_shape_are_refused():
    weights = initial_weights(SAEConfig(d_model=6, d_sae=20))
    with pytest.raises(SAEError, match=r"W_enc has shape \[6, 20\]; .* want \[5, 20\]"):
        JumpReLUSAE(SAEConfig(d_model=5, d_sae=20), weights)
    del weights["b_dec"]
    with pytest.raises(SAEError, match="found W_dec, W_enc, b_enc, theta"):
        JumpReLUSAE(SAEConfig(d_model=6, d_sae=20), weights)


@pytest.mark.parametrize("bad", [{"d_model": 0, "d_sae": 4}, {"d_model": 4, "d_sae": 4, "scale": -1.0}])
def test_impossible_configurations_are_refused(bad):
    with pytest.raises(ConfigError):
        SAEConfig(**bad)


def saved(tmp_path):
    sae = small(double=False, scale=3.0, pre_encoder_bias=True, hook_name="layers.2.resid_post", hook_layer=2).fold()
    sae.save(tmp_path / "sae")
    return sae, tmp_path / "sae"


def test_a_saved_sae_loads_bit_for_bit(tmp_path):
    sae, folder = saved(tmp_path)
    loaded = JumpReLUSAE.load(folder)
    assert loaded.config == sae.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), sae.parameters(), strict=True))


def test_saving_the_training_form_is_refused(tmp_path):
    for changes in ({"scale": 1.0}, {"pre_encoder_bias": True}, {"log_threshold": True}):
        with pytest.raises(SAEError, match=r"sae.fold\(\).save"):
            small(**changes).save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("threshold", lambda t: t * 0, "20 thresholds are not positive"),
        ("W_dec", lambda t: t * 1.5, "must have norm 1"),
        ("b_enc", lambda t: t * math.nan, "b_enc holds NaN"),
        ("W_enc", lambda t: t.double(), "W_enc is torch.float64"),
        ("W_enc", lambda t: t.T.contiguous(), r"W_enc has shape \[20, 6\]"),
    ],
)
def test_an_unsound_tensor_is_refused(tmp_path, name, spoil, message):
    _, folder = saved(tmp_path)
    tensors = load_file(folder / "sae.safetensors")
    tensors[name] = spoil(tensors[name])
    save_file(tensors, folder / "sae.safetensors")
    with pytest.raises(SAEError, match=message):
        JumpReLUSAE.load(folder)


def test_missing_or_damaged_files_are_named(tmp_path):
    with pytest.raises(SAEError, match="holds no SAE"):
        JumpReLUSAE.load(tmp_path)
    _, folder = saved(tmp_path)
    tensors = load_file(folder / "sae.safetensors")
    save_file({**tensors, "extra": torch.zeros(1)}, folder / "sae.safetensors")
    with pytest.raises(SAEError, match="extra"):
        JumpReLUSAE.load(folder)
    (folder / "sae.safetensors").write_bytes(b"\x80\x04not a tensor file")
    with pytest.raises(SAEError, match="damaged"):
        JumpReLUSAE.load(folder)
    (folder / "sae.safetensors").unlink()
    with pytest.raises(SAEError, match="missing"):
        JumpReLUSAE.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d | {"version": 2}, "version 2"),
        (lambda d: d | {"format": "other"}, "not an SAE of mistudio"),
        (lambda d: d | {"more": 1}, "not an SAE of mistudio"),
        (lambda d: d | {"config": d["config"] | {"colour": "red"}}, "unknown key colour"),
        (lambda d: d | {"config": d["config"] | {"scale": 2.0}}, "training form"),
        (lambda d: [d], "not an SAE of mistudio"),
    ],
)
def test_an_unknown_description_is_refused(tmp_path, change, message):
    _, folder = saved(tmp_path)
    path = folder / "sae.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(SAEError, match=message):
        JumpReLUSAE.load(folder)

"""The architectures against their closed forms, one number at a time in float64, and what all of them share."""

import pytest
import torch

from mistudio.errors import ConfigError, SAEError
from mistudio.sae import ARCHITECTURES, SAE, JumpReLUSAE

D, F, E = 6, 20, 5
FIELDS = {"topk": {"k": 4}, "transcoder": {"d_out": E, "skip": True}}


def make(architecture, seed=0, dtype=torch.float32, unit_rows=True, **fields):
    """A random SAE of an architecture: D = 6, F = 20, biases and thresholds in the middle of the pre-activations."""
    cls = ARCHITECTURES[architecture]
    config = cls.Config(**({"d_model": D, "d_sae": F} | FIELDS.get(architecture, {}) | fields))
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in config.shapes().items()}
    if unit_rows:
        weights["W_dec"] /= weights["W_dec"].norm(dim=1, keepdim=True)
    if "theta" in weights:
        weights["theta"] = weights["theta"].abs() + 0.1
    return cls(config, {name: weight.to(dtype) for name, weight in weights.items()})


def rows(*shape, dtype=torch.float64, d=D):
    return torch.randn(*shape, d, generator=torch.Generator().manual_seed(9)).to(dtype)


def closed_form(sae, x):
    """(f, x̂) of rows [B, D], one row and one feature at a time."""
    p = {name: weight.detach().double() for name, weight in sae.named_parameters()}
    f = torch.zeros(len(x), F, dtype=torch.float64)
    for row in range(len(x)):
        a = [float(x[row] @ p["W_enc"][:, i]) for i in range(F)]
        z = [a[i] + float(p["b_enc"][i]) for i in range(F)] if "b_enc" in p else None
        for i in range(F):
            match type(sae).__name__:
                case "JumpReLUSAE" | "Transcoder":
                    f[row, i] = z[i] if z[i] > p["theta"][i] else 0
                case "BatchTopKSAE":
                    f[row, i] = z[i] if z[i] > p["theta"] else 0
                case "ReLUSAE":
                    f[row, i] = max(0.0, z[i])
                case "TopKSAE":
                    f[row, i] = max(0.0, z[i]) if sum(other > z[i] for other in z) < sae.config.k else 0
                case "GatedSAE":
                    magnitude = float(p["r_mag"][i].exp()) * a[i] + float(p["b_mag"][i])
                    f[row, i] = max(0.0, magnitude) if a[i] + p["b_gate"][i] > 0 else 0
    x_hat = f @ p["W_dec"] + p["b_dec"]
    return f, x_hat + x.double() @ p["W_skip"] if "W_skip" in p else x_hat


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_is_the_closed_form(architecture):
    sae, x = make(architecture, dtype=torch.float64), rows(30)
    f, x_hat = closed_form(sae, x)
    got_x_hat, got_f = sae(x)
    torch.testing.assert_close(got_f, f)
    torch.testing.assert_close(got_x_hat, x_hat)
    torch.testing.assert_close(sae.encode(x), f)
    assert 0 < (f > 0).sum() < f.numel()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_contract_holds(architecture):
    sae = make(architecture)
    assert isinstance(sae, SAE)
    assert sae.folded
    assert (sae.d_in, sae.d_out) == (D, E if architecture == "transcoder" else D)
    assert torch.equal(sae.feature(7), sae.W_dec[7])
    with pytest.raises(SAEError, match="features 0 to 19"):
        sae.feature(20)
    x_hat, f = sae(rows(2, 3, dtype=torch.float32))
    assert f.shape == (2, 3, F)
    assert x_hat.shape == (2, 3, sae.d_out)
    assert (f >= 0).all()
    one_hat, one = sae(rows(2, 3, dtype=torch.float32)[1, 2])
    torch.testing.assert_close(one, f[1, 2])
    torch.testing.assert_close(one_hat, x_hat[1, 2])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_computes_in_float32_whatever_the_dtype_of_x_or_of_the_matrices(architecture):
    sae, x = make(architecture), rows(4, dtype=torch.bfloat16)
    x_hat, f = sae(x)
    assert (x_hat.dtype, f.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(f, sae.encode(x.float()))
    half = make(architecture)
    half.W_enc.data, half.W_dec.data = half.W_enc.data.bfloat16(), half.W_dec.data.bfloat16()
    assert half.encode(x).dtype == torch.float32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_wrong_weight_is_refused(architecture):
    sae = make(architecture)
    weights = {name: weight.detach() for name, weight in sae.named_parameters()}
    with pytest.raises(SAEError, match="W_dec has shape"):
        type(sae)(sae.config, weights | {"W_dec": weights["W_dec"].T})
    with pytest.raises(SAEError, match="colour"):
        type(sae)(sae.config, weights | {"colour": torch.zeros(1)})
    del weights["b_dec"]
    with pytest.raises(SAEError, match=r"b_dec.*; found"):
        type(sae)(sae.config, weights)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in ("jumprelu", "transcoder")])
@pytest.mark.parametrize("training", [{"scale": 2.0}, {"pre_encoder_bias": True}, {"log_threshold": True}])
def test_only_jumprelu_saes_and_transcoders_have_a_training_form(architecture, training):
    with pytest.raises(ConfigError, match="training JumpReLU SAEs only"):
        make(architecture, **training)


def test_architectures_are_final_and_sae_is_abstract():
    for cls in ARCHITECTURES.values():
        assert cls.__bases__ == (SAE,)
        assert not cls.__abstractmethods__
    with pytest.raises(TypeError, match="abstract"):
        SAE()


@pytest.mark.parametrize("architecture", ["jumprelu", "batchtopk", "transcoder"])
def test_a_feature_at_its_threshold_is_off(architecture):
    sae = make(architecture)
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.copy_(sae.theta.expand(F))
    assert not sae.encode(rows(2, dtype=torch.float32)).any()
    sae.b_enc.data *= 1 + 1e-6
    assert sae.encode(rows(2, dtype=torch.float32)).all()


def test_topk_keeps_fewer_where_fewer_are_positive():
    sae = make("topk", k=F)
    with torch.no_grad():
        sae.b_enc.fill_(-2.0)
    z = rows(50, dtype=torch.float32) @ sae.W_enc - 2
    assert torch.equal(sae.encode(rows(50, dtype=torch.float32)) > 0, z > 0)


def test_topk_is_the_same_whether_relu_comes_before_or_after_the_selection():
    sae, x = make("topk", k=12), rows(50, dtype=torch.float32)
    with torch.no_grad():
        sae.b_enc.sub_(1.0)
    z = x @ sae.W_enc + sae.b_enc
    values, indices = z.topk(12)
    assert (values < 0).any()
    assert torch.equal(sae.encode(x), torch.zeros(50, F).scatter(1, indices, values.relu()))


@pytest.mark.parametrize("k", [0, F + 1])
def test_an_impossible_k_is_refused(k):
    with pytest.raises(ConfigError, match="k must be between 1 and d_sae"):
        make("topk", k=k)


def test_batchtopk_at_inference_does_not_look_at_neighbours():
    sae, x = make("batchtopk", dtype=torch.float64), rows(8)
    torch.testing.assert_close(sae.encode(x)[3:4], sae.encode(x[3:4]))


def test_batchtopk_is_a_jumprelu_with_equal_thresholds():
    sae, x = make("batchtopk"), rows(8, dtype=torch.float32)
    jumprelu = make("jumprelu")
    weights = {name: weight.detach() for name, weight in sae.named_parameters()}
    jumprelu = JumpReLUSAE(jumprelu.config, weights | {"theta": weights["theta"].expand(F)})
    assert torch.equal(sae.encode(x), jumprelu.encode(x))


def test_a_transcoder_without_skip_is_its_features_alone():
    sae, x = make("transcoder", skip=False, d_out=D), rows(4, dtype=torch.float32)
    y, f = sae(x)
    assert torch.equal(y, sae.decode(f))
    assert "W_skip" not in sae.state_dict()

"""Evaluation on a tiny random model, against closed forms and against plain PyTorch hooks."""

import dataclasses
import math

import pytest
import torch
from safetensors.torch import save_file

from mistudio.errors import ConfigError, ModelError, SAEError, TextError
from mistudio.evaluate import EvalReport, FeatureStats, evaluate, plot_activation_frequency
from mistudio.lm import LanguageModel, Site
from mistudio.sae import JumpReLUSAE, SAEConfig
from tiny_models import TINY, gpt2_tokenizer, tiny_lm

SITE = Site(1, "resid_post")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return tiny_lm("gemma2")


@pytest.fixture(scope="module")
def rows(lm: LanguageModel) -> torch.Tensor:
    """Five rows of twelve tokens: BOS first, an EOS inside, padding behind the last row. Both ablations hurt."""
    low = max(lm.special_ids) + 1
    tokens = torch.randint(low, low + 40, (5, 12), generator=torch.Generator().manual_seed(3))
    tokens[:, 0] = lm.bos_id
    tokens[1, 5] = tokens[3, 9] = lm.eos_id
    tokens[4, 7:] = lm.pad_id
    return tokens


@pytest.fixture(scope="module")
def activations(lm: LanguageModel, rows: torch.Tensor) -> torch.Tensor:
    """The raw rows [B, D] at the site, special positions left out."""
    return lm.run(rows, read=(SITE,)).activations[SITE][~lm.is_special(rows)]


def _sae(width: int, d_sae: int, seed: int = 0) -> JumpReLUSAE:
    """An SAE of random weights whose features fire now and then."""
    sae = JumpReLUSAE(SAEConfig(d_model=width, d_sae=d_sae))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.W_dec):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / width**0.5)
        sae.theta.fill_(0.5)
    return sae


def _exact(width: int) -> JumpReLUSAE:
    """x_hat = x: one feature for each sign of each coordinate."""
    sae = JumpReLUSAE(SAEConfig(d_model=width, d_sae=2 * width))
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    with torch.no_grad():
        sae.W_enc.copy_(both.T)
        sae.W_dec.copy_(both)
        sae.theta.fill_(1e-30)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


def _constant(value: torch.Tensor) -> JumpReLUSAE:
    """x_hat = value, whatever x is; no feature ever fires."""
    sae = JumpReLUSAE(SAEConfig(d_model=value.shape[0], d_sae=6))
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.zero_()
        sae.theta.fill_(1.0)
        sae.b_dec.copy_(value)
    return sae


def _close(a: EvalReport, b: EvalReport, rel: float = 1e-5) -> None:
    for field in dataclasses.fields(EvalReport):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert x == (pytest.approx(y, rel=rel, abs=1e-6) if isinstance(x, float) else y), field.name


def test_an_exact_reconstruction_costs_nothing_and_recovers_everything(lm, rows):
    report, stats = evaluate(lm, _exact(lm.width(SITE)), SITE, rows)
    assert report.fvu == 0
    assert report.delta_loss == 0
    assert (report.recovered_zero, report.recovered_mean) == (1.0, 1.0)
    assert report.l0 == pytest.approx(lm.width(SITE))  # of ±x_j exactly one is above 0
    assert stats.density.sum().item() == pytest.approx(report.l0)


def test_an_sae_that_always_answers_the_mean_has_fvu_one_and_equals_mean_ablation(lm, rows, activations):
    report, _ = evaluate(lm, _constant(activations.double().mean(0).float()), SITE, rows)
    assert report.fvu == pytest.approx(1, rel=1e-6)
    assert report.loss_spliced == pytest.approx(report.loss_mean, rel=1e-6)
    assert report.recovered_mean == pytest.approx(0, abs=1e-3)
    assert (report.l0, report.dead, report.dead_fraction, report.dense) == (0, 6, 1.0, 0)


def test_an_sae_that_answers_zero_equals_zero_ablation(lm, rows, activations):
    report, _ = evaluate(lm, _constant(torch.zeros(lm.width(SITE))), SITE, rows)
    assert report.loss_spliced == report.loss_zero
    x = activations.double()
    assert report.fvu == pytest.approx((x.square().sum() / (x - x.mean(0)).square().sum()).item(), rel=1e-9)


def test_every_number_equals_dense_mathematics_over_the_ordinary_positions(lm, rows, activations):
    sae = _sae(lm.width(SITE), 16)
    report, stats = evaluate(lm, sae, SITE, rows, batch_rows=2)
    with torch.no_grad():
        x_hat, f = sae(activations)
    x, x_hat = activations.double(), x_hat.double()
    assert report.tokens == stats.tokens == len(x) == 5 * 12 - 5 - 2 - 5
    assert report.fvu == pytest.approx(((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item(), rel=1e-6)
    assert 0 < report.l0 == pytest.approx((f > 0).sum(1).double().mean().item())
    assert torch.equal(stats.count, (f > 0).sum(0))
    torch.testing.assert_close(stats.max, f.amax(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.mean, f.sum(0) / (f > 0).sum(0).clamp(min=1), rtol=1e-5, atol=1e-6)
    assert report.dense == int(((f > 0).double().mean(0) > 0.1).sum())


def test_losses_equal_those_of_plain_hooks_on_the_hugging_face_model(lm, rows):
    sae = _sae(lm.width(SITE), 16)
    report, _ = evaluate(lm, sae, SITE, rows)
    ordinary = ~lm.is_special(rows)
    assert report.loss_clean == pytest.approx(_hooked_loss(lm, rows, lambda h: h), rel=1e-5)

    def splice(h: torch.Tensor) -> torch.Tensor:
        return torch.where(ordinary[..., None], sae(h)[0], h)

    assert report.loss_spliced == pytest.approx(_hooked_loss(lm, rows, splice), rel=1e-5)
    assert report.loss_zero == pytest.approx(_hooked_loss(lm, rows, lambda h: h * ~ordinary[..., None]), rel=1e-5)
    assert report.delta_loss == report.loss_spliced - report.loss_clean != 0


@torch.no_grad()
def _hooked_loss(lm: LanguageModel, rows: torch.Tensor, edit) -> float:
    """Mean cross-entropy over targets that are neither BOS nor PAD, through torch's own hooks and float64 softmax."""

    def hook(module, args, output):
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    handle = lm.model.model.layers[SITE.layer].register_forward_hook(hook)
    try:
        logits = lm.model(input_ids=rows, use_cache=False).logits[:, :-1].double()
    finally:
        handle.remove()
    targets = rows[:, 1:]
    losses = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return losses[(targets != lm.bos_id) & (targets != lm.pad_id)].mean().item()


def test_predictions_of_eos_count_and_those_of_padding_do_not(lm, rows):
    report, _ = evaluate(lm, _sae(lm.width(SITE), 4), SITE, rows)
    assert report.predictions == 5 * 11 - 5


def test_where_bos_eos_and_padding_are_one_token_none_of_them_is_predicted():
    lm = LanguageModel(TINY["gpt2"](0), gpt2_tokenizer(), name="tiny-gpt2")
    rows = torch.tensor([[0, 9, 8, 0, 7, 6], [0, 5, 4, 3, 0, 0]])
    report, _ = evaluate(lm, _sae(lm.width(SITE), 4), SITE, rows)
    assert (report.tokens, report.predictions) == (7, 7)


def test_the_report_does_not_depend_on_how_rows_are_batched(lm, rows):
    sae = _sae(lm.width(SITE), 16)
    whole, whole_stats = evaluate(lm, sae, SITE, rows)
    for batch_rows in (1, 2, 3):
        report, stats = evaluate(lm, sae, SITE, rows, batch_rows=batch_rows)
        _close(report, whole)
        assert torch.equal(stats.count, whole_stats.count)


def test_a_batch_of_nothing_but_padding_changes_nothing_but_the_row_count(lm, rows):
    sae = _sae(lm.width(SITE), 16)
    padded = torch.cat([rows, torch.full((1, 12), lm.pad_id)])
    report, _ = evaluate(lm, sae, SITE, padded, batch_rows=1)
    _close(dataclasses.replace(report, rows=5), evaluate(lm, sae, SITE, rows, batch_rows=1)[0])


def test_evaluation_works_at_the_other_sites_and_their_own_width(lm, rows):
    for kind in ("mlp_out", "attn_z"):
        site = Site(0, kind)
        report, _ = evaluate(lm, _sae(lm.width(site), 8), site, rows)
        assert report.site == f"layers.0.{kind}"


def test_wrong_use_is_refused_in_words(lm, rows):
    width = lm.width(SITE)
    with pytest.raises(SAEError, match=r"sae\.fold\(\)"):
        evaluate(lm, JumpReLUSAE(SAEConfig(d_model=width, d_sae=4, scale=2.0)), SITE, rows)
    with pytest.raises(SAEError, match=rf"width {width + 1}.* {width} at layers"):
        evaluate(lm, _sae(width + 1, 4), SITE, rows)
    with pytest.raises(TextError, match="nothing to evaluate on"):
        evaluate(lm, _sae(width, 4), SITE, torch.full((2, 4), lm.bos_id))
    with pytest.raises(TextError, match="nothing to evaluate on"):
        evaluate(lm, _sae(width, 4), SITE, rows[:0])
    with pytest.raises(TextError, match="nothing to predict"):
        evaluate(lm, _sae(width, 4), SITE, rows[:, 1:2])
    with pytest.raises(TextError, match="nothing to predict"):
        evaluate(lm, _sae(width, 4), SITE, torch.tensor([[9, lm.pad_id, lm.pad_id]]))
    with pytest.raises(ConfigError, match="batch_rows"):
        evaluate(lm, _sae(width, 4), SITE, rows, batch_rows=0)
    with pytest.raises(ModelError):
        evaluate(lm, _sae(width, 4), Site(99, "resid_post"), rows)


def test_numbers_that_are_not_finite_are_errors(lm, rows):
    sae = _sae(lm.width(SITE), 4)
    with torch.no_grad():
        sae.b_dec[0] = math.nan
    with pytest.raises(SAEError, match="not finite"):
        evaluate(lm, sae, SITE, rows)
    with pytest.raises(ModelError, match="do not vary"):
        evaluate(lm, _sae(lm.width(SITE), 4), SITE, torch.tensor([[lm.bos_id, max(lm.special_ids) + 1]]))
    report, _ = evaluate(lm, _sae(lm.width(SITE), 4), SITE, rows)
    for value in (math.nan, math.inf):
        with pytest.raises(SAEError, match="delta_loss"):
            dataclasses.replace(report, delta_loss=value)


def test_reports_and_statistics_survive_their_files(lm, rows, tmp_path):
    report, stats = evaluate(lm, _sae(lm.width(SITE), 16), SITE, rows)
    report.save(tmp_path)
    stats.save(tmp_path)
    assert EvalReport.load(tmp_path) == report
    again = FeatureStats.load(tmp_path)
    assert again.tokens == stats.tokens
    for name in ("count", "mean", "max", "density"):
        assert torch.equal(getattr(again, name), getattr(stats, name))


def _stats(**changes) -> FeatureStats:
    parts = {
        "tokens": 10_000,
        "count": torch.tensor([0, 3, 5000]),
        "mean": torch.tensor([0.0, 1.0, 2.0]),
        "max": torch.tensor([0.0, 1.5, 9.0]),
    }
    return FeatureStats(**(parts | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": 0},
        {"tokens": 4999},
        {"count": torch.tensor([0, -1, 2])},
        {"mean": torch.tensor([0.0, math.nan, 2.0])},
        {"max": torch.tensor([0.0, 0.5, 9.0])},
    ],
)
def test_impossible_statistics_are_refused(changes):
    with pytest.raises(SAEError, match="cannot be right"):
        _stats(**changes)


def test_damaged_or_foreign_statistics_files_are_refused(tmp_path):
    with pytest.raises(SAEError, match="mistudio eval"):
        FeatureStats.load(tmp_path)
    path = _stats().save(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(SAEError, match="not a whole safetensors file"):
        FeatureStats.load(tmp_path)
    good = {"count": torch.tensor([1]), "mean": torch.tensor([1.0]), "max": torch.tensor([1.0])}
    label = {"format": "mistudio.feature_stats.1", "tokens": "10"}
    for tensors, metadata in (
        ({**good, "extra": torch.ones(1)}, label),
        ({**good, "count": torch.tensor([1.0])}, label),
        ({"count": good["count"]}, label),
        ({**good, "max": torch.ones(2)}, label),
        ({name: tensor[None] for name, tensor in good.items()}, label),
        (good, {**label, "format": "mistudio.feature_stats.2"}),
        (good, None),
        (good, {**label, "tokens": "ten"}),
    ):
        save_file(tensors, path, metadata)
        with pytest.raises(SAEError):
            FeatureStats.load(tmp_path)
    (tmp_path / "evaluation.json").write_text('{"l0": 3.0, "invented": 1}')
    with pytest.raises(ConfigError, match="invented"):
        EvalReport.load(tmp_path)


def test_the_frequency_plot_is_a_png_and_needs_a_live_feature(tmp_path):
    path = plot_activation_frequency(_stats(), tmp_path / "frequency.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    always = FeatureStats(tokens=1, count=torch.tensor([1]), mean=torch.ones(1), max=torch.ones(1))
    plot_activation_frequency(always, tmp_path / "one.png")
    zeros = torch.zeros(3)
    with pytest.raises(SAEError, match="No feature fired"):
        plot_activation_frequency(_stats(count=zeros.long(), mean=zeros, max=zeros), tmp_path / "none.png")

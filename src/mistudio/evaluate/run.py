"""`evaluate`: what an SAE's reconstruction keeps, measured on the activations and by what it costs the language model.

Two sweeps over the text. The first runs each batch clean (reading the site), then with the reconstruction and with
zeros in place of the activations; the second with their mean, which is known only after the first. All three
interventions are one edit: put these rows at the ordinary positions. BOS, EOS and PAD positions keep their
activations, because SAEs are never trained on them and the norm of BOS alone can drown everything else.

Which predictions count: those whose *target* is not BOS or PAD. Predicting EOS is part of modelling text and counts,
unless a tokenizer gives EOS the id of BOS or PAD. The prediction made at BOS counts too; nothing before it is edited,
so it is equal in every arm and dilutes differences by 1 in T.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mistudio.errors import ConfigError, ModelError, SAEError, TextError
from mistudio.evaluate.report import DENSE_ABOVE, EvalReport, FeatureStats
from mistudio.lm import LanguageModel, Site
from mistudio.metrics import FeatureSums, LossSums, ReconstructionSums
from mistudio.progress import progress_bar
from mistudio.sae import SAE, Transcoder

FEATURE_VALUES_AT_ONCE = 2**24
"""Rows are encoded in pieces of at most this many feature values (64 MiB of float32)."""


@torch.no_grad()
def evaluate(
    lm: LanguageModel, sae: SAE, site: Site, rows: Int[Tensor, "N T"], *, batch_rows: int = 16
) -> tuple[EvalReport, FeatureStats]:
    """The numbers of `sae` at `site` on rows of held-out tokens, and those of each of its features.

    Costs four forward passes of the language model over `rows` and one of the SAE. Sums are float64; the
    reconstruction is computed in float32 and spliced in the model's dtype. The same rows in other batches give the
    same report, to rounding.

    SAEError: the SAE is in normalised units, of another width, or a number comes out not finite. TextError: `rows`
    hold no ordinary token or no prediction. ModelError: the site does not exist, or its activations are not finite or
    do not vary.
    """
    _check(lm, sae, site, rows, batch_rows)
    clean = spliced = zero = mean = LossSums.empty()
    reconstruction, features = ReconstructionSums.empty(sae.config.d_model), FeatureSums.empty(sae.config.d_sae)
    with progress_bar(f"evaluate {site}", 2 * rows.numel(), "tokens") as bar:
        for tokens, ordinary, counted in _batches(lm, rows, batch_rows):
            x, losses = _read(lm, site, tokens, ordinary)
            clean += LossSums.of(losses, counted)
            x_hat, batch_features = _reconstruct(sae, x)
            reconstruction += ReconstructionSums.of(x, x_hat)
            features += batch_features
            spliced += LossSums.of(_losses_with(lm, site, tokens, ordinary, x_hat), counted)
            zero += LossSums.of(_losses_with(lm, site, tokens, ordinary, torch.zeros_like(x_hat)), counted)
            bar.advance(tokens.numel())
        for tokens, ordinary, counted in _batches(lm, rows, batch_rows):
            mean += LossSums.of(_losses_with(lm, site, tokens, ordinary, reconstruction.mean), counted)
            bar.advance(tokens.numel(), note="mean ablation")
    report = _report(lm, site, rows.shape[0], reconstruction, features, (clean, spliced, zero, mean))
    return report, FeatureStats.of(features)


def _check(lm: LanguageModel, sae: SAE, site: Site, rows: Tensor, batch_rows: int) -> None:
    lm.check(site)
    if batch_rows < 1:
        raise ConfigError(f"batch_rows is {batch_rows}; it must be at least 1.")
    if isinstance(sae, Transcoder):
        raise SAEError("A transcoder does not reconstruct what it reads; give an SAE of one site.")
    if sae.config.scale is not None:
        raise SAEError(
            f"This SAE reads normalised rows (scale {sae.config.scale}), but activations are raw; give `sae.fold()`."
        )
    if sae.config.d_model != lm.width(site):
        raise SAEError(
            f"The SAE takes rows of width {sae.config.d_model}, but {lm.name} has {lm.width(site)} at {site}."
        )
    if rows.numel() == 0 or not bool((~lm.is_special(rows.to(lm.device))).any()):
        raise TextError(f"There is nothing to evaluate on: {rows.shape[0]} rows hold no token but BOS, EOS and PAD.")
    if not bool(_counted(lm, rows.to(lm.device)).any()):
        raise TextError("There is nothing to predict: in no row does a token other than BOS and PAD follow another.")


def _counted(lm: LanguageModel, tokens: Int[Tensor, "N T"]) -> Bool[Tensor, "N P"]:
    """Which of the T-1 predictions of each row count: those of any token but BOS and PAD."""
    return ~torch.isin(tokens[:, 1:], torch.tensor([lm.bos_id, lm.pad_id], device=tokens.device))


def _batches(lm: LanguageModel, rows: Tensor, batch_rows: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens [N, T], the positions that are ordinary [N, T], and the predictions that count [N, T-1]."""
    for tokens in rows.split(batch_rows):
        tokens = tokens.to(lm.device)
        yield tokens, ~lm.is_special(tokens), _counted(lm, tokens)


def _read(
    lm: LanguageModel, site: Site, tokens: Int[Tensor, "N T"], ordinary: Bool[Tensor, "N T"]
) -> tuple[Float[Tensor, "B W"], Float[Tensor, "N P"]]:
    """The activations at the ordinary positions and the losses of the untouched model, from one forward pass."""
    seen: list[Tensor] = []

    def keep(h: Tensor) -> None:
        seen.append(h[ordinary])

    with lm.editing({site: keep}):
        losses = lm.token_losses(tokens)
    if not bool(seen[0].isfinite().all()):
        raise ModelError(
            f"{lm.name} has activations at {site} that are not finite; try another dtype, such as float32."
        )
    return seen[0], losses


def _reconstruct(sae: SAE, x: Float[Tensor, "B W"]) -> tuple[Float[Tensor, "B W"], FeatureSums]:
    """The reconstruction in float32, and the sums over its features, a few rows at a time."""
    sums, parts = FeatureSums.empty(sae.config.d_sae), []
    for part in x.to(sae.W_enc.device, torch.float32).split(max(1, FEATURE_VALUES_AT_ONCE // sae.config.d_sae)):
        x_hat, f = sae(part)
        sums += FeatureSums.of(f)
        parts.append(x_hat)
    x_hat = torch.cat(parts).to(x.device)
    if not bool(x_hat.isfinite().all()):
        raise SAEError(
            "The SAE reconstructs values that are not finite from finite activations; its weights are damaged."
        )
    return x_hat, sums


def _losses_with(
    lm: LanguageModel,
    site: Site,
    tokens: Int[Tensor, "N T"],
    ordinary: Bool[Tensor, "N T"],
    rows: Float[Tensor, "*B W"],
) -> Float[Tensor, "N P"]:
    """The model's losses with `rows` (one for each ordinary position, or one for all) in place of its activations."""
    with lm.editing({site: _putting(rows, ordinary)}):
        return lm.token_losses(tokens)


def _putting(rows: Float[Tensor, "*B W"], ordinary: Bool[Tensor, "N T"]) -> Callable[[Tensor], Tensor]:
    def put(h: Tensor) -> Tensor:
        h = h.clone()
        h[ordinary] = rows.to(h)
        return h

    return put


def _report(
    lm: LanguageModel,
    site: Site,
    n_rows: int,
    reconstruction: ReconstructionSums,
    features: FeatureSums,
    arms: tuple[LossSums, LossSums, LossSums, LossSums],
) -> EvalReport:
    clean, spliced, zero, mean = (arm.mean for arm in arms)
    if not reconstruction.varies:
        raise ModelError(
            f"The activations of {lm.name} at {site} do not vary over the tokens given, so FVU is not defined."
        )
    n_features, dead = features.count.shape[0], int((features.count == 0).sum())
    return EvalReport(
        model=lm.name,
        site=str(site),
        rows=n_rows,
        tokens=features.tokens,
        predictions=arms[0].predictions,
        n_features=n_features,
        l0=features.l0,
        fvu=reconstruction.fvu,
        loss_clean=clean,
        loss_spliced=spliced,
        delta_loss=spliced - clean,
        loss_zero=zero,
        loss_mean=mean,
        recovered_zero=_recovered(zero, spliced, clean),
        recovered_mean=_recovered(mean, spliced, clean),
        dead=dead,
        dead_fraction=dead / n_features,
        dense=int((features.density > DENSE_ABOVE).sum()),
    )


def _recovered(ablated: float, spliced: float, clean: float) -> float | None:
    return (ablated - spliced) / (ablated - clean) if ablated > clean else None

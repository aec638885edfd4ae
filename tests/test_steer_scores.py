"""Output and input scores against their definitions, and SAE-targeted vectors against maps that are known."""

import json
from dataclasses import replace

import pytest
import torch

from mistudio import cli
from mistudio.errors import ConfigError, SAEError
from mistudio.lm import Site
from mistudio.steer import (
    Arm,
    Effects,
    Push,
    fit_effects,
    fitted,
    input_scores,
    logit_lens,
    output_scores,
    read_again,
    steered,
    write_arms,
)
from tiny_lab import PROMPT, SITE, F, tiny_lab


def test_the_logit_lens_is_the_top_of_the_unembedded_direction():
    lab = tiny_lab()
    rows = lab.saes[SITE].W_dec.detach()[:4]
    W_U = lab.lm.model.lm_head.weight.detach()
    found = logit_lens(lab.lm, rows, 3)
    assert torch.equal(found, (rows @ W_U.T).argsort(dim=1, descending=True)[:, :3])
    with pytest.raises(ConfigError, match="width 16, not 5"):
        logit_lens(lab.lm, torch.ones(1, 5), 3)


def test_the_output_score_is_rank_times_probability_of_the_best_lens_token_at_the_last_position():
    lab = tiny_lab()
    maxima = lab.known[SITE].maxima.clone()
    maxima[3] = 0.0
    lab = replace(lab, known={SITE: replace(lab.known[SITE], maxima=maxima)})
    scores = output_scores(lab, SITE, prompt=PROMPT, of_max=6.0, k=4, batch_rows=5)
    assert bool(scores[3].isnan())
    tokens = torch.tensor([lab.lm.to_tokens(PROMPT)])
    for feature in (0, 7, F - 1):
        push = Push(feature=feature, strength=6.0, unit="max", site=str(SITE), positions="last-prompt")
        with steered(lab, [(push,)], [tokens.shape[1]]):
            p = lab.lm.run(tokens, logits=True).logits[0, -1].double().softmax(0)
        lens = logit_lens(lab.lm, lab.saes[SITE].W_dec.detach()[[feature]], 4)[0]
        ranks = [int((p > p[token]).sum()) for token in lens]
        expected = (1 - min(ranks) / len(p)) * float(p[lens].max())
        assert float(scores[feature]) == pytest.approx(expected, rel=1e-4)
    some = output_scores(lab, SITE, features=[7], prompt=PROMPT, of_max=6.0, k=4)
    assert some.isnan().sum() == F - 1
    torch.testing.assert_close(some[7], scores[7], rtol=1e-4, atol=1e-7)


def test_the_input_score_is_the_share_of_top_tokens_in_the_lens():
    lab, k = tiny_lab(), 5
    generator = torch.Generator().manual_seed(1)
    rows = torch.cat([torch.full((6, 1), lab.lm.bos_id), torch.randint(4, 60, (6, 11), generator=generator)], 1)
    scores = input_scores(lab, SITE, rows.split(2), k=k)
    f = lab.saes[SITE].encode(lab.lm.run(rows, read=(SITE,)).activations[SITE])[:, 1:].reshape(-1, F)
    ids = rows[:, 1:].reshape(-1)
    lens = logit_lens(lab.lm, lab.saes[SITE].W_dec.detach(), k)
    for feature in range(F):
        values, order = f[:, feature].topk(k)
        if not bool((values > 0).all()):
            assert bool(scores[feature].isnan())
            continue
        expected = sum(int(ids[i]) in lens[feature].tolist() for i in order) / k
        assert float(scores[feature]) == pytest.approx(expected)
    assert not bool(scores.isnan().all())


def test_a_linear_effect_is_found_and_its_vector_raises_the_target_alone():
    generator = torch.Generator().manual_seed(0)
    M = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    b = torch.randn(9, generator=generator, dtype=torch.float64)
    X = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    effects = fitted(X, X @ M + b, length=1.0)
    assert effects.r2 > 0.999
    torch.testing.assert_close(effects.M.double(), M, rtol=0.02, atol=0.02)
    v = effects.vector(4, penalty=0.0).double()
    torch.testing.assert_close(v, M[:, 4] / M[:, 4].norm(), rtol=0.02, atol=0.02)
    common = M @ b
    with_penalty = M[:, 4] / M[:, 4].norm() - common / common.norm()
    torch.testing.assert_close(effects.vector(4).double(), with_penalty / with_penalty.norm(), rtol=0.05, atol=0.05)


def test_effects_that_are_noise_explain_nothing_of_unseen_directions():
    generator = torch.Generator().manual_seed(0)
    X, Y = torch.randn(100, 6, generator=generator), torch.randn(100, 9, generator=generator)
    assert fitted(X, Y, length=1.0).r2 < 0.1


def test_effects_are_fitted_to_what_the_texts_show(tmp_path):
    lab = tiny_lab()
    effects = fit_effects(lab, SITE, [PROMPT], length=4.0, directions=10, max_new_tokens=4, temperature=1.5)
    moved = int(effects.M.norm(dim=0).argmax())
    assert (effects.M.shape, effects.b.shape, effects.length) == ((16, F), (F,), 4.0)
    again = fit_effects(lab, SITE, [PROMPT], length=4.0, directions=10, max_new_tokens=4, temperature=1.5)
    assert torch.equal(effects.M, again.M)
    loaded = Effects.load(effects.save(tmp_path / "e.safetensors"))
    assert torch.equal(loaded.vector(moved), effects.vector(moved))
    assert loaded.r2 == pytest.approx(effects.r2)
    with pytest.raises(SAEError, match="no feature 24"):
        effects.vector(24)
    with pytest.raises(ConfigError, match="at least 10 directions"):
        fit_effects(lab, SITE, [PROMPT], length=4.0, directions=4)
    torch.save({}, tmp_path / "bad.safetensors")
    with pytest.raises(ConfigError, match="does not read"):
        Effects.load(tmp_path / "bad.safetensors")


def test_the_target_of_one_direction_is_the_mean_over_its_text():
    """What `fit_effects` regresses on: the features of the written tokens, read by the unsteered model."""
    lab = tiny_lab()
    push = Push(feature=5, strength=4.0, site=str(SITE))
    rows = write_arms(lab, [PROMPT], [Arm(name="x", pushes=((push,),))], seeds=[0], max_new_tokens=5)
    [read] = read_again(lab, [PROMPT], rows, site=SITE)
    whole = torch.tensor([[*rows[0].context, *rows[0].tokens]])
    h = lab.lm.run(whole, read=(SITE,)).activations[SITE][0, len(rows[0].context) :]
    torch.testing.assert_close(read.features, lab.saes[SITE].encode(h).mean(0), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An SAE of the bundled model with an evaluation beside it."""
    from mistudio.evaluate import evaluate
    from mistudio.lm import LanguageModel, documents, token_rows
    from mistudio.sae import JumpReLUSAE, SAEConfig

    path = tmp_path_factory.mktemp("sae")
    lm, site = LanguageModel.load("demo", device="cpu"), Site(2, "resid_post")
    sae = JumpReLUSAE(SAEConfig(d_model=lm.width(site), d_sae=48, hook_name=str(site), model="demo"))
    with torch.no_grad():
        sae.theta.fill_(1.0)
    sae.save(path)
    _, stats = evaluate(lm, sae, site, token_rows(lm, documents("stories"), 64, 4))
    stats.save(path)
    return path


def test_steer_find_ranks_features_by_words_and_says_how_to_steer(folder, capsys):
    find = ["steer-find", "--sae", str(folder), "--words", "sea,boat", "--top", "4"]
    cli.main([*find, "--text", "stories", "--rows", "8"])
    shown = capsys.readouterr().out
    assert "Next: mistudio steer" in shown
    assert "--words sea,boat" in shown
    cli.main([*find, "--json"])
    found = json.loads(capsys.readouterr().out)["found"]
    assert [f["toward"] for f in found] == sorted((f["toward"] for f in found), reverse=True)
    cli.main(["steer-find", "--sae", str(folder), "--top", "4", "--json"])
    found = json.loads(capsys.readouterr().out)["found"]
    assert [f["output_score"] for f in found] == sorted((f["output_score"] for f in found), reverse=True)


def test_steer_vector_makes_a_vector_that_steer_takes(folder, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("the sea is blue\nthe boat is on the sea\n")
    (tmp_path / "b.txt").write_text("the barn is red\nthe cow is in the barn\n")
    texts = ["--positive", str(tmp_path / "a.txt"), "--negative", str(tmp_path / "b.txt")]
    out = tmp_path / "v.safetensors"
    cli.main(["steer-vector", "--sae", str(folder), "--out", str(out), *texts])
    assert "Next: mistudio steer" in capsys.readouterr().out
    steer = ["steer", "Once", "--sae", str(folder), "--vector", str(out), "--strength", "1", "--max-new-tokens", "3"]
    export = tmp_path / "steer.py"
    cli.main([*steer, "--export", str(export), "--stream", "--track", "2", "--track-plot", str(tmp_path / "t.png")])
    page = tmp_path / "t.html"
    cli.main([*steer, "--track", "2", "3", "--track-plot", str(page)])
    cli.main([*steer, "--track-top", "2", "--track-plot", str(tmp_path / "top.png")])
    capsys.readouterr()
    assert page.read_text().startswith("<!doctype html>")
    assert "feature 3" in page.read_text()
    assert export.read_text().startswith('"""A steering written by mistudio')
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    for wrong, reason in (
        ([*texts, "--target", "3"], "Give either"),
        (["--target", "3"], "--effects effects.safetensors"),
        ([texts[0], str(tmp_path / "none.txt"), *texts[2:]], "no file"),
        ([*texts[:3], texts[1]], "give the same activations, so no direction"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["steer-vector", "--sae", str(folder), "--out", str(out), *wrong])
        assert reason in capsys.readouterr().err


def test_steer_vector_targets_a_feature_and_keeps_the_effects(folder, tmp_path, capsys):
    out, effects = tmp_path / "v.gguf", tmp_path / "effects.safetensors"
    command = ["steer-vector", "--sae", str(folder), "--out", str(out), "--target", "3", "--effects", str(effects)]
    cli.main([*command, "--directions", "12", "--json"])
    first = json.loads(capsys.readouterr().out)
    assert first["norm"] == pytest.approx(1.0, rel=1e-5)
    made = effects.stat().st_mtime_ns
    cli.main([*command, "--json"])
    assert json.loads(capsys.readouterr().out) == first
    assert effects.stat().st_mtime_ns == made

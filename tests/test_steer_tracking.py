"""Features followed along texts, as the steered model itself had them."""

import json
from dataclasses import replace

import pytest
import torch

from mistudio import cli
from mistudio.errors import ConfigError, SAEError
from mistudio.lm import LanguageModel, Site
from mistudio.steer import Arm, Push, steered, track, write_arms
from tiny_lab import PROMPT, SITE, live_sae, tiny_lab

PUSH = Push(feature=5, strength=6.0, site=str(SITE))


def test_a_track_is_what_the_model_had_while_it_wrote():
    lab = tiny_lab()
    arms = [Arm(name="plain"), Arm(name="steered", pushes=((PUSH,),))]
    rows = write_arms(lab, [PROMPT], arms, seeds=[1], max_new_tokens=6, temperature=0.9)
    for row, found in zip(rows, track(lab, rows, site=SITE, features=[5, 2]), strict=True):
        seen = []
        with (
            steered(lab, [row.pushes], [len(row.context)]),
            lab.lm.editing({SITE: lambda h, seen=seen: seen.append(lab.saes[SITE].encode(h)[0][:, [5, 2]].detach())}),
        ):
            lab.lm.generate(PROMPT, max_new_tokens=6, temperature=0.9, seed=1)
        while_writing = torch.cat(seen)
        length = len(while_writing)
        torch.testing.assert_close(torch.tensor(found.activations)[:length], while_writing, rtol=1e-4, atol=1e-4)
        assert len(found.pieces) == len(found.activations) == len(row.context) + len(row.tokens)
        assert "".join(found.pieces[: found.prompt_tokens]) == PROMPT
        assert found.features == [5, 2]


def test_the_strongest_features_of_a_text_are_followed_without_naming_them():
    lab = tiny_lab()
    rows = write_arms(lab, [PROMPT], [Arm(name="plain")], seeds=[1], max_new_tokens=6, temperature=0.9)
    [found] = track(lab, rows, site=SITE, top=3)
    tokens = torch.tensor([[*rows[0].context, *rows[0].tokens]])
    f = lab.saes[SITE].encode(lab.lm.run(tokens, read=(SITE,)).activations[SITE][0])
    assert found.features == f[1:].amax(0).topk(3).indices.tolist()
    for options in ({}, {"features": [1], "top": 3}):
        with pytest.raises(ConfigError, match="which features"):
            track(lab, rows, site=SITE, **options)
    with pytest.raises(SAEError, match="no feature 99"):
        track(lab, rows, site=SITE, features=[99])


def test_the_command_line_follows_features_and_refuses_a_chat_without_a_template(tmp_path, capsys):
    site = Site(2, "resid_post")
    sae = live_sae(LanguageModel.load("demo", device="cpu").width(site), site)
    sae.config = replace(sae.config, model="demo")
    sae.save(tmp_path / "sae")
    flags = ["steer", "Once upon a time", "--sae", str(tmp_path / "sae"), "--max-new-tokens", "4", "--feature", "5"]
    cli.main([*flags, "--strength", "9", "--track", "5", "7", "--json"])
    tracks = json.loads(capsys.readouterr().out)["tracks"]
    assert [(t["arm"], t["features"]) for t in tracks] == [("unsteered", [5, 7]), ("steered", [5, 7])]
    cli.main([*flags, "--strength", "9", "--track", "5"])
    assert "steered: feature 5, at most" in capsys.readouterr().out
    for more, reason in ((["--chat"], "no chat template"), (["--chat", "--compare", "--ask", "x"], "--ask is put")):
        with pytest.raises(SystemExit):
            cli.main([*flags, "--strength", "9", *more])
        assert reason in capsys.readouterr().err

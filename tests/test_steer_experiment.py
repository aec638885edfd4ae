"""Experiments as files, the dose–response, and `mistudio steer` / `steer-run` on the bundled model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mistudio import cli
from mistudio.config import from_dict, to_dict
from mistudio.errors import ConfigError
from mistudio.evaluate import FeatureStats
from mistudio.lm import LanguageModel, Site
from mistudio.steer import (
    METHODS,
    Dose,
    Experiment,
    Interval,
    Lab,
    Outcome,
    Push,
    Record,
    check_record,
    dose_response,
    plot_dose_response,
    record,
    rows_tokens,
    run_experiment,
    strengths,
    write_vectors,
)
from mistudio.studio import steer_run_verb, steer_verb
from tiny_lab import PROMPT, SITE, F, live_sae, tiny_lab

PUSH = Push(feature=5, strength=6.0, site=str(SITE))
EXPERIMENT = Experiment(
    prompts=(PROMPT, "the hat"), pushes=(PUSH,), seeds=(0, 1, 2), max_new_tokens=6, temperature=0.9,
    controls=True, ask="say it. ", sweep=(0.0, 3.0, 12.0), words=("a",),
)  # fmt: skip


@pytest.fixture(scope="module")
def lab() -> Lab:
    return replace(tiny_lab(), saes={SITE: tiny_lab().saes[SITE]})


@pytest.fixture(scope="module")
def outcome(lab) -> Outcome:
    return run_experiment(lab, EXPERIMENT)


def interval(mean: float) -> Interval:
    return Interval(mean=mean, low=mean - 0.1, high=mean + 0.1, n=4)


def doses(*rises: float) -> list[Dose]:
    return [
        Dose(strength=10.0 * i, response=interval(float(i)), ce_rise=interval(float(r))) for i, r in enumerate(rises)
    ]


def test_an_experiment_has_every_arm_prompt_and_seed_and_its_effects(outcome):
    names = [arm.arm for arm in outcome.arms]
    assert names == [
        "unsteered", "steered", "flipped", "random feature", "random direction", "prompt",
        "steered 0", "steered 3", "steered 12",
    ]  # fmt: skip
    assert len(outcome.rows) == 9 * 2 * 3
    assert set(outcome.effects) >= {"ce", "kl", "target", "ce_rise"}
    means = {arm.arm: arm.means for arm in outcome.arms}
    e = outcome.effects["target"]
    controls = (means["random feature"]["target"].mean + means["random direction"]["target"].mean) / 2
    assert e.mean == pytest.approx(means["steered"]["target"].mean - controls)
    assert outcome.dose.doses[0].ce_rise.mean == pytest.approx(0, abs=1e-5)
    assert outcome.dose.doses[0].response.mean == 0


def test_the_same_experiment_gives_the_same_outcome(lab, outcome):
    assert run_experiment(lab, EXPERIMENT) == outcome


def test_outcome_and_record_survive_plain_data_and_json(lab, outcome, tmp_path):
    assert from_dict(Outcome, json.loads(json.dumps(to_dict(outcome), allow_nan=False))) == outcome
    written = record(lab, outcome, sae="here", vectors={})
    assert Record.load(written.save(tmp_path / "exp.json")) == written
    assert written.tokens == rows_tokens(outcome)


def test_other_weights_than_the_records_are_refused(lab, outcome):
    written = record(lab, outcome, sae="here", vectors={})
    check_record(lab, written)
    other = replace(lab, saes={SITE: live_sae(lab.lm.width(SITE), SITE, seed=9)})
    with pytest.raises(ConfigError, match="The SAE is not the experiment's"):
        check_record(other, written)
    with pytest.raises(ConfigError, match="The vector 'mine'"):
        check_record(replace(lab, vectors={"mine": torch.ones(lab.lm.width(SITE))}), written)


def test_a_strength_is_said_in_all_three_units(lab):
    tokens = torch.tensor([lab.lm.to_tokens(PROMPT)])
    norm = float(lab.lm.run(tokens, read=(SITE,)).activations[SITE][0, 1:].norm(dim=-1).mean())
    m = float(lab.known[SITE].maxima[5])
    found = strengths(lab, PUSH, PROMPT)
    assert (found.residual, found.of_max, found.relative) == pytest.approx((6.0, 6.0 / m, 6.0 / norm), rel=1e-4)
    same = strengths(lab, replace(PUSH, strength=6.0 / m, unit="max"), PROMPT)
    assert same.residual == pytest.approx(6.0, rel=1e-5)
    share = strengths(lab, replace(PUSH, strength=6.0 / norm, method="add-relative"), PROMPT)
    assert share.residual == pytest.approx(6.0, rel=1e-4)
    assert strengths(lab, replace(PUSH, method="scale"), PROMPT).residual is None


def test_the_recommended_strength_is_the_largest_before_the_price_first_passes_the_bound():
    for rises, expected in (((0, 0.2, 0.4, 0.9), 20.0), ((0, 0.9, 0.1), 0.0), ((0.7, 0.9), None), ((0, 0.1), 10.0)):
        found = dose_response(doses(*rises)[::-1], measure="x", ce_bound=0.5)
        assert found.recommended == expected
        assert [d.strength for d in found.doses] == sorted(d.strength for d in found.doses)
    away = [replace(d, strength=-d.strength) for d in doses(0, 0.1, 0.9)]
    assert dose_response(away, measure="x", ce_bound=0.5).recommended == -10.0
    for wrong in ([], [*away, *doses(0, 1)]):
        with pytest.raises(ConfigError, match="one sign"):
            dose_response(wrong, measure="x", ce_bound=0.5)


def test_a_sweep_is_drawn(tmp_path):
    dose = dose_response(doses(0, 0.2, 0.9), measure="share of words", ce_bound=0.5)
    assert plot_dose_response(dose, tmp_path / "dose.png").read_bytes().startswith(b"\x89PNG")


def test_experiments_that_mean_nothing_are_refused(lab):
    with pytest.raises(ConfigError, match="at least one push"):
        replace(EXPERIMENT, pushes=())
    with pytest.raises(ConfigError, match="controls"):
        replace(EXPERIMENT, controls=False)
    with pytest.raises(ConfigError, match="no vector"):
        run_experiment(lab, replace(EXPERIMENT, pushes=(Push(vector="none", strength=1.0, site=str(SITE)),)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An SAE for the bundled model, with statistics."""
    folder = tmp_path_factory.mktemp("sae")
    lm = LanguageModel.load("demo", device="cpu")
    site = Site(2, "resid_post")
    sae = live_sae(lm.width(site), site)
    sae.config = replace(sae.config, model="demo")
    sae.save(folder)
    FeatureStats(
        tokens=100, count=torch.full((F,), 20), mean=torch.full((F,), 1.0), max=torch.linspace(2, 6, F)
    ).save(folder)  # fmt: skip
    return folder


def flags(folder, *more: str) -> list[str]:
    return ["steer", "Once upon a time", "--sae", str(folder), "--max-new-tokens", "5", *more]


def test_steer_shows_texts_units_positions_and_the_sweep_and_writes_its_files(folder, tmp_path, capsys):
    exp, png = tmp_path / "exp.json", tmp_path / "dose.png"
    cli.main(flags(
        folder, "--feature", "5", "--strength", "2", "--unit", "max", "--positions", "no-bos", "--compare",
        "--ask", "A story. ", "--sweep", "0,1,2", "--seeds", "2", "--words", "the,a", "--save", str(exp),
        "--plot", str(png),
    ))  # fmt: skip
    shown = capsys.readouterr().out
    for text in ("unsteered", "steered", "random", "× max", "of 5 new ones", "recommended strength", "effect on"):
        assert text in shown, text
    assert png.read_bytes().startswith(b"\x89PNG")
    assert len(Record.load(exp).tokens) == 9 * 2


@pytest.mark.parametrize(
    "more",
    [
        ("--feature", "5", "7", "--strength", "20", "-4", "--method", "clamp", "--positions", "generated"),
        ("--feature", "5", "--method", "ablate-feature"),
        ("--feature", "5", "--strength", "30", "--when", "7>0.1", "--temperature", "0"),
    ],
)
def test_a_saved_experiment_gives_the_same_tokens_again(folder, tmp_path, capsys, more):
    exp = tmp_path / "exp.json"
    cli.main(flags(folder, *more, "--save", str(exp)))
    found = steer_run_verb.run(steer_run_verb.Config(experiment=exp))
    assert (found.same_rows, found.rows, found.first_difference) == (2, 2, None)
    assert not steer_run_verb.failed(found)
    capsys.readouterr()
    cli.main(["steer-run", str(exp), "--json"])
    assert json.loads(capsys.readouterr().out)["same_rows"] == 2


def test_a_record_whose_tokens_do_not_come_again_says_where_and_fails(folder, tmp_path, capsys):
    exp = tmp_path / "exp.json"
    cli.main(flags(folder, "--feature", "5", "--strength", "20", "--save", str(exp)))
    changed = json.loads(exp.read_text())
    changed["tokens"][1][3][2] += 1
    exp.write_text(json.dumps(changed))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["steer-run", str(exp)])
    assert ended.value.code == 1
    assert "arm 'steered', prompt 0, seed 16, new token 2" in capsys.readouterr().out


def test_a_vector_from_a_file_steers_and_is_found_again(folder, tmp_path, capsys):
    file = write_vectors(tmp_path / "v.safetensors", {Site(2, "resid_post"): torch.randn(192)}, model="demo")
    exp = tmp_path / "exp.json"
    cli.main(flags(folder, "--vector", str(file), "--strength", "3", "--compare", "--save", str(exp)))
    assert "left out: random feature" in capsys.readouterr().out
    assert steer_run_verb.run(steer_run_verb.Config(experiment=exp)).first_difference is None
    write_vectors(file, {Site(2, "resid_post"): torch.ones(192)}, model="demo")
    with pytest.raises(ConfigError, match="is not the experiment's"):
        steer_run_verb.run(steer_run_verb.Config(experiment=exp))


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ((), "Nothing to steer by"),
        (("--feature", "5"), "1 feature needs 1 strength, and none is given. Add --strength 30 (raw activation units"),
        (("--feature", "5", "6", "--method", "scale"), "Add --strength 2 2 (a factor; 1 changes nothing)"),
        (("--feature", "5", "--unit", "max"), "Add --strength 0.5 (multiples of the feature's largest activation)"),
        (("--feature", "5", "--vector", "v.npz", "--strength", "1"), "2 directions need 2 strengths, and 1 is given"),
        (("--feature", "5", "--strength", "1", "--words", ","), "names no word"),
        (("--feature", "5", "--strength", "1", "--save", "none/x.json"), "There is no folder none for x.json"),
        (("--feature", "5", "--strength", "1", "--export", "none/x.py"), "There is no folder none for x.py"),
        (("--feature", "5", "--strength", "1", "--sweep", "0,1", "--plot", "x.pdf"), "endings .png, .html"),
        (("--feature", "5", "--strength", "1e30"), "so large that numbers overflow"),
        (("--feature", "5", "--strength", "1", "--method", "ablate-feature"), "takes no strength"),
        (("--feature", "5", "--strength", "1", "--method", "push"), "no method 'push'"),
        (("--feature", "99", "--strength", "1"), "no feature 99"),
        (("--feature", "5", "--strength", "1", "--sweep", "1;2"), "no list of numbers"),
        (("--feature", "5", "--strength", "1", "--sweep=-1,2"), "one sign"),
        (("--feature", "5", "--strength", "1", "--when", "x"), "no condition"),
        (("--feature", "5", "--strength", "1", "--positions", "here"), "says no positions"),
        (("--feature", "5", "--strength", "1", "--plot", "x.png"), "draws a sweep"),
        (("--feature", "5", "--strength", "1e39"), "overflows"),
        (("--feature", "5", "--strength", "1", "--positions", "from:400"), "met none"),
        (("--feature", "5", "--strength", "1", "--temperature", "0", "--seeds", "2"), "greedy"),
        (("--vector", "no.npz", "--strength", "1"), "no file"),
    ],
)
def test_what_cannot_be_steered_is_said_in_one_sentence(folder, capsys, more, reason):
    with pytest.raises(SystemExit) as ended:
        cli.main(flags(folder, *more))
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


def test_every_method_is_named_in_the_flags_help():
    source = Path(steer_verb.__file__).read_text(encoding="utf-8")
    for name in METHODS:
        assert name in source, name


def test_an_empty_prompt_is_refused():
    push = Push(feature=1, strength=1.0)
    for prompts in ((), ("",), ("Once", " ")):
        with pytest.raises(ConfigError, match="A prompt is empty"):
            Experiment(prompts=prompts, pushes=(push,))

"""Arms in one batch, their controls, and effects with intervals."""

from dataclasses import replace

import pytest
import torch

from mistudio.errors import ConfigError, SAEError
from mistudio.steer import (
    Arm,
    Lab,
    Push,
    bootstrap,
    comparison_arms,
    effect,
    random_feature_arm,
    steered,
    sweep_arms,
    write_arms,
)
from tiny_lab import PROMPT, SITE, F, tiny_lab

SEEDS = (3, 4)
PUSH = Push(feature=5, strength=6.0, site=str(SITE))


@pytest.fixture(scope="module")
def lab() -> Lab:
    return tiny_lab()


def write(lab: Lab, arms, prompts=(PROMPT,), seeds=SEEDS, **options):
    return write_arms(lab, prompts, arms, seeds=seeds, **{"max_new_tokens": 7, "temperature": 0.8, **options})


def test_every_prompt_arm_and_seed_is_a_row_equal_to_writing_it_alone(lab):
    arms = [Arm(name="plain"), Arm(name="steered", pushes=((PUSH,),)), Arm(name="asked", prefix="say it. ")]
    prompts = (PROMPT, "the hat")
    rows = write(lab, arms, prompts)
    assert [(r.prompt, r.arm, r.seed) for r in rows] == [(p, a.name, s) for p in (0, 1) for a in arms for s in SEEDS]
    for row in rows:
        arm = next(arm for arm in arms if arm.name == row.arm)
        text = arm.prefix + prompts[row.prompt]
        with steered(lab, [arm.of(0)], [len(lab.lm.to_tokens(text))]):
            [alone] = lab.lm.generate(text, max_new_tokens=7, temperature=0.8, seed=row.seed)
        assert (row.tokens, row.text) == (alone.tokens, alone.text)
        assert row.context == tuple(lab.lm.to_tokens(text))


def test_an_arm_of_strength_zero_writes_the_unsteered_texts(lab):
    rows = write(lab, [Arm(name="plain"), Arm(name="zero", pushes=((replace(PUSH, strength=0.0),),))])
    assert [r.tokens for r in rows if r.arm == "plain"] == [r.tokens for r in rows if r.arm == "zero"]


def test_batches_of_few_rows_write_what_one_batch_writes(lab):
    arms, _ = comparison_arms(lab, (PUSH,), seeds=2, ask="say it. ")
    assert [r.tokens for r in write(lab, arms, batch_rows=3)] == [r.tokens for r in write(lab, arms)]


def test_sizes_say_where_each_row_was_pushed_and_unsteered_rows_have_none(lab):
    generated = replace(PUSH, positions="generated")
    rows = write(lab, [Arm(name="plain"), Arm(name="late", pushes=((generated,),))])
    for row in rows:
        if row.arm == "plain":
            assert row.sizes == {}
            continue
        sizes = row.sizes[str(SITE)]
        assert len(sizes) == len(row.context) + len(row.tokens)
        assert all(size is None for size in sizes[: len(row.context)])
        assert all(size is not None and size > 0 for size in sizes[len(row.context) : -1])


def test_the_comparison_has_its_controls_and_says_which_it_has_not(lab):
    arms, left_out = comparison_arms(lab, (PUSH,), seeds=3, ask="say it. ")
    assert [arm.name for arm in arms] == [
        "unsteered", "steered", "flipped", "random feature", "random direction", "prompt",
    ]  # fmt: skip
    assert left_out == []
    by_name = {arm.name: arm for arm in arms}
    assert by_name["flipped"].pushes == ((replace(PUSH, strength=-6.0),),)
    assert [p.turned for (p,) in by_name["random direction"].pushes] == [0, 1, 2]
    mine = Push(vector="mine", method="orthogonal", strength=-2.0, site=str(SITE))
    arms, left_out = comparison_arms(lab, (mine,), seeds=3)
    assert [arm.name for arm in arms] == ["unsteered", "steered", "random direction"]
    assert [reason.split(":")[0] for reason in left_out] == ["flipped", "random feature"]


def test_random_features_are_live_others_of_the_nearest_maxima_one_for_each_seed(lab):
    known = replace(lab.known[SITE], density=torch.where(torch.arange(F) % 3 == 0, 0.0, 0.2))
    lab = replace(lab, known={SITE: known})
    arm = random_feature_arm(lab, (PUSH,), seeds=2, draw=1)
    drawn = [push.feature for (push,) in arm.pushes]
    assert len(set(drawn)) == 2
    live = [i for i in range(F) if i % 3 and i != 5]
    nearest = sorted(live, key=lambda i: abs(torch.log(known.maxima[i] / known.maxima[5]).item()))[:8]
    assert set(drawn) <= set(nearest)
    assert arm == random_feature_arm(lab, (PUSH,), seeds=2, draw=1)
    assert len({random_feature_arm(lab, (PUSH,), seeds=2, draw=d).pushes for d in range(6)}) > 1
    with pytest.raises(SAEError, match="16 controls need"):
        random_feature_arm(lab, (PUSH,), seeds=16)


def test_random_features_push_as_far_where_decoder_rows_are_uneven(lab):
    uneven = tiny_lab()
    with torch.no_grad():
        uneven.saes[SITE].W_dec.mul_(torch.linspace(0.5, 2.0, F)[:, None])
    wanted = 6.0 * float(uneven.saes[SITE].W_dec[5].detach().norm())
    for (push,) in random_feature_arm(uneven, (PUSH,), seeds=4).pushes:
        assert push.strength * float(uneven.saes[SITE].W_dec[push.feature].detach().norm()) == pytest.approx(
            wanted, rel=1e-5
        )


def test_a_sweep_keeps_the_proportions_of_several_pushes():
    other = Push(vector="mine", strength=-3.0)
    ablation = Push(feature=1, method="ablate-feature")
    arms = sweep_arms((PUSH, other, ablation), (0.0, 12.0))
    assert [arm.name for arm in arms] == ["steered 0", "steered 12"]
    assert [p.strength for p in arms[1].pushes[0]] == [12.0, -6.0, None]
    for pushes, strengths in (((ablation,), (1.0,)), ((PUSH,), (1.0, 1.0)), ((), (1.0,))):
        with pytest.raises(ConfigError):
            sweep_arms(pushes, strengths)


def test_arms_that_cannot_be_told_apart_or_do_not_fit_are_refused(lab):
    for arms, options, reason in (
        ([Arm(name="a"), Arm(name="a")], {}, "called a"),
        ([Arm(name="a", pushes=((PUSH,),) * 3)], {}, "3 steerings for 2 seeds"),
        ([Arm(name="a")], {"temperature": 0.0}, "greedy"),
        ([], {}, "no texts"),
        ([Arm(name="a")], {"prompts": ()}, "no texts"),
    ):
        with pytest.raises(ConfigError, match=reason):
            write(lab, arms, **options)


def test_an_effect_is_the_target_less_the_mean_control_with_an_interval_that_covers():
    target, controls = [5.0, 6.0, 7.0, 6.0], [[1.0, 2.0, 1.0, 2.0], [3.0, 2.0, 3.0, 2.0]]
    found = effect(target, controls)
    assert found.mean == pytest.approx(4.0)
    assert found.low < 4.0 < found.high
    assert found == effect(target, controls)
    assert found.n == 4
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(100):
        sample = bootstrap(torch.randn(40, generator=generator, dtype=torch.float64).tolist())
        covered += sample.low <= 0 <= sample.high
    assert covered >= 88  # nominal 95, the percentile interval is a little narrow at n = 40
    assert bootstrap([2.0]).low == bootstrap([2.0]).high == 2.0
    for wrong in ([], [float("nan")]):
        with pytest.raises(ConfigError):
            bootstrap(wrong)
    with pytest.raises(ConfigError):
        effect([1.0], [])

"""Every steering method against dense float64 mathematics, and steerings mixed of several."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mistudio.errors import ConfigError, EditError, ModelError, SAEError
from mistudio.lm import Site
from mistudio.steer import (
    METHODS,
    Lab,
    Push,
    When,
    flipped,
    mean_difference,
    principal_direction,
    random_direction,
    read_vector,
    steered,
    write_vectors,
)
from tiny_lab import LATER, PROMPT, SITE, tiny_lab

FEATURE = 5
NUMBER = {  # a number at which each method does something on the tiny model
    "add": 3.0, "add-keeping-norm": 3.0, "add-relative": 0.7, "clamp": 4.0, "clamp-at-least": 4.0,
    "clamp-where-active": -4.0, "scale": 3.0, "ablate-feature": None, "ablate-direction": None, "orthogonal": -2.0,
    "projection-set": 2.5, "projection-cap": -0.5, "projection-floor": 0.5, "reconstruct": 2.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def lab() -> Lab:
    return tiny_lab()


def push(method: str, number: float | None = None, **options) -> Push:
    strength = None if METHODS[method].unit is None else NUMBER[method] if number is None else number
    return Push(**{"feature": FEATURE, "strength": strength, "method": method, "site": str(SITE), **options})


def tokens_of(lab: Lab, *prompts: str) -> torch.Tensor:
    rows = [lab.lm.to_tokens(prompt) for prompt in prompts]
    return torch.tensor([row[: min(map(len, rows))] for row in rows])


def read(lab: Lab, pushes, *prompts: str, site: Site = SITE) -> torch.Tensor:
    """The activations at `site` of the prompts, steered."""
    tokens = tokens_of(lab, *prompts)
    with steered(lab, [tuple(pushes)] * len(tokens), [tokens.shape[1]] * len(tokens)):
        return lab.lm.run(tokens, read=(site,)).activations[site]


def dense(method: str, h: torch.Tensor, c: float | None, sae, i: int) -> torch.Tensor:
    """The equations again, position by position, in float64 numpy, with the SAE decoded densely where that applies."""
    d = sae.W_dec[i].detach().double().numpy()
    W, b = sae.W_dec.detach().double().numpy(), sae.b_dec.detach().double().numpy()
    f64 = sae.encode(h).flatten(0, 1).detach().double().numpy()
    u, out = d / np.linalg.norm(d), []
    for row, codes in zip(h.flatten(0, 1).double().numpy(), f64, strict=True):
        f, p = codes[i], row @ u
        error = row - (codes @ W + b)
        edited = codes.copy()
        if method == "add":
            new = row + c * d
        elif method == "add-keeping-norm":
            new = (row + c * u) * np.linalg.norm(row) / np.linalg.norm(row + c * u)
        elif method == "add-relative":
            new = row + c * np.linalg.norm(row) * u
        elif method in ("ablate-direction", "orthogonal"):
            P = np.outer(d, d) / (d @ d)
            new = row - P @ row + (0 if c is None else c) * (P @ row)
        elif method.startswith("projection"):
            t = {"set": c, "cap": min(p, c), "floor": max(p, c)}[method.removeprefix("projection-")]
            new = row - p * u + t * u
        else:
            edited[i] = {
                "clamp": c, "clamp-at-least": None if c is None else max(f, c),
                "clamp-where-active": c if f > 0 else f, "ablate-feature": 0.0,
                "scale": f * (c or 0), "reconstruct": f * (c or 0),
            }[method]  # fmt: skip
            new = edited @ W + b + (0 if method == "reconstruct" else error)
        out.append(new)
    return torch.from_numpy(np.stack(out)).view(h.shape)


def test_every_method_has_a_number_here_and_a_docstring_with_its_equation():
    assert set(NUMBER) == set(METHODS)
    for method in METHODS.values():
        assert method.apply.__doc__
        assert method.equation


@pytest.mark.parametrize("method", METHODS)
def test_a_method_equals_its_equation_in_dense_float64(lab, method):
    h = read(lab, (), PROMPT, "the other one")
    sae = lab.saes[SITE]
    assert bool((sae.encode(h)[..., FEATURE] > 0).any()), "the feature must be on somewhere"
    found = read(lab, (push(method),), PROMPT, "the other one")
    expected = dense(method, h, NUMBER[method], sae, FEATURE)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    assert float((expected - h).norm()) > 1e-2, "the test must see a change"


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.no_op is not None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_no_op_number_leaves_every_bit(lab, method, dtype):
    h = read(lab, (), PROMPT).to(dtype)
    d = lab.saes[SITE].W_dec[FEATURE].detach()[None, None]
    c = torch.tensor(METHODS[method].no_op).view(1, 1, 1)
    terms = (
        (c, d) if METHODS[method].reads == "direction" else (c, d, lab.saes[SITE].encode(h).detach()[..., [FEATURE]])
    )
    assert torch.equal(METHODS[method].apply(h, *terms), h)


@pytest.mark.parametrize("method", ["clamp", "clamp-where-active", "ablate-feature", "scale"])
def test_methods_of_a_feature_leave_every_bit_where_it_is_off_already(lab, method):
    h = read(lab, (), PROMPT)
    f = torch.zeros(*h.shape[:2], 1)
    d, c = lab.saes[SITE].W_dec[FEATURE].detach()[None, None], torch.zeros(1, 1, 1)
    terms = (d, f) if METHODS[method].unit is None else (c, d, f)
    assert torch.equal(METHODS[method].apply(h, *terms), h)


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.no_op is not None])
def test_the_no_op_number_writes_the_unsteered_text_token_for_token(lab, method):
    lm, tokens = lab.lm, lab.lm.to_tokens(PROMPT)
    plain = lm.generate(PROMPT, max_new_tokens=12, temperature=0.8, seed=4)
    with steered(lab, [(push(method, METHODS[method].no_op),)], [len(tokens)]):
        assert lm.generate(PROMPT, max_new_tokens=12, temperature=0.8, seed=4) == plain


@pytest.mark.parametrize("method", METHODS)
def test_the_key_value_cache_does_not_change_the_greedy_text(lab, method):
    length = len(lab.lm.to_tokens(PROMPT))
    texts = []
    for use_cache in (True, False):
        with steered(lab, [(push(method),)], [length]):
            texts.append(lab.lm.generate(PROMPT, max_new_tokens=12, use_cache=use_cache))
    assert texts[0] == texts[1]


def test_a_batch_of_all_methods_equals_its_single_rows(lab):
    rows = [(push(method),) for method in METHODS] + [()]
    tokens = tokens_of(lab, PROMPT).expand(len(rows), -1)
    with steered(lab, rows, [tokens.shape[1]] * len(rows)):
        together = lab.lm.run(tokens, read=(SITE,)).activations[SITE]
    for row, pushes in zip(together, rows, strict=True):
        torch.testing.assert_close(row, read(lab, pushes, PROMPT)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_stays_bfloat16_and_near_float32(lab, method):
    h = read(lab, (), PROMPT)
    d, f = lab.saes[SITE].W_dec[FEATURE].detach()[None, None], lab.saes[SITE].encode(h).detach()[..., [FEATURE]]
    terms = [d] if METHODS[method].unit is None else [torch.tensor(NUMBER[method]).view(1, 1, 1), d]
    terms += [f] if METHODS[method].reads != "direction" else []
    terms += [lab.saes[SITE]] if METHODS[method].reads == "sae" else []
    narrow = METHODS[method].apply(h.bfloat16(), *terms)
    assert narrow.dtype == torch.bfloat16
    wide = METHODS[method].apply(h, *terms)
    assert float((narrow.float() - wide).norm().detach() / wide.norm().detach()) < 0.02


def test_adding_in_multiples_of_the_maximum(lab):
    m = float(lab.known[SITE].maxima[FEATURE])
    torch.testing.assert_close(
        read(lab, (push("add", 2.0, unit="max"),), PROMPT), read(lab, (push("add", 2.0 * m),), PROMPT)
    )


def test_pushes_of_one_site_run_in_order_each_on_what_the_one_before_left(lab):
    first, then = push("add", 3.0), push("orthogonal", 0.0, feature=7)
    h, sae = read(lab, (), PROMPT), lab.saes[SITE]
    expected = dense("orthogonal", dense("add", h, 3.0, sae, FEATURE).float(), 0.0, sae, 7)
    torch.testing.assert_close(read(lab, (first, then), PROMPT).double(), expected, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(read(lab, (first, then), PROMPT), read(lab, (then, first), PROMPT))


def test_pushes_of_two_layers_the_later_reads_the_changed_residual(lab):
    early, late = push("add", 3.0), push("ablate-direction", site=str(LATER))
    only_early = read(lab, (early,), PROMPT, site=LATER)
    expected = dense("ablate-direction", only_early, None, lab.saes[LATER], FEATURE)
    for order in ((early, late), (late, early)):
        torch.testing.assert_close(read(lab, order, PROMPT, site=LATER).double(), expected, rtol=1e-5, atol=1e-4)


def test_features_and_vectors_mix_and_a_vector_acts_as_a_feature_of_that_row(lab):
    vectors = {"row": lab.saes[SITE].W_dec[FEATURE].detach()}
    with_vector = replace(lab, vectors=vectors)
    for method in ("add", "orthogonal", "projection-cap"):
        mine = Push(vector="row", method=method, strength=NUMBER[method], site=str(SITE))
        assert torch.equal(read(with_vector, (mine,), PROMPT), read(lab, (push(method),), PROMPT))
    mixed = read(lab, (push("add"), Push(vector="mine", strength=2.0, site=str(SITE))), PROMPT)
    torch.testing.assert_close(mixed, read(lab, (push("add"),), PROMPT) + 2.0 * lab.vectors["mine"])


def test_a_condition_acts_where_the_other_feature_is_active_in_the_changed_residual(lab):
    h = read(lab, (), PROMPT)
    codes = lab.saes[SITE].encode(h)[0]
    other = int(((codes > 0.05).float().mean(0) - 0.5).abs().argmin())  # on at some positions and off at others
    on = codes[:, other] > 0.1
    assert bool(on.any())
    assert not bool(on.all())
    moved = read(lab, (push("add", when=When(feature=other, above=0.1)),), PROMPT)
    torch.testing.assert_close(moved[0, on], read(lab, (push("add"),), PROMPT)[0, on])
    assert torch.equal(moved[0, ~on], h[0, ~on])
    gone = (push("ablate-direction", feature=other), push("add", when=When(feature=other, above=1e6)))
    assert torch.equal(read(lab, gone, PROMPT), read(lab, gone[:1], PROMPT))


def test_a_turned_push_is_as_long_at_every_position_but_points_elsewhere(lab):
    h = read(lab, (), PROMPT)
    for method in ("add", "clamp", "orthogonal"):
        own = read(lab, (push(method),), PROMPT) - h
        turned = read(lab, (push(method, turned=3),), PROMPT) - h
        torch.testing.assert_close(turned.norm(dim=-1), own.norm(dim=-1), rtol=1e-3, atol=1e-4)
        direction = random_direction(h.shape[-1], 3)
        torch.testing.assert_close(turned @ direction, own.norm(dim=-1), rtol=1e-3, atol=1e-4)
    assert not torch.equal(random_direction(16, 3), random_direction(16, 4))


def test_difference_of_means_and_pca_find_a_planted_direction(lab):
    lm, positive, negative = lab.lm, ["the hat", "a boat he had"], ["xyz", "12345 67"]
    means = [
        torch.stack([lm.run(tokens_of(lab, t), read=(SITE,)).activations[SITE][0, 1:].mean(0) for t in texts]).mean(0)
        for texts in (positive, negative)
    ]
    torch.testing.assert_close(mean_difference(lm, SITE, positive, negative), means[0] - means[1])
    principal = principal_direction(lm, SITE, positive, negative)
    assert float(principal.norm()) == pytest.approx(1.0, rel=1e-5)
    last = mean_difference(lm, SITE, positive, negative, pooling="last")
    assert float(principal @ last) > 0
    torch.testing.assert_close(principal_direction(lm, SITE, negative, positive), -principal)
    one = principal_direction(lm, SITE, positive[:1], negative[:1])
    difference = mean_difference(lm, SITE, positive[:1], negative[:1], pooling="last")
    torch.testing.assert_close(one, difference / difference.norm(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="pairs"):
        principal_direction(lm, SITE, positive, negative[:1])
    with pytest.raises(ConfigError, match="no token"):
        mean_difference(lm, SITE, [""], negative)


def test_vectors_come_back_from_files_and_damaged_ones_are_refused(tmp_path):
    v = torch.randn(8)
    assert torch.equal(read_vector(write_vectors(tmp_path / "v.safetensors", {SITE: v}, model="m")), v)
    np.savez(tmp_path / "two.npz", a=v.numpy(), b=np.zeros((2, 2)))
    assert torch.equal(read_vector(tmp_path / "two.npz", "a"), v)
    np.savez(tmp_path / "object.npz", a=np.array([{}], dtype=object))
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    for path, key, reason in (
        ("two.npz", None, "say which"), ("two.npz", "b", "one axis"), ("two.npz", "c", "no array"),
        ("object.npz", "a", "does not read"), ("bad.safetensors", None, "does not read"),
        ("none.npz", None, "no file"), ("v.txt", None, "no file"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=reason):
            read_vector(tmp_path / path, key)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "push"}, "no method"),
        ({"strength": None}, "needs a strength"),
        ({"method": "ablate-feature"}, "takes no strength"),
        ({"strength": math.inf}, "finite"),
        ({"feature": None}, "direction"),
        ({"vector": "mine"}, "not both"),
        ({"feature": -1}, "start at 0"),
        ({"feature": None, "vector": "mine", "method": "clamp"}, "reads a feature"),
        ({"method": "orthogonal", "unit": "max"}, "Multiples"),
        ({"positions": "some"}, "no positions"),
        ({"when": When(feature=-3)}, "start at 0"),
    ],
)
def test_a_push_that_means_nothing_is_refused_in_words(options, reason):
    with pytest.raises(ConfigError, match=reason):
        Push(**{"feature": 3, "strength": 1.0, **options})


def test_what_the_lab_has_not_is_named(lab):
    for wrong, error, reason in (
        (push("add", feature=99), SAEError, "no feature 99"),
        (push("add", site="layers.0.resid_post"), SAEError, "no SAE at layers.0"),
        (push("add", site="layers.9.resid_post"), ModelError, "layers.9|layer 9"),
        (push("add", site=None), ConfigError, "must say its site"),
        (push("add", when=When(feature=99)), SAEError, "no feature 99"),
        (push("add", 1e39), ConfigError, "overflows"),
        (Push(vector="theirs", strength=1.0, site=str(SITE)), ConfigError, "no vector 'theirs'"),
        (Push(vector="mine", strength=1.0, site="layers.1.attn_z"), ConfigError, "width 32"),
    ):
        with pytest.raises(error, match=reason), steered(lab, [(wrong,)], [4]):
            pass
    bare = replace(lab, known={})
    with pytest.raises(SAEError, match="mistudio eval"):
        bare.number(push("add", unit="max"))
    with pytest.raises(SAEError, match=r"for layers.2.resid_post, not for layers.1"):
        replace(lab, saes={SITE: lab.saes[LATER]})


def test_a_batch_of_another_size_than_the_steering_is_an_error(lab):
    with pytest.raises(EditError, match="2 rows"), steered(lab, [(push("add"),)] * 2, [4, 4]):
        lab.lm.generate(PROMPT, max_new_tokens=2)


def test_the_flipped_push_is_the_opposite_one_where_there_is_one(lab):
    assert flipped(push("add")) == push("add", -3.0)
    assert flipped(push("orthogonal")) is None
    assert flipped(push("ablate-direction")) is None

"""Where pushes act: the rules, the same with and without the cache, and rows of unequal prompts in one batch."""

import pytest
import torch

from mistudio.errors import ConfigError, EditError, ModelError
from mistudio.steer import Lab, Place, Push, positions_mask, steered
from tiny_lab import PROMPT, SITE, tiny_lab
from tiny_models import tiny_lm

NEW = 6
RULES = ("all", "no-bos", "no-special", "prompt", "generated", "last-prompt", "from:3", "at:0,2,17")


@pytest.fixture(scope="module")
def lab() -> Lab:
    return tiny_lab()


def push(positions: str, strength: float = 6.0) -> Push:
    return Push(feature=5, strength=strength, site=str(SITE), positions=positions)


def test_the_rules_on_a_row_whose_prompt_is_four_tokens_long():
    special = torch.tensor([[True, False, True, False, False, True]])  # BOS, a special one inside, and one generated
    place = Place(torch.arange(6)[None], torch.tensor([[4]]), special)
    expected = {
        "all": [0, 1, 2, 3, 4, 5], "no-bos": [1, 2, 3, 4, 5], "no-special": [1, 3, 4, 5], "prompt": [0, 1, 2, 3],
        "generated": [4, 5], "last-prompt": [3], "from:2": [2, 3, 4, 5], "at:0,5,9": [0, 5],
    }  # fmt: skip
    for rule, wanted in expected.items():
        assert positions_mask(rule, place)[0].nonzero().flatten().tolist() == wanted, rule


def test_every_row_has_its_own_prompt_length():
    place = Place(torch.arange(4)[None], torch.tensor([[1], [3]]), torch.zeros(2, 4, dtype=torch.bool))
    assert positions_mask("generated", place).tolist() == [[False, True, True, True], [False, False, False, True]]
    assert positions_mask("last-prompt", place).tolist() == [[True, False, False, False], [False, False, True, False]]


@pytest.mark.parametrize("rule", ["", "from", "from:-1", "at:", "at:1,", "at:1, 2", "generated:3"])
def test_a_rule_that_is_none_is_refused(rule):
    with pytest.raises(ConfigError, match="says no positions"):
        Push(feature=1, strength=1.0, positions=rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["gemma2", "llama", "gpt2"])
def test_with_and_without_the_cache_the_same_positions_are_pushed_and_the_same_text_is_written(family, rule):
    lab = tiny_lab(family)
    length = len(lab.lm.to_tokens(PROMPT))
    found = []
    for use_cache in (True, False):
        with steered(lab, [(push(rule),)], [length]) as trace:
            [text] = lab.lm.generate(PROMPT, max_new_tokens=NEW, use_cache=use_cache)
        found.append((text.tokens, trace.sizes(SITE)))
    (tokens, sizes), (tokens_without, sizes_without) = found
    assert tokens == tokens_without
    torch.testing.assert_close(sizes, sizes_without, rtol=1e-4, atol=1e-5, equal_nan=True)
    fed = length + len(tokens) - (len(tokens) == NEW)  # the last token written is not fed back
    special = torch.zeros(1, sizes.shape[1], dtype=torch.bool)
    special[0, 0] = True
    wanted = positions_mask(rule, Place(torch.arange(sizes.shape[1])[None], torch.tensor([[length]]), special))[0]
    assert sizes.shape[1] >= fed
    assert torch.equal(~sizes[0].isnan(), wanted)


def test_sizes_are_the_change_against_the_residual(lab):
    tokens = torch.tensor([lab.lm.to_tokens(PROMPT)])
    h = lab.lm.run(tokens, read=(SITE,)).activations[SITE]
    with steered(lab, [(push("at:1,4"),)], [tokens.shape[1]]) as trace:
        moved = lab.lm.run(tokens, read=(SITE,)).activations[SITE]
    sizes = trace.sizes(SITE)[0]
    for position in (1, 4):
        ratio = (moved - h)[0, position].norm() / h[0, position].norm()
        assert float(sizes[position]) == pytest.approx(float(ratio), rel=1e-4)
    others = [p for p in range(tokens.shape[1]) if p not in (1, 4)]
    assert torch.equal(moved[0, others], h[0, others])
    assert bool(sizes[others].isnan().all())


def test_generated_only_leaves_the_first_token_and_prompt_only_reaches_it(lab):
    plain = lab.lm.generate(PROMPT, max_new_tokens=NEW)[0].tokens
    with steered(lab, [(push("generated", 40.0),)], [len(lab.lm.to_tokens(PROMPT))]):
        generated = lab.lm.generate(PROMPT, max_new_tokens=NEW)[0].tokens
    assert generated[0] == plain[0]
    assert generated != plain


def test_a_push_that_meets_no_position_is_an_error_and_never_a_text_labelled_steered(lab):
    length = len(lab.lm.to_tokens(PROMPT))
    for rule, new in (("generated", 1), ("from:60", 4), ("at:61", 4)):
        with pytest.raises(EditError, match="met none"), steered(lab, [(push(rule),), ()], [length] * 2):
            lab.lm.generate(PROMPT, max_new_tokens=new, samples=2, temperature=1.0)
    with pytest.raises(EditError, match="never fired"), steered(lab, [(push("all"),)], [length]):
        pass


def test_without_any_push_the_model_is_untouched_and_nothing_is_reported(lab):
    with steered(lab, [()], [3]) as trace:
        [text] = lab.lm.generate(PROMPT, max_new_tokens=NEW)
    assert [text] == lab.lm.generate(PROMPT, max_new_tokens=NEW)
    assert trace.sizes(SITE).shape == (1, 0)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt2", "qwen3"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_prompts_of_unequal_length_in_one_batch_write_what_each_writes_alone(family, use_cache):
    lm = tiny_lm(family)
    prompts = [lm.to_tokens(text) for text in ("the", PROMPT, "a hat", "")]
    for temperature in (0.0, 0.9):
        together = lm.generate_rows(
            prompts, streams=[(3, 0)] * 4, max_new_tokens=9, temperature=temperature, use_cache=use_cache
        )
        alone = [lm.generate_rows([p], streams=[(3, 0)], max_new_tokens=9, temperature=temperature)[0] for p in prompts]
        assert together == alone


def test_a_stream_is_the_sample_of_that_number(lab):
    lm, tokens = lab.lm, lab.lm.to_tokens(PROMPT)
    samples = lm.generate(PROMPT, max_new_tokens=8, samples=3, temperature=1.0, seed=5)
    rows = lm.generate_rows([tokens] * 2, streams=[(5, 2), (5, 0)], max_new_tokens=8, temperature=1.0)
    assert rows == [samples[2], samples[0]]
    with pytest.raises(ModelError, match="stream"):
        lm.generate_rows([tokens], streams=[], max_new_tokens=8)
    with pytest.raises(ModelError, match="exceed the context"):
        lm.generate_rows([tokens, [2] * 60], streams=[(0, 0), (0, 1)], max_new_tokens=8)


@pytest.mark.parametrize("rule", ["all", "prompt", "generated", "last-prompt", "no-bos"])
def test_steered_rows_of_unequal_prompts_write_what_each_writes_alone(lab, rule):
    lm = lab.lm
    prompts = [lm.to_tokens(text) for text in ("the", PROMPT, "a hat")]
    lengths = [len(prompt) for prompt in prompts]
    pushes = [(push(rule, strength),) for strength in (4.0, 9.0, -6.0)]
    with steered(lab, pushes, lengths) as trace:
        together = lm.generate_rows(prompts, streams=[(1, 0)] * 3, max_new_tokens=7, temperature=0.7)
    for row in range(3):
        with steered(lab, pushes[row : row + 1], lengths[row : row + 1]) as alone:
            [single] = lm.generate_rows([prompts[row]], streams=[(1, 0)], max_new_tokens=7, temperature=0.7)
        assert together[row] == single
        size = alone.sizes(SITE)[0]
        torch.testing.assert_close(trace.sizes(SITE)[row, : len(size)], size, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_pass_tells_tokens_and_position_with_the_cache_and_ends_with_its_block(lab):
    lm, seen = lab.lm, []
    with lm.following() as now, lm.editing({SITE: lambda h: seen.append((now.start, now.tokens.shape[1]))}):
        lm.generate(PROMPT, max_new_tokens=4)
    length = len(lm.to_tokens(PROMPT))
    assert seen == [(0, length), (length, 1), (length + 1, 1), (length + 2, 1)]
    before = now.tokens
    lm.run(torch.tensor([[2, 3]]), logits=True)
    assert now.tokens is before

"""Text while it is written, and the penalty on tokens that were there before."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mistudio.lm.generate import Sampling, _choose
from mistudio.lm.stream import TextStream
from tiny_models import tiny_lm


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_pieces_heard_are_the_texts_that_come_back(lm, temperature):
    prompts = [lm.to_tokens(text) for text in ("the hat", "once", "a")]
    heard = ["", "", ""]

    def tell(row: int, piece: str) -> None:
        heard[row] += piece

    options = {"streams": [(1, n) for n in range(3)], "max_new_tokens": 12, "temperature": temperature}
    told = lm.generate_rows(prompts, **options, tell=tell)
    assert told == lm.generate_rows(prompts, **options)
    for text, generation in zip(heard, told, strict=True):
        assert generation.text.startswith(text)
        assert set(generation.text[len(text) :]) <= {"�"}  # only a character that never became whole is missing


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="�"), max_size=12))
def test_characters_of_several_tokens_come_whole(text):
    lm = tiny_lm()
    stream = TextStream(lm.to_text, [lm.bos_id])
    pieces = [stream.feed(token) for token in lm.to_tokens(text)[1:]]
    assert "".join(pieces) == text


def test_the_penalty_is_subtracted_for_every_time_a_token_was_there():
    logits, before = torch.tensor([[1.0, 2.0, 0.5, 0.0]]), torch.tensor([[1, 1, 3]])
    scores = logits.double() / 0.5 - 1.5 * torch.tensor([[0.0, 2.0, 0.0, 1.0]])
    ends = scores.softmax(-1).cumsum(-1)[0]
    sampling = Sampling(max_new_tokens=1, temperature=0.5, frequency_penalty=1.5)
    for draw in torch.linspace(0.001, 0.999, 57).tolist():
        expected = int((ends <= draw).sum())
        assert int(_choose(logits, sampling, torch.tensor([draw], dtype=torch.float64), before)) == expected


def test_a_penalty_does_nothing_to_greedy_texts(lm):
    prompt = [lm.to_tokens("the hat")]
    plain = lm.generate_rows(prompt, streams=[(0, 0)], max_new_tokens=10)
    assert lm.generate_rows(prompt, streams=[(0, 0)], max_new_tokens=10, frequency_penalty=2.0) == plain

"""Rows without a store: each once, shuffled in blocks, and resumed exactly; `train` does not notice."""

import gc
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mistudio import recipes
from mistudio.collect import CollectConfig, StreamConfig, collect, stream
from mistudio.errors import ConfigError, ModelError, StoreError, TextError
from mistudio.sae import SAEConfig
from mistudio.store import RingFeed
from mistudio.store.order import row_order
from mistudio.train import initial_sae, train
from tiny_models import tiny_lm


def numbered(start: int) -> Iterator[torch.Tensor]:
    """Rows whose first number is their place in the source, in uneven pieces."""
    row = start
    while True:
        size = 1 + row % 7
        number = torch.arange(row, row + size, dtype=torch.float32)
        yield torch.stack([number, torch.ones(size), torch.sin(number)], dim=1)
        row += size


def ring(buffer_rows: int = 20, batch_rows: int = 6, seed: int = 1, source=numbered, **settings) -> RingFeed:
    return RingFeed(
        source,
        site="layers.0.mlp_out",
        width=3,
        buffer_rows=buffer_rows,
        batch_rows=batch_rows,
        seed=seed,
        settings=settings,
    )


def taken(feed, batches: int) -> torch.Tensor:
    return torch.cat([next(feed) for _ in range(batches)])


def numbers(feed, batches: int) -> np.ndarray:
    return (taken(feed, batches) * feed.scale)[:, 0].round().int().numpy()


@given(
    buffer_rows=st.integers(1, 60),
    batch_rows=st.integers(1, 90),
    seed=st.integers(0, 2**64 - 1),
    batches=st.integers(1, 9),
)
def test_rows_are_those_of_the_source_permuted_in_blocks(buffer_rows, batch_rows, seed, batches):
    found = numbers(ring(buffer_rows, batch_rows, seed), batches)
    blocks = range(-(-len(found) // buffer_rows))
    expected = [k * buffer_rows + row_order(seed, 0, k, buffer_rows) for k in blocks]
    assert np.array_equal(found, np.concatenate(expected)[: len(found)])


@given(
    buffer_rows=st.integers(1, 40),
    batch_rows=st.integers(1, 50),
    before=st.integers(0, 12),
    other_batch=st.integers(1, 50),
)
def test_a_restored_feed_goes_on_exactly_with_any_batch_size(buffer_rows, batch_rows, before, other_batch):
    feed = ring(buffer_rows, batch_rows)
    for _ in range(before):
        next(feed)
    state = json.loads(json.dumps(feed.state()))
    expected = taken(feed, -(-3 * other_batch // batch_rows))[: 3 * other_batch]
    other = ring(buffer_rows, other_batch)
    next(other)
    other.restore(state)
    assert torch.equal(taken(other, 3), expected)


def test_a_batch_that_fails_leaves_the_place_before_it():
    """The batch would have run over the end of a block, of which the rows were taken already."""

    def ends(start):
        return iter([piece for piece, _ in zip(numbered(start), range(19), strict=False)])

    whole, failing, again = ring(), ring(source=ends), ring()
    assert torch.equal(taken(failing, 3), taken(whole, 3))
    with pytest.raises(StoreError, match="must be endless"):
        next(failing)
    assert failing.taken == 18
    again.restore(failing.state())
    assert torch.equal(next(again), next(whole))


def test_a_restore_reads_at_most_two_blocks_and_not_the_first():
    starts, rows = [], 0

    def counted(start):
        nonlocal rows
        starts.append(start)
        for piece in numbered(start):
            rows += len(piece)
            yield piece

    feed = ring(buffer_rows=50, batch_rows=10)
    taken(feed, 47)
    again = ring(buffer_rows=50, batch_rows=10, source=counted)
    again.restore(feed.state())
    assert torch.equal(next(again), next(feed))
    assert starts == [450]
    assert rows <= 2 * 50 + 10 + 4 * 7  # and the pieces that are made ahead


def test_scale_and_mean_are_those_of_the_first_block_whenever_they_are_asked_for():
    first = torch.cat([piece for piece, _ in zip(numbered(0), range(9), strict=False)])[:20].double()
    feed = ring()
    assert feed.scale == pytest.approx(first.square().sum(1).mean().sqrt().item(), rel=1e-13)
    plain = taken(ring(), 9)
    assert torch.equal(taken(feed, 5), plain[:30])
    assert torch.allclose(feed.mean, first.mean(0).float())
    later = ring()
    later.restore(feed.state())
    assert torch.equal(later.mean, feed.mean)  # reads the first block, and comes back
    assert torch.equal(taken(later, 4), plain[30:])
    assert torch.equal(taken(feed, 4), plain[30:])


def test_the_state_of_another_feed_is_refused_by_name():
    state = ring(text="a").state()
    for other, message in (
        (ring(seed=2, text="a"), "seed = 1; this one has 2"),
        (ring(buffer_rows=21, text="a"), "buffer_rows = 20; this one has 21"),
        (ring(text="b"), "text = 'a'; this one has 'b'"),
    ):
        with pytest.raises(StoreError, match=message):
            other.restore(state)
    with pytest.raises(StoreError, match="state of a feed without a store has site"):
        ring().restore({"taken": 3})
    with pytest.raises(StoreError, match="taken = -1"):
        ring(text="a").restore({**state, "taken": -1})


def test_rows_that_are_not_finite_or_that_end_stop_the_feed():
    def torn(start):
        for piece in numbered(start):
            if (piece[:, 0] >= 70).any():
                piece[-1, 1] = torch.nan
            yield piece

    feed = ring(source=torn)
    with pytest.raises(StoreError, match=r"layers\.0\.mlp_out has NaN or infinite values in row 7\d"):
        taken(feed, 30)
    feed = ring(source=lambda start: iter([torch.ones(30, 3)]))
    with pytest.raises(StoreError, match="ended after 30 rows"):
        taken(feed, 30)
    with pytest.raises(StoreError, match="zero"):
        next(ring(source=lambda start: iter([torch.zeros(90, 3)])))


# ---- from a language model


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def cfg(tmp_path_factory) -> StreamConfig:
    path = tmp_path_factory.mktemp("text") / "pages.txt"
    path.write_text("\n\n".join(f"Page {n}: " + "the hen had a hat. " * (1 + n % 4) for n in range(40)))
    return StreamConfig(
        site="layers.1.resid_post",
        buffer_rows=300,
        text=str(path),
        separator="blank-line",
        held_out=0.25,
        context=16,
        lm_batch_rows=4,
    )


@pytest.fixture(scope="module")
def stored(cfg, lm, tmp_path_factory) -> np.ndarray:
    """All rows of the text in its order, in raw units."""
    store = collect(
        CollectConfig(
            sites=(cfg.site,),
            tokens=10**6,
            out=tmp_path_factory.mktemp("s") / "s",
            text=cfg.text,
            separator="blank-line",
            held_out=0.25,
            context=16,
            lm_batch_rows=4,
        ),
        lm,
    )
    where, rows = store.where(0), store.bucket(cfg.site, 0)
    return rows[np.lexsort((where[:, 2], where[:, 1]))]


def test_a_stream_gives_the_rows_of_a_collection_and_then_those_of_the_text_again(cfg, lm, stored):
    feed = stream(cfg, 100, lm)
    found = (taken(feed, 15) * np.float32(feed.scale)).numpy()
    endless = np.concatenate([stored, stored])
    assert len(stored) < 1500 < len(endless)
    order = np.concatenate([k * 300 + row_order(0, 0, k, 300) for k in range(5)])
    assert np.allclose(found, endless[order], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("batches", [1, 4, 14])
def test_a_stream_resumes_exactly_inside_a_batch_of_the_model_and_after_the_end_of_the_text(cfg, lm, batches):
    feed = stream(cfg, 110, lm)
    taken(feed, batches)
    again = stream(cfg, 110, lm)
    again.restore(json.loads(json.dumps(feed.state())))
    assert torch.equal(taken(again, 3), taken(feed, 3))


def test_the_thread_of_a_stream_ends_with_it(cfg, lm):
    before = set(threading.enumerate())

    def new():
        return len(set(threading.enumerate()) - before)

    feed = stream(cfg, 110, lm)
    taken(feed, 3)
    assert new() == 1
    feed.restore(feed.state())
    assert new() == 0
    next(feed)
    del feed
    gc.collect()
    assert new() == 0


def test_two_streams_of_one_model_do_not_disturb_each_other(cfg, lm):
    other = replace(cfg, site="layers.0.attn_z")
    expected, expected_other = taken(stream(cfg, 70, lm), 6), taken(stream(other, 70, lm), 6)
    feeds = stream(cfg, 70, lm), stream(other, 70, lm)
    both = [(next(feeds[0]), next(feeds[1])) for _ in range(6)]
    assert torch.equal(torch.cat([x for x, _ in both]), expected)
    assert torch.equal(torch.cat([y for _, y in both]), expected_other)


def test_training_on_a_stream_that_was_stopped_equals_training_that_was_not(cfg, lm, tmp_path):
    config = replace(recipes.quick(steps=12, batch_rows=64, target_l0=4), checkpoint_every=5, log_every=1)

    def sae(feed):
        sae_config = SAEConfig(d_model=feed.width, d_sae=24, hook_name=cfg.site, scale=feed.scale)
        return initial_sae(sae_config, config)

    whole = stream(cfg, 64, lm)
    expected = train(sae(whole), whole, config, folder=tmp_path / "whole", mean=whole.mean / whole.scale)

    class Stopped(RingFeed):
        def __next__(self):
            if self.taken >= 8 * 64:
                raise KeyboardInterrupt
            return super().__next__()

    half = stream(cfg, 64, lm)
    half.__class__ = Stopped
    with pytest.raises(KeyboardInterrupt):
        train(sae(half), half, config, folder=tmp_path / "half", mean=half.mean / half.scale)
    other = stream(cfg, 64, lm)
    resumed = train(sae(other), other, config, folder=tmp_path / "half", resume=True, mean=other.mean / other.scale)
    for name, value in expected.sae.state_dict().items():
        assert torch.equal(value, resumed.sae.state_dict()[name])


def test_a_stream_that_cannot_be_is_refused_before_it_begins(cfg, lm):
    with pytest.raises(TextError, match="no file or folder"):
        stream(replace(cfg, text="nowhere.txt"), 10, lm)
    with pytest.raises(ModelError, match="0 to 2"):
        stream(replace(cfg, site="layers.9.resid_post"), 10, lm)
    with pytest.raises(ModelError, match="context must be"):
        stream(replace(cfg, context=10**6), 10, lm)
    with pytest.raises(ConfigError, match="buffer_rows"):
        replace(cfg, buffer_rows=0)
    with pytest.raises(StoreError, match="batch_rows = 0"):
        stream(cfg, 0, lm)


def test_a_text_too_short_for_one_row_is_an_error_and_not_an_endless_loop(cfg, lm, tmp_path: Path):
    (tmp_path / "short.txt").write_text("hi")
    with pytest.raises(TextError, match="too short"):
        next(stream(replace(cfg, text=str(tmp_path / "short.txt"), separator=None, held_out=0.0), 10, lm))

"""What ends a collection, which rows are left out, documents read by length: stated, counted, never by chance."""

import json
import math
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mistudio.collect
import mistudio.lm.batches
from mistudio import cli
from mistudio.collect import collect
from mistudio.errors import ConfigError, StoreError, TextError
from mistudio.lm import LanguageModel, Site, TokenRow, documents, separate
from mistudio.lm.batches import packed_groups, sorted_groups
from mistudio.store import Store, outliers
from mistudio.store.outliers import Rows, judged, rule_of
from test_collect import SITES, TOKENS, _KillError, cfg, in_order_of_text, lm, text  # noqa: F401 (fixtures)
from test_store import digest


def killed_after(lm: LanguageModel, monkeypatch, passes: int):  # noqa: F811
    run, left = lm.run, iter(range(passes))

    def killed(*args, **kwargs):
        if next(left, None) is None:
            raise _KillError
        return run(*args, **kwargs)

    monkeypatch.setattr(lm, "run", killed)


# ---- budgets


def test_documents_end_a_collection_and_the_store_says_so(cfg, lm):  # noqa: F811
    store = collect(replace(cfg, documents=5), lm)
    assert store.manifest.ended_by == "documents"
    _, where = in_order_of_text(store, SITES[0])
    assert set(where[:, 1]) <= set(range(5))
    assert 0 < store.rows < TOKENS


def test_the_budget_that_is_spent_first_ends_it(cfg, lm):  # noqa: F811
    assert collect(cfg, lm).manifest.ended_by == "tokens"
    assert collect(replace(cfg, tokens=10**5, out=cfg.out / "t"), lm).manifest.ended_by == "text"
    assert collect(replace(cfg, documents=10**5, out=cfg.out / "d"), lm).manifest.ended_by == "tokens"


def test_disk_room_is_a_number_of_rows(cfg, lm):  # noqa: F811
    row = 4 * (16 + 32) + 12
    store = collect(replace(cfg, disk_gb=500.5 * row / 1e9), lm)
    assert (store.rows, store.manifest.ended_by, store.manifest.expected_rows) == (500, "disk_gb", 500)
    rows = sum(path.stat().st_size - 256 for path in cfg.out.rglob("0*.safetensors"))
    assert rows == 500 * row
    with pytest.raises(ConfigError, match="no room for a single row of 204 bytes"):
        collect(replace(cfg, disk_gb=1e-7, out=cfg.out / "x"), lm)


def test_time_ends_a_collection_with_what_there_is_and_append_goes_on(cfg, lm, tmp_path, monkeypatch, caplog):  # noqa: F811
    hours = count()
    with monkeypatch.context() as patch:
        patch.setattr(mistudio.lm.batches, "time", SimpleNamespace(monotonic=lambda: 3600.0 * next(hours)))
        first = collect(replace(cfg, hours=1.5), lm)
    assert 0 < first.rows < TOKENS
    assert first.manifest.ended_by == "hours"
    assert "ended by the time; go on with --append" in caplog.text
    assert collect(replace(cfg, resume=True), lm).rows == first.rows  # it is finished
    store = collect(replace(cfg, append=True), lm)
    assert (store.rows, store.manifest.ended_by) == (TOKENS, "tokens")
    whole = collect(replace(cfg, out=tmp_path / "whole"), lm)
    assert store.manifest.checksums == whole.manifest.checksums


def test_a_finished_collection_by_documents_can_be_extended(cfg, lm, tmp_path):  # noqa: F811
    collect(replace(cfg, documents=5, packing="none"), lm)
    store = collect(replace(cfg, append=True, packing="none", documents=12), lm)
    whole = collect(replace(cfg, documents=12, packing="none", out=tmp_path / "whole"), lm)
    assert (store.rows, store.manifest.ended_by) == (whole.rows, "documents")


@pytest.mark.parametrize("name", ["documents", "disk_gb", "hours", "drop_outliers"])
@pytest.mark.parametrize("limit", [0, math.inf, math.nan])
def test_a_budget_of_nothing_or_everything_is_refused(cfg, name, limit):  # noqa: F811
    with pytest.raises(ConfigError, match=f"{name} = {limit}"):
        replace(cfg, **{name: limit})


def test_a_disk_beyond_counting_is_no_budget(cfg, lm):  # noqa: F811
    assert collect(replace(cfg, disk_gb=1e300), lm).rows == cfg.tokens


def test_rows_beyond_what_a_model_reads_in_a_pass_are_refused_before_they_are_gathered(cfg):  # noqa: F811
    with pytest.raises(ConfigError, match="lm_batch_rows = 100,000,000,000, but a model reads at most 65,536"):
        replace(cfg, lm_batch_rows=10**11)


# ---- outliers


@pytest.fixture
def spiky(lm):  # noqa: F811
    """The model with rows a hundred times as long wherever the token is one of three."""
    chosen = torch.tensor([5, 17, 40])
    with lm.following() as step, lm.editing({Site(1, "resid_post"): lambda h: longer(h, step.tokens, chosen)}):
        yield lm


def longer(h: torch.Tensor, tokens: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.isin(tokens, chosen)[..., None], 100 * h, h)


def long_tokens(store: Store) -> np.ndarray:
    """Whether each row's norm is beyond ten medians of the first rows, in the order of the text."""
    rows, _ = in_order_of_text(store, SITES[0])
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    return lengths > 10 * np.median(lengths[: outliers.FIRST_ROWS])


def test_outliers_are_counted_and_kept_unless_asked(cfg, spiky, capsys):  # noqa: F811
    store = collect(cfg, spiky)
    found = store.manifest.outliers
    expected = int(long_tokens(store).sum())
    assert expected > 5
    assert (found.factor, found.drop, found.dropped, found.first_rows) == (10.0, False, 0, TOKENS)
    assert {site: at.rows for site, at in found.sites.items()} == {SITES[0]: expected, SITES[1]: 0}
    cli.main(["store", "show", str(cfg.out)])
    assert f"{SITES[0]} {expected}" in capsys.readouterr().out


def test_dropped_outliers_are_gone_from_every_site_and_counted(cfg, spiky, tmp_path):  # noqa: F811
    everything = collect(replace(cfg, tokens=900, out=tmp_path / "all"), spiky)
    store = collect(replace(cfg, drop_outliers=10.0), spiky)
    assert store.rows == TOKENS
    beyond = long_tokens(everything)
    rows, where = in_order_of_text(everything, SITES[1])
    mine, my_where = in_order_of_text(store, SITES[1])
    assert np.array_equal(mine, rows[~beyond][:TOKENS])
    assert np.array_equal(my_where, where[~beyond][:TOKENS])
    last = np.flatnonzero(~beyond)[TOKENS - 1]
    assert store.manifest.outliers.dropped == beyond[:last].sum() == store.manifest.outliers.sites[SITES[0]].rows


@pytest.mark.parametrize("passes", [0, 2, 5, 9])
@pytest.mark.parametrize("drop", [None, 10.0])
def test_an_interruption_does_not_change_what_is_dropped(cfg, spiky, tmp_path, monkeypatch, passes, drop):  # noqa: F811
    monkeypatch.setattr(outliers, "FIRST_ROWS", 150)
    monkeypatch.setattr(mistudio.collect, "CHECKPOINT_EVERY_S", 0.0)
    ask = replace(cfg, drop_outliers=drop, resume=True)
    collect(replace(ask, out=tmp_path / "whole"), spiky)
    with monkeypatch.context() as patch:
        killed_after(spiky, patch, passes)
        with pytest.raises(_KillError):
            collect(ask, spiky)
    collect(ask, spiky)
    assert digest(cfg.out) == digest(tmp_path / "whole")


def test_an_append_drops_as_one_longer_collection_does(cfg, spiky, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(outliers, "FIRST_ROWS", 150)
    ask = replace(cfg, drop_outliers=10.0)
    collect(replace(ask, tokens=400), spiky)
    store = collect(replace(ask, tokens=800, append=True), spiky)
    whole = collect(replace(ask, tokens=800, bucket_rows=400, out=tmp_path / "whole"), spiky)
    assert store.manifest.checksums == whole.manifest.checksums
    assert store.manifest.outliers == whole.manifest.outliers


def test_rows_that_are_not_finite_are_refused_and_not_dropped(cfg, lm):  # noqa: F811
    with (
        lm.editing({Site(1, "resid_post"): lambda h: torch.where(torch.rand(h.shape) < 0.001, torch.inf, h)}),
        pytest.raises(StoreError, match="NaN or infinite"),
    ):
        collect(replace(cfg, drop_outliers=3.0), lm)


def pieces(sizes: list[int]):
    values = torch.randn(sum(sizes), 4, generator=torch.Generator().manual_seed(0))
    values[::7] *= 30
    where = torch.arange(sum(sizes))[:, None].repeat(1, 3)
    start = 0
    for end, size in enumerate(sizes):
        yield Rows({"a": values[start : start + size]}, where[start : start + size], end)
        start += size


@pytest.mark.parametrize("sizes", [[200], [3] * 66, [1, 50, 2, 100], [7, 93, 100]])
@pytest.mark.parametrize("left", [1, 20, 60, 150, 1000])
def test_portions_do_not_bear_on_what_is_dropped(monkeypatch, sizes, left):
    monkeypatch.setattr(outliers, "FIRST_ROWS", 40)
    got = list(judged(pieces(sizes), (5.0, True), left))
    kept = torch.cat([piece.where for piece in got])[:, 0].tolist()
    whole = torch.cat([piece.rows["a"] for piece in pieces(sizes)])
    lengths = whole.norm(dim=1)
    beyond = lengths > 5 * lengths[: min(40, left)].double().quantile(0.5)
    assert kept == (~beyond).nonzero()[:left, 0].tolist()
    counted = beyond[: kept[-1] + 1] if len(kept) == left else beyond
    assert sum(int(piece.beyond.sum()) for piece in got) == counted.sum()


def test_the_median_is_numpys():
    rows = torch.randn(11, 3, generator=torch.Generator().manual_seed(2))
    rule = rule_of({"a": rows}, 2.0, False)
    assert rule.sites["a"].median == pytest.approx(np.median(np.linalg.norm(rows.numpy(), axis=1)), rel=1e-6)


# ---- documents by length


def test_without_packing_a_row_has_one_document_and_all_tokens_come_once(cfg, lm):  # noqa: F811
    docs = list(documents(cfg.text, separator="blank-line", part="train", held_out=0.25))
    rows = list(separate(lm, docs, 16))
    assert all(len(set(row.document[1:])) == 1 and row.tokens[0] == lm.bos_id for row in rows)
    assert {len(row.tokens) for row in rows} >= {16}
    found = [(d, o, t) for r in rows for d, o, t in zip(r.document[1:], r.offset[1:], r.tokens[1:], strict=True)]
    encoded = lm.encode([doc.text for doc in docs])
    assert found == [(d, o, t) for d, ids in enumerate(encoded) for o, t in enumerate(ids)]
    with pytest.raises(TextError, match="no token"):
        list(separate(lm, [], 16))


def test_rows_sorted_by_length_are_the_same_rows_with_less_filling(cfg, lm, tmp_path, monkeypatch):  # noqa: F811
    ask = replace(cfg, packing="none", tokens=10**5, bucket_rows=10**5)
    by_length = collect(ask, lm)
    monkeypatch.setattr(mistudio.collect, "ROWS_SORTED", 1)
    plain = collect(replace(ask, out=tmp_path / "plain"), lm)
    for site in SITES:
        (rows, where), (others, other_where) = in_order_of_text(by_length, site), in_order_of_text(plain, site)
        assert np.array_equal(where, other_where)
        assert np.allclose(rows, others, atol=1e-5)
    assert by_length.rows == len({tuple(row) for row in where[:, 1:].tolist()})


def test_each_row_is_what_the_model_gives_for_its_document_alone(cfg, lm):  # noqa: F811
    store = collect(replace(cfg, packing="none", tokens=400), lm)
    rows, where = in_order_of_text(store, SITES[0])
    docs = list(documents(cfg.text, separator="blank-line", part="train", held_out=0.25))
    for document in (0, 3):
        piece = next(row for row in separate(lm, docs, 16) if row.document[1] == document)
        tokens = torch.from_numpy(piece.tokens).long()[None]
        alone = lm.run(tokens, read=[Site.parse(SITES[0])]).activations[Site.parse(SITES[0])][0, 1:]
        chosen = (where[:, 1] == document) & (where[:, 2] < len(alone))
        assert np.allclose(rows[chosen], alone[: chosen.sum()].numpy(), atol=1e-5)


def row_of(length: int, number: int) -> TokenRow:
    return TokenRow(*(np.full(length, number, dtype=np.int32) for _ in range(3)))


def test_sorted_groups_have_every_row_once_fill_up_little_and_keep_within_their_tokens():
    lengths = np.random.default_rng(0).integers(2, 41, size=500)
    rows = [row_of(length, number) for number, length in enumerate(lengths)]

    def filled(groups: list[list[TokenRow]]) -> int:
        return sum(max(len(row.tokens) for row in group) * len(group) for group in groups)

    groups = list(sorted_groups(rows, 160, 200))
    assert sorted(row.document[0] for group in groups for row in group) == list(range(500))
    assert all(filled([group]) <= 160 for group in groups)
    assert filled(groups) < 1.1 * lengths.sum() < 0.8 * filled(list(packed_groups(rows, 4)))
    again = sorted_groups(rows, 160, 200)
    assert [[row.document[0] for row in group] for group in again] == [[r.document[0] for r in g] for g in groups]
    assert [[len(r.tokens) for r in g] for g in sorted_groups([row_of(50, 0)] * 2, 16, 9)] == [[50], [50]]


@pytest.mark.parametrize("passes", [1, 4])
def test_an_interrupted_collection_of_sorted_documents_equals_a_whole_one(cfg, lm, tmp_path, monkeypatch, passes):  # noqa: F811
    monkeypatch.setattr(mistudio.collect, "CHECKPOINT_EVERY_S", 0.0)
    ask = replace(cfg, packing="none", tokens=400, resume=True)
    collect(replace(ask, out=tmp_path / "whole"), lm)
    with monkeypatch.context() as patch:
        killed_after(lm, patch, passes)
        with pytest.raises(_KillError):
            collect(ask, lm)
    collect(ask, lm)
    assert digest(cfg.out) == digest(tmp_path / "whole")


def test_groups_of_packed_rows_are_all_rows_in_order(cfg, lm):  # noqa: F811
    assert list(packed_groups(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]


def test_the_settings_are_in_the_manifest(cfg, lm):  # noqa: F811
    collect(replace(cfg, documents=5, drop_outliers=50.0), lm)
    source = json.loads((cfg.out / "manifest.json").read_text())["source"]
    assert (source["documents"], source["drop_outliers"], source["packing"]) == (5, 50.0, "stream")
    assert "hours" not in source

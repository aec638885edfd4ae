"""Collection: the rows are the model's, from the train part, each once; and interrupting it changes nothing."""

import logging
import os
import random
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import mistudio.collect
from mistudio.collect import CollectConfig, collect
from mistudio.errors import ConfigError, ModelError, StoreError, TextError
from mistudio.lm import LanguageModel, Site, documents, pack
from mistudio.store import Store, StoreWriter
from test_store import digest
from tiny_models import tiny_lm

SITES = ("layers.1.resid_post", "layers.0.attn_z")
TOKENS = 700


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return tiny_lm()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "pages.txt"
    path.write_text("\n\n".join(f"Page {n}: " + "the hen had a hat. " * (1 + n % 4) for n in range(40)))
    return path


@pytest.fixture
def cfg(text, tmp_path) -> CollectConfig:
    return CollectConfig(
        sites=SITES,
        tokens=TOKENS,
        out=tmp_path / "store",
        text=str(text),
        separator="blank-line",
        held_out=0.25,
        context=16,
        lm_batch_rows=4,
        bucket_rows=200,
    )


def in_order_of_text(store: Store, site: str) -> tuple[np.ndarray, np.ndarray]:
    buckets = range(len(store.manifest.bucket_sizes))
    where = np.concatenate([store.where(k) for k in buckets])
    rows = np.concatenate([store.bucket(site, k) for k in buckets])
    order = np.lexsort((where[:, 2], where[:, 1]))
    return rows[order], where[order]


def test_rows_are_the_models_activations_of_the_train_part_without_special_tokens(cfg, lm):
    store = collect(cfg, lm)
    docs = documents(cfg.text, separator="blank-line", part="train", held_out=0.25)
    packed = list(pack(lm, docs, 16))
    tokens = torch.from_numpy(np.stack([row.tokens for row in packed])).long()
    kept = ~torch.isin(tokens, torch.tensor(sorted(lm.special_ids)))
    assert not kept[:, 0].any()
    assert not kept[:, 1:].all()  # some EOS between documents
    for name in SITES:
        site = Site.parse(name)
        expected = torch.cat([lm.run(part, read=[site]).activations[site] for part in tokens.split(4)])[kept][:TOKENS]
        rows, where = in_order_of_text(store, name)
        assert np.array_equal(rows, expected.numpy())
        assert np.array_equal(where[:, 0], tokens[kept][:TOKENS].numpy())
        documents_of = np.stack([row.document for row in packed])[kept.numpy()][:TOKENS]
        assert np.array_equal(where[:, 1], documents_of)


def test_where_leads_back_to_the_token_in_its_document(cfg, lm):
    _, where = in_order_of_text(collect(cfg, lm), SITES[0])
    texts = [doc.text for doc in documents(cfg.text, separator="blank-line", part="train", held_out=0.25)]
    encoded = lm.encode(texts)
    assert all(encoded[document][offset] == token for token, document, offset in where)


def test_a_store_has_exactly_the_rows_asked_for_and_says_what_was_asked(cfg, lm):
    store = collect(cfg, lm)
    assert store.rows == TOKENS
    assert store.sites == list(SITES)
    assert (store.width(SITES[0]), store.width(SITES[1])) == (16, 32)
    assert store.manifest.model == "tiny-gemma2"
    source = store.manifest.source
    assert (source["part"], source["held_out"], source["text"], source["revision"]) == ("train", 0.25, cfg.text, None)
    assert source["lm_dtype"] == "float32"
    assert "out" not in source


def test_a_site_may_be_named_in_any_spelling_but_once(cfg, lm):
    store = collect(replace(cfg, sites=("blocks.1.hook_resid_post",)), lm)
    assert store.sites == ["layers.1.resid_post"]
    with pytest.raises(ConfigError, match="more than once"):
        collect(replace(cfg, sites=("blocks.1.hook_resid_post", SITES[0]), out=cfg.out / "b"), lm)


class _KillError(Exception):
    pass


@pytest.mark.parametrize("every_s", [0.0, 1e9])
@pytest.mark.parametrize("kills", [[0], [3], [5, 2, 4]])
def test_an_interrupted_collection_equals_one_never_interrupted(cfg, lm, tmp_path, monkeypatch, every_s, kills):
    collect(replace(cfg, out=tmp_path / "whole"), lm)
    monkeypatch.setattr(mistudio.collect, "CHECKPOINT_EVERY_S", every_s)
    run = lm.run
    for passes in kills:
        left = iter(range(passes))

        def killed(*args, left=left, **kwargs):
            if next(left, None) is None:
                raise _KillError
            return run(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(lm, "run", killed)
            with pytest.raises(_KillError):
                collect(replace(cfg, resume=True), lm)
        with open(cfg.out / "where" / "00000.safetensors", "ab") as tail:
            tail.write(b"garbage")
    collect(replace(cfg, resume=True), lm)
    assert digest(cfg.out) == digest(tmp_path / "whole")


@pytest.mark.parametrize(("every_s", "kept"), [(0.0, r"[1-9]\d*"), (1e9, "0")])
def test_a_collection_that_is_interrupted_says_how_far_it_came_and_what_to_type(cfg, lm, monkeypatch, every_s, kept):
    monkeypatch.setattr(mistudio.collect, "CHECKPOINT_EVERY_S", every_s)
    calls, write = iter(range(3)), StoreWriter.write

    def interrupted(writer, *rows):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        write(writer, *rows)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write", interrupted)
        says = (
            rf"^interrupted; {kept} of {cfg.tokens} rows are safe in .*\. Go on with the same command and --resume\.$"
        )
        with pytest.raises(KeyboardInterrupt, match=says):
            collect(cfg, lm)
    assert collect(replace(cfg, resume=True), lm).rows == cfg.tokens


def killed_collection(cfg: CollectConfig, lm: LanguageModel, after_s: float) -> bool:
    """Whether a process that goes on with the collection is killed, by the system, after so many seconds."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, after_s)
        collect(cfg, lm)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize(("every_s", "bucket_rows"), [(0.0, 200), (0.0, 30), (0.01, 200)])
def test_a_collection_killed_at_twenty_moments_equals_one_never_killed(
    cfg, lm, tmp_path, monkeypatch, every_s, bucket_rows
):
    monkeypatch.setattr(mistudio.collect, "CHECKPOINT_EVERY_S", every_s)
    ask = replace(cfg, resume=True, bucket_rows=bucket_rows)
    start = time.monotonic()
    collect(replace(ask, out=tmp_path / "whole"), lm)
    whole_s = time.monotonic() - start
    draw, kills = random.Random(bucket_rows), 0
    while kills < 20:
        if not killed_collection(ask, lm, draw.uniform(0.0005, whole_s * 0.6)):
            assert digest(cfg.out) == digest(tmp_path / "whole")
            shutil.rmtree(cfg.out)  # it finished between two kills: begin again
        else:
            kills += 1
    collect(ask, lm)
    assert digest(cfg.out) == digest(tmp_path / "whole")


def test_a_resume_of_a_finished_collection_changes_nothing(cfg, lm):
    collect(cfg, lm)
    before = digest(cfg.out)
    assert collect(replace(cfg, resume=True), lm).rows == TOKENS
    assert digest(cfg.out) == before


def test_a_resume_with_another_setting_names_it(cfg, lm):
    collect(cfg, lm)
    with pytest.raises(StoreError, match=r"held_out = 0\.25; this run wants 0\.5"):
        collect(replace(cfg, resume=True, held_out=0.5), lm)


def test_a_text_that_ends_early_gives_fewer_rows_and_a_warning(cfg, lm, caplog):
    ask = replace(cfg, tokens=10**6, bucket_rows=300_000)
    with caplog.at_level(logging.WARNING, logger="mistudio.collect"):
        store = collect(ask, lm)
    assert TOKENS < store.rows < 10**6
    assert "ended early" in caplog.text
    assert store.manifest.expected_rows == 10**6
    again = digest(cfg.out)
    assert collect(replace(ask, resume=True), lm).rows == store.rows
    assert digest(cfg.out) == again


def test_too_little_text_is_said_before_a_folder_is_made(cfg, lm, tmp_path):
    (tmp_path / "short.txt").write_text("hi")
    with pytest.raises(TextError, match="too short"):
        collect(replace(cfg, text=str(tmp_path / "short.txt"), separator=None, held_out=0.0), lm)
    assert not cfg.out.exists()


def test_a_missing_text_and_a_folder_in_use_are_said_before_the_model_loads(cfg, monkeypatch):
    monkeypatch.setattr(LanguageModel, "load", None)  # calling it would be a TypeError
    with pytest.raises(TextError, match="no file or folder"):
        collect(replace(cfg, text="nowhere.txt"))
    cfg.out.mkdir()
    (cfg.out / "notes").touch()
    with pytest.raises(StoreError, match="not empty"):
        collect(cfg)


def test_a_disk_too_small_is_said_before_the_work(cfg, lm):
    with pytest.raises(StoreError, match=r"GB at .* are free"):
        collect(replace(cfg, tokens=10**13), lm)
    assert not cfg.out.exists()


def test_an_unknown_site_is_an_error_that_names_the_layers(cfg, lm):
    with pytest.raises(ModelError, match="0 to 2"):
        collect(replace(cfg, sites=("layers.9.resid_post",)), lm)


def test_a_nan_activation_stops_the_collection(cfg, lm):
    with (
        lm.editing({Site(1, "resid_post"): lambda h: h / 0}),
        pytest.raises(StoreError, match=r"layers\.1.*document 0"),
    ):
        collect(cfg, lm)


@pytest.mark.parametrize(
    "change",
    [{"tokens": 0}, {"sites": ()}, {"held_out": 1.0}, {"context": 1}, {"bucket_rows": 0}, {"lm_batch_rows": 0}],
)
def test_settings_that_cannot_be_are_refused(cfg, change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(cfg, **change)


def test_a_disk_too_small_for_gemma_scope_is_said_before_any_weights_are_read(tmp_path):
    """The folder has the configuration of Gemma 2 2B and no weights; 4 billion rows of 2304 need 37 TB."""
    model = tmp_path / "gemma-2-2b"
    config = transformers.Gemma2Config(hidden_size=2304, num_hidden_layers=26, num_attention_heads=8, head_dim=256)
    config.save_pretrained(model)
    out = tmp_path / "store"
    cfg = CollectConfig(sites=("layers.20.resid_post",), tokens=4_000_000_000, out=out, model=str(model))
    with pytest.raises(StoreError, match=r"need 36,912\.0 GB"):
        collect(cfg)
    assert not out.exists()


def test_more_tokens_can_be_collected_into_a_finished_store_and_equal_one_longer_collection(cfg, lm, tmp_path):
    """650 rows end inside a batch, whose other rows must come first in what follows."""
    collect(replace(cfg, tokens=650), lm)
    collect(replace(cfg, tokens=900, append=True), lm)
    extended = collect(replace(cfg, tokens=1100, append=True), lm)
    long = collect(replace(cfg, tokens=1100, bucket_rows=275, out=tmp_path / "long"), lm)
    assert extended.manifest.checksums == long.manifest.checksums
    assert extended.manifest.token_rows == long.manifest.token_rows
    assert extended.manifest.plan == long.manifest.plan
    assert extended.scale(SITES[0]) == pytest.approx(long.scale(SITES[0]), rel=1e-14)
    again = digest(cfg.out)
    assert collect(replace(cfg, tokens=1100, append=True), lm).rows == 1100
    assert digest(cfg.out) == again


def test_an_interrupted_append_goes_on(cfg, lm, tmp_path, monkeypatch):
    collect(cfg, lm)
    monkeypatch.setattr(mistudio.collect, "CHECKPOINT_EVERY_S", 0.0)
    run, left = lm.run, iter(range(3))

    def killed(*args, **kwargs):
        if next(left, None) is None:
            raise _KillError
        return run(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(lm, "run", killed)
        with pytest.raises(_KillError):
            collect(replace(cfg, tokens=1100, append=True), lm)
    with pytest.raises(StoreError, match=r"of 1,100 rows"):
        Store.open(cfg.out)
    extended = collect(replace(cfg, tokens=1100, append=True), lm)
    long = collect(replace(cfg, tokens=1100, bucket_rows=275, out=tmp_path / "long"), lm)
    assert extended.manifest.checksums == long.manifest.checksums


def test_an_append_with_another_setting_or_fewer_rows_is_refused(cfg, lm):
    collect(cfg, lm)
    with pytest.raises(StoreError, match=r"held_out = 0\.25; this run wants 0\.5"):
        collect(replace(cfg, append=True, tokens=1100, held_out=0.5), lm)
    with pytest.raises(StoreError, match="row_dtype = 'float32'"):
        collect(replace(cfg, append=True, tokens=1100, row_dtype="int8"), lm)
    with pytest.raises(StoreError, match="700 rows in 4 buckets; it cannot become one of 400"):
        collect(replace(cfg, append=True, tokens=400), lm)


def test_a_write_that_fails_in_the_background_stops_the_collection_with_its_error(cfg, lm, monkeypatch):
    def full(*_):
        raise StoreError("the disk is full")

    monkeypatch.setattr("mistudio.store.shard.Shard.write", full)
    with pytest.raises(StoreError, match="the disk is full"):
        collect(cfg, lm)


def test_the_threads_of_a_collection_end_with_it(cfg, lm):
    before = set(threading.enumerate())
    collect(cfg, lm)
    with (
        lm.editing({Site(1, "resid_post"): lambda h: h / 0}),
        pytest.raises(StoreError),
    ):
        collect(replace(cfg, out=cfg.out / "other"), lm)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(("text", "thread"), [("stories", "MainThread"), ("hf:some/stories", "ahead")])
def test_tokens_are_made_between_a_cpus_passes_unless_they_come_over_a_network(cfg, lm, monkeypatch, text, thread):
    threads, is_special = set(), lm.is_special

    def seen(tokens):
        threads.add(threading.current_thread().name)
        return is_special(tokens)

    monkeypatch.setattr(lm, "is_special", seen)
    monkeypatch.setattr("mistudio.collect.documents", lambda *_, **__: documents("stories"))
    collect(replace(cfg, text=text), lm)
    assert threads == {thread}


@pytest.mark.parametrize(("every_s", "thread"), [(1e9, "MainThread"), (0.0, "behind")])
def test_rows_are_written_between_a_cpus_passes_unless_a_checkpoint_is_due(cfg, lm, monkeypatch, every_s, thread):
    monkeypatch.setattr(mistudio.collect, "CHECKPOINT_EVERY_S", every_s)
    threads, write = set(), StoreWriter.write

    def seen(self, *given):
        threads.add(threading.current_thread().name)
        write(self, *given)

    monkeypatch.setattr(StoreWriter, "write", seen)
    collect(cfg, lm)
    assert threads == {thread}

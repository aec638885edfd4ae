"""Stores: exact, resumable to the byte, strict."""

import hashlib
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mistudio.errors import ConfigError, StoreError
from mistudio.store import Position, Store, StoreWriter, convert, shard, statistics, verify, writer
from mistudio.store.extend import bucket_rows_to_extend
from mistudio.store.shard import Shard
from mistudio.store.writer import make_plan

A, B = "layers.3.resid_post", "layers.3.attn_z"
PORTION = 17  # rows a write


def settings_of(rows: int = 200, bucket_rows: int = 40, seed: int = 5, **changes) -> dict:
    return {
        "widths": {A: 3, B: 2},
        "expected_rows": rows,
        "bucket_rows": bucket_rows,
        "seed": seed,
        "model": "tiny",
        "context": 16,
        "source": {"text": "stories", "sites": (A, B), "held_out": 0.1},
        **changes,
    }


def portion(cursor: int, size: int = PORTION) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Rows of one write: the first column of A is the row's number, so that rows can be told apart."""
    draw = torch.Generator().manual_seed(cursor)
    number = torch.arange(cursor * PORTION, cursor * PORTION + size)
    rows = {site: torch.randn(PORTION, width, generator=draw)[:size] for site, width in ((A, 3), (B, 2))}
    rows[A][:, 0] = number
    return rows, torch.stack([number % 7, number // 10, number], dim=1)


def write(writer: StoreWriter, rows: int, until: int | None = None, checkpoint_every: int = 3) -> None:
    cursor = writer.cursor
    while writer.rows < rows and (until is None or cursor < until):
        values, where = portion(cursor, min(PORTION, rows - writer.rows))
        writer.write(values, where)
        cursor += 1
        if cursor % checkpoint_every == 0:
            writer.checkpoint(cursor)
    if writer.rows >= rows:
        writer.checkpoint(cursor)


def make(path: Path, rows: int = 200, **changes) -> Store:
    with StoreWriter.create(path, **settings_of(rows, **changes)) as writer:
        write(writer, rows)
        return writer.finish()


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    make(tmp_path / "whole")
    return tmp_path / "whole"


def edit_manifest(path: Path, **changes) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))


# ---- what is in a store


def test_every_row_is_stored_once_and_keeps_its_origin(whole):
    store = Store.open(whole)
    seen = []
    for bucket in range(5):
        rows, other, where = store.bucket(A, bucket), store.bucket(B, bucket), store.where(bucket)
        assert np.array_equal(rows[:, 0].astype(int), where[:, 2])
        for number, b_row, a_row in zip(where[:, 2], other, rows, strict=True):
            values, origin = portion(int(number) // PORTION, min(PORTION, 200 - int(number) // PORTION * PORTION))
            assert np.array_equal(a_row, values[A][number % PORTION])
            assert np.array_equal(b_row, values[B][number % PORTION])
            assert where[list(where[:, 2]).index(number)].tolist() == origin[number % PORTION].tolist()
        assert (np.diff(where[:, 2]) > 0).all()  # in a bucket, in the order of writing
        seen += where[:, 2].tolist()
    assert sorted(seen) == list(range(200))


def test_scale_and_mean_are_those_of_all_rows_in_float64(whole):
    store = Store.open(whole)
    for site in store.sites:
        rows = np.concatenate([store.bucket(site, k) for k in range(5)]).astype(np.float64)
        assert store.scale(site) == pytest.approx(np.sqrt((rows**2).sum(1).mean()), rel=1e-13)
        assert np.allclose(store.mean(site).numpy(), rows.mean(0), rtol=1e-6)
        second = load_file(whole / "statistics.safetensors")[f"{site}.second_moment"]
        assert np.allclose(second, (rows**2).mean(0), rtol=1e-13)
        feed = store.feed(site, 200, seed=0)
        assert next(feed).double().square().sum(1).mean().item() == pytest.approx(1, rel=1e-6)


def test_shards_are_safetensors_files_that_other_tools_open(whole):
    store = Store.open(whole)
    assert torch.equal(load_file(whole / A / "00002.safetensors")["rows"], torch.from_numpy(store.bucket(A, 2).copy()))
    assert load_file(whole / "where" / "00002.safetensors")["where"].dtype == torch.int32


def test_an_empty_bucket_is_a_valid_shard(tmp_path):
    store = make(tmp_path / "s", rows=20, bucket_rows=1)
    assert 0 in store.manifest.bucket_sizes
    empty = store.manifest.bucket_sizes.index(0)
    assert load_file(store.path / A / f"{empty:05d}.safetensors")["rows"].shape == (0, 3)
    assert store.bucket(A, empty).shape == (0, 3)


def test_the_portions_in_which_rows_come_do_not_change_the_rows(tmp_path, whole):
    with StoreWriter.create(tmp_path / "s", **settings_of()) as writer:
        parts = [portion(cursor) for cursor in range(12)]
        values = {site: torch.cat([p[0][site] for p in parts])[:200] for site in (A, B)}
        writer.write(values, torch.cat([p[1] for p in parts])[:200])
        writer.finish()
    one, other = digest(tmp_path / "s"), digest(whole)
    assert {name: one[name] for name in one if "/" in name} == {name: other[name] for name in other if "/" in name}


def test_a_store_says_what_it_was_made_from(whole):
    manifest = Store.open(whole).manifest
    assert (manifest.model, manifest.context, manifest.seed, manifest.rows) == ("tiny", 16, 5, 200)
    assert manifest.token_rows == 12
    assert manifest.source == {"text": "stories", "sites": [A, B], "held_out": 0.1}


# ---- feeds


@given(
    rows=st.integers(1, 120),
    bucket_rows=st.integers(1, 130),
    batch_rows=st.integers(1, 150),
    seed=st.integers(0, 2**64 - 1),
    epochs=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_an_epoch_gives_every_row_exactly_once(tmp_path_factory, rows, bucket_rows, batch_rows, seed, epochs):
    folder = tmp_path_factory.mktemp("feed")
    store = make(folder / "s", rows=rows, bucket_rows=bucket_rows, seed=seed)
    feed = store.feed(A, batch_rows, seed=seed)
    taken = torch.cat([next(feed) for _ in range(-(-rows * epochs // batch_rows))])
    stored = np.concatenate([store.bucket(A, k) for k in range(len(store.manifest.bucket_sizes))])
    expected = stored / np.float32(store.scale(A))
    for epoch in range(epochs):
        got = taken[epoch * rows : (epoch + 1) * rows].numpy()
        assert np.array_equal(got[np.argsort(got[:, 0])], expected[np.argsort(expected[:, 0])])
    shutil.rmtree(folder)


@given(batch_rows=st.integers(1, 90), before=st.integers(0, 12), after_rows=st.integers(1, 90))
@settings(max_examples=25, deadline=None)
def test_a_restored_feed_goes_on_exactly_even_with_another_batch_size(shared_store, batch_rows, before, after_rows):
    feed = shared_store.feed(A, batch_rows, seed=9)
    for _ in range(before):
        next(feed)
    state = json.loads(json.dumps(feed.state()))
    expected = torch.cat([next(feed) for _ in range(-(-3 * after_rows // batch_rows))])[: 3 * after_rows]
    other = shared_store.feed(A, after_rows, seed=9)
    next(other)
    other.restore(state)
    assert torch.equal(torch.cat([next(other) for _ in range(3)]), expected)
    start = Position(state["epoch"], state["offset"])
    assert torch.equal(next(shared_store.feed(A, after_rows, seed=9, start=start)), expected[:after_rows])


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory) -> Store:
    return make(tmp_path_factory.mktemp("shared") / "s", rows=100, bucket_rows=30)


def test_same_seed_same_batches_other_seed_other_batches(shared_store):
    first, again, other = (next(shared_store.feed(A, 100, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_two_epochs_have_different_orders(shared_store):
    feed = shared_store.feed(A, 100, seed=1)
    assert not torch.equal(next(feed), next(feed))


def test_sites_of_a_store_are_fed_in_the_same_order(shared_store):
    values, _ = portion(0)
    a = next(shared_store.feed(A, 100, seed=4)) * shared_store.scale(A)
    b = next(shared_store.feed(B, 100, seed=4)) * shared_store.scale(B)
    numbers = a[:, 0].round().int().tolist()
    for number in range(PORTION):
        assert torch.allclose(b[numbers.index(number)], values[B][number])


def test_a_feed_refuses_the_state_of_another_feed(shared_store):
    feed = shared_store.feed(A, 10, seed=1)
    with pytest.raises(StoreError, match="seed = 2; this one has 1"):
        feed.restore(shared_store.feed(A, 10, seed=2).state())
    with pytest.raises(StoreError, match="site"):
        feed.restore(shared_store.feed(B, 10, seed=1).state())
    with pytest.raises(StoreError, match="offset"):
        feed.restore({**feed.state(), "offset": 100})
    with pytest.raises(StoreError, match="state has site, seed, rows"):
        feed.restore({"epoch": 0})


def test_an_unknown_site_is_an_error_that_names_the_sites(shared_store):
    with pytest.raises(StoreError, match=f"has {A}, {B}"):
        shared_store.feed("layers.9.mlp_out", 10, seed=0)


# ---- interruption and resume


@pytest.mark.parametrize("checkpoint_every", [1, 4])
@pytest.mark.parametrize("kills", [[0], [1], [4], [5, 7], [11], [12], [2, 2, 9, 12]])
def test_an_interrupted_store_equals_one_never_interrupted(tmp_path, whole, kills, checkpoint_every):
    path = tmp_path / "s"
    for until in kills:
        with StoreWriter.resume(path, **settings_of()) as writer:
            write(writer, 200, until=until, checkpoint_every=checkpoint_every)
        for file in (*path.rglob("0*.safetensors"),):
            with open(file, "ab") as tail:  # a row half written when the kill came
                tail.write(b"garbage")
    (path / ".progress.json.1.tmp").write_text("half")
    (path / "statistics-9999.safetensors").write_bytes(b"half")
    with StoreWriter.resume(path, **settings_of()) as writer:
        write(writer, 200, checkpoint_every=checkpoint_every)
        writer.finish()
    assert digest(path) == digest(whole)


@pytest.mark.parametrize("step", ["write_statistics", "write_manifest", "Path.unlink"])
def test_a_kill_while_finishing_is_made_good(tmp_path, whole, monkeypatch, step):
    path = tmp_path / "s"
    with StoreWriter.create(path, **settings_of()) as writer:
        write(writer, 200)

        def killed(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(f"mistudio.store.writer.{step}", killed)
        with pytest.raises(KeyboardInterrupt):
            writer.finish()
        monkeypatch.undo()
    with StoreWriter.resume(path, **settings_of()) as writer:
        assert writer.complete == (step == "Path.unlink")
        writer.finish()
    assert digest(path) == digest(whole)


def test_a_kill_before_the_first_checkpoint_is_made_good(tmp_path, whole):
    path = tmp_path / "s"
    path.mkdir()
    (path / ".lock").write_text("")
    (path / ".progress.json.1.tmp").write_text("{")
    (path / "statistics-0.safetensors").write_bytes(b"")
    with StoreWriter.resume(path, **settings_of()) as writer:
        write(writer, 200)
        writer.finish()
    assert digest(path) == digest(whole)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_store import StoreWriter, settings_of, write, portion
writer = StoreWriter.create({path!r}, **settings_of())
write(writer, 200, until=8)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_store_survives_sigkill(tmp_path, whole):
    path = tmp_path / "s"
    script = KILLED.format(tests=str(Path(__file__).parent), path=str(path))
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    with StoreWriter.resume(path, **settings_of()) as writer:
        assert writer.cursor == 6
        write(writer, 200)
        writer.finish()
    assert digest(path) == digest(whole)


def test_a_finished_store_is_left_alone_by_a_resume(whole):
    before = digest(whole)
    with StoreWriter.resume(whole, **settings_of()) as writer:
        assert writer.complete
        assert writer.rows == 200
        writer.finish()
    assert digest(whole) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 6}, "seed = 5; this run wants 6"),
        ({"widths": {A: 3}}, "widths"),
        ({"source": {"text": "other.txt", "sites": (A, B), "held_out": 0.1}}, "text = 'stories'.*'other.txt'"),
        ({"source": {"text": "stories", "sites": (A, B), "held_out": 0.1, "new": 1}}, "new = None; this run wants 1"),
    ],
)
def test_a_resume_with_other_settings_is_refused_by_name(tmp_path, whole, changes, message):
    with StoreWriter.create(tmp_path / "s", **settings_of()) as writer:
        write(writer, 200, until=5)
    for path in (tmp_path / "s", whole):
        with pytest.raises(StoreError, match=message):
            StoreWriter.resume(path, **settings_of(**changes))


def test_two_writers_cannot_write_to_one_store(tmp_path):
    with StoreWriter.create(tmp_path / "s", **settings_of()), pytest.raises(StoreError, match="Another process"):
        StoreWriter.resume(tmp_path / "s", **settings_of())


def test_a_shard_cut_below_the_checkpoint_is_named(tmp_path):
    path = tmp_path / "s"
    with StoreWriter.create(path, **settings_of()) as writer:
        write(writer, 200, until=6)
    (path / A / "00001.safetensors").write_bytes(b"")
    with pytest.raises(StoreError, match=r"resid_post/00001\.safetensors has 0 bytes"):
        StoreWriter.resume(path, **settings_of())


# ---- what is refused


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_row_stops_the_collection_and_is_named(tmp_path, value):
    with StoreWriter.create(tmp_path / "s", **settings_of()) as writer:
        write(writer, 200, until=2)
        values, where = portion(2)
        values[B][4, 1] = value
        with pytest.raises(
            StoreError, match=rf"{B} has 1 NaN or infinite values in row 38 \(document 3, token 38 of it\)"
        ):
            writer.write(values, where)
        assert writer.rows == 34


def test_a_disk_too_small_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(StoreError, match=r"need 32,000\.0 GB"):
        StoreWriter.create(tmp_path / "s", **settings_of(rows=10**12))
    assert not (tmp_path / "s").exists()


def test_a_write_that_fails_is_an_error_that_says_how_to_go_on(tmp_path):
    path = tmp_path / "s"
    with StoreWriter.create(path, **settings_of()) as writer:
        write(writer, 200, until=4)
        shutil.rmtree(path / B)
        with pytest.raises(StoreError, match=r"cannot be written: No such file.*--resume"):
            writer.write(*portion(4))


@pytest.mark.parametrize(
    ("name", "message"), [("manifest.json", "finished store"), ("progress.json", "unfinished"), ("notes", "not empty")]
)
def test_a_folder_in_use_is_refused(tmp_path, name, message):
    (tmp_path / name).write_text("{}")
    with pytest.raises(StoreError, match=message):
        StoreWriter.create(tmp_path, **settings_of())


def test_a_store_without_rows_or_without_scale_cannot_be_finished(tmp_path):
    with StoreWriter.create(tmp_path / "s", **settings_of()) as writer:
        with pytest.raises(StoreError, match="No row was written"):
            writer.finish()
        writer.write({A: torch.zeros(5, 3), B: torch.ones(5, 2)}, torch.zeros(5, 3, dtype=torch.int32))
        with pytest.raises(StoreError, match=f"{A} are zero"):
            writer.finish()


@pytest.mark.parametrize("site", ["../up", "where", "a/b", "", ".hidden", "-x"])
def test_a_site_name_that_could_leave_the_folder_is_refused(tmp_path, whole, site):
    with pytest.raises(ConfigError, match="name of a site"):
        StoreWriter.create(tmp_path / "s", **settings_of(widths={site: 3}))
    edit_manifest(whole, sites={site: {"width": 3, "scale": 1.0}})
    with pytest.raises(StoreError, match="name of a site"):
        Store.open(whole)


def test_a_missing_store_says_how_to_make_one(tmp_path):
    with pytest.raises(StoreError, match="mistudio collect"):
        Store.open(tmp_path / "none")


def test_an_unfinished_store_says_how_far_it_got_and_how_to_go_on(tmp_path):
    with StoreWriter.create(tmp_path / "s", **settings_of()) as writer:
        write(writer, 200, until=4)
    with pytest.raises(StoreError, match=r"51 of 200 rows.*mistudio collect \.\.\. --out .*s --resume"):
        Store.open(tmp_path / "s")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 5}, "version 5; this mistudio reads version 1, 2, 3 and 4"),
        ({"version": 1}, "version 1 with checksums"),
        ({"version": 3}, "is no checksum of version 3"),
        ({"checksums": None}, "version 4 without checksums"),
        ({"checksums": {}}, "checksums does not hold"),
        ({"format": "zip"}, "does not describe a mistudio store"),
        ({"surprise": 1}, "unknown key surprise"),
        ({"rows": 201}, "rows is 201, but the buckets hold 200"),
        ({"bucket_sizes": [200]}, "bucket_sizes"),
        ({"bucket_sizes": [-1, 201, 0, 0, 0]}, "bucket_sizes"),
        ({"seed": "5"}, "seed: wanted int"),
        ({"dtype": "float8"}, "float32, bfloat16, float16, int8"),
        ({"sites": {A: {"width": 3, "scale": float("nan")}}}, "scale"),
        ({"sites": {A: {"width": 3, "scale": 1.0}}}, "checksums does not hold"),
        ({"sites": {A: {"width": 3, "scale": 1.0}, B: {"width": 2, "scale": 1.0}}}, "manifest.json says 1.0"),
        ({"statistics_sha256": "0"}, "SHA-256"),
    ],
)
def test_a_manifest_that_is_not_exactly_right_is_refused(whole, changes, message):
    edit_manifest(whole, **changes)
    with pytest.raises(StoreError, match=message):
        Store.open(whole)


def test_a_manifest_that_is_not_json_is_refused(whole):
    (whole / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="not valid JSON"):
        Store.open(whole)


def test_a_shard_of_another_size_is_named(whole):
    with open(whole / B / "00003.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(StoreError, match=r"attn_z/00003\.safetensors has .* bytes; manifest\.json says"):
        Store.open(whole)
    (whole / B / "00003.safetensors").unlink()
    with pytest.raises(StoreError, match=r"00003\.safetensors is missing"):
        Store.open(whole)


def test_a_shard_of_another_shape_is_named(whole):
    path = whole / A / "00000.safetensors"
    data = bytearray(path.read_bytes())
    data[data.index(b'"rows"')] = ord("'")
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"00000\.safetensors has the header"):
        Store.open(whole).bucket(A, 0)


def test_damaged_statistics_are_refused(whole):
    (whole / "statistics.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(StoreError, match=r"statistics\.safetensors cannot be read"):
        Store.open(whole)
    save_file({"x": torch.zeros(2)}, whole / "statistics.safetensors")
    with pytest.raises(StoreError, match="does not hold"):
        Store.open(whole)


# ---- checksums and versions


def test_a_flipped_bit_is_found_at_the_first_read_and_names_the_shard(whole):
    path = whole / B / "00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    store = Store.open(whole)
    store.bucket(B, 2)
    with pytest.raises(StoreError, match=r"attn_z/00003\.safetensors: checksum of its .* rows"):
        store.bucket(B, 3)
    with pytest.raises(StoreError, match=r"attn_z/00003"):
        next(store.feed(B, 200, seed=0))


def shard_bytes(path: Path, name: str, bucket: int) -> bytes:
    """A shard without its header."""
    return (path / name / f"{bucket:05d}.safetensors").read_bytes()[256:]


def test_the_checksums_are_those_of_the_files_without_their_headers(whole):
    for name, checksums in Store.open(whole).manifest.checksums.items():
        for bucket, checksum in enumerate(checksums):
            assert checksum == f"xxh3_128:{xxhash.xxh3_128_hexdigest(shard_bytes(whole, name, bucket))}"


@pytest.mark.parametrize("checksum", ["md5:" + 32 * "0", 32 * "0", "xxh3_128:" + 31 * "0", "xxh3_128:" + 32 * "G"])
def test_a_checksum_of_an_unknown_algorithm_is_refused(whole, checksum):
    manifest = json.loads((whole / "manifest.json").read_text())
    manifest["checksums"][A][2] = checksum
    (whole / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        StoreError, match=f"'{checksum}' is no checksum of version 4, which is xxh3_128: and 32 digits.*copy"
    ):
        Store.open(whole)


def as_version_1(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["checksums"], manifest["statistics_sha256"]
    (path / "manifest.json").write_text(json.dumps({**manifest, "version": 1}))


def as_version_3(path: Path) -> None:
    """With SHA-256, as it was before version 4."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name, checksums in manifest["checksums"].items():
        digests = [hashlib.sha256(shard_bytes(path, name, bucket)).hexdigest() for bucket in range(len(checksums))]
        manifest["checksums"][name] = digests
    (path / "manifest.json").write_text(json.dumps({**manifest, "version": 3}))


def test_a_finished_store_of_version_1_is_read(whole):
    expected = next(Store.open(whole).feed(A, 50, seed=3))
    as_version_1(whole)
    store = Store.open(whole)
    assert (store.manifest.version, store.manifest.checksums) == (1, None)
    assert torch.equal(next(store.feed(A, 50, seed=3)), expected)


def test_a_finished_store_of_version_2_is_read(whole):
    expected = next(Store.open(whole).feed(A, 50, seed=3))
    as_version_3(whole)
    manifest = json.loads((whole / "manifest.json").read_text())
    del manifest["ended_by"], manifest["outliers"]
    (whole / "manifest.json").write_text(json.dumps({**manifest, "version": 2}))
    store = Store.open(whole)
    assert (store.manifest.version, store.manifest.ended_by, store.manifest.outliers) == (2, None, None)
    assert torch.equal(next(store.feed(A, 50, seed=3)), expected)


def test_a_finished_store_with_sha256_is_read_and_verified(whole):
    expected = next(Store.open(whole).feed(A, 50, seed=3))
    as_version_3(whole)
    assert torch.equal(next(Store.open(whole).feed(A, 50, seed=3)), expected)
    assert verify(whole).problems == ()
    path = whole / B / "00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    told = r"attn_z/00003\.safetensors: checksum of its .* rows \(sha256\) is"
    with pytest.raises(StoreError, match=told):
        Store.open(whole).bucket(B, 3)
    assert re.search(told, verify(whole).problems[0])


def test_a_store_with_sha256_is_extended_and_converted_to_one_with_xxh3(tmp_path, whole):
    as_version_3(whole)
    converted = convert(Store.open(whole), tmp_path / "c")
    make_longer(whole, 400, 80)
    make(tmp_path / "long", rows=400, bucket_rows=80)
    assert Store.open(whole).manifest.checksums == Store.open(tmp_path / "long").manifest.checksums
    assert converted.manifest.checksums == make(tmp_path / "d").manifest.checksums
    assert verify(whole).problems == verify(tmp_path / "c").problems == ()


def test_a_collection_that_was_begun_with_version_3_goes_on(tmp_path, whole):
    path = tmp_path / "s"
    with StoreWriter.create(path, **settings_of()) as writer:
        write(writer, 200, until=4)
    progress = json.loads((path / "progress.json").read_text())
    (path / "progress.json").write_text(json.dumps({**progress, "version": 3}))
    with StoreWriter.resume(path, **settings_of()) as writer:
        write(writer, 200)
        writer.finish()
    assert digest(path) == digest(whole)


def test_an_unfinished_store_of_version_1_is_refused_in_one_sentence(tmp_path):
    with StoreWriter.create(tmp_path / "s", **settings_of()) as writer:
        write(writer, 200, until=4)
    progress = json.loads((tmp_path / "s" / "progress.json").read_text())
    (tmp_path / "s" / "progress.json").write_text(json.dumps({**progress, "version": 1}))
    with pytest.raises(StoreError, match="version 1; this mistudio reads version 3 and 4"):
        StoreWriter.resume(tmp_path / "s", **settings_of())


# ---- number types of rows


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_rows_come_back_as_the_number_type_keeps_them(tmp_path, whole, dtype):
    exact, store = Store.open(whole), make(tmp_path / "s", row_dtype=dtype)
    for bucket in range(5):
        rows, kept = torch.from_numpy(exact.bucket(A, bucket).copy()), torch.from_numpy(store.bucket(A, bucket))
        if dtype == "int8":
            step = rows.abs().amax(1, keepdim=True) / 127
            assert ((kept - rows).abs() <= step * 0.5001).all()
        else:
            assert torch.equal(kept, rows.to(getattr(torch, dtype)).float())
    assert np.array_equal(exact.where(0), store.where(0))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_scale_and_feed_are_those_of_the_rows_as_kept(tmp_path, dtype):
    store = make(tmp_path / "s", row_dtype=dtype)
    kept = np.concatenate([store.bucket(A, k) for k in range(5)])
    assert store.scale(A) == pytest.approx(np.sqrt((kept.astype(np.float64) ** 2).sum(1).mean()), rel=1e-13)
    got = next(store.feed(A, 200, seed=1)).numpy()
    expected = kept / np.float32(store.scale(A))
    assert np.array_equal(got[np.lexsort(got.T)], expected[np.lexsort(expected.T)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_an_interrupted_store_of_any_number_type_equals_one_never_interrupted(tmp_path, dtype):
    make(tmp_path / "whole", row_dtype=dtype)
    with StoreWriter.create(tmp_path / "s", **settings_of(row_dtype=dtype)) as writer:
        write(writer, 200, until=7)
    with StoreWriter.resume(tmp_path / "s", **settings_of(row_dtype=dtype)) as writer:
        write(writer, 200)
        writer.finish()
    assert digest(tmp_path / "s") == digest(tmp_path / "whole")


def test_appends_that_the_disk_begins_with_at_once_leave_the_same_store(tmp_path, monkeypatch):
    begun = []
    plain = shard._begin_writing
    monkeypatch.setattr(shard, "_begin_writing", lambda *given: (begun.append(given[1:]), plain(*given)))
    whole = digest(make(tmp_path / "whole").path)
    assert begun == []  # they are small
    monkeypatch.setattr(shard, "_WRITTEN_AT_ONCE", 1)
    assert digest(make(tmp_path / "s").path) == whole
    rows = sum(size for _, size in begun)
    assert rows == 200 * 4 * (3 + 2 + 3)  # of both sites and of where, each byte once
    assert min(start for start, _ in begun) == shard.PREFIX_BYTES


def test_shards_of_every_number_type_are_safetensors_files(tmp_path):
    types = {"bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
    for dtype, kind in types.items():
        make(tmp_path / dtype, row_dtype=dtype)
        assert load_file(tmp_path / dtype / A / "00001.safetensors")["rows"].dtype == kind
    assert load_file(tmp_path / "int8" / A / "00001.row_scale.safetensors")["row_scale"].shape[1] == 1


def test_a_number_too_large_for_float16_is_refused_with_the_types_that_hold_it(tmp_path):
    with StoreWriter.create(tmp_path / "s", **settings_of(row_dtype="float16")) as writer:
        values, where = portion(0)
        values[B][3, 0] = 1e5
        with pytest.raises(StoreError, match=r"values beyond the range of float16 in row 3.*bfloat16 or float32"):
            writer.write(values, where)


def test_zero_rows_and_tiny_rows_survive_int8(tmp_path):
    with StoreWriter.create(tmp_path / "s", **settings_of(rows=17, row_dtype="int8")) as writer:
        values, where = portion(0)
        values[B][0], values[B][1] = 0, 1e-40
        writer.write(values, where)
        store = writer.finish()
    assert (store.bucket(B, 0)[:2] == 0).all()


# ---- appending


def make_longer(path: Path, rows: int, bucket_rows: int, until: int | None = None) -> None:
    changed = settings_of(rows, bucket_rows)
    plan = make_plan(**changed)
    with StoreWriter.extend(path, plan) as writer:
        # a portion that the finished store cut short goes on where it was cut
        if writer.rows % PORTION:
            values, where = portion(writer.rows // PORTION)
            begun = writer.rows % PORTION
            writer.write({site: v[begun:] for site, v in values.items()}, where[begun:])
            writer.checkpoint(writer.cursor)
        writer.cursor = writer.rows // PORTION
        write(writer, rows, until=until)
        if writer.rows == rows:
            writer.finish()


@pytest.mark.parametrize("interrupted", [False, True])
def test_an_extended_store_equals_one_longer_collection(tmp_path, whole, interrupted):
    make(tmp_path / "long", rows=400, bucket_rows=80)
    if interrupted:
        make_longer(whole, 400, 80, until=15)
        with pytest.raises(StoreError, match="did not finish"):
            Store.open(whole)
    make_longer(whole, 400, 80)
    one, other = digest(whole), digest(tmp_path / "long")
    different = {name for name in one | other if one.get(name) != other.get(name)}
    assert different <= {"manifest.json", "statistics.safetensors"}
    extended, long = Store.open(whole), Store.open(tmp_path / "long")
    assert extended.manifest.checksums == long.manifest.checksums
    assert extended.scale(A) == pytest.approx(long.scale(A), rel=1e-14)
    assert torch.allclose(extended.mean(A), long.mean(A))


def test_a_kill_while_a_store_is_reopened_leaves_a_store_that_can_be_extended(tmp_path, whole, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mistudio.store.extend.Path.unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            make_longer(whole, 400, 80)
    assert Store.open(whole).rows == 200
    make_longer(whole, 400, 80)
    assert Store.open(whole).rows == 400


def test_the_bucket_size_for_more_rows_keeps_the_number_of_buckets(tmp_path, whole):
    assert bucket_rows_to_extend(whole, 400) == 80
    assert bucket_rows_to_extend(tmp_path / "none", 400) is None
    make(tmp_path / "small", rows=20, bucket_rows=2)
    with pytest.raises(StoreError, match=r"10 buckets, and 31 rows .* Ask for 40 rows"):
        bucket_rows_to_extend(tmp_path / "small", 31)
    with pytest.raises(StoreError, match="200 rows in 5 buckets; it cannot become one of 100 in 5"):
        StoreWriter.extend(whole, make_plan(**settings_of(100, 20)))


@given(rows=st.integers(0, 200), width=st.integers(2, 20), seed=st.integers(0, 9))
def test_sums_of_columns_have_the_same_bits_compiled_and_by_numpy_and_are_those_of_float64(rows, width, seed):
    pytest.importorskip("numba")
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "WORTH_BYTES", 0)
        loop = statistics.column_sums(values)
        patch.setattr(statistics, "WORTH_BYTES", math.inf)
        by_numpy = statistics.column_sums(values)
    assert torch.equal(loop, by_numpy)
    exact = torch.stack([values.double().sum(0), values.double().square().sum(0)])
    torch.testing.assert_close(loop, exact, rtol=1e-13, atol=1e-10)


def test_several_threads_write_the_same_files_as_one(tmp_path, monkeypatch):
    one = digest(make(tmp_path / "one", rows=200, bucket_rows=20).path)
    monkeypatch.setattr(writer, "WORTH_THREADS", 0)
    assert digest(make(tmp_path / "several", rows=200, bucket_rows=20).path) == one
    write_through = Shard.write

    def full(shard, row, left):
        if "00003" in shard.path.name:
            raise StoreError("the disk is full")
        write_through(shard, row, left)

    monkeypatch.setattr(Shard, "write", full)
    with pytest.raises(StoreError, match="the disk is full"):
        make(tmp_path / "full", rows=200, bucket_rows=20)

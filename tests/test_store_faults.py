"""Kills at every moment, full disks, damage, vanished files: made good by a resume, or refused with the file named."""

import errno
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

import mistudio.collect
from mistudio.collect import collect
from mistudio.errors import StoreError
from mistudio.store import FeedOptions, Store, StoreWriter, convert, copy_store, verify
from mistudio.store.folder import lock
from mistudio.store.order import bucket_order
from mistudio.store.shard import Shard
from test_collect import cfg, lm, text  # noqa: F401 (fixtures)
from test_store import A, B, digest, make, settings_of, write

CHANGES = ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir", "os.rmdir")
"""What Python announces before it does it, and may change a file."""


def in_child(work, folder: Path, kill_at: int | None) -> int:
    """Runs `work` in a process that ends, with nothing cleaned up, before its `kill_at`-th step that touches a file in
    `folder`, or within the `kill_at`-th write of rows; how many steps there were."""
    count, inside = 0, str(folder)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:

        def step(event, arguments):
            nonlocal count
            if event in CHANGES and str(arguments[0]).startswith(inside):
                count += 1
                if count == kill_at:
                    os._exit(9)

        sys.addaudithook(step)
        plain = Shard.write

        def torn(self, row, data):
            """Half of the bytes come to the disk, and that is a step of its own."""
            nonlocal count
            count += 1
            if count == kill_at:
                plain(self, row, data[: len(data) // 2])
                os._exit(9)
            plain(self, row, data)

        Shard.write = torn
        try:
            work()
        finally:
            os.write(writing, str(count).encode())
            os._exit(0)
    _, status = os.waitpid(child, 0)
    os.close(writing)
    said = os.read(reading, 100)
    os.close(reading)
    assert os.waitstatus_to_exitcode(status) == (0 if said else 9)
    return int(said or 0)


# ---- kills


@pytest.mark.parametrize(("dtype", "every"), [("float32", 2), ("int8", 11)])
def test_a_store_killed_at_more_than_fifty_steps_of_its_writing_is_the_same_store_in_the_end(tmp_path, dtype, every):
    """Steps are every opening, renaming, removing and truncating of a file, and every write, torn in the middle."""
    asked = settings_of(rows=30, bucket_rows=15, row_dtype=dtype)
    path = tmp_path / "s"

    def work():
        with StoreWriter.resume(path, **asked) as writer:
            write(writer, 30, checkpoint_every=1)
            writer.finish()

    work()
    whole = digest(path)
    shutil.rmtree(path)
    steps = in_child(work, path, None)
    assert digest(path) == whole
    assert steps > 100
    for kill_at in range(1, steps + 1, every):
        shutil.rmtree(path)
        assert in_child(work, path, kill_at) == 0
        work()
        assert digest(path) == whole, kill_at


def test_a_store_killed_again_and_again_is_the_same_store_in_the_end(tmp_path):
    """Each run dies a few steps on from where it is, so that resuming is interrupted too."""
    asked = settings_of(rows=60, bucket_rows=30)
    make(tmp_path / "whole", rows=60, bucket_rows=30)
    path, kills = tmp_path / "s", 0

    def work():
        with StoreWriter.resume(path, **asked) as writer:
            write(writer, 60, checkpoint_every=1)
            writer.finish()

    while not (path / "manifest.json").is_file():
        kills += 1
        in_child(work, path, 35 + kills)
    work()
    assert kills > 3
    assert digest(path) == digest(tmp_path / "whole")


def test_a_collection_killed_at_fifteen_steps_is_the_same_store_in_the_end(cfg, lm, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(mistudio.collect, "CHECKPOINT_EVERY_S", 0.0)
    ask = replace(cfg, tokens=200, bucket_rows=100, resume=True)
    collect(replace(ask, out=tmp_path / "whole"), lm)
    whole = digest(tmp_path / "whole")
    steps = in_child(lambda: collect(ask, lm), cfg.out, None)
    for number in range(15):
        shutil.rmtree(cfg.out)
        in_child(lambda: collect(ask, lm), cfg.out, 1 + number * (steps - 1) // 15)
        collect(ask, lm)
        assert digest(cfg.out) == whole


def test_a_conversion_killed_before_each_thirtieth_step_is_the_same_store_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("mistudio.store.copy.PIECE_ROWS", 9)
    monkeypatch.setattr("mistudio.store.copy.CHECKPOINT_EVERY_S", 0.0)
    source, path = make(tmp_path / "source", rows=60, bucket_rows=30), tmp_path / "s"
    convert(source, path, dtype="int8")
    whole = digest(path)
    shutil.rmtree(path)
    steps = in_child(lambda: convert(source, path, dtype="int8"), path, None)
    for kill_at in range(1, steps + 1, 30):
        shutil.rmtree(path)
        in_child(lambda: convert(source, path, dtype="int8", resume=True), path, kill_at)
        assert digest(convert(source, path, dtype="int8", resume=True).path) == whole


def test_a_copy_killed_before_each_third_step_is_the_same_store_in_the_end(tmp_path):
    source, path = make(tmp_path / "source", rows=60, bucket_rows=30), tmp_path / "s"
    steps = in_child(lambda: copy_store(source, path), path, None)
    for kill_at in range(1, steps + 1, 3):
        shutil.rmtree(path)
        in_child(lambda: copy_store(source, path), path, kill_at)
        if (path / "manifest.json").exists():  # it looks finished, and so it must be
            assert verify(path).problems == ()
        copy_store(source, path)
        assert digest(path) == digest(source.path)


# ---- a full disk


FULL = Path("/dev/full")  # every write to it fails with ENOSPC


@pytest.mark.skipif(not FULL.exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("name", [f"{A}/00001.safetensors", "where/00000.safetensors"])
def test_a_disk_that_fills_up_under_the_rows_is_said_and_gone_on_from(tmp_path, name):
    make(tmp_path / "whole")
    path = tmp_path / "s"
    with StoreWriter.create(path, **settings_of()) as writer:
        write(writer, 200, until=6)
        kept = (path / name).read_bytes()
        (path / name).unlink()
        (path / name).symlink_to(FULL)
        with pytest.raises(StoreError, match=rf"{name} cannot be written: {os.strerror(errno.ENOSPC)}.*--resume"):
            write(writer, 200)
    (path / name).unlink()
    (path / name).write_bytes(kept)
    with StoreWriter.resume(path, **settings_of()) as writer:
        write(writer, 200)
        writer.finish()
    assert digest(path) == digest(tmp_path / "whole")


@pytest.mark.skipif(not FULL.exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize(
    ("name", "finishing"),
    [("progress.json", False), ("statistics-102.safetensors", False), ("statistics.safetensors", True)],
)
def test_a_disk_that_fills_up_at_a_checkpoint_or_at_the_end_is_said_and_gone_on_from(tmp_path, name, finishing):
    make(tmp_path / "whole")
    path = tmp_path / "s"
    with StoreWriter.create(path, **settings_of()) as writer:
        write(writer, 200, until=None if finishing else 4, checkpoint_every=2)
        temporary = path / f".{name}.{os.getpid()}.tmp"
        temporary.symlink_to(FULL)
        with pytest.raises(StoreError, match=rf"cannot be written: {os.strerror(errno.ENOSPC)}.*--resume"):
            writer.finish() if finishing else write(writer, 200, until=6, checkpoint_every=2)
    with StoreWriter.resume(path, **settings_of()) as writer:
        write(writer, 200)
        writer.finish()
    assert digest(path) == digest(tmp_path / "whole")


@pytest.mark.skipif(not FULL.exists(), reason="needs Linux's /dev/full")
def test_a_disk_that_fills_up_under_a_copy_is_said_and_gone_on_from(tmp_path):
    source, path = make(tmp_path / "source"), tmp_path / "s"
    (path / B).mkdir(parents=True)
    (path / B / ".00002.safetensors.tmp").symlink_to(FULL)
    with pytest.raises(StoreError, match=rf"{B}/00002\.safetensors cannot be written: {os.strerror(errno.ENOSPC)}"):
        copy_store(source, path)
    copy_store(source, path)
    assert digest(path) == digest(source.path)


def test_a_copy_of_what_is_there_already_counts_every_shard(tmp_path):
    source = make(tmp_path / "source")
    first, again = (copy_store(source, tmp_path / "s") for _ in range(2))
    assert (again.sent, again.there) == (0, first.sent)


# ---- damage while a store is in use


def test_a_bucket_that_vanishes_while_it_is_fed_is_named(tmp_path):
    store = make(tmp_path / "s")
    feed = store.feed(A, 10, seed=0)
    next(feed)
    for path in (store.path / A).iterdir():
        path.unlink()
    with pytest.raises(StoreError, match=r"resid_post/0000\d\.safetensors is missing, but manifest\.json says"):
        list(islice(feed, 40))


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_bucket_damaged_while_a_store_is_fed_is_named(tmp_path, damage):
    store = make(tmp_path / "s")
    feed = store.feed(A, 10, seed=0)
    next(feed)
    assert {path.parent.name for path in store._files._sound} == {A}
    for path in (store.path / B).iterdir():
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data[:-4] if damage == "truncated" else data)
    with pytest.raises(StoreError, match=rf"{B}/0000\d\.safetensors(: checksum of its| has .* bytes; manifest)"):
        next(store.feed(B, 10, seed=0))


CUT = """
import os, sys
from mistudio.errors import StoreError
from mistudio.store import FeedOptions, Store, order
store = Store.open(sys.argv[1])
site, rows, prefetch = "layers.3.resid_post", int(sys.argv[2]), int(sys.argv[3])
feed = store.feed(site, rows, seed=0, how=FeedOptions(prefetch=prefetch, threads=2))
next(feed)
first = order.bucket_order(0, 0, len(store.manifest.bucket_sizes))[0]
os.truncate(f"{sys.argv[1]}/{site}/{first:05d}.safetensors", 300)
try:
    for _ in range(10):
        next(feed)
except StoreError as error:
    print(error)
"""


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_shard_cut_while_it_is_mapped_is_named_and_does_not_end_the_process(tmp_path, prefetch):
    """In a process of its own, which reading lost rows through the map would end with SIGBUS."""
    asked = settings_of(rows=1000, bucket_rows=1000, widths={A: 64})
    with StoreWriter.create(tmp_path / "s", **asked) as writer:
        writer.write({A: torch.ones(1000, 64)}, torch.zeros(1000, 3, dtype=torch.int32))
        store = writer.finish()
    command = [sys.executable, "-c", CUT, str(store.path), "70", str(prefetch)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (child.returncode, child.stderr) == (0, "")
    assert re.search(rf"{A}/00000\.safetensors has 300 bytes, but had .* when reading it began", child.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's leases")
def test_a_shard_cannot_be_cut_while_its_rows_are_taken_by_any_of_several_readers(tmp_path):
    """Who does not want to wait is told so. The signal that tells us of it ends nothing."""
    store = make(tmp_path / "s")
    mapped = store.mapped(A, 0)["rows"]

    def to_write() -> None:
        os.close(os.open(mapped.shard.path, os.O_WRONLY | os.O_NONBLOCK))

    with mapped.uncut():
        with mapped.uncut():
            pass
        with pytest.raises(BlockingIOError):
            to_write()
    to_write()
    os.truncate(mapped.shard.path, 300)
    with pytest.raises(StoreError, match="has 300 bytes, but had"), mapped.uncut():
        pass


def test_a_shard_that_is_replaced_between_epochs_is_checked_again(tmp_path):
    store = make(tmp_path / "s", rows=60, bucket_rows=30)
    feed = store.feed(A, 60, seed=0, how=FeedOptions(prefetch=0))
    next(feed)
    path = store.path / A / f"{bucket_order(0, 1, 2)[1]:05d}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.with_suffix(".new").write_bytes(data)
    os.replace(path.with_suffix(".new"), path)
    with pytest.raises(StoreError, match=rf"{A}/{path.name}: checksum of its"):
        next(feed)


def test_a_shard_that_is_removed_while_its_rows_are_fed_is_fed_to_its_end(tmp_path):
    store = make(tmp_path / "s", rows=60, bucket_rows=60)
    expected = next(store.feed(A, 60, seed=0))
    feed = store.feed(A, 20, seed=0, how=FeedOptions(prefetch=0))
    first = next(feed)
    (store.path / A / "00000.safetensors").unlink()
    assert torch.equal(torch.cat([first, next(feed), next(feed)]), expected)


def test_sites_of_unequal_length_are_refused_by_the_file_that_differs(tmp_path):
    store = make(tmp_path / "s")
    shorter = make(tmp_path / "shorter", rows=150, bucket_rows=30)
    shutil.copy(shorter.path / B / "00001.safetensors", store.path / B / "00001.safetensors")
    with pytest.raises(StoreError, match=rf"{B}/00001\.safetensors has .* bytes; manifest\.json says"):
        Store.open(store.path)


# ---- two writers


def test_a_second_process_cannot_write_collect_or_copy_into_a_store_in_work(cfg, lm, tmp_path):  # noqa: F811
    cfg.out.mkdir(parents=True)
    held = lock(cfg.out)
    for work in (
        lambda: collect(cfg, lm),
        lambda: copy_store(make(tmp_path / "source"), cfg.out),
        lambda: StoreWriter.create(cfg.out, **settings_of()),
    ):
        with pytest.raises(StoreError, match="Another process is writing to"):
            work()
    held.close()
    assert collect(cfg, lm).rows == cfg.tokens


def test_non_finite_rows_name_the_shard_they_would_have_been_in(tmp_path):
    with StoreWriter.create(tmp_path / "s", **settings_of(rows=17, bucket_rows=17)) as writer:
        rows = {A: torch.ones(17, 3), B: torch.ones(17, 2)}
        rows[B][9, 1] = torch.nan
        with pytest.raises(StoreError, match=rf"{B} has 1 NaN.*would be row 9 of .*{B}/00000\.safetensors"):
            writer.write(rows, torch.zeros(17, 3, dtype=torch.int32))

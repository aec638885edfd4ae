"""Listing, verifying, converting, merging, splitting and removing stores; each also from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from command_line import run
from mistudio.errors import ConfigError, StoreError
from mistudio.store import Store, StoreWriter, convert, merge, remove, split, stores_in, verify
from test_store import A, B, as_version_1, digest, make, settings_of, write


@pytest.fixture
def whole(tmp_path: Path) -> Store:
    return make(tmp_path / "whole")


def other(path: Path, text: str = "stories:2", **changes) -> Store:
    source = {"text": text, "sites": (A, B), "held_out": 0.1}
    return make(path, rows=150, **{"source": source, **changes})


def table(store: Store, shift: int = 0) -> set[tuple[float, ...]]:
    """Every row with its origin, as a set: a row's number is in its first column."""
    found = set()
    for bucket in range(len(store.manifest.bucket_sizes)):
        where = store.where(bucket) + np.array([0, shift, 0])
        parts = [store.bucket(site, bucket) for site in store.sites]
        found |= set(map(tuple, np.concatenate([where, *parts], axis=1).tolist()))
    return found


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# ---- verify


def test_a_sound_store_verifies(whole):
    found = verify(whole.path)
    assert (found.problems, found.checksums, found.files) == ((), True, 16)


def test_every_damaged_file_is_named_and_the_others_are_still_looked_at(whole):
    flip_a_bit(whole.path / A / "00001.safetensors")
    flip_a_bit(whole.path / "where" / "00004.safetensors")
    flip_a_bit(whole.path / "statistics.safetensors")
    (whole.path / B / "00002.safetensors").unlink()
    problems = verify(whole.path).problems
    for name in (f"{A}/00001", f"{B}/00002", "where/00004", "statistics"):
        assert sum(name in problem for problem in problems) == 1
    assert len(problems) == 4


def test_a_store_of_version_1_verifies_without_checksums(whole):
    as_version_1(whole.path)
    found = verify(whole.path)
    assert (found.problems, found.checksums) == ((), False)


# ---- convert


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_a_converted_store_is_the_one_that_would_have_been_collected(tmp_path, whole, dtype):
    converted = convert(whole, tmp_path / "c", dtype=dtype)
    direct = make(tmp_path / "d", row_dtype=dtype)
    assert converted.manifest.checksums == direct.manifest.checksums
    assert converted.manifest.bucket_sizes == whole.manifest.bucket_sizes
    assert converted.manifest.source["converted_from"] == ["float32"]
    assert converted.manifest.token_rows == whole.manifest.token_rows


def test_a_converted_store_feeds_in_the_same_order(tmp_path, whole):
    converted = convert(whole, tmp_path / "c", dtype="bfloat16", sites=[A])
    assert converted.sites == [A]
    mine, theirs = next(converted.feed(A, 77, seed=2)), next(whole.feed(A, 77, seed=2))
    assert torch.allclose(mine, theirs, rtol=2**-7, atol=1e-4)
    back = convert(converted, tmp_path / "b", dtype="float32")
    assert np.array_equal(back.bucket(A, 1), converted.bucket(A, 1))
    assert back.manifest.source["converted_from"] == ["float32", "bfloat16"]


def test_an_interrupted_conversion_goes_on_to_the_same_store(tmp_path, whole, monkeypatch):
    monkeypatch.setattr("mistudio.store.copy.PIECE_ROWS", 13)
    monkeypatch.setattr("mistudio.store.copy.CHECKPOINT_EVERY_S", 0.0)
    convert(whole, tmp_path / "c", dtype="int8")
    left, plain = iter(range(9)), StoreWriter.write

    def killed(*args, **kwargs):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(whole, tmp_path / "i", dtype="int8")
    with pytest.raises(StoreError, match="unfinished"):
        convert(whole, tmp_path / "i", dtype="int8")
    convert(whole, tmp_path / "i", dtype="int8", resume=True)
    assert digest(tmp_path / "i") == digest(tmp_path / "c")


def test_damage_is_not_copied(tmp_path, whole):
    flip_a_bit(whole.path / A / "00001.safetensors")
    with pytest.raises(StoreError, match=r"resid_post/00001\.safetensors: checksum"):
        convert(whole, tmp_path / "c", dtype="int8")


# ---- merge


def test_a_merged_store_has_the_rows_of_all_with_documents_numbered_on(tmp_path, whole):
    second = other(tmp_path / "second")
    merged = merge([whole, second], tmp_path / "m", seed=3)
    parts = merged.manifest.source["merged"]
    first = max(int(whole.where(bucket)[:, 1].max()) for bucket in range(5)) + 1
    assert [part["first_document"] for part in parts] == [0, first]
    assert table(merged) == table(whole) | table(second, first)
    assert merged.rows == 350
    assert merged.scale(A) ** 2 == pytest.approx((200 * whole.scale(A) ** 2 + 150 * second.scale(A) ** 2) / 350)
    assert verify(merged.path).problems == ()


def test_rows_of_merged_stores_are_scattered_over_all_buckets(tmp_path, whole):
    merged = merge([whole, other(tmp_path / "second")], tmp_path / "m", bucket_rows=120)
    first = merged.manifest.source["merged"][1]["first_document"]
    assert len(merged.manifest.bucket_sizes) == 3
    for bucket in range(3):
        share = (merged.where(bucket)[:, 1] < first).mean()
        assert 0.4 < share < 0.75  # 200 of 350 are 0.57


def test_stores_that_do_not_fit_are_not_merged(tmp_path, whole):
    with pytest.raises(StoreError, match="hold the same text"):
        merge([whole, make(tmp_path / "same", seed=9)], tmp_path / "m")
    with pytest.raises(StoreError, match="model = 'large'"):
        merge([whole, other(tmp_path / "large", model="large")], tmp_path / "m")
    with pytest.raises(StoreError, match="row_dtype = 'int8'"):
        merge([whole, other(tmp_path / "int8", row_dtype="int8")], tmp_path / "m")
    with pytest.raises(ConfigError, match="at least two"):
        merge([whole], tmp_path / "m")
    assert not (tmp_path / "m").exists()


# ---- split


def test_a_split_puts_every_document_on_one_side_with_all_its_rows(tmp_path, whole):
    rest, held = split(whole, tmp_path / "r", tmp_path / "h", fraction=0.3, seed=1)
    assert table(rest) | table(held) == table(whole)
    assert rest.rows + held.rows == whole.rows
    documents = [{row[1] for row in table(part)} for part in (rest, held)]
    assert not documents[0] & documents[1]
    assert held.manifest.source["split"]["part"] == "held_out"
    again = split(whole, tmp_path / "r2", tmp_path / "h2", fraction=0.3, seed=1)
    assert table(again[1]) == table(held)


def test_the_parts_of_a_split_can_be_merged_again(tmp_path, whole):
    parts = split(whole, tmp_path / "r", tmp_path / "h", fraction=0.3, seed=1)
    assert merge(parts, tmp_path / "m").rows == 200


@pytest.mark.parametrize("fraction", [0.0, 1.0, 1e-9])
def test_a_split_with_an_empty_side_is_refused(tmp_path, whole, fraction):
    with pytest.raises(ConfigError, match="fraction"):
        split(whole, tmp_path / "r", tmp_path / "h", fraction=fraction)


def test_a_split_into_one_folder_is_refused_before_anything_is_written(tmp_path, whole):
    with pytest.raises(ConfigError, match="give each a folder of its own"):
        split(whole, tmp_path / "r", tmp_path / "h" / ".." / "r", fraction=0.3)
    assert not (tmp_path / "r").exists()


# ---- ls and rm


def test_stores_are_found_whatever_state_they_are_in(tmp_path, whole):
    with StoreWriter.create(tmp_path / "deep" / "half", **settings_of()) as writer:
        write(writer, 200, until=4, checkpoint_every=2)
    broken = make(tmp_path / "broken")
    manifest = json.loads((broken.path / "manifest.json").read_text())
    (broken.path / "manifest.json").write_text(json.dumps({**manifest, "rows": 3}))
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text('{"name": "an app"}')
    found = {Path(store.path).name: store for store in stores_in(tmp_path)}
    assert set(found) == {"whole", "half", "broken"}
    assert (found["whole"].state, found["whole"].rows, found["whole"].bytes) == ("finished", 200, 200 * 32)
    assert (found["half"].state, found["half"].rows, found["half"].expected_rows) == ("unfinished", 68, 200)
    assert "rows is 3" in found["broken"].state


def test_removing_a_store_leaves_what_is_not_its_own(tmp_path, whole):
    (whole.path / "notes.txt").write_text("mine")
    (whole.path / A / "mine.safetensors").write_text("mine")
    assert remove(whole.path) == (A, "notes.txt")
    assert (whole.path / A / "mine.safetensors").read_text() == "mine"
    unfinished = tmp_path / "half"
    with StoreWriter.create(unfinished, **settings_of()) as writer:
        write(writer, 200, until=4)
        with pytest.raises(StoreError, match="Another process"):
            remove(unfinished)
    assert remove(unfinished) == ()
    assert not unfinished.exists()
    with pytest.raises(StoreError, match="nothing was removed"):
        remove(tmp_path)


# ---- the command line


def test_the_store_verbs_go_from_one_store_to_the_next(capsys, tmp_path, whole):
    other(tmp_path / "second")
    code, out, _ = run(capsys, "store", "merge", whole.path, tmp_path / "second", "--out", tmp_path / "m")
    assert (code, "350 rows" in out) == (0, True)
    code, out, _ = run(capsys, "store", "convert", tmp_path / "m", "--out", tmp_path / "c", "--row-dtype", "int8")
    assert (code, "int8" in out) == (0, True)
    parts = ("--out", tmp_path / "r", "--held-out", tmp_path / "h")
    code, out, _ = run(capsys, "store", "split", tmp_path / "c", *parts, "--fraction", "0.3")
    assert code == 0
    code, out, _ = run(capsys, "store", "ls", tmp_path, "--json")
    assert [Path(s["path"]).name for s in json.loads(out)["stores"]] == ["c", "h", "m", "r", "second", "whole"]
    code, out, _ = run(capsys, "store", "show", tmp_path / "r")
    assert (code, "layers.3.attn_z" in out, "fraction" in out) == (0, True, True)
    code, out, _ = run(capsys, "store", "verify", tmp_path / "r")
    assert (code, out.startswith("Sound: ")) == (0, True)
    flip_a_bit(tmp_path / "r" / A / "00000.safetensors")
    code, out, _ = run(capsys, "store", "verify", tmp_path / "r")
    assert (code, "resid_post/00000.safetensors" in out) == (1, True)
    code, _, err = run(capsys, "store", "rm", tmp_path / "r")
    assert (code, "Add --yes" in err, (tmp_path / "r").exists()) == (2, True, True)
    code, out, _ = run(capsys, "store", "rm", tmp_path / "r", "--yes")
    assert (code, (tmp_path / "r").exists()) == (0, False)
    code, _, err = run(capsys, "store", "rm", tmp_path / "r", "--yes")
    assert (code, "There is no activation store" in err) == (2, True)

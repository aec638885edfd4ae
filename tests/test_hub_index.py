"""The index holds every row of the listing, knows the shapes, chooses the canonical ones, and says what there is."""

import csv
import dataclasses
import importlib.util
import json
import lzma
import re
import socket
import subprocess
import sys
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistudio.errors import HubError
from mistudio.hub import index
from mistudio.hub.entry import L0_CLASSES, SITES, WIDTHS, Entry, parse
from mistudio.hub.index import decode, encode, entries, find, nearest
from mistudio.hub.refresh import compare, listing, parse_file, refresh
from mistudio.lm import Site

LISTING = Path(__file__).parent / "data" / "gemma_scope_index.csv.xz"
ROWS = list(csv.DictReader(lzma.decompress(LISTING.read_bytes()).decode().splitlines()))
SLIP = (
    "google/gemma-scope-9b-pt-res",
    "layer_2/width_16k/average_l0_8",
)  # the listing has the id of another SAE's page
BY_PLACE = {(e.repo_id, e.path): e for e in entries()}


def number(text):
    return int(text) if text else None


def one(**wanted):
    (entry,) = find(**wanted)
    return entry


# The table


def test_the_index_has_every_row_of_the_listing_and_no_other():
    assert len(entries()) == len(ROWS) == 11_214
    assert set(BY_PLACE) == {(row["repo_id"], row["path"]) for row in ROWS}


def test_every_field_of_every_entry_is_as_in_the_listing():
    for row in ROWS:
        entry = BY_PLACE[row["repo_id"], row["path"]]
        page = None if (entry.repo_id, entry.path) == SLIP else row["neuronpedia_id"] or None
        assert dataclasses.asdict(entry) == {
            "generation": int(row["generation"]),
            "repo_id": row["repo_id"],
            "path": row["path"],
            "model": row["model"],
            "site": row["site"],
            "layer": number(row["layer"]),
            "width": int(row["width"]),
            "l0": number(row["l0"]),
            "l0_class": row["l0_class"] or None,
            "canonical": row["canonical"] == "1",
            "neuronpedia_id": page,
            "affine": row["affine"] == "1",
        }


def test_the_index_file_is_small_and_its_bytes_depend_on_the_entries_alone():
    shipped = index.SHIPPED.read_bytes()
    assert len(shipped) < 150_000
    assert decode(shipped) == entries()
    assert encode(reversed(entries())) == encode(entries())


def build_tool():
    path = Path(__file__).parents[1] / "tools" / "build_hub_index.py"
    spec = importlib.util.spec_from_file_location("build_hub_index", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tool_builds_the_shipped_index_from_the_listing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["build_hub_index.py", str(LISTING), "--out", str(tmp_path / "index.xz")])
    build_tool().main()
    assert decode((tmp_path / "index.xz").read_bytes()) == entries()


@pytest.mark.parametrize(("column", "value"), [("model", "google/gemma-2-9b"), ("l0", "78"), ("path", "layer_0/16k")])
def test_the_tool_stops_at_a_row_that_contradicts_its_path(column, value):
    row = next(row for row in ROWS if row["repo_id"] == "google/gemma-scope-9b-it-res")
    with pytest.raises(ValueError, match=r"the listing says|no known layout"):
        build_tool().entry_of(row | {column: value})


def test_looking_something_up_imports_neither_torch_nor_numpy():
    code = (
        "import sys; from mistudio.hub.index import find; from mistudio.hub.names import resolve; "
        "import mistudio.hub.refresh; find(model='gemma-2-2b', layer=20); resolve('gemma-2-2b/20-gemmascope-res-16k'); "
        "print([name for name in ('torch', 'numpy', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("data", [b"", b"not compressed", index.SHIPPED.read_bytes()[:-100]])
def test_a_damaged_index_file_is_refused(data, tmp_path, monkeypatch):
    refuse(data, tmp_path / "index.xz", monkeypatch)


@pytest.mark.parametrize(
    "text",
    [
        "mistudio hub index 2\n",
        "mistudio hub index 1\nsomeone/else\n layer_0/width_16k/average_l0_13",
        "mistudio hub index 1\ngoogle/gemma-scope-2b-pt-res\n layer_0/width_16k/average_l0_13 x",
        "mistudio hub index 1\ngoogle/gemma-scope-2b-pt-res\n ../../layer_0/width_16k/average_l0_13",
        "mistudio hub index 1\ngoogle/gemma-scope-2b-pt-res\n ",
        "mistudio hub index 1\n",
    ],
)
def test_a_foreign_index_file_is_refused(text, tmp_path, monkeypatch):
    refuse(lzma.compress(text.encode(), preset=0), tmp_path / "index.xz", monkeypatch)


def refuse(data, path, monkeypatch):
    path.write_bytes(data)
    monkeypatch.setenv(index.ENVIRONMENT, str(path))
    with pytest.raises(HubError, match="not a readable index"):
        entries()


def test_the_environment_can_name_another_index(tmp_path, monkeypatch):
    some = entries()[:3]
    path = tmp_path / "mine.xz"
    path.write_bytes(encode(some))
    monkeypatch.setenv(index.ENVIRONMENT, str(path))
    assert entries() == some


# Shapes


@pytest.mark.parametrize(
    ("model", "site", "d_in"),
    [
        ("gemma-2-2b", "res", 2304),
        ("gemma-2-2b", "mlp", 2304),
        ("gemma-2-2b", "att", 2048),
        ("gemma-2-2b", "transcoder", 2304),
        ("gemma-2-2b", "embedding", 2304),
        ("gemma-2-9b", "res", 3584),
        ("gemma-2-9b", "att", 4096),
        ("gemma-2-9b-it", "res", 3584),
        ("gemma-2-27b", "res", 4608),
        ("gemma-3-270m", "res", 640),
        ("gemma-3-270m", "att", 1024),
        ("gemma-3-1b-it", "mlp", 1152),
        ("gemma-3-1b", "att", 1024),
        ("gemma-3-4b", "res", 2560),
        ("gemma-3-4b-it", "att", 2048),
        ("gemma-3-12b", "res", 3840),
        ("gemma-3-12b", "att", 4096),
        ("gemma-3-27b", "res", 5376),
        ("gemma-3-27b-it", "att", 4096),
        ("gemma-3-27b-it", "transcoder", 5376),
    ],
)
def test_d_in_is_that_of_the_model_and_site(model, site, d_in):
    assert {(e.d_in, e.d_out) for e in find(model=model, site=site)} == {(d_in, d_in)}


@pytest.mark.parametrize(
    ("wanted", "payload"),
    [
        ({"model": "gemma-2-2b", "site": "res", "width": "16k"}, 302_130_176),
        ({"model": "gemma-2-2b", "site": "mlp", "width": "65k"}, 1_208_493_056),
        ({"model": "gemma-2-2b", "site": "res", "width": "131k"}, 2_416_976_896),
        ({"model": "gemma-2-2b", "site": "res", "width": "1m"}, 19_335_750_656),
        ({"model": "gemma-2-2b", "site": "att", "width": "16k"}, 268_574_720),
        ({"model": "gemma-2-2b", "site": "att", "width": "65k"}, 1_074_274_304),
        ({"model": "gemma-2-9b", "site": "res", "width": "16k"}, 469_907_456),
        ({"model": "gemma-2-9b", "site": "res", "width": "65k"}, 1_879_586_816),
        ({"model": "gemma-2-9b", "site": "mlp", "width": "131k"}, 3_759_159_296),
        ({"model": "gemma-2-9b", "site": "res", "width": "1m"}, 30_073_174_016),
        ({"model": "gemma-2-9b", "site": "att", "width": "16k"}, 537_018_368),
        ({"model": "gemma-2-9b", "site": "att", "width": "131k"}, 4_296_032_256),
        ({"model": "gemma-2-27b", "site": "res", "width": "131k"}, 4_832_905_216),
    ],
)
def test_the_expected_bytes_are_those_of_the_released_files(wanted, payload):
    """The table of the project's notes on the released files."""
    assert {e.bytes_expected for e in find(**wanted)} == {payload}


def test_the_expected_bytes_are_those_of_the_arrays_and_an_affine_one_adds_its_skip_matrix():
    for entry in entries():
        d, f = entry.d_in, entry.width
        arrays = [(d, f), (f, d), (f,), (f,), (d,)] + [(d, d)] * entry.affine
        elements = sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in arrays)
        assert entry.bytes_expected == 4 * elements
        assert entry.size_fits(4 * elements + 1240)
        assert not entry.size_fits(4 * elements - 1)
        assert not entry.size_fits(4 * elements + 10_000)


def test_site_names_are_sites_of_ours():
    for entry in entries():
        if entry.site == "embedding":
            assert entry.site_name is None
        elif entry.site == "transcoder":
            reads, writes = entry.site_name
            assert reads == f"layers.{entry.layer}.{'ln2_normalized' if entry.generation == 1 else 'mlp_in'}"
            assert Site.parse(writes) == Site(entry.layer, "mlp_out")
        else:
            kind = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z"}[entry.site]
            assert Site.parse(entry.site_name) == Site(entry.layer, kind)


# The canonical ones


def groups_with_numbers():
    """(model, site, layer, width) -> entries of the first generation."""
    kinds = defaultdict(list)
    for entry in entries():
        if entry.generation == 1:
            kinds[entry.model, entry.site, entry.layer, entry.width_label].append(entry)
    return kinds


TIES = {("google/gemma-2-9b", "att", 27, "16k"): 136, ("google/gemma-2-9b", "att", 23, "131k"): 66}


def test_all_429_canonical_ones_have_the_l0_nearest_100_and_the_two_ties_are_known():
    right = 0
    for kind, group in groups_with_numbers().items():
        canonical = [e for e in group if e.canonical]
        if not canonical:
            continue
        distance = min(abs(e.l0 - 100) for e in group)
        nearest_l0s = {e.l0 for e in group if abs(e.l0 - 100) == distance}
        assert (len(nearest_l0s) == 2) == (kind in TIES)
        assert [e.l0 for e in canonical] == ([TIES[kind]] if kind in TIES else list(nearest_l0s))
        assert nearest(group, 100) == canonical[0]
        right += 1
    assert right == 429


def test_the_groups_without_a_canonical_one_are_those_of_the_notes():
    without = {kind for kind, group in groups_with_numbers().items() if not any(e.canonical for e in group)}
    assert without == {
        ("google/gemma-2-2b", "res", 12, "131k"),
        ("google/gemma-2-9b", "res", 20, "262k"),
        ("google/gemma-2-2b", "embedding", None, "4k"),
        ("google/gemma-2-9b", "embedding", None, "4k"),
        *(("google/gemma-2-2b", "transcoder", layer, "16k") for layer in range(26)),
    }
    assert not any(e.canonical for e in entries() if e.generation == 2)


def test_near_100_finds_the_canonical_ones():
    found = [e for e in find(l0="near:100") if e.generation == 1]
    assert {e.hf_path for e in found if e.canonical} == {e.hf_path for e in entries() if e.canonical}


def test_the_canonical_l0s_of_2b_layer_by_layer():
    found = find(model="gemma-2-2b", site="residual", width="16k", l0="canonical")
    l0s = "105 102 141 59 124 68 70 69 71 73 77 80 82 84 84 78 78 77 74 73 71 70 72 75 73 116"
    assert [e.l0 for e in found] == [int(l0) for l0 in l0s.split()]


def test_slips_of_other_registries_are_not_ours():
    assert one(model="gemma-2-9b", layer=20, site="res", width="524k", l0="canonical").l0 == 48
    assert BY_PLACE["google/gemma-scope-9b-it-res", "layer_9/width_16k/average_l0_88"].model == "google/gemma-2-9b-it"
    assert one(model="gemma-2-9b", layer=20, site="res", width="131k", l0="canonical").l0 == 114
    assert BY_PLACE[SLIP].neuronpedia_id is None


# find


def test_find_takes_the_words_people_use():
    expected = one(model="google/gemma-2-2b", layer=20, site="res", width=16384, l0=71)
    assert expected.hf_path == "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
    for site in ("residual", "resid_post", " Residual Stream "):
        for width in ("16k", "16K", "16384", "16,384"):
            for l0 in ("canonical", "71", "near:75", "NEAR: 60"):
                assert find(model="Gemma-2-2B", layer=20, site=site, width=width, l0=l0) == [expected]
    assert find(site="attention") == find(site="att")
    assert find(model="gemma-3-4b") == find(model="gemma-3-4b-pt") == find(model="google/gemma-3-4b-pt")
    assert find(model="gemma-3-270m-pt") == find(model="gemma-3-270m")
    assert find() == list(entries())


def test_find_by_class_gives_the_second_generation():
    found = find(model="gemma-3-1b", layer=13, site="transcoder", width="16k", l0="medium")
    assert [e.path.split("/")[1] for e in found] == [
        "layer_13_width_16k_l0_medium",
        "layer_13_width_16k_l0_medium_affine",
    ]


def test_l0_71_exists_at_layers_8_and_20_only():
    assert [e.layer for e in find(model="gemma-2-2b", site="res", width="16k", l0=71)] == [8, 20]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (
            {"model": "gemma-2-2b", "layer": 12, "site": "res", "width": "16k", "l0": 71},
            "22, 41, 82 (canonical), 176, 445",
        ),
        (
            {"model": "gemma-2-2b", "layer": 12, "site": "res", "width": "131k", "l0": "canonical"},
            "12, 20, 36, 67, 129",
        ),
        ({"model": "gemma-3-1b", "layer": 14, "site": "res", "width": "16k", "l0": "medium"}, "20 (small), 120 (big)"),
        ({"model": "gemma-2-2b", "layer": 26}, "Choices of layer: 0-25"),
        ({"model": "gemma-2-2b", "site": "res", "layer": 13, "width": "131k"}, "Choices of width: 16k, 65k"),
        ({"model": "gemma-2-27b", "site": "mlp"}, "Choices of site: res"),
        ({"site": "embedding", "layer": 0}, "Choices of layer: none"),
        ({"model": "gemma2-2b"}, "did you mean gemma-2-2b?"),
        ({"model": "gemma-2-2b-it"}, "those of the pretrained model are used on it: gemma-2-2b"),
        ({"model": "gpt2"}, "there are some for gemma-2-2b, gemma-2-9b, gemma-2-9b-it, gemma-2-27b, gemma-3-270m,"),
        ({"site": "residul"}, "did you mean residual?"),
        ({"site": "head"}, "residual, mlp, attention, transcoder and embedding"),
        ({"width": "17k"}, "4k, 16k, 32k, 65k, 131k, 262k, 524k, 1m"),
        ({"l0": "tiny"}, "a number, canonical, near:NUMBER, small, medium or big"),
        ({"l0": -3}, "a number, canonical"),
        ({"l0": "near:"}, "a number, canonical"),
    ],
)
def test_what_does_not_exist_is_answered_with_what_does(wanted, said):
    with pytest.raises(HubError, match=re.escape(said)):
        find(**wanted)


def test_a_menu_of_many_groups_is_cut_short():
    with pytest.raises(HubError, match=r"more: give model, site, layer and width") as error:
        find(l0=99_999)
    assert len(str(error.value)) < 1500


# Paths


def test_every_path_is_parsed_to_its_entry():
    for entry in entries():
        known = {"canonical": entry.canonical, "on_neuronpedia": entry.neuronpedia_id is not None}
        target = entry.l0 if entry.generation == 2 else None
        assert parse(entry.repo_id, entry.path, **known, target_l0=target) == entry
        bare = dataclasses.replace(entry, canonical=False, neuronpedia_id=None, l0=None if target else entry.l0)
        assert parse_file(entry.repo_id, f"{entry.path}/{entry.filename}") == bare


@pytest.mark.parametrize(
    "path",
    [
        "layer_20/width_16k/average_l0_71",
        "layer_20/width_16k/average_l0_71/params.safetensors",
        "layer_20/width_16k/average_l0_71/config.json",
        "layer_20/width_16k/canonical/params.npz",
        "layer_020/width_16k/average_l0_71/params.npz",
        "layer_20/width_17k/average_l0_71/params.npz",
        "layer_20/width_16k/average_l0_71/old/params.npz",
        "../layer_20/width_16k/average_l0_71/params.npz",
        "layer_20/width_16k/average_l0_71\n/params.npz",
        "layer_" + "9" * 5000 + "/width_16k/average_l0_71/params.npz",
        "layer_٢٠/width_16k/average_l0_71/params.npz",
        "resid_post/layer_13_width_16k_l0_medium/params.safetensors",
    ],
)
def test_other_files_of_a_first_generation_repository_are_no_entries(path):
    assert parse_file("google/gemma-scope-2b-pt-res", path) is None


@pytest.mark.parametrize(
    ("repo_id", "path"),
    [
        ("google/gemma-scope-2-1b-pt", "resid_post/layer_13_width_16k_l0_medium_affine/params.safetensors"),
        ("google/gemma-scope-2-1b-pt", "crosscoder/layer_7_13_17_22_width_65k_l0_medium/params.safetensors"),
        ("google/gemma-scope-2-1b-pt", "clt/width_262k_l0_medium/params_layer_0.safetensors"),
        ("google/gemma-scope-2-1b-pt", "resid_post/layer_13_width_16k_l0_medium/examples.safetensors"),
        ("google/gemma-scope-2-1b-pt", "resid_post/layer_13_width_16k_l0_medium/params.npz"),
        ("google/gemma-scope-2b-pt-mlp", "embedding/width_4k/average_l0_6/params.npz"),
        ("google/gemma-scope", "layer_20/width_16k/average_l0_71/params.npz"),
        ("someone/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71/params.npz"),
    ],
)
def test_other_layouts_are_no_entries(repo_id, path):
    assert parse_file(repo_id, path) is None


@settings(max_examples=200)
@given(
    st.sampled_from(sorted({e.repo_id for e in entries()})),
    st.integers(0, 99),
    st.sampled_from(list(WIDTHS)),
    st.integers(0, 9999),
    st.sampled_from(L0_CLASSES),
    st.sampled_from(["resid_post", "mlp_out", "attn_out", "transcoder", "resid_post_all", "transcoder_all"]),
    st.booleans(),
)
def test_parsing_inverts_writing_a_path(repo_id, layer, width, l0, l0_class, folder, affine):
    if repo_id.startswith("google/gemma-scope-2-"):
        affine = affine and folder.startswith("transcoder")
        path = f"{folder}/layer_{layer}_width_{width}_l0_{l0_class}" + "_affine" * affine
        expected = (2, layer, WIDTHS[width], None, l0_class, affine)
    else:
        path, expected = f"layer_{layer}/width_{width}/average_l0_{l0}", (1, layer, WIDTHS[width], l0, None, False)
    entry = parse(repo_id, path)
    assert (entry.generation, entry.layer, entry.width, entry.l0, entry.l0_class, entry.affine) == expected
    assert entry.site in SITES
    assert entry.hf_path == f"{repo_id}/{path}"


@settings(max_examples=200)
@given(st.sampled_from(sorted({e.repo_id for e in entries()})), st.text(max_size=60))
def test_parsing_any_text_gives_an_entry_or_none(repo_id, text):
    assert parse(repo_id, text) is None or isinstance(parse(repo_id, text), Entry)


# Refreshing


def whole(found):
    """The listings of a hub that holds exactly these."""
    listings = defaultdict(dict)
    for entry in found:
        listings[entry.repo_id][f"{entry.path}/{entry.filename}"] = entry.bytes_expected + 1240
    return listings


def test_a_hub_that_holds_what_the_index_says_changes_nothing():
    refreshed = compare(entries(), whole(entries()))
    assert refreshed.entries == entries()
    assert (refreshed.added, refreshed.removed, refreshed.wrong_size) == ((), (), ())


def test_what_a_listing_adds_removes_and_truncates_is_said():
    repo_id = "google/gemma-scope-2b-pt-transcoders"
    gone, short, *_ = [e for e in entries() if e.repo_id == repo_id]
    listings = whole(e for e in entries() if e.repo_id == repo_id)
    del listings[repo_id][f"{gone.path}/params.npz"]
    listings[repo_id][f"{short.path}/params.npz"] = 213_000_000
    listings[repo_id]["layer_0/width_16k/average_l0_115/params.npz"] = short.bytes_expected
    listings[repo_id]["README.md"] = 10
    refreshed = compare(entries(), listings)
    assert [e.l0 for e in refreshed.added] == [115]
    assert refreshed.removed == (gone,)
    assert refreshed.wrong_size == ((short, 213_000_000),)
    assert set(refreshed.entries) == (set(entries()) - {gone}) | set(refreshed.added)
    assert decode(encode(refreshed.entries)) == refreshed.entries


class Hub(BaseHTTPRequestHandler):
    """The one endpoint that a listing asks, two files a page. `server.files`: repository -> path -> bytes."""

    def do_GET(self):
        url = urlsplit(self.path)
        repo_id = url.path.removeprefix("/api/models/").removesuffix("/tree/main")
        files = list(self.server.files.get(repo_id, {}).items())
        start = int(parse_qs(url.query).get("cursor", ["0"])[0])
        self.send_response(self.server.status)
        if start + 2 < len(files):
            link = f"http://{self.headers['Host']}{url.path}?recursive=true&cursor={start + 2}"
            self.send_header("Link", f'<{link}>; rel="next"')
        folders = [{"type": "directory", "path": "layer_0", "oid": "0", "size": 0}]
        page = [{"type": "file", "path": path, "oid": "0", "size": size} for path, size in files[start : start + 2]]
        body = json.dumps(folders + page if self.server.status == 200 else {"error": "no"}).encode()
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.status = {}, 200
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_refresh_reads_every_page_of_a_listing(hub):
    repo_id = "google/gemma-scope-27b-pt-res"
    hub.files = dict(whole(e for e in entries() if e.repo_id == repo_id))
    hub.files[repo_id]["layer_45/width_131k/average_l0_90/params.npz"] = 4_832_905_216
    refreshed = refresh(repos=[repo_id], endpoint=hub.endpoint)
    assert [e.hf_path for e in refreshed.added] == [f"{repo_id}/layer_45/width_131k/average_l0_90"]
    assert (refreshed.removed, refreshed.wrong_size) == ((), ())
    assert len(refreshed.entries) == len(entries()) + 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_repository_that_may_not_be_listed_says_how_to_log_in(hub, status):
    hub.status = status
    with pytest.raises(HubError, match=rf"\({status}\).*hf auth login"):
        refresh(repos=["google/gemma-scope-27b-pt-res"], endpoint=hub.endpoint)


class Unreachable:
    """A client without a network."""

    endpoint = "https://hub.test"

    def __init__(self, error):
        self.error = error

    def list_repo_tree(self, repo_id, *, recursive):
        raise self.error


def transport_errors():
    from huggingface_hub.errors import HfHubHTTPError

    library = sys.modules[HfHubHTTPError.__bases__[0].__module__]
    return [library.ConnectError("connection refused"), library.ReadTimeout(""), OSError("no route to host")]


@pytest.mark.parametrize("error", transport_errors(), ids=lambda error: type(error).__name__)
def test_without_a_network_a_refresh_says_so(error):
    with pytest.raises(HubError, match=r"https://hub\.test cannot be reached"):
        listing("google/gemma-scope-27b-pt-res", Unreachable(error))


def test_where_nothing_answers_a_refresh_asks_once(caplog):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        with pytest.raises(HubError, match=rf"{endpoint} cannot be reached \(.*refused\)"):
            refresh(endpoint=endpoint)
    assert "Retrying" not in caplog.text


def test_an_offline_refresh_says_so():
    from huggingface_hub.errors import OfflineModeIsEnabled

    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        listing("google/gemma-scope-27b-pt-res", Unreachable(OfflineModeIsEnabled("offline")))

"""Every name that people use for a released SAE leads to its repository and path, and to no other."""

import csv
import lzma
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistudio.errors import HubError
from mistudio.hub.index import entries, find
from mistudio.hub.names import names, resolve

LISTING = Path(__file__).parent / "data" / "gemma_scope_index.csv.xz"
ROWS = list(csv.DictReader(lzma.decompress(LISTING.read_bytes()).decode().splitlines()))
SLIP = "gemma-2-9b/20-gemmascope-res-131k__l0-10"  # in the listing at layer 2, width 16k, L0 8
ROWS_WITH_A_PAGE = [row for row in ROWS if row["neuronpedia_id"] not in ("", SLIP)]


def place(row):
    return row["repo_id"], row["path"]


def resolved(name, model=None):
    entry = resolve(name, model)
    return entry.repo_id, entry.path


def saelens_pairs(row):
    """SAELens's (release, id), written from its naming rules and not from ours."""
    repo, path = row["repo_id"].removeprefix("google/"), row["path"]
    if row["generation"] == "1":
        yield repo, path
        if row["canonical"] == "1":
            yield f"{repo}-canonical", re.sub(r"average_l0_\d+$", "canonical", path)
        return
    folder, leaf = path.split("/")
    kind = {"res": "res", "mlp": "mlp", "att": "att", "transcoder": "transcoders"}[row["site"]]
    release = f"{repo}-{kind}{'-all' if folder.endswith('_all') else ''}"
    yield release, path if kind == "transcoders" else leaf


def test_every_row_is_found_by_its_place_on_the_hub():
    for row in ROWS:
        file = "params.npz" if row["generation"] == "1" else "params.safetensors"
        name = "/".join(place(row))
        assert resolved(name) == place(row)
        assert resolved(f"{name}/{file}") == place(row)
        assert resolved(f"https://huggingface.co/{row['repo_id']}/tree/main/{row['path']}") == place(row)
        assert resolved(f"https://mirror.test/{row['repo_id']}/resolve/0123abc/{row['path']}/{file}?a=b") == place(row)
        assert resolved(f"{row['repo_id']}:{row['path']}") == place(row)


def test_every_row_is_found_by_its_saelens_release_and_id():
    for row in ROWS:
        for release, sae_id in saelens_pairs(row):
            assert resolved(f"{release}:{sae_id}") == place(row)
            assert resolved(f"{release} {sae_id}") == place(row)
    canonical = [pair for row in ROWS for pair in saelens_pairs(row) if pair[0].endswith("-canonical")]
    assert len(canonical) == 429


def test_every_row_with_dashboards_is_found_by_its_neuronpedia_id():
    assert len(ROWS_WITH_A_PAGE) == 656 + 222
    for row in ROWS_WITH_A_PAGE:
        page = row["neuronpedia_id"]
        assert resolved(page) == place(row)
        assert resolved(f"https://www.neuronpedia.org/{page}/12082") == place(row)
        assert resolved(f"{row['model']}/{page.split('/')[1]}") == place(row)


def test_an_id_without_its_model_is_completed_by_the_model_or_is_unique_or_lists_its_meanings():
    meanings = Counter(row["neuronpedia_id"].split("/")[1] for row in ROWS_WITH_A_PAGE)
    for row in ROWS_WITH_A_PAGE:
        model, short = row["neuronpedia_id"].split("/")
        assert resolved(short, model) == place(row)
        if meanings[short] == 1:
            assert resolved(short) == place(row)
        else:
            with pytest.raises(HubError, match=re.escape(row["neuronpedia_id"])):
                resolve(short)


def test_every_first_generation_sae_has_an_id_with_its_l0_written_out():
    for row in ROWS:
        if row["generation"] == "1" and row["layer"]:
            width = re.search(r"width_(\w+)/", row["path"])[1]
            model = row["model"].removeprefix("google/")
            name = f"{model}/{row['layer']}-gemmascope-{row['site']}-{width}__l0-{row['l0']}"
            assert resolved(name) == place(row)


def test_all_names_of_an_entry_lead_back_to_it_and_begin_with_its_place():
    for entry in entries():
        ours = names(entry)
        assert ours[0] == entry.hf_path
        assert all(resolve(name) is entry for name in ours)
    assert names(resolve("gemma-2-2b/20-gemmascope-res-16k")) == (
        "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71",
        "gemma-scope-2b-pt-res:layer_20/width_16k/average_l0_71",
        "gemma-2-2b/20-gemmascope-res-16k",
        "gemma-2-2b/20-gemmascope-res-16k__l0-71",
        "gemma-scope-2b-pt-res-canonical:layer_20/width_16k/canonical",
    )


def test_the_guides_names():
    expected = "google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71"
    for name in (
        "gemma-2-2b/20-gemmascope-res-16k",
        "google/gemma-2-2b/20-gemmascope-res-16k",
        "gemma-2-2b/20-gemmascope-res-16k__l0-71",
        "  Gemma-2-2B / 20-GemmaScope-Res-16K ",
        "gemma-2-2b/20 - gemmascope - res - 16k",
        "gemma-2-2b 20-gemmascope-res-16k",
        "neuronpedia.org/gemma-2-2b/20-gemmascope-res-16k",
        "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71",
        "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71/",
        "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71/params.npz",
        "hf://google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71/params.npz",
        "https://huggingface.co/google/gemma-scope-2b-pt-res/blob/main/layer_20/width_16k/average_l0_71/params.npz",
        "gemma-scope-2b-pt-res-canonical:layer_20/width_16k/canonical",
        "gemma-scope-2b-pt-res-canonical : layer_20/width_16k/canonical",
        '("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical")',
        "google\\gemma-scope-2b-pt-res\\layer_20\\width_16k\\average_l0_71",
    ):
        assert resolved(name) == expected, name
    assert resolved("20-gemmascope-res-16k", "gemma-2-2b") == expected
    assert resolved("20-gemmascope-res-16k__l0-71", "google/gemma-2-2b") == expected
    assert resolved("layer_20/width_16k/average_l0_71", "gemma-2-2b") == expected
    assert resolved("gemma-2-2b/5-gemmascope-res-16k__l0-34")[1] == "layer_5/width_16k/average_l0_34"
    assert resolved("gemma-2-2b/20-gemmascope-transcoder-16k")[0] == "google/gemma-scope-2b-pt-transcoders"


def test_a_model_beside_a_name_that_says_its_own_is_not_needed_and_beside_a_short_one_is_obeyed():
    assert resolve("gemma-2-9b/20-gemmascope-res-16k", "gemma-2-2b").model == "google/gemma-2-9b"
    assert resolve("20-gemmascope-att-131k").model == "google/gemma-2-9b"
    with pytest.raises(HubError, match="was not released for gemma-2-2b; there is gemma-2-9b/20-gemmascope-att-131k"):
        resolve("20-gemmascope-att-131k", "gemma-2-2b")


def test_an_ambiguous_name_lists_its_meanings():
    with pytest.raises(HubError) as error:
        resolve("20-gemmascope-res-16k")
    assert "gemma-2-2b/20-gemmascope-res-16k, gemma-2-9b/20-gemmascope-res-16k, gemma-2-9b-it/20" in str(error.value)
    with pytest.raises(HubError, match="means 8 SAEs"):
        resolve("layer_13_width_16k_l0_medium")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_71/params.npz",
            "22, 41, 82 (canonical), 176, 445",
        ),
        ("gemma-2-2b/5-gemmascope-res-16k__l0-35", "18, 34, 68 (canonical), 143, 309"),
        ("gemma-2-2b/20-gemmascope-res-131k", "Choices of width: 16k, 65k"),
        ("gemma-2-2b/26-gemmascope-res-16k", "Choices of layer: 0-25"),
        ("gemma-2-2b/12-gemmascope-res-131k", "google/gemma-scope-2b-pt-res/layer_12/width_131k/average_l0_67"),
        ("gemma-scope-2b-pt-res-canonical:layer_12/width_131k/canonical", "12, 20, 36, 67, 129, 264"),
        ("gemma-2-2c/20-gemmascope-res-16k", "did you mean gemma-2-2b?"),
        (
            "gemma-scope-2b-pt-rse:layer_20/width_16k/average_l0_71",
            "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71",
        ),
        ("gemma-3-4b/30-gemmascope-2-res-262k", "resid_post_all/layer_30_width_262k_l0_small"),
        ("google/gemma-scope-2-1b-pt/resid_post/layer_14_width_16k_l0_medium", "20 (small), 120 (big)"),
        ("google/gemma-scope-2b-pt-transcoders/layer_0/width_16k/average_l0_115", "index --refresh"),
        ("google/gemma-scope-2b-pt-res", "a repository of 316: add a folder"),
        ("google/gemma-scope", "nearest names are gemma-scope-2"),
        (SLIP, "11, 19, 34, 53, 62, 114 (canonical), 221, 276"),
        ("gpt2-small/6-res-jb", "mistudio sae find"),
        ("", "mistudio sae find"),
    ],
)
def test_a_wrong_name_is_answered_with_what_there_is(name, said):
    with pytest.raises(HubError, match=re.escape(said)):
        resolve(name)


def test_find_and_resolve_agree_on_the_canonical_ones():
    for entry in find(l0="canonical"):
        folder = entry.path.rpartition("/")[0]
        assert resolve(f"{entry.repo_id}-canonical:{folder}/canonical") is entry


@settings(max_examples=30)
@given(st.text(max_size=40))
def test_any_text_that_is_no_name_is_refused_with_a_sentence(text):
    with pytest.raises(HubError, match="no released SAE"):
        resolve(text)

import pytest

from mistudio.errors import ModelError
from mistudio.lm import KINDS, Site


@pytest.mark.parametrize("kind", KINDS)
def test_a_site_parses_from_its_own_name_and_from_transformerlens(kind):
    site = Site(20, kind)
    assert Site.parse(str(site)) == site
    assert Site.parse(site.hook_name) == site


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("blocks.20.hook_resid_post", "layers.20.resid_post"),
        ("blocks.0.hook_mlp_out", "layers.0.mlp_out"),
        ("blocks.3.attn.hook_z", "layers.3.attn_z"),
        ("20-gemmascope-res-16k", "layers.20.resid_post"),
        ("12-gemmascope-mlp-65k", "layers.12.mlp_out"),
        ("0-gemmascope-att-16k", "layers.0.attn_z"),
        ("15-gemmascope-2-res-16k", "layers.15.resid_post"),
    ],
)
def test_names_of_other_tools_are_understood(name, written):
    assert str(Site.parse(name)) == written


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("blocks.12.attn.hook_result", "before it"),
        ("blocks.12.mlp.hook_post", "hook_mlp_out"),
        ("blocks.12.hook_q", "attn.hook_z"),
        ("layers.3.resid", "resid_post, mlp_out, attn_z"),
        ("layer 3", "layers.20.resid_post"),
        ("20-gemmascope-transcoder-16k", "layers.20.resid_post"),
        ("layers.-1.resid_post", "layers.20.resid_post"),
    ],
)
def test_a_wrong_name_is_an_error_that_shows_a_right_one(name, says):
    with pytest.raises(ModelError, match=says):
        Site.parse(name)


def test_a_negative_layer_is_an_error():
    with pytest.raises(ModelError, match="count from 0"):
        Site(-1, "resid_post")


def test_sites_sort_in_the_order_of_the_forward_pass():
    names = ["layers.1.resid_post", "layers.1.attn_z", "layers.0.resid_post", "layers.1.mlp_out"]
    ordered = [str(site) for site in sorted(Site.parse(name) for name in names)]
    assert ordered == ["layers.0.resid_post", "layers.1.attn_z", "layers.1.mlp_out", "layers.1.resid_post"]

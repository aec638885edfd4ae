"""Configurations survive the way to YAML and back, and refuse what they do not know by name."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistudio.config import from_dict, load_file, to_dict
from mistudio.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outer:
    steps: int
    kind: Literal["a", "b"] = "a"
    on: bool = False
    limit: float | None = None
    folder: Path = Path("x")
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self):
        if self.steps < 1:
            raise ConfigError(f"steps = {self.steps}, but at least 1 is needed")


@given(
    st.builds(
        Outer,
        steps=st.integers(1, 10**9),
        kind=st.sampled_from(["a", "b"]),
        on=st.booleans(),
        limit=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        inner=st.builds(
            Inner, rate=st.floats(allow_nan=False, allow_infinity=False), names=st.lists(st.text()).map(tuple)
        ),
    )
)
def test_a_configuration_survives_plain_data_and_back(config):
    assert from_dict(Outer, to_dict(config)) == config


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, "steps is missing"),
        ({"steps": 3, "speed": 1}, "unknown key speed; the choices are steps, kind, on, limit, folder, inner"),
        ({"steps": 3.7}, "steps: wanted int, found 3.7"),
        ({"steps": True}, "wanted int, found True"),
        ({"steps": 3, "on": "yes"}, "on: wanted bool, found 'yes'"),
        ({"steps": 3, "inner": {"rate": "fast"}}, "inner.rate: wanted float, found 'fast'"),
        ({"steps": 3, "inner": {"speed": 1}}, "inner: unknown key speed"),
        ({"steps": 3, "inner": 4}, "inner: Inner wants a mapping"),
        ({"steps": 3, "kind": "c"}, "kind: wanted one of a, b, found 'c'"),
        ({"steps": 0}, "steps = 0, but at least 1 is needed"),
        ([1], "Outer wants a mapping"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(data, says):
    with pytest.raises(ConfigError) as error:
        from_dict(Outer, data)
    assert says in str(error.value)


def test_yaml_numbers_with_an_exponent_are_numbers(tmp_path):
    (tmp_path / "c.yaml").write_text("steps: 3\ninner: {rate: 1e-3}\n")
    assert load_file(Outer, tmp_path / "c.yaml").inner.rate == 0.001


@pytest.mark.parametrize("text", ["steps: [", "steps: 3\n\tx: 1", "\x00"])
def test_a_file_that_does_not_parse_is_one_sentence(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match="does not parse"):
        load_file(Outer, tmp_path / "c.yaml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="There is no file"):
        load_file(Outer, tmp_path / "none.yaml")

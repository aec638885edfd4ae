"""Frozen dataclasses to and from plain data, strictly: an unknown key is an error that names the choices.

Every configuration and every report of mistudio is a frozen, keyword-only dataclass. This module turns one into JSON or
YAML and back through cattrs. Numbers are never coerced silently: `3.7` is not an int, `"yes"` is not a bool; the one
concession is `1e-3`, which YAML 1.1 reads as text.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import cattrs
import yaml
from cattrs.gen import make_dict_structure_fn

from mistudio.errors import ConfigError

T = TypeVar("T")


def to_dict(value: Any) -> Any:
    """Plain dicts, lists, strings and numbers that `from_dict` turns back into an equal value."""
    return _CONVERTER.unstructure(value)


def from_dict(cls: type[T], data: Any, *, source: str = "configuration") -> T:
    """An instance of `cls` from plain data. ConfigError: an unknown or missing key, a wrong type, a refused value."""
    try:
        return _CONVERTER.structure(data, cls)
    except Exception as error:  # cattrs raises whatever a hook raises; what is no mistake in the data is raised again
        reasons = _reasons(error)
        if reasons is None:
            raise
        raise ConfigError(f"{source}: " + "; ".join(reasons)) from error


def load_file(cls: type[T], path: str | Path) -> T:
    """An instance of `cls` from a .yaml, .yml or .json file."""
    return from_dict(cls, read_plain(path), source=str(path))


def read_plain(path: str | Path) -> Any:
    """The plain data of a YAML or JSON file. ConfigError: it is missing or does not parse."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"There is no file {path}.")
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} does not parse: {' '.join(str(error).split())}") from error


def _field_names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _structure_dataclass(cls: type) -> Any:
    build: Callable[[Any, Any], Any] = make_dict_structure_fn(cls, _CONVERTER, _cattrs_forbid_extra_keys=False)
    hints = get_type_hints(cls)

    def structure(data: Any, _: Any) -> Any:
        if isinstance(data, cls):
            return data
        if not isinstance(data, dict):
            raise ConfigError(f"{cls.__name__} wants a mapping of {', '.join(_field_names(cls))}, not {data!r}")
        unknown = sorted(str(key) for key in data if key not in hints)
        if unknown:
            raise ConfigError(f"unknown key {', '.join(unknown)}; the choices are {', '.join(_field_names(cls))}")
        return build(data, cls)

    return structure


def _strict(wanted: type) -> Any:
    def structure(data: Any, _: Any) -> Any:
        if wanted is float and isinstance(data, str):  # YAML 1.1 reads 1e-3 as text
            try:
                return float(data)
            except ValueError:
                pass
        allowed = (int, float) if wanted is float else (wanted,)
        if isinstance(data, allowed) and (wanted is bool or not isinstance(data, bool)):
            return wanted(data)
        raise ConfigError(f"wanted {wanted.__name__}, found {data!r}")

    return structure


def _is_literal(cls: Any) -> bool:
    return get_origin(cls) is Literal


def _structure_literal(cls: Any) -> Any:
    def structure(data: Any, _: Any) -> Any:
        if data not in get_args(cls):
            raise ConfigError(f"wanted one of {', '.join(map(str, get_args(cls)))}, found {data!r}")
        return data

    return structure


def _reasons(error: BaseException, path: str = "") -> list[str] | None:
    """One clause for each thing that is wrong, with its place; None where the error is not the user's."""
    if isinstance(error, cattrs.BaseValidationError):
        found: list[str] = []
        for child in error.exceptions:
            notes = [n for n in getattr(child, "__notes__", []) if isinstance(n, cattrs.AttributeValidationNote)]
            place = f"{path}.{notes[0].name}".lstrip(".") if notes else path
            reasons = _reasons(child, place)
            if reasons is None:
                return None
            found += reasons
        return found
    if isinstance(error, KeyError):
        return [f"{path or error.args[0]} is missing"]
    if isinstance(error, (ConfigError, ValueError, TypeError)):
        return [f"{path}: {error}" if path else str(error)]
    return None


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter()
    for wanted in (int, float, str, bool):
        converter.register_structure_hook(wanted, _strict(wanted))
    converter.register_structure_hook(Path, lambda data, _: Path(data))
    converter.register_unstructure_hook(Path, str)
    return converter


_CONVERTER = _make_converter()
_CONVERTER.register_structure_hook_factory(dataclasses.is_dataclass, _structure_dataclass)
_CONVERTER.register_structure_hook_factory(_is_literal, _structure_literal)

"""From any name that people use for a released SAE to its entry.

| name                                                                      | whose                                 |
|---------------------------------------------------------------------------|---------------------------------------|
| `gemma-2-2b/20-gemmascope-res-16k`, `gemma-2-2b/5-gemmascope-res-16k__l0-34` | Neuronpedia                        |
| `20-gemmascope-res-16k`                                                   | Neuronpedia, the model left out       |
| `google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`           | the hub; with `/params.npz`, as a URL |
| `gemma-scope-2b-pt-res-canonical:layer_20/width_16k/canonical`            | SAELens: release and id               |
| `google/gemma-scope-2-1b-pt/resid_post/layer_13_width_16k_l0_medium`      | the hub, Gemma Scope 2                |
| `gemma-scope-2-1b-pt-res:layer_13_width_16k_l0_medium`                    | SAELens, Gemma Scope 2                |

A release and an id, or a repository and a folder, may be separated by a slash, a colon, a comma or a space: every name
becomes a path, and a dictionary of paths decides. A name with several meanings is an error that lists them.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from mistudio.errors import HubError
from mistudio.hub.entry import Entry, neuronpedia_id, parse
from mistudio.hub.index import describe, find, index_path, read

_LISTED = 10
_SAELENS_KINDS = {"resid_post": "res", "mlp_out": "mlp", "attn_out": "att", "transcoder": "transcoders"}
_NEURONPEDIA = re.compile(
    r"(?:(?P<model>[^/]+)/)?(?P<layer>\d{1,4})-gemmascope(?:-2)?-(?P<site>[a-z]+)-(?P<width>\w+?)(?:__l0-(?P<l0>\d{1,5}))?"
)
_CANONICAL = re.compile(r"(?P<repo>.+)-canonical/(?P<folder>layer_\d{1,4}/width_\w+)/canonical")
_REFRESH = "`mistudio sae index --refresh` asks the hub whether it has more."
_FORMS = (
    "Names look like gemma-2-2b/20-gemmascope-res-16k or google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71 "
    "or gemma-scope-2b-pt-res-canonical:layer_20/width_16k/canonical; `mistudio sae find` lists what there is."
)


def resolve(name: str, model: str | None = None) -> Entry:
    """The entry that `name` means. `model` completes a name that does not say of which model or repository it is.

    HubError: the name means several, or none; the message lists them, or the L0s that there are, or the nearest names.
    """
    key, table = normalise(name), _table(index_path())
    meanings = table.get(key, ())
    if model is not None and not key.startswith("gemma-"):
        of_model = find(model=model)[0].model
        whole_name = f"{of_model.removeprefix('google/')}/{key}"
        chosen = table.get(whole_name) or tuple(e for e in meanings if e.model == of_model)
        if meanings and not chosen:
            raise HubError(f"{name!r} was not released for {model}; there is {_listed(meanings)}.")
        meanings = chosen
    if len(meanings) == 1:
        return meanings[0]
    if meanings:
        raise HubError(f"{name!r} means {len(meanings)} SAEs; say which: {_listed(meanings)}.")
    raise HubError(f"There is no released SAE {name!r}. {_advice(key, model)}")


def names(entry: Entry) -> tuple[str, ...]:
    """What this entry and no other is called by those who use it, the model or repository included; hub path first."""
    table = _table(index_path())
    spelt = dict.fromkeys((entry.hf_path, *_spellings(entry)))
    whole = [name for name in spelt if name.startswith(("google/", "gemma-"))]
    return tuple(name for name in whole if table[normalise(name)] == (entry,))


def normalise(name: str) -> str:
    """The name as a lower-case path: no quotes, host, revision, `google/` or file name; `:` `,` and spaces are slashes.

    `https://huggingface.co/google/gemma-scope-2b-pt-res/blob/main/layer_0/width_16k/average_l0_13/params.npz` becomes
    `gemma-scope-2b-pt-res/layer_0/width_16k/average_l0_13`.
    """
    key = re.sub(r"['\"`()]", " ", name).strip().lower().replace("\\", "/")
    key = re.sub(r"^(?:hf:/|https?://[^/]+|(?:www\.)?(?:huggingface\.co|hf\.co|neuronpedia\.org))/", "", key)
    key = re.sub(r"[?#].*$", "", key)
    key = re.sub(r"/(?:tree|blob|resolve|raw)/[^/]+(?=/|$)", "", key)
    key = re.sub(r"\s*([-_])\s*", r"\1", key)
    key = re.sub(r"[\s,:/]+", "/", key).strip("/")
    key = re.sub(r"/(?:params\.npz|params\.safetensors|config\.json)$", "", key)
    key = re.sub(r"(-gemmascope-[\w-]+)/\d+$", r"\1", key)  # Neuronpedia's page of one feature
    return key.removeprefix("google/")


@cache
def _table(path: Path) -> dict[str, tuple[Entry, ...]]:
    """Normalised name -> what it means, for an index file."""
    table: dict[str, tuple[Entry, ...]] = defaultdict(tuple)
    for entry in read(path):
        for name in dict.fromkeys(_spellings(entry)):
            table[name.replace(":", "/")] += (entry,)
    return dict(table)


def _spellings(entry: Entry) -> Iterator[str]:
    """What an entry is called, whether or not others are called so too. Normalised but for SAELens's colons."""
    repo = entry.repo_id.removeprefix("google/")
    yield f"{repo}{':' if entry.generation == 1 else '/'}{entry.path}"
    yield entry.path
    yield from _neuronpedia_names(entry)
    if entry.generation == 1 and entry.canonical:
        folder = entry.path.rpartition("/")[0]
        yield f"{repo}-canonical:{folder}/canonical"
        yield f"{folder}/canonical"
    if entry.generation == 2:
        kind, leaf = entry.path.split("/")
        release = f"{repo}-{_SAELENS_KINDS[kind.removesuffix('_all')]}" + ("-all" if kind.endswith("_all") else "")
        yield f"{release}:{leaf}"
        yield f"{release}:{entry.path}"
        yield leaf


def _neuronpedia_names(entry: Entry) -> Iterator[str]:
    """With and without the model; with it, an L0 may be written out for every SAE of the first generation."""
    model = entry.model.removeprefix("google/")  # gemma-3-4b-pt, which Neuronpedia calls gemma-3-4b
    if entry.neuronpedia_id is not None:
        short = entry.neuronpedia_id.partition("/")[2]
        yield from (entry.neuronpedia_id, f"{model}/{short}", short)
    if entry.generation == 1 and entry.layer is not None:
        yield neuronpedia_id(entry.model, entry.site, entry.layer, entry.width_label, entry.l0)


def _listed(meanings: Sequence[Entry]) -> str:
    """A name for each that is not ambiguous."""
    shown = [e.neuronpedia_id or e.hf_path for e in meanings[:_LISTED]]
    more = len(meanings) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _advice(key: str, model: str | None) -> str:
    """What to type instead of a name that means nothing."""
    asked = _asked(key, model)
    if asked is not None:
        return _what_there_is(asked)
    repos: dict[str, list[Entry]] = defaultdict(list)
    for entry in read(index_path()):
        repos[entry.repo_id.removeprefix("google/")].append(entry)
    if key in repos:
        return f"That is a repository of {len(repos[key])}: add a folder, such as {repos[key][0].hf_path}."
    alike = [name for name in _table(index_path()) if name.count("/") == key.count("/")]
    close = _nearest(key, repos if key.startswith("gemma-scope") and "/" not in key else alike)
    return (f"The nearest names are {', '.join(close)}. " if close else "") + _FORMS


class _Asked(NamedTuple):
    """What a well-formed name asks for, whether or not it was released."""

    model: str
    site: str
    layer: int | None
    width: str
    l0: str | int | None
    is_path: bool


def _asked(key: str, model: str | None) -> _Asked | None:
    """None: the name is not well formed, or says no model."""
    if match := _NEURONPEDIA.fullmatch(key):
        of_model = match["model"] or model
        if of_model is None:
            return None
        return _Asked(of_model, match["site"], int(match["layer"]), match["width"], match["l0"], False)
    match = _CANONICAL.fullmatch(key)
    repo, _, folder = (key if match is None else f"{match['repo']}/{match['folder']}/average_l0_0").partition("/")
    entry = parse(f"google/{repo}", folder)
    if entry is None:
        return None
    l0 = "canonical" if match else entry.l0_class or entry.l0
    return _Asked(entry.model, entry.site, entry.layer, entry.width_label, l0, match is None)


def _what_there_is(asked: _Asked) -> str:
    """The L0s, widths or layers of the kind that was asked for."""
    try:
        found = find(model=asked.model, site=asked.site, layer=asked.layer, width=asked.width, l0=asked.l0)
    except HubError as error:
        return f"{error} {_REFRESH}" if asked.is_path else str(error)
    return f"{describe(found[0])} is there under other names: {_listed(found)}."


def _nearest(key: str, known: Iterable[str]) -> list[str]:
    """Up to five names that look like it."""
    import difflib  # only for errors

    return difflib.get_close_matches(key, list(known), n=5, cutoff=0.6)

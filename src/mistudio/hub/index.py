"""Every released Gemma Scope weight file, from a table that comes with the package, and `find` to filter it.

The table is a compressed listing: a line for each repository and, indented below it, one for each folder, with `c`
where it is the canonical one of its kind, `n` where Neuronpedia shows it, and the target L0 where the path has none.
The rest follows from the path (`hub.entry`). Reading it takes a twentieth of a second; nothing here imports torch or
numpy. `tools/build_hub_index.py` writes it; `hub.refresh` compares it with the hub.
"""

import lzma
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

from mistudio.errors import HubError
from mistudio.hub.entry import L0_CLASSES, SITES, WIDTHS, Entry, ReleasedSite, neuronpedia_model, parse

SHIPPED = Path(__file__).with_name("index.txt.xz")
ENVIRONMENT = "MISTUDIO_HUB_INDEX"
"""The environment variable that names another index file, such as one that a refresh wrote."""

SITE_WORDS: dict[str, ReleasedSite] = {
    **{site: site for site in SITES},
    **dict.fromkeys(("residual", "residual_stream", "resid", "resid_post"), "res"),
    **dict.fromkeys(("attention", "attn", "attn_z", "attn_out"), "att"),
    "mlp_out": "mlp",
    "transcoders": "transcoder",
    "embed": "embedding",
}
_HEADER = "mistudio hub index 1"
_SHOWN = 8


def entries() -> tuple[Entry, ...]:
    """All of them, by repository, site, layer, width and L0. HubError: the index file is missing or damaged."""
    return read(index_path())


def index_path() -> Path:
    """The index in use: the file that MISTUDIO_HUB_INDEX names, or else the one that comes with the package."""
    return Path(os.environ.get(ENVIRONMENT) or SHIPPED)


@cache
def read(path: Path) -> tuple[Entry, ...]:
    """The entries of an index file. HubError: it cannot be read."""
    try:
        return decode(path.read_bytes())
    except (OSError, ValueError, lzma.LZMAError) as error:
        raise HubError(
            f"{path} is not a readable index of released SAEs: {error}. Unset {ENVIRONMENT} to use the one that comes "
            "with mistudio."
        ) from error


def find(
    *,
    model: str | None = None,
    layer: int | None = None,
    site: str | None = None,
    width: str | int | None = None,
    l0: str | int | None = None,
) -> list[Entry]:
    """The released SAEs that fit, at least one. HubError: there is none; it says what there is instead.

    - `model`: `gemma-2-2b`, `google/gemma-2-2b`; `gemma-3-4b` is the pretrained one.
    - `site`: residual, mlp, attention, transcoder, embedding, or Gemma Scope's res, att.
    - `width`: `16k` or 16384.
    - `l0`: an exact L0; `canonical` (Gemma Scope 1); `near:100`, the nearest of each (model, site, layer, width); or
      small, medium or big (Gemma Scope 2).
    """
    found = list(entries())
    if model is not None:
        found = _only(found, "model", _model(model, found), lambda e: e.model)
    if site is not None:
        found = _only(found, "site", _site(site), lambda e: e.site)
    if layer is not None:
        found = _only(found, "layer", layer, lambda e: e.layer)
    if width is not None:
        found = _only(found, "width", _width(width), lambda e: e.width_label)
    return found if l0 is None else _with_l0(found, str(l0).strip().lower())


def nearest(group: Iterable[Entry], l0: float) -> Entry:
    """The entry whose average L0 is nearest; of two equally near ones the canonical one, else the sparser.

    With 100 this is the rule by which the canonical ones were chosen.
    """
    return min(
        (e for e in group if e.l0 is not None),
        key=lambda e: (abs((e.l0 or 0) - l0), not e.canonical, e.l0),
    )


def groups(found: Iterable[Entry]) -> dict[tuple[str, str, int | None, int, bool], list[Entry]]:
    """The entries by what they differ from others in besides L0: (model, site, layer, width, affine)."""
    by_kind: dict[tuple[str, str, int | None, int, bool], list[Entry]] = defaultdict(list)
    for entry in found:
        by_kind[entry.model, entry.site, entry.layer, entry.width, entry.affine].append(entry)
    return by_kind


def describe(entry: Entry) -> str:
    """`gemma-2-2b residual stream, layer 20, width 16k`: all but the L0."""
    words = {"res": "residual stream", "mlp": "MLP output", "att": "attention heads"}
    what = "affine transcoder" if entry.affine else words.get(entry.site, entry.site)
    layer = "" if entry.layer is None else f", layer {entry.layer}"
    return f"{entry.model.removeprefix('google/')} {what}{layer}, width {entry.width_label}"


def encode(found: Iterable[Entry]) -> bytes:
    """The index file of these entries: the same bytes for the same set of entries."""
    lines, repo_id = [_HEADER], ""
    for entry in sorted(found, key=_order):
        if entry.repo_id != repo_id:
            repo_id = entry.repo_id
            lines.append(repo_id)
        marks = "c" * entry.canonical + "n" * (entry.neuronpedia_id is not None)
        target = entry.l0 if entry.generation == 2 and entry.l0 is not None else ""
        lines.append(" " + " ".join(f"{entry.path} {marks} {target}".split()))
    return lzma.compress("\n".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME)


def decode(data: bytes) -> tuple[Entry, ...]:
    """The entries of the bytes that `encode` gave. ValueError, LZMAError: they are something else."""
    header, *lines = lzma.decompress(data).decode().split("\n")
    if header != _HEADER:
        raise ValueError(f"it begins with {header[:40]!r}, not with {_HEADER!r}")
    found, repo_id = [], ""
    for line in lines:
        if not line.startswith(" "):
            repo_id = line
            continue
        found.append(_decode_line(repo_id, line))
    if not found:
        raise ValueError("it is empty")
    return tuple(found)


def _decode_line(repo_id: str, line: str) -> Entry:
    """` PATH [MARKS] [TARGET]`"""
    path, *rest = line.split()
    target = int(rest.pop()) if rest and rest[-1].isdecimal() else None
    marks = rest.pop() if rest else ""
    entry = parse(repo_id, path, canonical="c" in marks, on_neuronpedia="n" in marks, target_l0=target)
    if entry is None or rest or marks not in ("", "c", "n", "cn"):
        raise ValueError(f"{repo_id}{line} is not a place where Gemma Scope keeps weights")
    return entry


def _order(entry: Entry) -> tuple[object, ...]:
    """Small models first, pretrained before instruction-tuned; a repository's entries are together."""
    layer = -1 if entry.layer is None else entry.layer
    l0 = (entry.l0 or 0) if entry.l0_class is None else L0_CLASSES.index(entry.l0_class)
    repo = (entry.generation, entry.d_model, entry.model.endswith("-it"), entry.repo_id)
    return *repo, SITES.index(entry.site), layer, entry.width, entry.affine, l0, entry.path


def _model(name: str, known: Sequence[Entry]) -> str:
    """The hub id of a model, as people write it."""
    models = dict.fromkeys(e.model for e in known)
    short = {neuronpedia_model(model): model for model in models}
    ways = short | {model.removeprefix("google/"): model for model in models}
    ways["gemma-3-270m-pt"] = "google/gemma-3-270m"
    key = name.strip().lower().removeprefix("google/")
    if key in ways:
        return ways[key]
    if key.removesuffix("-it") in ways:
        base = key.removesuffix("-it")
        raise HubError(f"No SAE was released for {name}; those of the pretrained model are used on it: {base}.")
    raise HubError(f"No SAE was released for the model {name}{_meant(key, ways)}; there are some for {_list(short)}.")


def _site(name: str) -> str:
    key = name.strip().lower().replace("-", "_").replace(" ", "_")
    if key not in SITE_WORDS:
        raise HubError(
            f"There is no site {name!r}{_meant(key, SITE_WORDS)}; the sites are residual, mlp, attention, "
            "transcoder and embedding."
        )
    return SITE_WORDS[key]


def _width(width: str | int) -> str:
    """`16k` for 16k, 16K, 16384, "16384" and "16,384"."""
    text = str(width).strip().lower().replace(",", "").replace("_", "")
    labels = {str(number): label for label, number in WIDTHS.items()}
    label = labels.get(text, text)
    if label not in WIDTHS:
        raise HubError(f"There is no width {width!r}; the widths are {', '.join(WIDTHS)} (16k is 16,384 features).")
    return label


def _only(found: list[Entry], what: str, wanted: object, of: Callable[[Entry], object]) -> list[Entry]:
    """Those of `found` with the wanted value. HubError: none has it; these are the values that there are."""
    kept = [e for e in found if of(e) == wanted]
    if not kept:
        choices = _list(dict.fromkeys(of(e) for e in found)) or "none"
        raise HubError(f"Nothing was released for {what} {wanted} ({_scope(found)}). Choices of {what}: {choices}.")
    return kept


def _with_l0(found: list[Entry], l0: str) -> list[Entry]:
    if l0.isdecimal():
        kept = [e for e in found if e.l0 == int(l0)]
    elif l0 == "canonical":
        kept = [e for e in found if e.canonical]
    elif l0 in L0_CLASSES:
        kept = [e for e in found if e.l0_class == l0]
    elif l0.startswith("near:") and l0[5:].strip().isdecimal():
        numbered = groups(e for e in found if e.l0 is not None)
        kept = [nearest(group, int(l0[5:])) for group in numbered.values()]
    else:
        raise HubError(f"l0 is a number, canonical, near:NUMBER, small, medium or big, not {l0!r}.")
    if not kept:
        missing = "is canonical" if l0 == "canonical" else f"has L0 {l0}"
        raise HubError(f"Nothing that was released here {missing}. {menu(found)}")
    return kept


def menu(found: Sequence[Entry]) -> str:
    """The L0s that there are, as a sentence for each (model, site, layer, width), the canonical one marked."""
    by_kind = list(groups(found).values())
    sentences = [f"{describe(group[0])} has L0 {_list(_l0s(group))}." for group in by_kind[:_SHOWN]]
    if len(by_kind) > _SHOWN:
        sentences.append(f"({len(by_kind) - _SHOWN} more: give model, site, layer and width to see one.)")
    return " ".join(sentences)


def _l0s(group: Sequence[Entry]) -> list[str]:
    """`71 (canonical)`; in the second generation `53 (medium)`."""
    words = []
    for entry in sorted(group, key=lambda e: e.l0 or 0):
        remark = "canonical" if entry.canonical else entry.l0_class
        words.append(f"{entry.l0} ({remark})" if remark else str(entry.l0))
    return list(dict.fromkeys(words))


def _scope(found: Sequence[Entry]) -> str:
    """What earlier filters have left: `gemma-2-2b, res, layer 20`."""
    models, sites, layers = {e.model for e in found}, {str(e.site) for e in found}, {e.layer for e in found}
    words = [one.pop().removeprefix("google/") for one in (models, sites) if len(one) == 1]
    words += [f"layer {layer}" for layer in layers if len(layers) == 1 and layer is not None]
    return ", ".join(words) or "any model"


def _meant(key: str, known: Iterable[str]) -> str:
    import difflib  # 16 ms, and only for errors

    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _list(values: Iterable[object]) -> str:
    """`a, b, c`, with runs of whole numbers written as 0-25."""
    items = list(values)
    numbers = [v for v in items if isinstance(v, int)]
    if len(numbers) > 2 and sorted(numbers) == list(range(min(numbers), max(numbers) + 1)):
        items = [f"{min(numbers)}-{max(numbers)}", *(v for v in items if not isinstance(v, int))]
    return ", ".join(str(v) for v in items if v is not None)

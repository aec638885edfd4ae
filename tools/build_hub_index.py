"""Write the index that comes with the package, from a CSV listing of the released weights.

    python tools/build_hub_index.py LISTING.csv [--out src/mistudio/hub/index.txt.xz]

The listing has the columns generation, repo_id, path, model, site, layer, width, l0, canonical, neuronpedia_id,
l0_class and affine. The index keeps the path, two marks and the second generation's target L0; so every column is
compared with what these say, and a row that disagrees stops the build, unless it is one of the known slips below.
`.csv.xz` is read too.
"""

import argparse
import csv
import lzma
from pathlib import Path

from mistudio.files import write_bytes
from mistudio.hub.entry import Entry, parse
from mistudio.hub.index import SHIPPED, encode, groups, nearest

SLIPS = {
    # A registry gives this layer-2 SAE the dashboard id of another layer and width.
    "google/gemma-scope-9b-pt-res/layer_2/width_16k/average_l0_8": "gemma-2-9b/20-gemmascope-res-131k__l0-10",
}
TIES = {"layer_27/width_16k/average_l0_136", "layer_23/width_131k/average_l0_66"}
"""Canonical SAEs of 9b attention with a neighbour equally far from 100."""


def entry_of(row: dict[str, str]) -> Entry:
    """The entry of a row. ValueError: the row's path is not in a known layout, or says something else than the row."""
    place = f"{row['repo_id']}/{row['path']}"
    page = "" if SLIPS.get(place) == row["neuronpedia_id"] else row["neuronpedia_id"]
    entry = parse(
        row["repo_id"],
        row["path"],
        canonical=row["canonical"] == "1",
        on_neuronpedia=page != "",
        target_l0=int(row["l0"]) if row["generation"] == "2" and row["l0"] else None,
    )
    if entry is None:
        raise ValueError(f"{place} is in no known layout")
    said = {name: row[name] for name in row} | {"neuronpedia_id": page}
    for name, value in said.items():
        if value != column(entry, name):
            raise ValueError(f"{place}: the listing says {name} {value!r}, the path {column(entry, name)!r}")
    return entry


def column(entry: Entry, name: str) -> str:
    """A field as the listing writes it."""
    columns = {
        "generation": entry.generation,
        "repo_id": entry.repo_id,
        "path": entry.path,
        "model": entry.model,
        "site": entry.site,
        "layer": entry.layer,
        "width": entry.width,
        "l0": entry.l0,
        "canonical": int(entry.canonical),
        "neuronpedia_id": entry.neuronpedia_id,
        "l0_class": entry.l0_class,
        "affine": int(entry.affine),
    }
    value = columns[name]
    return "" if value is None else str(value)


def check_canonical(found: list[Entry]) -> None:
    """ValueError: a canonical entry is not the one nearest to an average L0 of 100, or there are two in a group."""
    for group in groups(found).values():
        marked = [e for e in group if e.canonical]
        if not marked:
            continue
        if marked != [nearest(group, 100)]:
            raise ValueError(f"{marked[0].hf_path} is marked as canonical, but it is not the one nearest to 100")
        tied = [e for e in group if e.l0 is not None and abs(e.l0 - 100) == abs((marked[0].l0 or 0) - 100)]
        if len(tied) > 1 and marked[0].path not in TIES:
            raise ValueError(f"{marked[0].hf_path} is one of {len(tied)} equally near to 100: a tie that is not known")


def main() -> None:
    """Read, check, write."""
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("listing", type=Path)
    arguments.add_argument("--out", type=Path, default=SHIPPED)
    given = arguments.parse_args()
    data = given.listing.read_bytes()
    text = (lzma.decompress(data) if given.listing.suffix == ".xz" else data).decode()
    found = [entry_of(row) for row in csv.DictReader(text.splitlines())]
    check_canonical(found)
    packed = encode(found)
    write_bytes(given.out, packed)
    print(f"{given.out}: {len(found):,} entries, {len(packed):,} bytes")


if __name__ == "__main__":
    main()

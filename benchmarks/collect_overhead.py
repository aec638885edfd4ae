"""What collecting costs over the bare forward passes: time of `collect` / time of the same passes alone, in one run.

    python benchmarks/collect_overhead.py [--tokens 60000] [--rounds 3]

Both read the same packed rows of stories up to layer 2 of the bundled model; `collect` also tokenises, drops special
positions, scatters rows to their buckets, sums statistics and writes the store.
"""

import argparse
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from mistudio.collect import CollectConfig, collect
from mistudio.lm import LanguageModel, Site, documents, pack

CONTEXT, BATCH = 256, 16


def bare(lm: LanguageModel, rows: torch.Tensor, sites: list[Site]) -> float:
    """Seconds for the forward passes alone."""
    start = time.perf_counter()
    for batch in rows.split(BATCH):
        lm.run(batch, read=sites[-1:])
    return time.perf_counter() - start


def collected(lm: LanguageModel, tokens: int, sites: list[Site]) -> float:
    """Seconds for the whole collection into a temporary folder."""
    names = tuple(map(str, sites))
    with tempfile.TemporaryDirectory() as folder:
        cfg = CollectConfig(sites=names, tokens=tokens, out=Path(folder) / "s", context=CONTEXT, lm_batch_rows=BATCH)
        start = time.perf_counter()
        collect(cfg, lm)
        return time.perf_counter() - start


def main() -> None:
    """Prints the median ratio and its range for one site and for three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    lm = LanguageModel.load("demo")
    stories = pack(lm, documents("stories", part="train"), CONTEXT)
    kept, rows = 0, []
    for row in islice(stories, args.tokens):
        rows.append(torch.from_numpy(np.asarray(row.tokens)).long())
        kept += int((~lm.is_special(rows[-1][None])).sum())
        if kept >= args.tokens:
            break
    packed = torch.stack(rows)
    for kinds in (["resid_post"], ["attn_z", "mlp_out", "resid_post"]):
        sites = [Site(2, kind) for kind in kinds]
        ratios = [collected(lm, args.tokens, sites) / bare(lm, packed, sites) for _ in range(args.rounds + 1)][1:]
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        print(f"collect / bare forward, {len(sites)} site(s): {statistics.median(ratios):.2f} ({spread})")


if __name__ == "__main__":
    main()

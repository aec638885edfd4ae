"""What collecting costs over the bare forward passes: time of `collect` / time of the same passes alone, in one run.

    python benchmarks/collect_overhead.py [--tokens 60000] [--rounds 5] [--model demo|wide] [--threads N] [--small]

Both read the same packed rows of stories up to layer 2 (of the bundled model) or layer 1 (of "wide": a random Gemma 2
of width 2304); `collect` also writes the stories, tokenises, drops special positions, scatters rows to their buckets,
sums statistics and writes the store. Rounds alternate, each ratio is of neighbours in time, and the first round is
left out. The ratio of processor times is what is added to the work; that of wall times is what is felt, which is less
where a core is free. A second pair of ratios has the text as a file, so that making up stories does not count.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import transformers

from mistudio.collect import CollectConfig, collect
from mistudio.lm import LanguageModel, Site, documents, pack

CONTEXT = 256


def model(name: str) -> tuple[LanguageModel, int]:
    """The language model and the layer that is read."""
    lm = LanguageModel.load("demo")
    if name == "demo":
        return lm, 2
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=len(lm.tokenizer), hidden_size=2304, intermediate_size=9216, num_hidden_layers=2, head_dim=256
    )
    config._attn_implementation = "eager"
    return LanguageModel(transformers.Gemma2ForCausalLM(config), lm.tokenizer, name="wide"), 1


def packed_rows(lm: LanguageModel, text: str, tokens: int, batch: int) -> torch.Tensor:
    """The rows [N, T] that a collection of `tokens` activations from `text` reads: whole batches, also the last."""
    kept, rows = 0, []
    for row in pack(lm, documents(text, separator="blank-line", part="train", held_out=0.0), CONTEXT):
        rows.append(torch.from_numpy(np.asarray(row.tokens)).long())
        kept += int((~lm.is_special(rows[-1][None])).sum())
        if kept >= tokens and len(rows) % batch == 0:
            break
    return torch.stack(rows)


def clocks() -> np.ndarray:
    """Seconds of the wall and of all threads of this process."""
    return np.array([time.perf_counter(), time.process_time()])


def bare(lm: LanguageModel, rows: torch.Tensor, sites: list[Site], batch: int) -> np.ndarray:
    """Seconds (wall, processor) for the forward passes alone."""
    start = clocks()
    for some in rows.split(batch):
        lm.run(some, read=sites[-1:])
    return clocks() - start


def collected(lm: LanguageModel, text: str, tokens: int, sites: list[Site], batch: int) -> np.ndarray:
    """Seconds (wall, processor) for the whole collection into a temporary folder."""
    names = tuple(map(str, sites))
    with tempfile.TemporaryDirectory() as folder:
        cfg = CollectConfig(
            sites=names,
            tokens=tokens,
            out=Path(folder) / "s",
            text=text,
            separator="blank-line",
            held_out=0.0,
            context=CONTEXT,
            lm_batch_rows=batch,
        )
        start = clocks()
        collect(cfg, lm)
        return clocks() - start


def ratios(
    lm: LanguageModel, text: str, tokens: int, sites: list[Site], rounds: int, batch: int
) -> Iterator[np.ndarray]:
    """Collection / mean of the bare passes before and after it."""
    rows = packed_rows(lm, text, tokens, batch)
    before = bare(lm, rows, sites, batch)
    for _ in range(rounds + 1):
        whole = collected(lm, text, tokens, sites, batch)
        after = bare(lm, rows, sites, batch)
        yield whole / ((before + after) / 2)
        before = after


def main() -> None:
    """Prints the median ratio and its range for one site and for three, for stories and for a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", choices=("demo", "wide"), default="demo")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=16, help="rows of 256 tokens in one forward pass")
    parser.add_argument("--small", action="store_true", help="few tokens, to see that it runs")
    args = parser.parse_args()
    if args.small:
        args.tokens, args.rounds, args.batch = 400, 1, 1
    torch.set_num_threads(args.threads)
    lm, layer = model(args.model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "stories.txt"
        file.write_text("\n\n".join(doc.text for doc in islice(documents("stories"), args.tokens // 50)))
        cores = len(os.sched_getaffinity(0))
        print(f"{lm.name}, {args.tokens:,} tokens, {args.threads} torch threads, {cores} cores")
        for text in ("stories", str(file)):
            for kinds in (["resid_post"], ["attn_z", "mlp_out", "resid_post"]):
                sites = [Site(layer, kind) for kind in kinds]
                found = list(ratios(lm, text, args.tokens, sites, args.rounds, args.batch))[1:]
                kind = "stories" if text == "stories" else "a file"
                for clock, values in zip(("wall", "processor"), np.stack(found).T, strict=True):
                    spread = f"{np.median(values):.3f} ({values.min():.3f}-{values.max():.3f})"
                    print(f"collect / bare forward, {kind}, {len(sites)} site(s), {clock} time: {spread}", flush=True)


if __name__ == "__main__":
    main()

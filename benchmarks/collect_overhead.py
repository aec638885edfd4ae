"""What collecting costs over the bare forward passes: time of `collect` / time of the same passes alone, in one run.

    python benchmarks/collect_overhead.py [--tokens 40000] [--rounds 5] [--model demo|wide] [--text stories|file]
                                          [--sites 1|3] [--batch 16] [--threads N] [--small]

Both read the same packed rows, in the same batches and with the same model, up to layer 2 (of the bundled model) or
layer 1 (of "wide": a random Gemma 2 of width 2304), and stop there. `collect` also writes the stories or reads them
from a file, tokenises, drops special positions, scatters rows to their buckets, sums statistics and writes the store.

Rounds alternate, each ratio is of a collection and the mean of the bare passes before and after it, and the first round
is left out. The ratio of processor times is what is added to the work, threads that spin while they wait included; that
of wall times is what is felt. "Start and end" is what does not grow with the rows: making the store and its first text
while the model waits, writing the last batch, the disk's sync, the manifest. It is measured as a collection of one
batch without its forward pass, is part of the first ratio, and is taken off in the ratio "a row". Rounds in which other
programs used more than 5% of the processors do not count.
"""

import argparse
import ctypes
import os
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import transformers

from mistudio.collect import CollectConfig, collect
from mistudio.lm import LanguageModel, Site, documents, pack

CONTEXT = 256
DISTURBED = 0.05  # share of the processors' time


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
    """Seconds of the wall, of all threads of this process, and of all others on the machine (Linux; elsewhere 0)."""
    own, stat = time.process_time(), Path("/proc/stat")
    if not stat.is_file():
        return np.array([time.perf_counter(), own, 0.0])
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split(maxsplit=9)[1:9])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return np.array([time.perf_counter(), own, busy - own])


def keep_freed_memory() -> None:
    """glibc returns nothing to the system. Otherwise it may return the activations after every pass or never, by what
    happens to lie behind them, and the page faults of that, a tenth of a pass and more, fall on either side."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(option, 1 << 30)


def bare(lm: LanguageModel, rows: torch.Tensor, sites: list[Site], batch: int) -> np.ndarray:
    """Seconds (as `clocks`) for the forward passes alone."""
    start = clocks()
    for some in rows.split(batch):
        lm.run(some, read=sites[-1:])
    return clocks() - start


def collected(lm: LanguageModel, text: str, tokens: int, sites: list[Site], batch: int) -> np.ndarray:
    """Seconds (as `clocks`) for the whole collection into a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = CollectConfig(
            sites=tuple(map(str, sites)),
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


def measured(lm: LanguageModel, text: str, tokens: int, sites: list[Site], rounds: int, batch: int) -> np.ndarray:
    """[rounds, 3, 3]: clocks of the bare passes, the collection, and its start and end."""
    rows = packed_rows(lm, text, tokens, batch)
    first = rows[:batch]
    in_first = int((~lm.is_special(first)).sum())
    before, found = bare(lm, rows, sites, batch), []
    for _ in range(rounds + 1):
        whole = collected(lm, text, tokens, sites, batch)
        after = bare(lm, rows, sites, batch)
        fixed = collected(lm, text, in_first, sites, batch) - bare(lm, first, sites, batch)
        found.append(((before + after) / 2, whole, fixed))
        before = after
    return np.array(found[1:])


def line(found: np.ndarray) -> str:
    """Medians and ranges of what was `measured`, over the rounds that the machine was ours."""
    wall, _, others = (found[:, 0] + found[:, 1]).T
    ours = others < DISTURBED * wall * len(os.sched_getaffinity(0))
    if not ours.any():
        return f"other programs took the processors in all {len(ours)} rounds"

    def spread(values: np.ndarray) -> str:
        return f"{np.median(values):.3f} ({values.min():.3f}-{values.max():.3f})"

    passes, whole, fixed = found[ours].swapaxes(0, 1)  # [rounds, 3] each
    a_row = (whole - np.median(fixed, axis=0)) / passes
    return (
        f"wall {spread(whole[:, 0] / passes[:, 0])}, processor {spread(whole[:, 1] / passes[:, 1])}; "
        f"a row: wall {spread(a_row[:, 0])}; start and end {np.median(fixed[:, 0]):.3f} s, "
        f"bare passes {np.median(passes[:, 0]):.2f} s, {ours.sum()} of {len(ours)} rounds"
    )


def main() -> None:
    """Prints the median ratio and its range, for one site and for three, for stories and for a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", choices=("demo", "wide"), default="demo")
    parser.add_argument("--text", choices=("stories", "file"), action="append", help="both, unless said")
    parser.add_argument("--sites", type=int, choices=(1, 3), action="append", help="both, unless said")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=16, help="rows of 256 tokens in one forward pass")
    parser.add_argument("--small", action="store_true", help="few tokens, to see that it runs")
    args = parser.parse_args()
    if args.small:
        args.tokens, args.rounds, args.batch = 400, 1, 1
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    lm, layer = model(args.model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "stories.txt"
        file.write_text("\n\n".join(doc.text for doc in islice(documents("stories"), args.tokens // 50)))
        cores = len(os.sched_getaffinity(0))
        print(f"{lm.name}, {args.tokens:,} tokens, {args.threads} torch threads, {cores} cores: collect / bare forward")
        for text in args.text or ("stories", "file"):
            for count in args.sites or (1, 3):
                sites = [Site(layer, kind) for kind in ("attn_z", "mlp_out", "resid_post")[-count:]]
                source = "stories" if text == "stories" else str(file)
                found = measured(lm, source, args.tokens, sites, args.rounds, args.batch)
                print(f"{text}, {count} site(s): {line(found)}", flush=True)


if __name__ == "__main__":
    main()

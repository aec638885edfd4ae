"""Runs in SAELens's environment: writes rows as SAELens caches activations, then reads them as its training does.

Each line of input is JSON, each line of output answers one. {"files", "cache", "width"}: the rows of these shards (of
ours) become a cache as its CacheActivationsRunner writes it, a row of it being `CONTEXT` tokens; the answer is their
number. {"mixing", "cold"}: one epoch of the cache through its ActivationsStore; the answer is rows and seconds of the
wall and of all threads. mixing 0.5 is its own shuffle in a buffer, 0 none.
"""

import gc
import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file

SITE, CONTEXT, BATCH = "site", 128, 4096
BUFFER, PROMPTS = 128, 32  # contexts of the mixing buffer (16,384 rows, as in its tutorial), and of one reading


def write(files: list[str], cache: Path, width: int) -> int:
    """Rows written: as many of each shard as fill contexts."""
    from datasets import Array2D, Dataset, Features, Sequence, Value
    from sae_lens.cache_activations_runner import CacheActivationsRunner

    features = Features(
        {
            SITE: Array2D(shape=(CONTEXT, width), dtype="float32"),
            "token_ids": Sequence(Value("int32"), length=CONTEXT),
        }
    )
    shards, rows = cache / ".tmp_shards", 0
    shards.mkdir(parents=True)
    for number, file in enumerate(files):
        values = load_file(file)["rows"]
        contexts = len(values) // CONTEXT
        data = {
            SITE: values[: contexts * CONTEXT].reshape(contexts, CONTEXT, width),
            "token_ids": torch.zeros(contexts, CONTEXT, dtype=torch.int32),
        }
        Dataset.from_dict(data, features=features).save_to_disk(str(shards / f"shard_{number:05d}"), num_shards=1)
        rows += contexts * CONTEXT
    CacheActivationsRunner._consolidate_shards(shards, cache, copy_files=False)
    return rows


def activations(cache: Path, width: int, mixing: float):
    """Its reader of cached activations."""
    from sae_lens.training.activations_store import ActivationsStore

    return ActivationsStore(
        model=None,
        dataset=None,
        streaming=False,
        hook_name=SITE,
        hook_head_index=None,
        context_size=CONTEXT,
        d_in=width,
        n_batches_in_buffer=BUFFER,
        total_training_tokens=1,
        store_batch_size_prompts=PROMPTS,
        train_batch_size_tokens=BATCH,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=str(cache),
        activations_mixing_fraction=mixing,
    )


def drop(cache: Path) -> None:
    """The files are not in the page cache."""
    gc.collect()  # a mapped file stays in it
    for path in cache.glob("*.arrow"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(cache: Path, width: int, rows: int, mixing: float, cold: bool) -> dict[str, float]:
    """One epoch, opening the cache included, as it is with ours."""
    if cold:
        drop(cache)
    start, processor = time.perf_counter(), time.process_time()
    batches = activations(cache, width, mixing)
    count = rows // BATCH
    for _ in range(count):
        next(batches)
    return {
        "rows": count * BATCH,
        "wall": time.perf_counter() - start,
        "processor": time.process_time() - processor,
    }


def main() -> None:
    """Answers until the input ends."""
    warnings.simplefilter("ignore")  # it says so when an epoch ends
    torch.set_num_threads(int(sys.argv[1]))
    for line in sys.stdin:
        ask = json.loads(line)
        if "files" in ask:
            cache, width = Path(ask["cache"]), ask["width"]
            rows = write(ask["files"], cache, width)
            read(cache, width, rows, 0.5, False)  # imports, and whatever else happens once
            answer = {"rows": rows}
        else:
            answer = read(cache, width, rows, ask["mixing"], ask["cold"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

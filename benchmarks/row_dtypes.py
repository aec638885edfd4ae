"""What storing rows in fewer bits does to an SAE: the rows' relative error, and the FVU of SAEs on and from such rows.

    python benchmarks/row_dtypes.py [--rows 120000] [--steps 600] [--width 1024] [--site layers.3.resid_post]

One float32 store of the bundled model is collected and converted to the other types. Printed for each: bytes a row;
‖x - x_q‖² / ‖x - mean‖² of the stored rows x_q; FVU, against the float32 rows, of the SAE trained on float32 rows when
it reads x_q; and FVU and L0 on float32 rows of an SAE trained on x_q (same seed, same order of rows). The SAE trained
on float32 with another seed shows how much of that is chance. Measured on held-out rows of the same text.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mistudio import recipes
from mistudio.collect import CollectConfig, collect
from mistudio.sae import JumpReLUSAE, SAEConfig
from mistudio.store import Store, convert, split
from mistudio.store.dtypes import ROW_DTYPES, site_row_bytes
from mistudio.train import initial_sae, train


def all_rows(store: Store, site: str) -> Tensor:
    """Every row [N, D] in raw units."""
    return torch.from_numpy(np.concatenate([store.bucket(site, k) for k in range(len(store.manifest.bucket_sizes))]))


def trained(store: Store, site: str, steps: int, width: int, seed: int) -> JumpReLUSAE:
    """An SAE in raw units."""
    cfg = recipes.quick(steps=steps, batch_rows=1024, seed=seed)
    config = SAEConfig(d_model=store.width(site), d_sae=width, hook_name=site, scale=store.scale(site))
    mean = (store.mean(site) / store.scale(site)).float()
    feed = store.feed(site, cfg.batch_rows, seed=0)
    return train(initial_sae(config, cfg), feed, cfg, mean=mean).sae.fold()


@torch.no_grad()
def measured(sae: JumpReLUSAE, read: Tensor, true: Tensor) -> tuple[float, float]:
    """FVU against `true` [N, D] and L0 when the SAE reads `read`."""
    error = fired = 0.0
    for x, target in zip(read.split(4096), true.split(4096), strict=True):
        x_hat, f = sae(x)
        error += (target - x_hat).double().square().sum().item()
        fired += (f > 0).sum().item()
    return error / (true - true.mean(0)).double().square().sum().item(), fired / len(true)


def main() -> None:
    """Prints one line a number type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=120_000)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--site", default="layers.3.resid_post")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        cfg = CollectConfig(sites=(args.site,), tokens=args.rows, out=place / "all", bucket_rows=20_000)
        whole, held = split(collect(cfg), place / "float32", place / "held", fraction=0.1)
        true = all_rows(held, args.site)
        exact = trained(whole, args.site, args.steps, args.width, seed=0)
        variance = (true - true.mean(0)).double().square().sum().item()
        print("type       bytes/row  rows' error  FVU reading it   FVU trained on it   L0")
        for dtype in ROW_DTYPES:
            kept = all_rows(convert(held, place / f"held_{dtype}", dtype=dtype), args.site)
            store = convert(whole, place / f"train_{dtype}", dtype=dtype)
            sae = exact if dtype == "float32" else trained(store, args.site, args.steps, args.width, seed=0)
            error = (kept - true).double().square().sum().item() / variance
            fvu, l0 = measured(sae, true, true)
            size = site_row_bytes(store.width(args.site), dtype)
            print(
                f"{dtype:<10} {size:>9,}  {error:11.3g}  {measured(exact, kept, true)[0]:14.5f}  {fvu:18.5f}  {l0:5.2f}"
            )
        fvu, l0 = measured(trained(whole, args.site, args.steps, args.width, seed=1), true, true)
        print(f"{'float32, another seed':<50}  {fvu:18.5f}  {l0:5.2f}")


if __name__ == "__main__":
    main()

"""How fast and in how much memory a Gemma Scope npz loads: against reading its bytes, and against the weights' size.

Writes a random 16k × 2304 file (302 MB) to a temporary folder, then, in fresh processes and from a warm page cache,
reads its bytes into new memory and loads it in float32 and bfloat16. Prints the load time over that of the read (least
and median of the processes: other work on the machine only ever adds), and the peak of resident memory over the size of
the target.

    python benchmarks/load_npz.py [--features 16384] [--width 2304] [--repeats 5]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import json, sys, time
from pathlib import Path
def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
job, path, dtype = sys.argv[1:]
import torch
from mistudio.hub.formats import gemma_scope
torch.set_num_threads(1)
torch.zeros(8).dot(torch.zeros(8)); torch.linalg.vector_norm(torch.zeros(8, 8), dim=1)
size = Path(path).stat().st_size
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = status("VmRSS")
start = time.perf_counter()
if job == "read":
    with open(path, "rb", buffering=0) as file:
        data = file.read()
else:
    data = gemma_scope.load(Path(path), getattr(torch, dtype))
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "peak": status("VmHWM") - before}))
"""


def measure(job: str, path: Path, dtype: str) -> dict[str, float]:
    """Seconds and peak bytes of one job, in a process of its own."""
    command = [sys.executable, "-c", CHILD, job, str(path), dtype]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def write_random_npz(path: Path, d_sae: int, d_in: int) -> None:
    """A file in the released layout with random weights."""
    from mistudio.hub.formats import gemma_scope
    from mistudio.sae import JumpReLUSAE, SAEConfig

    gemma_scope.save(JumpReLUSAE(SAEConfig(d_model=d_in, d_sae=d_sae)), path)


def main() -> None:
    """Prints the ratios; the bounds of the project are 1.5 for time and 1.2 for memory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--features", type=int, default=16384)
    parser.add_argument("--width", type=int, default=2304)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.npz"
        write_random_npz(path, arguments.features, arguments.width)
        size = path.stat().st_size
        print(f"{size / 1e6:.0f} MB, {arguments.features} × {arguments.width}; {arguments.repeats} processes each")
        runs: dict[str, list[dict[str, float]]] = {"read": [], "float32": [], "bfloat16": []}
        for _ in range(arguments.repeats):
            for name, seen in runs.items():
                seen.append(measure("read" if name == "read" else "load", path, name))
    reads = sorted(run["seconds"] for run in runs["read"])
    print(f"read bytes  {reads[0] * 1e3:6.0f} ms (median {statistics.median(reads) * 1e3:.0f} ms)")
    for name, target in (("float32", size), ("bfloat16", size / 2)):
        seconds = sorted(run["seconds"] for run in runs[name])
        peak = max(run["peak"] for run in runs[name])
        print(
            f"{name:<11} {seconds[0] * 1e3:6.0f} ms = {seconds[0] / reads[0]:.2f} × the read "
            f"(medians {statistics.median(seconds) / statistics.median(reads):.2f} ×); "
            f"peak {peak / target:.3f} × the weights"
        )


if __name__ == "__main__":
    main()

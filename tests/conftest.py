"""Before any test module is imported: helpers of `tests/` can be imported, and shapes in annotations are checked.

One thread: the shapes are tiny, and several test processes share the cores. Without a GPU, Triton's kernels are run by
its interpreter, which it must be told before it is imported.
"""

import os
import sys
from pathlib import Path

import torch
from jaxtyping import install_import_hook

sys.path.insert(0, str(Path(__file__).parent))

install_import_hook(["mistudio.sae", "mistudio.metrics", "mistudio.evaluate", "mistudio.steer"], "beartype.beartype")
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

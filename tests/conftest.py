"""Before any test module is imported: helpers of `tests/` can be imported, and shapes in annotations are checked.

One thread: the shapes are tiny, and several test processes share the cores.
"""

import sys
from pathlib import Path

import torch
from jaxtyping import install_import_hook

sys.path.insert(0, str(Path(__file__).parent))

install_import_hook(["mistudio.sae", "mistudio.metrics", "mistudio.evaluate", "mistudio.steer"], "beartype.beartype")
torch.set_num_threads(1)

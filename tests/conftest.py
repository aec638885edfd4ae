"""Before any test module is imported: helpers of `tests/` can be imported, and shapes in annotations are checked.

One thread, here and in processes that tests start: the shapes are tiny, and several test processes share the cores.
Without a GPU, Triton's kernels are run by its interpreter, which it must be told before it is imported. Hypothesis
tries the same examples every time, and lets each take as long as it takes.
"""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

sys.path.insert(0, str(Path(__file__).parent))

install_import_hook(["mistudio.sae", "mistudio.metrics", "mistudio.evaluate", "mistudio.steer"], "beartype.beartype")
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
settings.register_profile("mistudio", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("mistudio")


@pytest.fixture(scope="session", autouse=True)
def no_fsync():
    """Nothing waits for the disk: what was written survives the end of a process, and no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def no_waits(tmp_path, monkeypatch):
    """Stores at URLs without waits, with a cache of the test's own, and pieces so small that a shard has several."""
    monkeypatch.setattr("mistudio.store.remote.WAITS_S", (0, 0, 0))
    monkeypatch.setattr("mistudio.store.remote.PIECE_BYTES", 300)
    monkeypatch.setenv("MISTUDIO_CACHE", str(tmp_path / "cache"))

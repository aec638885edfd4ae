"""Before any test module is imported: helpers of `tests/` can be imported, and shapes in annotations are checked."""

import sys
from pathlib import Path

from jaxtyping import install_import_hook

sys.path.insert(0, str(Path(__file__).parent))

install_import_hook(["mistudio.sae", "mistudio.metrics", "mistudio.evaluate"], "beartype.beartype")
